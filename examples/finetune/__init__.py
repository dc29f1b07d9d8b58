"""Fine-tuning of Moonlight, Qwen2 and Llama with Muon, in full and with LoRA."""
