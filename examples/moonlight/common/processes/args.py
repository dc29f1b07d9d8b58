"""The flags by which a program becomes one of several processes."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ProcessArgs:
    """Which of several processes this one is; a cluster's job needs none of these flags."""

    local_processes: int | None = None
    """Start this command so many times on this machine, as processes that work together: to try
    it, or one for each GPU. On CPU each has the devices of XLA_FLAGS to itself."""
    coordinator: str | None = None
    """HOST:PORT of process 0, which listens there: the same for all. Left out, the processes of a
    job of Slurm, Open MPI, Kubernetes or Cloud TPU find each other by themselves."""
    processes: int | None = None
    """How many processes there are, with --coordinator; 1 works alone whatever the cluster says."""
    process: int | None = None
    """Which of them this one is, from 0 on."""

    def check(self) -> None:
        """Raises ValueError for numbers that cannot be, and for flags that do not go together."""
        least = {"local_processes": 1, "processes": 1, "process": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{_flag(name)} must be at least {low}, got {value}")
        if self.local_processes is not None and (self.coordinator or self.processes):
            raise ValueError(
                "--local-processes starts all processes itself: leave --coordinator, --processes "
                "and --process out"
            )
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdecimal():
            raise ValueError(f"--coordinator {self.coordinator}: write HOST:PORT of process 0")
        if self.process is not None and self.process >= (self.processes or self.process + 1):
            raise ValueError(
                f"--process {self.process}: of --processes {self.processes} the last is "
                f"{self.processes - 1 if self.processes else 0}, since they are counted from 0"
            )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
