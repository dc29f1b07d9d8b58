"""Fine-tuning: data, adapters, runs and what becomes of them."""
