"""Everything that is measured on one GPU or TPU, in one command; `__main__` runs it."""
