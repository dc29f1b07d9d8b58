"""Supervised fine-tuning of the models that the Moonlight example can import."""
