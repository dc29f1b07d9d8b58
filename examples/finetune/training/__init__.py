"""How a model is fine-tuned: what to do, with what, step by step."""
