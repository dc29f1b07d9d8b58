"""Small breaks of the library: the program is `__main__.py`, the breaks are in `mutations.py`."""
