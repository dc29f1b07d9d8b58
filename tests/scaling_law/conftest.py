"""Programs that several tests of the study run are compiled once."""

from tests.compiled_once import compiled_once, unchecked_shapes

__all__ = ["compiled_once", "unchecked_shapes"]
