"""The study's tables, for a page and for the terminal."""

import statistics
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import rich.table

from examples.scaling_law.fit import INTERVAL

Summary = Mapping[str, Any]

_PERCENT = f"{100 * INTERVAL:.0f}%"
_NAMES = {"adamw": "AdamW", "muon": "Muon"}
_HEADS = ("heads", "each_head")
_LAWS = {"power": "a C^-b", "irreducible": "E + a C^-b"}


class Table(NamedTuple):
    """A title, the names of its columns, and rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        """As a table of a page; the title is the page's own business."""
        lines = [self.columns, ("---",) + ("---:",) * (len(self.columns) - 1), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def rich(self) -> rich.table.Table:
        """For the terminal, whose lines are short: the longer side goes down."""
        header, rows = self.columns, self.rows
        if len(rows) < len(header) - 1:
            header, *rows = zip(header, *rows, strict=True)
        table = rich.table.Table(title=self.title)
        for i, column in enumerate(header):
            table.add_column(column, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        return table


def all_tables(summary: Summary) -> dict[str, Table]:
    """Every table that there are numbers for, by name; a study's are `name/...`."""
    made = {}
    for name, study in summary.items():
        if name == "ablations":
            for ablation, numbers in study.items():
                made[f"ablations/{ablation}"] = _ablation(ablation, numbers)
            continue
        if has_own_tuning(name, summary):
            made[f"{name}/tuning"] = _tuning(study)
        made[f"{name}/losses"] = _losses(study)
        made[f"{name}/ratios"] = _ratios(study)
        if study["laws"]:
            made[f"{name}/laws"] = _laws(study)
        made[f"{name}/updates"] = _updates(study)
    return made


def has_own_tuning(name: str, summary: Summary) -> bool:
    """Whether a study's grids are its own, and not those of the main study."""
    return name == "main" or summary[name]["tuned"] != summary.get("main", {}).get("tuned")


def _tuning(study: Summary) -> Table:
    rows = []
    for size, bowl in study["tuned"]["bowls"].items():
        cells = study["tuned"]["grids"][size]
        rate, batch, loss = min((c for c in cells if c[2] is not None), key=lambda c: c[2])
        rows.append(
            (
                f"{size}",
                f"{rate:g}, {batch}: {loss:.4f}{' (edge)' if bowl['at_edge'] else ''}",
                f"{bowl['learning_rate']:.2g}, {bowl['batch']:.1f}"
                if bowl["fitted"]
                else "no bowl",
            )
        )
    rule = study["tuned"]["rule"]
    title = (
        f"AdamW on the tuning files; rate = {rule['rate_factor']:.3g} C^{rule['rate_power']:.3f}, "
        f"batch = {rule['batch_factor']:.3g} C^{rule['batch_power']:.3f}"
    )
    return Table(title, ("layers", "best cell: rate, batch, loss", "bottom: rate, batch"), rows)


def _losses(study: Summary) -> Table:
    sizes = study["sizes"].values()
    fractions = [f for f in next(iter(sizes))["muon"] if f != "1"]
    columns = (
        "parameters",
        "tokens",
        "rate",
        "batch",
        "AdamW",
        "Muon",
        "seeds ahead",
        *(f"Muon, {float(f):.0%} of tokens" for f in fractions),
    )
    rows = [
        (
            f"{size['parameters']:,}",
            f"{size['tokens']:,}",
            f"{size['learning_rate']:g}",
            str(size["batch"]),
            _spread(size["adamw"]),
            _spread(size["muon"]["1"]),
            f"{size['seeds_ahead']} of {len(size['adamw'])}",
            *(f"{statistics.mean(size['muon'][f]):.4f}" for f in fractions),
        )
        for size in sizes
    ]
    return Table("Validation loss, nats per byte", columns, rows)


def _ratios(study: Summary) -> Table:
    laws = list(study["laws"])
    columns = (
        "parameters",
        f"shorter runs ({_PERCENT})",
        "with Newton-Schulz",
        *(f"{_LAWS[law]} ({_PERCENT})" for law in laws),
    )
    rows = []
    for name, size in study["sizes"].items():
        direct, price = size["direct"], size["price_of_a_token"]
        rows.append(
            (
                f"{size['parameters']:,}",
                _interval(direct) + ("" if direct["inside"] else " (extrapolated)"),
                _number(None if direct["value"] is None else direct["value"] * price, 2),
                *(_interval(study["laws"][law]["ratio"][name]) for law in laws),
            )
        )
    rows.append(
        ("geometric mean", _interval(study["direct"]), *[""] * (len(columns) - 2)),
    )
    return Table("Muon's share of AdamW's compute at equal loss", columns, rows)


def _laws(study: Summary) -> Table:
    rows = [
        (
            f"{_NAMES[optimizer]}, {_LAWS[name]}",
            *(_interval(law[optimizer]["intervals"][field], 3) for field in ("factor", "power")),
            _irreducible(law[optimizer]) if name == "irreducible" else "",
            # Infinite where there are as few sizes as parameters.
            "" if law[optimizer]["aicc"] is None else _number(law[optimizer]["aicc"], 1),
        )
        for name, law in study["laws"].items()
        for optimizer in _NAMES
    ]
    columns = ("law, C in PFLOP/s-days", "a", "b", "E", "AICc")
    return Table("Fitted laws", columns, rows)


def _irreducible(law: Summary) -> str:
    interval = _interval(law["intervals"]["irreducible"], 3)
    return "0, at its bound" if law["irreducible"] < 1e-3 else interval


def _updates(study: Summary) -> Table:
    groups = list(next(iter(study["sizes"].values()))["svd_entropy"]["muon"])
    columns = (
        "parameters",
        "update RMS, AdamW",
        "update RMS, Muon",
        "Muon / AdamW",
        *(f"entropy {group}, AdamW / Muon" for group in groups),
    )
    rows = []
    for size in study["sizes"].values():
        adamw, muon = (size["update_rms"][name]["muon"] for name in ("adamw", "muon"))
        entropy = size["svd_entropy"]
        rows.append(
            (
                f"{size['parameters']:,}",
                f"{adamw:.3f}",
                f"{muon:.3f}",
                f"{muon / adamw:.2f}",
                *(f"{entropy['adamw'][g]:.3f} / {entropy['muon'][g]:.3f}" for g in groups),
            )
        )
    return Table("Update RMS over the matrices, and SVD entropy at the end", columns, rows)


def _ablation(name: str, ablation: Summary) -> Table:
    extra = dict(_extra_columns(name))
    columns = ("setting", "validation loss", "seeds", *extra)
    rows = [
        (
            label,
            "diverged" if setting["mean"] is None else f"{setting['mean']:.4f}",
            ", ".join("diverged" if x is None else f"{x:.4f}" for x in setting["val_loss"]),
            *(column(setting) for column in extra.values()),
        )
        for label, setting in ablation["settings"].items()
    ]
    return Table(ablation["question"], columns, rows)


def _extra_columns(name: str) -> Iterator[tuple[str, Any]]:
    def measured(what: str, kind: str, digits: int) -> Any:
        def cell(setting: Summary) -> str:
            value = setting[what].get(kind)
            return "" if value is None else f"{value:.{digits}f}"

        return cell

    update_rms = measured("update_rms", "muon", 3)

    if name == "scales":
        yield "update RMS", update_rms
        yield "query RMS", measured("weight_rms", "self_attn/q_proj", 4)
        yield "MLP RMS", measured("weight_rms", "mlp/up_proj", 4)
    elif name in ("update_rms", "newton_schulz", *_HEADS):
        yield "update RMS", update_rms
    elif name == "weight_decay":
        yield "down_proj RMS", measured("weight_rms", "mlp/down_proj", 4)
        yield "last MLP's output RMS", measured("output_rms", "mlp", 3)
    elif name == "learning_rate":
        yield "rate", lambda setting: f"{setting['learning_rate']:.3g}"
    elif name == "entropy":
        yield (
            "SVD entropy",
            lambda s: ", ".join(
                f"{group} {value:.3f}" for group, value in s["svd_entropy"].items()
            ),
        )
    if name in ("newton_schulz", *_HEADS):
        yield "share of the model's FLOPs", lambda s: f"{s['newton_schulz_share']:.1%}"


def _spread(losses: list[float]) -> str:
    return f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}"


def _interval(interval: Mapping[str, float | None], digits: int = 2) -> str:
    value, low, high = (_number(interval[name], digits) for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _number(value: float | None, digits: int) -> str:
    return "infinite" if value is None else f"{value:.{digits}f}"
