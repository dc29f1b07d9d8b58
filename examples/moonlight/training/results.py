"""What a training leaves behind: `results.json`, its curves, and what it says at the end."""

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import rich

from examples.moonlight.common.files import write_atomically
from examples.moonlight.run_folder import metrics
from examples.moonlight.run_folder.folder import RESULTS

CURVES = "loss.png"
STABILITY = "stability.png"
SCHEDULE = "schedule.png"
SHARDING = "sharding.txt"

_REPORTED_PACKAGES = ("muon-jax", "jax", "jaxlib", "flax", "optax", "tokenizers")


def write_results(
    folder: Path, last: Mapping[str, Any], best: Mapping[str, Any], results: dict[str, Any]
) -> dict[str, Any]:
    """Completes a run's results by its losses and versions, and writes them.

    All of it comes from the run itself: what lies in its folder may be another's, or gone.

    Args:
        folder: The run's folder.
        last: The record of the last validation, which is of the run's last step.
        best: The lowest validation loss, and its step.
        results: What the run knows; `bytes_per_token` turns its losses into losses per byte.

    Raises:
        ValueError: The last validation is of an earlier step.
    """
    if last["step"] != results["steps"]:
        raise ValueError(
            f"the results of a run of {results['steps']} steps need the validation of its last, "
            f"got that of step {last['step']}"
        )
    per_byte = last["val_loss"] / results["bytes_per_token"]
    results = {
        "final_val_loss": last["val_loss"],
        "best_val_loss": best["val_loss"],
        "best_step": best["step"],
        "final_val_loss_per_byte": per_byte,
        "final_val_loss_by_source": {
            name.removeprefix("val_loss/"): loss
            for name, loss in last.items()
            if name.startswith("val_loss/")
        },
        **results,
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _REPORTED_PACKAGES},
    }
    text = json.dumps(results, indent=2)
    write_atomically(folder / RESULTS, f"{text}\n".encode())
    return json.loads(text)  # as a later call will read it


def present(folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Draws the curves, prints the outcome and the sample, and says where everything is."""
    # Here, because matplotlib takes long to import: a run shall begin without it.
    from examples.moonlight.training.plots import draw_losses
    from examples.moonlight.training.stability_plot import draw_stability

    settings = results["settings"]
    train_records = [
        record
        for record in metrics.read_metrics(folder / metrics.FILE, metrics.TRAIN)
        if math.isfinite(record["loss"])
    ]
    validations = metrics.read_metrics(folder / metrics.FILE, metrics.VALIDATION)
    title = (
        f"Moonlight {settings['preset']}, {settings['optimizer']}, "
        f"peak rate {settings['learning_rate']:g}"
    )
    losses = [record["loss"] for record in train_records]
    if losses:  # a log that was lost is no reason to say nothing
        draw_losses(
            folder / CURVES,
            train=([record["step"] for record in train_records], losses),
            validation=([r["step"] for r in validations], [r["val_loss"] for r in validations]),
            title=title,
        )
    if records := metrics.read_metrics(folder / metrics.FILE, metrics.MONITOR):
        threshold = settings["qk_clip_threshold"]
        draw_stability(folder / STABILITY, records, title=title, threshold=threshold)
    console = rich.get_console()
    console.rule("a sample")
    console.print(results["sample"], markup=False, highlight=False)
    console.rule("results")
    if recent := losses[-metrics.SMOOTHING :]:
        console.print(
            f"training loss {sum(recent) / len(recent):.4f} nats per token, the mean of the last "
            f"{len(recent)} steps"
        )
    console.print(
        f"validation loss {results['final_val_loss']:.4f} nats per token, "
        f"{results['final_val_loss_per_byte']:.4f} per byte (best {results['best_val_loss']:.4f} "
        f"at step {results['best_step']}); {results['tokens']:,} tokens in "
        f"{results['wall_seconds']:.0f} s, {results['tokens_per_second']:,.0f} tokens/s"
    )
    if skipped := results.get("skipped_updates", 0):  # older runs counted none
        console.print(f"{skipped} updates were left out: their gradients were not finite")
    for name, loss in results["final_val_loss_by_source"].items():
        console.print(f"  of the source {name}: {loss:.4f} nats per token")
    for what, name in (
        ("results", RESULTS),
        ("loss curves", CURVES),
        ("stability", STABILITY),
        ("schedule", SCHEDULE),
        ("sharding", SHARDING),
        ("metrics", metrics.FILE),
        ("TensorBoard", metrics.TENSORBOARD),
        ("checkpoints", "checkpoints"),
    ):
        if (folder / name).exists():
            console.print(f"  {what:<12} {folder / name}", highlight=False, soft_wrap=True)
    return results
