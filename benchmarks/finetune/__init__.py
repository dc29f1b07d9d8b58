"""Fine-tuning with LoRA beside peft on torch: the program is `__main__.py`."""
