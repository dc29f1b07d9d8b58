"""From the records of a study to its numbers: one dictionary, as JSON holds it."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from examples.scaling_law import fit
from examples.scaling_law.ablations import Ablation
from examples.scaling_law.flops import PETAFLOP_DAY
from examples.scaling_law.protocol import Run
from examples.scaling_law.store import Record
from examples.scaling_law.studies import OPTIMIZERS, Study
from examples.scaling_law.tuning import TunedLaw

Summary = dict[str, Any]
Records = Mapping[Run, Record]

# A size, an optimizer, a fraction of AdamW's tokens.
_Cell = tuple[int, str, float]

_RATIOS = ("direct", "power/ratio", "irreducible/ratio")


class _Comparison(NamedTuple):
    """What a study declared and what came of it.

    Attributes:
        study: What was declared.
        law: AdamW's rates and batches.
        records: The records of all runs.
        days: Compute of AdamW's run at each size, in PFLOP/s-days.
        shares: What each declared fraction of AdamW's tokens came to at each size, in whole calls.
        cells: Losses `[seeds]`.
    """

    study: Study
    law: TunedLaw
    records: Records
    days: Mapping[int, float]
    shares: Mapping[int, Mapping[float, float]]
    cells: Mapping[_Cell, np.ndarray]


def summarize(study: Study, records: Records) -> Summary:
    """The numbers of a comparison; None stands for infinity.

    Args:
        study: What was declared; all of its runs are there.
        records: The records of every run.

    Raises:
        KeyError: A run is missing.
        ValueError: A reported run diverged.
    """
    law = study.tuned(records)
    first = {size: study.run(law, size, "adamw", study.seeds[0]) for size in study.sizes}
    days = {size: records[run]["flops"]["body"] / PETAFLOP_DAY for size, run in first.items()}
    shares = {
        size: {
            f: study.run(law, size, "muon", study.seeds[0], f).trained_tokens / run.trained_tokens
            for f in (*study.fractions, 1.0)
        }
        for size, run in first.items()
    }
    cells = _cells(study, law, records)
    comparison = _Comparison(study, law, records, days, shares, cells)
    statistics = functools.partial(_statistics, days, shares)
    intervals = {
        name: _exp(interval) if name.startswith(_RATIOS) else interval
        for name, interval in fit.bootstrap(
            cells,
            statistics,
            group=lambda cell: cell[0],
            groups=lambda name: 1 if name.startswith(("direct/", "gain/")) else len(study.sizes),
        ).items()
    }
    some = records[study.run(law, study.sizes[0], "muon", study.seeds[0])]
    summary = {
        "corpus": some["corpus"],
        "device": some["device"],
        "versions": some["versions"],
        "tuned": {
            "rule": law._asdict(),
            "bowls": {str(size): bowl._asdict() for size, bowl in study.bowls(records).items()},
            "grids": {
                str(size): [
                    [run.learning_rate, run.batch, records[run]["val_loss"]] for run in runs
                ]
                for size, runs in study.tuning_runs().items()
            },
        },
        "seeds": list(study.seeds),
        "sizes": {str(size): _size(comparison, intervals, size) for size in study.sizes},
        "laws": _laws(comparison, intervals),
        "direct": intervals["direct"]._asdict(),
    }
    return _without_infinities(summary)


def summarize_ablation(ablation: Ablation, records: Records) -> Summary:
    """Losses of each setting, mean and spread, and what else was measured.

    Raises:
        KeyError: A run is missing.
    """
    settings = {}
    for name, runs in ablation.variants.items():
        found = [records[run] for run in runs]
        values = [record["val_loss"] for record in found]
        flops = found[0]["flops"]
        settings[name] = {
            "val_loss": values,
            "mean": None if None in values else float(np.mean(values)),
            "learning_rate": runs[0].learning_rate,
            "batch": runs[0].batch,
            "update_rms": _mean_of([record["update_rms"] for record in found]),
            "weight_rms": _mean_of([record.get("weight_rms", {}) for record in found]),
            "svd_entropy": _mean_of([record.get("svd_entropy", {}) for record in found]),
            "newton_schulz_share": flops["newton_schulz"] / flops["whole"],
            # What the last layer's MLP adds to the stream, where it was measured.
            "output_rms": _mean_of(
                [
                    {"mlp": record["watched"][-1]["mlp_rms"][-1]}
                    for record in found
                    if record["watched"]
                ]
            ),
            "watched": found[0]["watched"],
        }
    return {"question": ablation.question, "settings": settings}


def _cells(study: Study, law: TunedLaw, records: Records) -> dict[_Cell, np.ndarray]:
    cells = {}
    for size in study.sizes:
        lengths = [("adamw", 1.0), *(("muon", f) for f in (*study.fractions, 1.0))]
        for optimizer, fraction in lengths:
            runs = [study.run(law, size, optimizer, seed, fraction) for seed in study.seeds]
            values = [records[run]["val_loss"] for run in runs]
            if None in values:
                raise ValueError(
                    f"{optimizer} diverged at {size} layers, with rate {runs[0].learning_rate:g}: "
                    "there is no loss to compare"
                )
            cells[size, optimizer, fraction] = np.array(values)
    return cells


def _statistics(
    days: Mapping[int, float],
    shares: Mapping[int, Mapping[float, float]],
    cells: Mapping[_Cell, np.ndarray],
) -> dict[str, float]:
    """Everything that has an interval; ratios are logarithms here, so that none falls below 0."""
    numbers = {}
    for size in days:
        adamw = float(cells[size, "adamw", 1.0].mean())
        muon = _by_share(shares, cells, size)
        numbers[f"direct/{size}"] = math.log(fit.direct_ratio(muon, adamw).ratio)
        numbers[f"gain/{size}"] = adamw - muon[1.0]
    directs = [numbers[f"direct/{size}"] for size in days]
    numbers["direct"] = float(np.mean(directs))
    for name, fitted in _fitted(days, cells).items():
        for size in days:
            ratio = fit.compute_ratio(fitted["muon"], fitted["adamw"], days[size])
            numbers[f"{name}/ratio/{size}"] = math.log(ratio)
        for optimizer, law in fitted.items():
            for field, value in law._asdict().items():
                numbers[f"{name}/{optimizer}/{field}"] = value
    return numbers


def _exp(interval: fit.Interval) -> fit.Interval:
    return fit.Interval(*np.exp(interval).tolist())


def _by_share(
    shares: Mapping[int, Mapping[float, float]], cells: Mapping[_Cell, np.ndarray], size: int
) -> dict[float, float]:
    """Muon's mean losses by its share of AdamW's tokens."""
    return {share: float(cells[size, "muon", f].mean()) for f, share in shares[size].items()}


def _fitted(
    days: Mapping[int, float], cells: Mapping[_Cell, np.ndarray]
) -> dict[str, dict[str, fit.Law]]:
    """Both laws, as far as there are sizes for them, of both optimizers at full length."""
    solvers = {}
    if len(days) >= 2:
        solvers["power"] = fit.fit_power_law
    if len(days) >= 4:
        solvers["irreducible"] = fit.fit_with_irreducible
    return {
        name: {optimizer: solve(*_points(days, cells, optimizer)) for optimizer in OPTIMIZERS}
        for name, solve in solvers.items()
    }


def _points(
    days: Mapping[int, float], cells: Mapping[_Cell, np.ndarray], optimizer: str
) -> tuple[list[float], list[float]]:
    compute, loss = [], []
    for size, value in days.items():
        losses = cells[size, optimizer, 1.0].tolist()
        compute += [value] * len(losses)
        loss += losses
    return compute, loss


def _laws(comparison: _Comparison, intervals: Mapping[str, fit.Interval]) -> Summary:
    study, days, cells = comparison.study, comparison.days, comparison.cells
    return {
        name: {
            "ratio": {
                str(size): intervals[f"{name}/ratio/{size}"]._asdict() for size in study.sizes
            },
            **{
                optimizer: {
                    **law._asdict(),
                    "aicc": fit.aicc(law, *_points(days, cells, optimizer)),
                    "intervals": {
                        field: intervals[f"{name}/{optimizer}/{field}"]._asdict()
                        for field in law._fields
                    },
                }
                for optimizer, law in fitted.items()
            },
        }
        for name, fitted in _fitted(days, cells).items()
    }


def _size(comparison: _Comparison, intervals: Mapping[str, fit.Interval], size: int) -> Summary:
    study, law, records, days, shares, cells = comparison
    found = {
        name: [records[study.run(law, size, name, seed)] for seed in study.seeds]
        for name in OPTIMIZERS
    }
    run = study.run(law, size, "adamw", study.seeds[0])
    flops = {name: found[name][0]["flops"] for name in OPTIMIZERS}
    muon = _by_share(shares, cells, size)
    direct = intervals[f"direct/{size}"]
    return {
        "parameters": found["adamw"][0]["parameters"]["body"],
        "hidden_size": size * study.head_dim,
        "tokens": run.trained_tokens,
        "steps": run.steps,
        "batch": run.batch,
        "learning_rate": run.learning_rate,
        "compute": days[size],
        "flops": flops,
        "adamw": cells[size, "adamw", 1.0].tolist(),
        "muon": {f"{f:g}": cells[size, "muon", f].tolist() for f in shares[size]},
        "shares": {f"{f:g}": share for f, share in shares[size].items()},
        "seeds_ahead": int(np.sum(cells[size, "muon", 1.0] < cells[size, "adamw", 1.0])),
        "gain": intervals[f"gain/{size}"]._asdict(),
        "direct": direct._asdict()
        | {"inside": fit.direct_ratio(muon, float(cells[size, "adamw", 1.0].mean())).inside},
        # FLOPs of a token with Muon, in units of what it costs with AdamW.
        "price_of_a_token": (flops["muon"]["whole"] + flops["muon"]["newton_schulz"])
        / flops["adamw"]["whole"],
        "update_rms": {name: _mean_of([r["update_rms"] for r in found[name]]) for name in found},
        "svd_entropy": {name: _mean_of([r["svd_entropy"] for r in found[name]]) for name in found},
    }


def _without_infinities(value: Any) -> Any:
    """None for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {name: _without_infinities(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_infinities(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mean_of(values: list[dict[str, float | None]]) -> dict[str, float]:
    """Means by name, over those that have a number: a run that diverged may have none."""
    found: dict[str, list[float]] = {}
    for value in values:
        for name, number in value.items():
            if number is not None:
                found.setdefault(name, []).append(number)
    return {name: float(np.mean(numbers)) for name, numbers in found.items()}
