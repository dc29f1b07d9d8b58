"""What happened to the runs, and what of it was a fault."""

from collections import Counter
from pathlib import Path
from typing import Any

from rich.table import Table

FAULTS = ("lost", "silent", "hung", "different")


class Report:
    """What happened, and what of it was a fault.

    Args:
      folder: where the runs lie; what is taken down does not name it.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.rows: list[dict[str, Any]] = []

    def add(self, group: str, what: str, faults: list[str], note: str) -> None:
        """Takes down one trial."""
        note = note.replace(f"{self._folder}/", "")
        self.rows.append({"group": group, "what": what, "faults": faults, "note": note})

    def table(self) -> Table:
        """How often each thing was done, and how often each fault came of it."""
        table = Table(title="what a run was put through, and how often it failed", box=None)
        for column in ("", "times", *FAULTS):
            table.add_column(column, justify="left" if not column else "right")
        for group in dict.fromkeys(row["group"] for row in self.rows):
            rows = [row for row in self.rows if row["group"] == group]
            count = Counter(fault for row in rows for fault in row["faults"])
            table.add_row(group, str(len(rows)), *(str(count[fault]) for fault in FAULTS))
        return table

    @property
    def faults(self) -> list[dict[str, Any]]:
        """The trials that had one."""
        return [row for row in self.rows if row["faults"]]
