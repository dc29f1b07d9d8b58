"""What a whole step sends, counted in programs compiled for eight CPU devices and for TPUs."""

import dataclasses
import json

import pytest

from benchmarks import hlo, targets
from benchmarks.targets import TARGETS
from benchmarks.wire import __main__ as wire
from benchmarks.wire import counts, steps
from benchmarks.wire.cases import CASES
from benchmarks.wire.limits import EXPECTED, complete, ideal_total, total_of

pytestmark = pytest.mark.one_stack

CPU = TARGETS["cpu-8"]
TPU = TARGETS["v5e-8"]


CPU_CASES = ("separate", "stacked-12", "few", "many", "fsdp", "experts")


@pytest.fixture(scope="module")
def cpu_rows():
    two = {"optimizers": ("adamw", "muon_jax")}
    cases = {name: dataclasses.replace(CASES[name], **two) for name in CPU_CASES}
    # "many" has twelve times as many leaves as "few"; three times shows as much, sooner.
    shapes = {
        path: shape for path, shape in CASES["many"].shapes.items() if int(path.split("/")[0]) < 12
    }
    cases["many"] = dataclasses.replace(CASES["many"], shapes=shapes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "CASES", cases)
        rows = complete(list(steps.rows(CPU, cases)))
    return {(row["case"], row["optimizer"]): row for row in rows}


@pytest.mark.parametrize("case", CPU_CASES)
def test_cpu_rows_are_within_their_limits(cpu_rows, case):
    row = cpu_rows[case, "muon_jax"]
    assert row["checks"] and all(row["checks"].values()), row


def test_cpu_bytes_of_separate_leaves(cpu_rows):
    adamw, ours = cpu_rows["separate", "adamw"], cpu_rows["separate", "muon_jax"]
    even = 7 / 8 * adamw["parameters"]
    assert adamw["bytes"]["gather"] == 4 * even
    assert ours["bytes"]["gather"] == 2 * even
    assert ours["bytes"]["exchange"] == pytest.approx(2 / 8 * even)
    # What XLA:CPU does with gradients is the same for both.
    assert ours["bytes"]["reduction"] == pytest.approx(adamw["bytes"]["reduction"], rel=1e-5)
    assert ideal_total(adamw) == pytest.approx(8 * even, rel=1e-5)


def test_local_experts_send_nothing(cpu_rows):
    row = cpu_rows["experts", "muon_jax"]
    assert sum(row["bytes"][kind] for kind in ("exchange", "gather", "reduction")) == 0
    assert row["ratio"] == 0


def test_collectives_do_not_grow_with_the_number_of_leaves(cpu_rows):
    few, many = (cpu_rows[name, "muon_jax"]["collectives"] for name in ("few", "many"))
    assert few["exchange"] == many["exchange"] > 0
    assert few["gather"] == many["gather"] > 0
    few, many = (cpu_rows[name, "adamw"]["collectives"] for name in ("few", "many"))
    assert many["gather"] == 3 * few["gather"]  # so it would show


needs_libtpu = pytest.mark.skipif(
    targets.missing(TPU) is not None, reason=f"{targets.missing(TPU)}"
)


@needs_libtpu
def test_tpu_row_is_within_its_limits():
    """The eight chips of a v5e, in a process of its own, as `python -m benchmarks.wire` does it."""
    rows = complete(list(wire.measure(TPU, ["few"])))
    adamw, ours = rows
    even = 7 / 8 * ours["parameters"]
    # Gradients end as reduce-scatters.
    assert ours["bytes"]["reduction"] == adamw["bytes"]["reduction"] == 4 * even
    assert {c["opcode"] for c in ours["listed"] if c["kind"] == "reduction"} == {"reduce-scatter"}
    assert ours["bytes"]["exchange"] == pytest.approx(2 / 8 * even)
    assert ours["bytes"]["gather"] == 2 * even
    assert all(ours["checks"].values()) and ours["ratio"] <= 0.79, ours


@needs_libtpu
@pytest.mark.parametrize(
    ("target", "case"),
    [("v5e-8", "tiles-704"), ("v5e-4x2", "tiles-640")],
)
def test_gradients_are_scattered_whatever_their_widths(target, case):
    """Shards of no whole lanes, of no whole tiles, in a loop, and over two mesh axes."""
    [ours] = wire.measure(TARGETS[target], [case], ["muon_jax"])
    reductions = [c for c in ours["listed"] if c["kind"] == "reduction"]
    assert {c["opcode"] for c in reductions} == {"reduce-scatter"}
    adamw = 8 * 7 / 8 * ours["parameters"]  # reduce-scatters and gathers that nothing pads
    assert total_of(ours) <= EXPECTED[case].ratio * adamw, ours


def test_a_worker_that_fails_says_why():
    with pytest.raises(wire.WorkerError, match=r"(?s)cpu-8: exit status 1.*KeyError: 'nothing'"):
        list(wire.measure(CPU, ["nothing"]))


# --- the command, on rows that need no compiler


def row(case, optimizer, **changed):
    sent = {"reduction": 100.0, "loss": 0.0, "exchange": 0.0, "gather": 100.0, "other": 0.0}
    base = {
        "target": "v5e-8", "case": case, "optimizer": optimizer, "devices": 8, "parameters": 30,
        "even_flops": 10.0, "state_bytes": 100, "compile_s": 1.0, "bytes": sent,
        "collectives": {"reduction": 1, "gather": 1}, "flops": 5.0, "listed": [],
    }  # fmt: skip
    return base | changed


