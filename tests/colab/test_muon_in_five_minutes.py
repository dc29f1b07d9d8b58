"""`muon_in_five_minutes.ipynb`, from top to bottom."""

import pytest

from tests.colab.executed import Executed, execute

pytestmark = pytest.mark.one_stack

TELL = """{
    "muon": muon_losses.tolist(), "adamw": adamw_losses.tolist(),
    "found": {str(rate): losses for rate, losses in found.items()},
    "spectra": {
        "momentum": svd_entropy(momentum).item(),
        "orthogonalized": svd_entropy(orthogonalize(momentum)).item(),
    },
}"""


@pytest.fixture(scope="module", name="executed")
def _executed(tmp_path_factory: pytest.TempPathFactory) -> Executed:
    """The notebook with trainings of 40 steps, at two learning rates."""
    return execute(
        "muon_in_five_minutes.ipynb",
        tmp_path_factory.mktemp("notebook"),
        settings="STEPS, BATCH, OTHER_RATES = 40, 128, (0.004,)",
        tell=TELL,
        devices=1,
    )


def test_both_learn_from_the_same_start(executed: Executed):
    muon, adamw = executed.told["muon"], executed.told["adamw"]
    assert len(muon) == len(adamw) == 40
    assert muon[0] == pytest.approx(adamw[0], rel=1e-6)
    for losses in (muon, adamw):
        assert sum(losses[-5:]) / 5 < losses[0] - 1.5
    assert muon[-1] != adamw[-1]


def test_what_is_held_out_is_measured_at_each_learning_rate(executed: Executed):
    found = executed.told["found"]
    assert list(found) == ["0.016", "0.004"]
    for losses in found.values():
        assert all(2.0 < loss < 3.3 for loss in losses)  # 4.85 before training
    assert len({loss for losses in found.values() for loss in losses}) == 4
    adamw, muon = found["0.004"]
    assert f"learning rate 0.004  AdamW {adamw:.3f}, Muon {muon:.3f}" in executed.said("rates")


def test_orthogonalizing_flattens_the_spectrum(executed: Executed):
    spectra = executed.told["spectra"]
    assert spectra["momentum"] < 0.8 and spectra["orthogonalized"] > 0.95


def test_its_pictures_show_both_curves(executed: Executed):
    for cell in ("losses", "spectrum"):
        # A black frame and letters on white.
        assert {0xFFFFFF, 0x000000, 0x1F77B4, 0xFF7F0E} <= executed.colours(cell)


def test_it_tells_what_the_reader_is_to_see(executed: Executed):
    routing = executed.said("routing")
    assert "muon: 5 matrices, 196,608 parameters (90.2%)" in routing
    assert "rows by index" in routing and "no matrix after it" in routing
    assert "nats per character on held-out text" in executed.said("train")
    assert not executed.errors()
