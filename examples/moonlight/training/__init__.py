"""What a training run consists of, from its arguments to its results."""
