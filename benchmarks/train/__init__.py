"""Our training step beside that of transformers: the program is `__main__.py`."""
