"""QK-Clip."""
