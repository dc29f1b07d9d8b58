"""Compiled programs as texts, which took minutes to make and are read many times."""

import dataclasses
import gzip
import json
from pathlib import Path

from benchmarks import targets
from benchmarks.scale.job import Job


@dataclasses.dataclass(frozen=True)
class Kept:
    """The text of a compiled program and the compiler's account of its memory, in one file.

    Of the code that was compiled its name says nothing: who changes the step empties the folder.

    Attributes:
      path: the file.
    """

    path: Path

    @classmethod
    def of(cls, job: Job, folder: Path) -> "Kept":
        """Where the program of a job lies, compiled by the compiler that is here."""
        compiler = targets.compiler(job.scale.target).removeprefix("compiled by ").replace(" ", "-")
        parts = (job.target, job.preset, str(job.layers or "all"), f"{job.context}x{job.batch}")
        return cls(folder / f"{'-'.join(parts)}-{compiler}.hlo.gz")

    def write(self, text: str, sizes: dict[str, int]) -> None:
        """Keep both."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(self.path, "wt") as file:
            file.write(f"{json.dumps(sizes)}\n{text}")

    def read(self) -> tuple[str, dict[str, int]]:
        """The text, and the bytes of one device by what holds them."""
        with gzip.open(self.path, "rt") as file:
            sizes, text = file.read().split("\n", 1)
        return text, json.loads(sizes)