def ours(case="separate", reduction=100.0, exchange=6.0, gather=50.0, **changed):
    sent = {"reduction": reduction, "loss": 0.0, "exchange": exchange, "gather": gather}
    fields = {"bytes": sent | {"other": 0.0}, "flops": 15.0, "state_bytes": 50}
    return row(case, "muon_jax", **fields | changed)


def checked(*rows):
    return complete(list(rows))[-1]["checks"]


def test_checks_fail_where_they_should():
    adamw = row("separate", "adamw")
    assert checked(adamw, ours()) == {"ratio": True, "state": True, "work": True}
    assert not checked(adamw, ours(exchange=12))["ratio"]
    assert not checked(adamw, ours(flops=17.0))["work"]
    assert not checked(adamw, ours(state_bytes=60))["state"]
    # An all-reduce of gradients is held against us on eight TPU chips, not on the CPU.
    assert not checked(adamw, ours(reduction=200.0))["ratio"]
    cpu = {"target": "cpu-8"}
    assert checked(row("separate", "adamw", **cpu), ours(reduction=200.0, **cpu))["ratio"]
    assert checked(ours()) == {}


def test_sharded_parameters_count_what_the_optimizer_adds():
    adamw = row("fsdp", "adamw")
    whole = 8 * 7 / 8 * 30
    done = complete([adamw, ours("fsdp", gather=100.0, exchange=6.0)])[-1]
    assert done["ratio"] == pytest.approx(6 / whole)
    assert done["checks"]["ratio"]
    assert not checked(row("experts", "adamw"), ours("experts", gather=100.0, exchange=1))["ratio"]


def test_the_command_prints_every_row_and_names_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        wire,
        "measure",
        lambda target, names: iter([row("fsdp", "adamw"), ours("fsdp", state_bytes=60)]),
    )
    needs = {"h100-8": "needs wheels: pip install them"}
    monkeypatch.setattr(targets, "missing", lambda target: needs.get(target.name))
    args = wire.Args(("h100-8", "v5e-8", "v5e-256"), ("fsdp",), tmp_path / "wire.json")
    record = wire.main(args)
    assert json.loads(args.output.read_text()) == record
    assert record["left_out"] == needs
    assert [r["optimizer"] for r in record["rows"]] == ["adamw", "muon_jax"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "needs wheels: pip install them" in printed
    assert "8 TPU chips (v5e:2x4)" in printed
    assert "over the limit: state" in printed


def test_the_command_refuses_unknown_names():
    with pytest.raises(ValueError, match="unknown: nowhere; known: cpu-8"):
        wire.main(wire.Args(targets=("nowhere",)))


def test_every_case_is_expected_and_every_target_known():
    assert set(EXPECTED) == set(CASES)
    assert {name for case in CASES.values() for name in case.targets} == set(TARGETS)


def test_state_that_cannot_be_divided_raises():
    with pytest.raises(ValueError, match=r"8 devices do not divide the rows of \(12, 4\)"):
        CASES["separate"].state_spec((12, 4), ("data",), 8)


def test_kinds_of_collectives():
    def kind(opcode, scope, optimizer="muon_jax", size=1e6):
        return counts.kind_of(hlo.Collective(opcode, "f32", 0, size, 8, 1, scope), optimizer)

    backward = "jit(step)/transpose(jvp())/dot_general"
    assert kind("reduce-scatter", backward) == kind("all-reduce", backward) == "reduction"
    assert kind("all-gather", "jit(step)/jvp()/dot_general") == "loss"
    assert kind("all-to-all", "jit(step)/shard_map/muon.exchange/all_to_all", size=8) == "exchange"
    assert kind("all-gather", "jit(step)/shard_map/muon.gather/x", "adamw") == "gather"
    assert kind("all-gather", "jit(step)/adamw.gather/x", "adamw") == "gather"
    assert kind("all-reduce", "jit(step)/reduce_sum", size=4) == "other"
    assert kind("all-reduce", "jit(step)/dot_general", "optax muon") == "exchange"


# --- targets


def test_what_is_missing_is_named_with_the_line_that_mends_it(monkeypatch, tmp_path):
    monkeypatch.setattr(targets, "_location", lambda module: None)
    assert targets.missing(CPU) is None
    line = "-m pip install --no-deps --target .aot"
    assert f'{line} "libtpu' in targets.missing(TPU)
    assert f'{line} "jax-cuda13-plugin==' in targets.missing(TARGETS["h100-8"])
    monkeypatch.setattr(targets, "_location", lambda module: tmp_path)
    assert targets.missing(TPU) is None
    monkeypatch.setattr(targets, "_version", lambda package: "0.0.1")
    assert "of jaxlib's version" in targets.missing(TARGETS["h100-8"])


def test_workers_leave_the_machines_own_accelerators_alone():
    for target in TARGETS.values():
        assert targets.environment(target)["JAX_PLATFORMS"] == "cpu"
    assert "device_count=8" in targets.environment(CPU)["XLA_FLAGS"]
    assert targets.environment(TPU)["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
