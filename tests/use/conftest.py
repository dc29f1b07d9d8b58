"""Reading programs calls many small functions: their annotations are not checked here."""

from tests.compiled_once import unchecked_shapes

__all__ = ["unchecked_shapes"]
