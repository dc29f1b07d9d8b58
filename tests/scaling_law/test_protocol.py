"""A run's name: another for every change that changes the numbers, the same for none."""

import dataclasses
import json

import pytest

from examples.scaling_law import protocol
from examples.scaling_law.protocol import STEPS_PER_CALL, Run, from_json, to_json

pytestmark = pytest.mark.one_stack

RUN = Run(part="study", layers=2, tokens=50_000, batch=4, learning_rate=4e-3, optimizer="muon")

# Another value for every field, and as few other changes as a valid run allows.
CHANGES = {
    "part": "tuning",
    "layers": 3,
    "tokens": 50_001,
    "batch": 5,
    "learning_rate": 4.001e-3,
    "optimizer": "adamw",
    "seed": 1,
    "family": "two_layer",
    "head_dim": 32,
    "sequence_length": 127,
    "compute_dtype": "bfloat16",
    "weight_decay": 0.0,
    "scale": "update_norm",
    "update_rms": 0.4,
    "ns_coeffs": "dion",
    "ns_steps": 5,
    "muon_too": ("embed",),
    "watch": 1,
    "heads_per_group": 1,
}


# --- the key --------------------------------------------------------------------------------------


def test_every_field_has_a_change():
    assert list(CHANGES) == [field.name for field in dataclasses.fields(Run)]


@pytest.mark.parametrize("name", CHANGES)
def test_the_key_differs_with_every_field(name):
    changed = RUN.replace(**{name: CHANGES[name]})
    assert changed != RUN
    assert changed.key("corpus") != RUN.key("corpus")


def test_no_two_changes_have_one_key():
    keys = {RUN.replace(**{name: value}).key("corpus") for name, value in CHANGES.items()}
    assert len(keys) == len(CHANGES)


def test_the_key_differs_with_the_corpus():
    assert RUN.key("corpus") != RUN.key("another")


@pytest.mark.parametrize("name", protocol.PROTOCOL)
def test_the_key_differs_with_what_all_runs_share(monkeypatch, name):
    before = RUN.key("corpus")
    monkeypatch.setitem(protocol.PROTOCOL, name, "another")
    assert RUN.key("corpus") != before


def test_the_key_is_that_of_before_a_field_was_added():
    # A key that moves leaves all finished runs behind.
    assert RUN.key("corpus") == "ca507572e649f1e0"


def test_equal_runs_have_one_key_of_16_digits():
    again = Run(**{field.name: getattr(RUN, field.name) for field in dataclasses.fields(Run)})
    assert again.key("corpus") == RUN.key("corpus")
    assert len(RUN.key("corpus")) == 16 and int(RUN.key("corpus"), 16)


# --- JSON -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHANGES)
def test_json_and_back(name):
    run = RUN.replace(**{name: CHANGES[name]})
    line = json.dumps(to_json(run))
    found = from_json(json.loads(line))
    assert found == run and hash(found) == hash(run)
    assert found.key("corpus") == run.key("corpus")


def test_left_out_fields_have_their_defaults():
    fields = to_json(RUN)
    needed = ("part", "layers", "tokens", "batch", "learning_rate", "optimizer")
    assert from_json({name: fields[name] for name in needed}) == RUN


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"layer": 2}, TypeError, "unexpected keyword argument 'layer'"),
        ({"layers": 0}, ValueError, "layers must be at least 1, got 0"),
        ({"layers": "2"}, TypeError, "'<' not supported"),
        ({"muon_too": None}, TypeError, "not iterable"),
    ],
)
def test_fields_that_are_not_a_runs_raise(change, error, message):
    with pytest.raises(error, match=message):
        from_json(to_json(RUN) | change)


# --- steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch, sequence_length", [(1, 128), (3, 40), (64, 128)])
@pytest.mark.parametrize("tokens", [1, 2_559, 12_345, 50_000, 999_999])
def test_steps_are_the_whole_calls_nearest_to_the_tokens(tokens, batch, sequence_length):
    run = RUN.replace(tokens=tokens, batch=batch, sequence_length=sequence_length)
    per_call = STEPS_PER_CALL * batch * sequence_length
    assert run.trained_tokens == run.steps * batch * sequence_length
    assert run.steps >= STEPS_PER_CALL and run.steps % STEPS_PER_CALL == 0
    if tokens >= per_call:
        assert abs(run.trained_tokens - tokens) <= per_call / 2
    else:
        assert run.steps == STEPS_PER_CALL


def test_steps_of_one_example():
    # 1,000,000 tokens are 97.7 calls of 20 steps of 4 x 128.
    run = RUN.replace(tokens=1_000_000)
    assert (run.steps, run.trained_tokens) == (1960, 1_003_520)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"batch": -2}, "batch must be at least 1, got -2"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"sequence_length": 0}, "sequence_length must be at least 1, got 0"),
        ({"learning_rate": 0.0}, r"learning_rate must be positive and finite, got 0\.0"),
        ({"learning_rate": -1e-3}, r"learning_rate must be positive and finite, got -0\.001"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive and finite, got nan"),
        ({"update_rms": float("inf")}, "update_rms must be positive and finite, got inf"),
        ({"weight_decay": -0.1}, r"weight_decay must be finite and not negative, got -0\.1"),
        ({"seed": -1}, "seed must be finite and not negative, got -1"),
        ({"watch": -1}, "watch must be finite and not negative, got -1"),
        ({"heads_per_group": 0}, "heads_per_group must be at least 1, got 0"),
        ({"heads_per_group": 4}, "heads_per_group must divide the 2 heads, got 4"),
    ],
)
def test_numbers_out_of_range_raise(change, message):
    with pytest.raises(ValueError, match=message):
        RUN.replace(**change)


@pytest.mark.parametrize("name", protocol._OF_MUON)
def test_options_of_muon_in_a_run_of_adamw_raise(name):
    adamw = RUN.replace(optimizer="adamw")
    with pytest.raises(ValueError, match=rf"^{name}=.* is Muon's, and the optimizer is AdamW"):
        adamw.replace(**{name: CHANGES[name]})


def test_equal_runs_have_one_key():
    run = RUN.replace(learning_rate=1, weight_decay=0)
    same = RUN.replace(learning_rate=1.0, weight_decay=0.0)
    assert run == same and run.key("corpus") == same.key("corpus")


@pytest.mark.parametrize("field", ["part", "optimizer", "family", "scale", "ns_coeffs"])
def test_unknown_choices_raise(field: str):
    with pytest.raises(ValueError, match=f"{field} is 'other', not one of"):
        RUN.replace(**{field: "other"})
