"""Bytes that a step sends: matrices in `cases.py`, rows in `steps.py`, program `__main__.py`."""
