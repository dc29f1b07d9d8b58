"""Two processes with four devices each train as one process with eight does."""

import contextlib
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import muon_jax
from muon_jax import sharding_report
from tests.checkers import relative_error
from tests.mesh.mesh_model import COSTLY_WORK, LEAVES, make_mesh, make_params
from tests.mesh.process_worker import CASES, DEVICES, Shards, param_specs, train

PROCESSES = 2
pytestmark = [pytest.mark.one_stack, pytest.mark.processes]
TIMEOUT = 240  # seconds; about 20 are needed where nothing else runs

# Gaussian gradients are summed over processes in another order, and a bfloat16 rounding that falls
# on the other side goes on through Newton-Schulz. Measured after ten steps, relative to the norm of
# each leaf: 4e-5 in the parameters, 2e-7 in the state.
ORDER_OF_SUMS = 1e-3


# --- Processes -----------------------------------------------------------------------------------


@contextlib.contextmanager
def started(commands: Sequence[list[str]], folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start the commands, their output in files; end whatever still runs when the block ends."""
    library = Path(muon_jax.__file__).parents[1]  # the one that this process tests
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(library), *sys.path]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(
            [*flags, f"--xla_force_host_platform_device_count={DEVICES // PROCESSES}"]
        ),
    }
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for number, command in enumerate(commands):
            # Into files: a full pipe that nobody reads would stop all of them.
            with (folder / f"{number}.log").open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        command,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        stdin=subprocess.DEVNULL,
                        env=environment,
                    )
                )
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def run_together(commands: Sequence[list[str]], folder: Path, timeout: float = TIMEOUT) -> None:
    """Run commands side by side until all have ended well.

    Raises:
      AssertionError: as soon as one has failed, or after `timeout` seconds, with the output of all.
    """
    deadline = time.monotonic() + timeout
    with started(commands, folder) as processes:
        codes: list[int | None] = [None]
        while None in codes and not any(codes) and time.monotonic() < deadline:
            time.sleep(0.05)
            codes = [process.poll() for process in processes]
    if any(code != 0 for code in codes):
        report = [f"exit codes {codes} (None: still running, after {timeout} s or another's end)"]
        for number in range(len(commands)):
            log = (folder / f"{number}.log").read_text(errors="replace")
            report.append(f"--- process {number} ---\n{log[-10_000:]}")
        raise AssertionError("\n".join(report))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def of_processes(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of the two processes holds at the end of each case."""
    folder = tmp_path_factory.mktemp("processes")
    address = f"localhost:{free_port()}"
    worker = ["-m", "tests.mesh.process_worker"]
    command = [sys.executable, "-W", "error", *worker, address, str(PROCESSES)]
    run_together([[*command, str(n), str(folder)] for n in range(PROCESSES)], folder)
    return [pickle.loads((folder / f"{n}.pickle").read_bytes()) for n in range(PROCESSES)]


@pytest.fixture(scope="module")
def of_one_process() -> Any:
    """The same from this process with its eight devices, trained when first asked for."""
    results: dict[str, Any] = {}

    def of(name: str) -> Any:
        if name not in results:
            results[name] = train(CASES[name])
        return results[name]

    return of


def test_a_failing_process_ends_the_others(tmp_path):
    fails = "print('this is what happened'); raise SystemExit(3)"
    waits = "import time; print('I wait', flush=True); time.sleep(60)"
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)3.*this is what happened.*process 1"):
        run_together([[sys.executable, "-c", code] for code in (fails, waits)], tmp_path)
    assert time.monotonic() - start < 30


def test_processes_that_hang_are_ended(tmp_path):
    waits = [sys.executable, "-c", "import time; time.sleep(60)"]
    with started([waits, waits], tmp_path) as processes:
        assert all(process.poll() is None for process in processes)
    assert all(process.returncode for process in processes)
    with pytest.raises(AssertionError, match=r"\[None, None\].*0.5 s"):
        run_together([waits, waits], tmp_path, timeout=0.5)


# --- What they hold ------------------------------------------------------------------------------


def assemble(*parts: Shards) -> tuple[np.ndarray, np.ndarray]:
    """The whole array, and how many of the shards hold each element of it."""
    whole = np.zeros(parts[0].shape, parts[0].values[0].dtype)
    copies = np.zeros(parts[0].shape, int)
    for part in parts:
        for bounds, values in zip(part.bounds, part.values, strict=True):
            where = tuple(slice(*bound) for bound in bounds)
            if copies[where].any():
                np.testing.assert_array_equal(whole[where], values, "replicas differ")
            whole[where] = values
            copies[where] += 1
    return whole, copies


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one_does(name, of_processes, of_one_process):
    for kind, alone in of_one_process(name).items():
        together = [results[name][kind] for results in of_processes]
        assert [*together[0]] == [*together[1]] == [*alone]
        for path, shards in alone.items():
            expected, _ = assemble(shards)
            actual, _ = assemble(*(held[path] for held in together))
            assert np.isfinite(actual).all()
            if kind == "hadamard" or path.startswith("start/") or not expected.ndim:
                np.testing.assert_array_equal(actual, expected, f"{kind}, {path}")
            else:
                error = relative_error(actual, expected)
                assert error <= ORDER_OF_SUMS, f"{kind}, {path}: {error}"


@pytest.mark.parametrize("name", CASES)
def test_training_changes_every_parameter(name, of_processes):
    start = jax.tree_util.tree_leaves_with_path({"params": make_params()})
    for path, before in start:
        shards = [
            results[name]["hadamard"][jax.tree_util.keystr(path, simple=True, separator="/")]
            for results in of_processes
        ]
        assert np.abs(assemble(*shards)[0] - before).min() > 0


@pytest.mark.parametrize("name", CASES)
def test_the_state_is_divided_among_both_processes(name, of_processes):
    case = CASES[name]
    mesh = make_mesh(case.mesh, case.axis_type)
    report = sharding_report(
        jax.eval_shape(make_params),
        mesh=mesh,
        param_specs=param_specs(case),
        mesh_costs=COSTLY_WORK,
    )
    replicas = {leaf.path: leaf.replicas for leaf in report.leaves}
    assert [path for path, n in replicas.items() if n > 1] == ["bias"]
    held = [results[name]["gaussian"] for results in of_processes]
    # As `init` left them, and after ten steps.
    moments = [path for path in held[0] if not path.startswith("params/") and held[0][path].shape]
    adam = {"embed/embedding", "norm/scale", "bias"}
    assert len(moments) == 2 * (len(LEAVES) + len(adam))
    for path in moments:
        param = next(leaf for leaf, _ in LEAVES if path.endswith(f"/{leaf}"))
        _, copies = assemble(*(shards[path] for shards in held))
        assert (copies == replicas[param]).all(), path
        for shards in held:
            assert len(shards[path].values) == DEVICES // PROCESSES
            _, own = assemble(shards[path])
            assert (own == 0).mean() == (0.5 if replicas[param] == 1 else 0), path


@pytest.mark.parametrize("name", CASES)
def test_every_route_is_taken(name):
    case = CASES[name]
    report = sharding_report(
        jax.eval_shape(make_params),
        mesh=make_mesh(case.mesh, case.axis_type),
        param_specs=param_specs(case),
        mesh_costs=COSTLY_WORK,
    )
    routes = " + ".join(row.route for row in report.rows)
    for route in ("local", "exchange") if case.fsdp else ("local", "exchange", "split"):
        assert route in routes
