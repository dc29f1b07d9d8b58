"""Texts and exports of several processes: one process's tokens and files, each reading its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from examples.moonlight.huggingface import names as hf_names
from tests.moonlight import text_processes

pytestmark = [pytest.mark.one_stack, pytest.mark.processes]

ROOT = Path(__file__).parents[2]

# Of this process, but for its devices.
FLAGS = " ".join(f for f in os.environ.get("XLA_FLAGS", "").split() if "device" not in f)


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model."""
    folder = tmp_path_factory.mktemp("processes")
    text_processes.write_model(folder / "model")
    return folder


@pytest.fixture(scope="module", name="said")
def _said(folder: Path) -> dict[str, Any]:
    """What two processes of two devices each say; `exported` is in the folder then."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.moonlight.text_processes", "--local-processes", "2"],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count=2",
            "PYTHONPATH": str(ROOT),
        },
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        input="first\nsecond\n",
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_texts_are_those_of_one_process(folder, said):
    assert said["texts"] == text_processes.continued(folder / "model", None)


def test_each_process_reads_its_own_parts(said):
    """Parts over `fsdp` and `tensor` are half each; what is whole everywhere is small."""
    total = hf_names.total_size(text_processes.CONFIG)
    for numbers in said["numbers"]:
        assert total / 2 <= numbers < 0.6 * total


def test_export_is_the_file_that_was_read(folder, said):
    del said
    assert (folder / "exported" / "config.json").exists()
    assert not [*folder.glob(".*tmp")]
    ours, theirs = tensors(folder / "exported"), tensors(folder / "model")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name].view(np.uint32), value.view(np.uint32), name)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    files = map(load_file, folder.glob("*.safetensors"))
    return {name: value for file in files for name, value in file.items()}


def test_a_talk_goes_on_after_it_is_interrupted(said):
    """Process 0 reads and is interrupted; the other, which is not, stops at the same token."""
    first, other = map(json.loads, said["answers"])
    assert first == other and len(first) == 2
    assert 0 < len(first[0]) < len(first[1])
