"""What a fine-tuning remembers of its course, in its checkpoints: its results are made of this."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from examples.moonlight.training.loop import History


@dataclasses.dataclass
class Course(History):
    """The course of a run.

    Attributes:
        tokens: Tokens of samples that were read, whether they count for the loss or not.
        base: The digest of the weights that the run began with.
    """

    tokens: int = 0
    base: str = ""

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Course":
        """Inverts `record`."""
        course = cls(record["meshes"], record["validation"], record["best"])
        course.tokens, course.base = record["tokens"], record["base"]
        return course
