"""The study's tables, for its page and for the terminal."""

import statistics
from typing import Any

from examples.finetune.study.protocol import OPTIMIZERS, TUNERS
from examples.scaling_law.tables import Table

NAMES = {"muon": "Muon", "adamw": "AdamW"}
TITLES = {"full": "all weights", "lora": "LoRA"}


def all_tables(summary: dict[str, Any]) -> dict[str, Table]:
    """Every table, by its name on the page."""
    made = {tuner: _answers(summary, tuner) for tuner in TUNERS}
    made |= {f"{tuner}/rates": _rates(summary, tuner) for tuner in TUNERS}
    return made | {"pairs": _pairs(summary), "bases": _bases(summary)}


def spread(values: list[float]) -> str:
    """Mean, and the standard deviation over seeds, of shares."""
    return f"{statistics.mean(values):.1%} ± {statistics.stdev(values):.1%}"


def _answers(summary: dict[str, Any], tuner: str) -> Table:
    rows = [
        (NAMES[before], *(_answer(summary[tuner]["cells"], before, after) for after in OPTIMIZERS))
        for before in OPTIMIZERS
    ]
    columns = ("pre-trained with", *(f"fine-tuned with {NAMES[name]}" for name in OPTIMIZERS))
    return Table(f"right answers, {TITLES[tuner]}", columns, rows)


def _answer(cells: dict[str, Any], before: str, after: str) -> str:
    cell = cells[f"{before} -> {after}"]
    losses = [loss for loss in cell["loss"] if loss is not None]
    loss = f"{statistics.mean(losses):.3f}" if losses else "diverged"
    return f"{spread(cell['exact'])} (loss {loss})"


def _rates(summary: dict[str, Any], tuner: str) -> Table:
    cells = summary[tuner]["cells"]
    grid = list(next(iter(cells.values()))["grid"])
    rows = []
    for name, cell in cells.items():
        before, after = name.split(" -> ")
        shown = [
            ("diverged" if loss is None else f"{loss:.3f}").join(
                ("**", "**") if float(rate) == cell["rate"] else ("", "")
            )
            for rate, loss in cell["grid"].items()
        ]
        rows.append((f"{NAMES[before]} -> {NAMES[after]}", *shown))
    return Table(f"loss on the tuning questions by rate, {TITLES[tuner]}", ("cell", *grid), rows)


def _pairs(summary: dict[str, Any]) -> Table:
    rows = []
    for tuner in TUNERS:
        for before in OPTIMIZERS:
            pair = summary[tuner]["pairs"][before]
            rows.append(
                (
                    f"{TITLES[tuner]}, {NAMES[before]}",
                    f"{100 * pair['mean']:+.1f}",
                    f"{100 * min(pair['difference']):+.1f} to {100 * max(pair['difference']):+.1f}",
                    f"{pair['muon_ahead']} of {len(pair['difference'])}",
                )
            )
    columns = ("what is trained, pre-trained with", "mean", "seeds", "Muon ahead")
    return Table("Muon less AdamW in fine-tuning, points of right answers", columns, rows)


def _bases(summary: dict[str, Any]) -> Table:
    rows = [
        (NAMES[name], f"{base['exact'][0]:.1%}", f"{base['loss'][0]:.3f}")
        for name, base in summary["bases"].items()
    ]
    return Table("before fine-tuning", ("pre-trained with", "right answers", "loss"), rows)
