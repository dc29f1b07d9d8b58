"""The Moonlight example: model, data, training, Hugging Face, generation."""
