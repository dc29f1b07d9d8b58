"""What a training run loses when it is hurt: `ordeals.py` hurts it, `trial.py` is the run."""
