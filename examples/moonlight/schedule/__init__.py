"""What a run trains with, step by step."""
