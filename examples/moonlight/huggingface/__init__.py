"""The published format of weights, configurations and tokenizers."""
