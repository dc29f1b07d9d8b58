"""The word for a tree of arrays, as type checkers shall know it.

jaxtyping's PyTree is unknown to them on purpose, and under strict rules whoever calls the library
would have to answer for it.
"""

from typing import Any, TypeAlias

PyTree: TypeAlias = Any
