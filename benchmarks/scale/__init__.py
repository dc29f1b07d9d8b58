"""The 16B training step: machines in `cases.py`, rows in `steps.py`, program `__main__.py`."""
