"""What a fine-tuning leaves behind: `results.json`, its curves, and what it says at the end."""

import importlib.metadata
import json
import math
import platform
from pathlib import Path
from typing import Any

import jax
import rich

from examples.moonlight.common.files import write_atomically
from examples.moonlight.run_folder import metrics
from examples.moonlight.run_folder.folder import RESULTS
from examples.moonlight.training.results import CURVES, SHARDING

_REPORTED_PACKAGES = ("muon-jax", "jax", "jaxlib", "flax", "optax", "tokenizers")


def write_results(folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Completes a run's results by device and versions, and writes them."""
    results = {
        **results,
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _REPORTED_PACKAGES},
    }
    text = json.dumps(results, indent=2)
    write_atomically(folder / RESULTS, f"{text}\n".encode())
    return json.loads(text)  # as a later call will read it


def present(folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Draws the curves, prints the outcome, and says where everything is."""
    # Here, because matplotlib takes long to import: a run shall begin without it.
    from examples.moonlight.training.plots import draw_losses

    records = [
        record
        for record in metrics.read_metrics(folder / metrics.FILE, metrics.TRAIN)
        if math.isfinite(record["loss"])
    ]
    validations = metrics.read_metrics(folder / metrics.FILE, metrics.VALIDATION)
    settings = results["settings"]
    if records:  # a log that was lost is no reason to say nothing
        draw_losses(
            folder / CURVES,
            train=([r["step"] for r in records], [r["loss"] for r in records]),
            validation=([r["step"] for r in validations], [r["val_loss"] for r in validations]),
            title=(
                f"fine-tuning, {settings['tuner_type']}, {settings['optimizer']}, "
                f"peak rate {settings['learning_rate']:g}"
            ),
        )
    console = rich.get_console()
    console.rule("results")
    if (last := results["validation"]) is not None:
        console.print(
            f"validation loss {last['val_loss']:.4f} nats per token, token accuracy "
            f"{last['val_token_acc']:.2%} (lowest loss {results['best']['val_loss']:.4f} at step "
            f"{results['best']['step']})",
            highlight=False,
        )
    console.print(
        f"{results['steps']} steps, {results['tokens']:,} tokens in {results['seconds']:.0f} s, "
        f"{results['tokens_per_second']:,.0f} tokens/s",
        highlight=False,
    )
    for what, name in (
        ("results", RESULTS),
        ("loss curves", CURVES),
        ("sharding", SHARDING),
        ("metrics", metrics.FILE),
        ("TensorBoard", metrics.TENSORBOARD),
    ):
        if (folder / name).exists():
            console.print(f"  {what:<12} {folder / name}", highlight=False, soft_wrap=True)
    for name in ("last_model_checkpoint", "best_model_checkpoint"):  # ms-swift's words
        console.print(f"{name}: {results[name]}", highlight=False, soft_wrap=True)
    if results["last_model_checkpoint"] is not None:
        console.print(
            "talk to it: python -m examples.finetune.infer --adapters "
            f"{results['best_model_checkpoint'] or results['last_model_checkpoint']} "
            "--stream true --temperature 0",
            highlight=False,
            soft_wrap=True,
        )
    return results
