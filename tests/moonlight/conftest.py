"""Programs that several tests of the example run are compiled once."""

from tests.compiled_once import compiled_once, unchecked_shapes

__all__ = ["compiled_once", "unchecked_shapes"]
