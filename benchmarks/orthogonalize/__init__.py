"""Orthogonalization by shape; `__main__` measures the shapes of real models."""
