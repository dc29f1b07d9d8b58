"""What a program calls the flags that its run's folder speaks of, in messages."""

from typing import NamedTuple


class Flags(NamedTuple):
    """The flags of a program, as its user writes them.

    Attributes:
        resume: Goes on from the newest checkpoint.
        output: Says in which folder the run is.
        step: Goes back to an earlier checkpoint; "" where there is no such flag.
        branch: Begins a run at another one's checkpoint; "" where there is no such flag.
    """

    resume: str = "--resume"
    output: str = "--output-dir"
    step: str = "--resume-step"
    branch: str = "--branch-from"


PRETRAINING = Flags()
