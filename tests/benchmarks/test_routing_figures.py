"""The pictures of the routing page say what the library says, and every scene shows its point."""

from benchmarks.routing_figures import EVIDENCE, KINDS, parts_of


def groups(scene):
    return {name: group for name, (group, _) in parts_of(scene.leaves).items()}


def test_the_scenes_show_what_their_titles_say():
    agree, layers, axis_one, experts = EVIDENCE
    assert set(groups(agree).values()) == {"Muon"}
    assert parts_of(agree.leaves)["query"][1] == ("in", "out", "out")
    assert parts_of(agree.leaves)["out"][1] == ("in", "in", "out")
    assert groups(layers) == {"wq": "asks", "wk": "asks", "wo": "asks", "b1": "AdamW"}
    assert groups(axis_one) == {"query": "asks", "out": "asks", "scale": "AdamW"}
    assert set(groups(experts).values()) == {"asks"}
    window, stack, head, hidden = KINDS
    assert parts_of(window.leaves)["patches/kernel"] == ("Muon", ("in", "in", "in", "out"))
    assert parts_of(stack.leaves)["layers/mlp/up/kernel"] == ("Muon", ("batch", "in", "out"))
    assert set(groups(head).values()) == {"AdamW"}
    assert list(groups(hidden).values()) == ["Muon", "AdamW"]
