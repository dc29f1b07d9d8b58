"""`shard_your_optimizer.ipynb`, from top to bottom."""

import pytest

from tests.colab.executed import Executed, execute

pytestmark = pytest.mark.one_stack

TELL = """{
    "whole": whole, "shared": shared, "loss": loss.item(),
    "sent": {name: dict(kinds) for name, kinds in sent.items()},
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    "exchanged": [report.rows[0].bytes_in, sum(row.bytes_in for row in report.rows)],
    "differences": differences,
    "size": max(float(abs(leaf).max()) for leaf in jax.tree.leaves(both)),
}"""

LAST_BITS = 1e-6
"""Differences between the updates of two programs, to the largest update: measured 1e-7."""


@pytest.fixture(scope="module", name="executed")
def _executed(tmp_path_factory: pytest.TempPathFactory) -> Executed:
    """The notebook with two layers and two steps."""
    return execute(
        "shard_your_optimizer.ipynb",
        tmp_path_factory.mktemp("notebook"),
        settings="LAYERS, STEPS = 2, 2",
        tell=TELL,
        devices=8,
    )


def test_the_state_is_divided_by_eight(executed: Executed):
    whole, shared = executed.told["whole"], executed.told["shared"]
    entries = executed.told["parameters"] * 4 / 1e6
    assert whole["AdamW"] == pytest.approx(2 * entries, rel=1e-3)
    assert whole["muon_jax"] == pytest.approx(entries * 1.0769, rel=1e-3)  # two for AdamW's leaves
    for name, megabytes in shared.items():
        assert megabytes == pytest.approx(whole[name] / 8, rel=1e-3)


def test_bytes_are_those_of_the_collectives(executed: Executed):
    sent, parameters = executed.told["sent"], executed.told["parameters"]
    ring = 4 * parameters * 7 / 8 / 1e6  # float32 that a device passes on in a ring of eight
    assert sent["AdamW"] == pytest.approx({"all-reduce": 2 * ring, "all-gather": ring}, rel=1e-3)
    ours = sent["muon_jax"]
    assert ours["all-reduce"] == pytest.approx(2 * ring, rel=0.05)
    assert 0.5 * ring < ours["all-gather"] < 0.6 * ring  # two bytes, and four of AdamW's leaves
    assert sum(sent["optax.contrib.muon"].values()) > 3 * sum(ours.values())
    assert sum(ours.values()) < sum(sent["AdamW"].values())


def test_updates_are_those_of_one_device(executed: Executed):
    told = executed.told
    assert len(told["differences"]) == 12 and told["size"] > 1e-5
    assert max(told["differences"]) < LAST_BITS * told["size"]


def test_its_picture_shows_three_optimizers(executed: Executed):
    # A black frame and letters on white, what is undivided and what is shared out.
    colours = {0xFFFFFF, 0x000000, 0xD9D9D9, 0x595959}
    # Three kinds of collectives: dark violet, blue-green, light green.
    colours |= {0x440154, 0x25848E, 0xBDDF26}
    assert colours <= executed.colours("bytes")


def test_it_tells_what_the_reader_is_to_see(executed: Executed):
    assert "8 x cpu" in executed.said("devices")
    assert "on 8 devices:" in executed.said("report") and "exchange" in executed.said("report")
    assert executed.said("train").count("compiled with") == 3
    assert executed.told["loss"] == pytest.approx(5.55, abs=0.05)  # log 256: it guesses
    assert "matrices have the same bits" in executed.said("same")
    assert not executed.errors()
