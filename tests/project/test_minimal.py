"""The first example: it learns, also on a mesh, and it is short."""

from pathlib import Path
from typing import Any

import jax
import matplotlib.image
import numpy as np
import pytest

from examples import minimal

TINY: dict[str, Any] = {"steps": 20, "batch": 8, "length": 16, "width": 32}

# Between losses on eight devices and on one, in nats: 1.8e-4 measured, Newton-Schulz in bfloat16.
ROUNDING = 2e-3


@pytest.fixture(scope="module", name="losses")
def _losses(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    drawn = tmp_path_factory.mktemp("minimal") / "new folder" / "loss.png"
    losses = minimal.main(**TINY, output=drawn)
    assert matplotlib.image.imread(drawn).std() > 0.05
    return np.array(losses)


def test_its_loss_falls(losses):
    assert losses[0] > 4.5
    assert losses[-5:].mean() < losses[0] - 1


def test_a_mesh_has_the_same_losses_to_rounding(losses, tmp_path, capsys):
    spread = minimal.main(**TINY, on_mesh=True, output=tmp_path / "loss.png")
    np.testing.assert_allclose(spread, losses, rtol=0, atol=ROUNDING)
    printed = capsys.readouterr().out
    assert "head/kernel" in printed and "step  19: " in printed
    assert printed.startswith("devices: 8\n")


def test_a_mesh_of_one_device_is_said(monkeypatch, tmp_path, capsys):
    def stop(*_: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(minimal, "Model", stop)  # so that nothing is compiled
    with pytest.raises(InterruptedError):
        minimal.main(**TINY, on_mesh=True, output=tmp_path / "loss.png")
    assert capsys.readouterr().out.startswith("devices: 1: nothing to share, see --help")


def test_it_is_a_page():
    assert len(Path(minimal.__file__).read_text().splitlines()) <= 110
