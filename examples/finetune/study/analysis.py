"""From the records to the 2x2 of each tuner: means and spreads over seeds, and paired differences.

A pair is two runs of one seed, which see the same questions in the same order and, under LoRA,
begin with the same factors: only the optimizer of the fine-tuning differs.
"""

import math
import statistics
from typing import Any

from examples.finetune.study.protocol import OPTIMIZERS, TUNERS, Run, Study
from examples.finetune.study.runs import chosen_rate, tuning_losses
from examples.scaling_law.store import Record, Store

Summary = dict[str, Any]


def summarize(study: Study, store: Store) -> Summary:
    """What the figure and the tables are made of.

    Returns:
        `{"bases": {optimizer: numbers}, tuner: {"cells": {...}, "pairs": {...}}}`. A cell is named
        "pre-training -> fine-tuning".

    Raises:
        KeyError: A run is missing.
    """
    summary: Summary = {
        "bases": {run.pretrained_by: _numbers([store[run.key()]]) for run in study.bases()}
    }
    cells = {cell.cell: cell for cell in study.cells()}
    for tuner in TUNERS:
        found = {
            (before, after): _cell(study, store, cells[tuner, before, after])
            for before in OPTIMIZERS
            for after in OPTIMIZERS
        }
        summary[tuner] = {
            "cells": {f"{before} -> {after}": cell for (before, after), cell in found.items()},
            "pairs": {
                before: _pairs(found[before, "muon"], found[before, "adamw"])
                for before in OPTIMIZERS
            },
        }
    return summary


def _cell(study: Study, store: Store, cell: Run) -> Summary:
    tuning = study.tuning(cell)
    rate = chosen_rate(store, tuning)
    rates = study.rates[str(cell.tuner)]
    return {
        "rate": rate,
        "at_edge": rate in (rates[0], rates[-1]),
        "grid": {f"{rate:g}": loss for rate, loss in tuning_losses(store, tuning).items()},
    } | _numbers([store[run.key()] for run in study.reported(cell, rate)])


def _numbers(records: list[Record]) -> Summary:
    """What each seed came to; a run that diverged has answered nothing."""
    return {
        "exact": [record["exact"] or 0.0 for record in records],
        "loss": [record["loss"] for record in records],
        "cpu_seconds": round(math.fsum(record["cpu_seconds"] for record in records), 1),
    }


def _pairs(muon: Summary, adamw: Summary) -> Summary:
    """Muon's share of right answers less AdamW's, seed by seed."""
    ahead = [m - a for m, a in zip(muon["exact"], adamw["exact"], strict=True)]
    return {
        "difference": ahead,
        "mean": statistics.mean(ahead),
        "muon_ahead": sum(x > 0 for x in ahead),
    }
