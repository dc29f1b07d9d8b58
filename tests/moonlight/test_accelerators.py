"""What a device computes in, and how often a run reads its texts, are said before it begins."""

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from examples.moonlight.data.batches import plan_spans
from examples.moonlight.model.execution.dtype import compute_dtype
from examples.moonlight.training.args import Args
from examples.moonlight.training.job import make_job
from examples.moonlight.training.texts import epochs, epochs_line

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("platform", "capability", "dtype"),
    [
        ("cpu", None, "float32"),
        ("tpu", None, "bfloat16"),
        ("gpu", "7.5", "float32"),
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "12.0", "bfloat16"),
        ("gpu", None, "bfloat16"),
    ],
)
def test_the_dtype_follows_the_device(platform: str, capability: str | None, dtype: str):
    device = SimpleNamespace(platform=platform)
    if capability is not None:
        device.compute_capability = capability
    found, why = compute_dtype(None, device)
    assert found == dtype
    assert capability != "7.5" or "7.5 has no instructions for bfloat16" in why
    assert compute_dtype("bfloat16", device) == ("bfloat16", "as asked")


def test_a_silent_command_line_is_recorded_as_what_it_became():
    for asked, recorded in ((None, "float32"), ("bfloat16", "bfloat16")):
        job = make_job(Args(Path("run"), compute_dtype=asked))
        assert job.settings("corpus")["compute_dtype"] == recorded


def test_epochs_are_counted_by_source_and_too_many_come_with_advice():
    mix = ("long=3,short=1",)
    data = ("long=long.txt", "short=short.txt")
    job = make_job(Args(Path("run"), data=data, mix=mix, total_tokens=1_024_000))
    sizes = {"long": 1_000_000, "short": 25_600}
    times = epochs(job, plan_spans(job.plan, sizes), sizes)
    assert times == pytest.approx({"long": 0.768, "short": 10}, rel=1e-3)
    assert epochs_line("long", times["long"], job) == "this run reads 77% of long"
    assert epochs_line("long", 4.4, job) == "this run reads long 4.4 times"
    assert "--data" in epochs_line("long", 4.6, job)
    line = epochs_line("short", times["short"], job)
    assert "reads short 10.0 times" in line and "--data" in line
    # What is advised is few enough.
    (fewer,) = re.findall(r"--total-tokens (\d+)", line)
    again = make_job(Args(Path("run"), data=data, mix=mix, total_tokens=int(fewer)))
    assert epochs(again, plan_spans(again.plan, sizes), sizes)["short"] == pytest.approx(4, 0.01)


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """What make would do in a folder that has the project's Makefile."""
    command = ["make", "-n", "-f", str(ROOT / "Makefile"), "train", *arguments]
    (folder / "pyproject.toml").touch()
    # A make that runs the tests would have this one say which folders it enters.
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)


def test_make_installs_the_accelerators_jax(tmp_path: Path):
    assert '"jax[' not in make(tmp_path).stdout
    planned = make(tmp_path, "ACCELERATOR=cuda13").stdout
    assert 'pip install -q "jax[cuda13]" -e ".[examples]"' in planned


def test_make_finds_the_environment_of_another_accelerator_wanting(tmp_path: Path):
    (tmp_path / ".venv").mkdir()
    for stamp in (".python-tpu", ".examples"):
        (tmp_path / ".venv" / stamp).touch()
    assert "venv --clear" not in make(tmp_path, "ACCELERATOR=tpu").stdout
    for other in ("cpu", "cuda13"):
        planned = make(tmp_path, f"ACCELERATOR={other}").stdout
        assert "venv --clear" in planned and "pip install" in planned


@pytest.mark.parametrize("value", ["cuda", "", "cpu tpu"])
def test_make_refuses_an_unknown_accelerator(value: str, tmp_path: Path):
    refused = make(tmp_path, f"ACCELERATOR={value}")
    assert refused.returncode != 0 and not refused.stdout
    assert f'ACCELERATOR is "{value}", expected cpu, cuda12, cuda13 or tpu' in refused.stderr
