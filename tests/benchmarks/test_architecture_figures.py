"""The drawings of the architecture name what is there, every room, in the order of imports."""

import itertools

import matplotlib.image

from benchmarks import architecture_figures as figures
from benchmarks.architecture_figures import EXAMPLES, LIBRARY, ON_A_MESH, STEP
from tests.project.test_imports import ROOT, layer


def drawn(rows):
    return [path for rooms in rows for room in rooms for path in room.paths]


def test_what_is_drawn_is_there():
    steps = [where for _, _, where in STEP if where] + [where for _, where in ON_A_MESH.values()]
    gone = {
        path for path in [*drawn(LIBRARY), *drawn(EXAMPLES), *steps] if not (ROOT / path).exists()
    }
    assert not gone
    assert ON_A_MESH.keys() <= {title for title, _, _ in STEP}


def test_every_room_is_drawn():
    rooms = {
        str(path.parent.relative_to(ROOT))
        for folder in ("muon_jax", "examples")
        for path in [
            *(ROOT / folder).glob("*/__init__.py"),
            *(ROOT / folder).glob("moonlight/*/__init__.py"),
        ]
    }
    named = {*drawn(LIBRARY), *drawn(EXAMPLES)}
    # The room of the rooms.
    assert rooms - {"examples/moonlight"} <= named


def test_whoever_is_above_is_a_later_layer():
    for rows in (LIBRARY, EXAMPLES):
        layers = [
            [layer(path.removesuffix(".py").replace("/", ".")) for path in drawn([rooms])]
            for rooms in rows
        ]
        for above, below in itertools.pairwise(layers):
            assert min(above) >= max(below)


def test_they_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "DOCS", tmp_path)
    figures.main()
    pictures = sorted(tmp_path.glob("*.png"))
    assert [path.name for path in pictures] == sorted(
        path.name for path in (ROOT / "docs").glob("architecture_*.png")
    )
    assert all(matplotlib.image.imread(path).std() > 0.05 for path in pictures)
