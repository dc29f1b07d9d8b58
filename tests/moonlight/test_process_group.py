"""Several processes of one program: how they find each other, agree, and end together."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from examples.moonlight.common.processes import group
from examples.moonlight.common.processes.agreement import everywhere_equal, of_first
from examples.moonlight.common.processes.args import ProcessArgs
from examples.moonlight.common.processes.cluster import Cluster, check_package, find_cluster
from examples.moonlight.common.processes.launcher import _free_port
from examples.moonlight.common.processes.watch import LOST

ROOT = Path(__file__).parents[2]

started = [pytest.mark.one_stack, pytest.mark.processes]

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}


# --- which cluster --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "8"}, Cluster("Slurm", "slurm", 8, 3)),
        # The shell of an allocation, as a step of its own, and without one.
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({n: x for n, x in SLURM.items() if n != "SLURM_STEP_NODELIST"}, None),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        (OPEN_MPI, Cluster("Open MPI", "mpi4py", 4, 2)),
        (
            OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"},
            Cluster("Open MPI", "ompi", 4, 2),
        ),
        # mpirun in an allocation of Slurm, whose variables are those of mpirun's own daemons.
        (SLURM | OPEN_MPI | {"SLURM_STEP_NUM_TASKS": "2"}, Cluster("Open MPI", "mpi4py", 4, 2)),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, Cluster("GKE, on TPUs", "gketpu")),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        (
            {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"},
            Cluster("GKE, on TPUs", "gketpu"),
        ),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"},
            Cluster("Kubernetes", "k8s", None, 1),
        ),
    ],
)
def test_a_job_of_several_is_told_from_one_of_one(environment, expected, tmp_path):
    assert find_cluster(environment, tmp_path) == expected


def test_a_tpu_machine_asks_google(tmp_path, monkeypatch):
    (tmp_path / "accel0").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert find_cluster({}, tmp_path) == Cluster("Cloud TPU", "gcetpu")
    assert find_cluster({"TPU_SKIP_MDS_QUERY": "1"}, tmp_path) is None


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_package(Cluster("Slurm", "slurm", 4, 0))
    with pytest.raises(RuntimeError, match=r"mpi4py.*--coordinator HOST:PORT --processes 4, or"):
        check_package(Cluster("Open MPI", "mpi4py", 4, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local_processes": 0}, "--local-processes must be at least 1, got 0"),
        ({"local_processes": 2, "processes": 2}, "starts all processes itself"),
        ({"coordinator": "host"}, "--coordinator host: write HOST:PORT"),
        ({"coordinator": "h:1", "processes": 2, "process": 2}, "--process 2: of --processes 2 the"),
    ],
)
def test_flags_that_do_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        ProcessArgs(**changes).check()


def test_alone_nothing_is_exchanged():
    assert (group.count(), group.index(), group.is_first()) == (1, 0, True)
    group.barrier()
    assert group.exchange("x") == ["x"]
    assert of_first(lambda: [1, "a"]) == [1, "a"]
    everywhere_equal({"a": 1}, "the settings")


# --- real ones ------------------------------------------------------------------------------------


def command(what: str, *words: object) -> list[str]:
    program = [sys.executable, "-m", "tests.moonlight.process_toy", "--what", what]
    return [*program, *map(str, words)]


ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_cpu_collective_timeout_seconds=3",
    "COLUMNS": "1000",
    "PYTHONPATH": str(ROOT),
}


def run(what: str, count: int = 2) -> tuple[int, list[str], list[str]]:
    """The exit code of `--local-processes`, and the lines of its outputs."""
    ended = subprocess.run(
        command(what, "--local-processes", count),
        env=ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    return ended.returncode, ended.stdout.splitlines(), ended.stderr.splitlines()


class TestLaunched:
    """Processes that the launcher started."""

    pytestmark = started

    def test_they_agree_and_one_speaks(self):
        code, said, errors = run("agree", 3)
        assert (code, errors) == (0, [])
        assert said == [
            "3 processes (this machine), each with 2 of 6 devices; this is process 0",
            "sums [0.0, 2.0, 4.0] by 0 of 6",
        ]

    @pytest.mark.parametrize(
        ("what", "code", "last"),
        [
            ("differ", 1, r"error: the settings must be the same .* rate is 0.0 in process 0 and"),
            ("fail_one", 1, r"process 1: error: .*/nowhere/one\.json"),
            ("fail_all", 1, r"error: .*/nowhere/all\.json"),
            ("crash", 1, r"process 1: ValueError: invalid literal"),
            ("kill_last", 137, "error: process 1 was ended by SIGKILL"),
            ("kill_first", 137, "error: process 0 was ended by SIGKILL"),
            ("leave_out", 1, r".*(Timed out|timed out|timeout)"),
        ],
    )
    def test_the_end_of_one_ends_all_and_its_words_are_last(self, what, code, last):
        ended, _, errors = run(what)
        assert ended == code
        assert re.match(last, errors[-1]), errors
        if what != "leave_out":  # whose words are a traceback
            assert sum("rror: " in line for line in errors) == 1, errors

    def test_a_signal_passes(self):
        """`wait` does not take signals down, so it dies of the first: as it would alone."""
        process = subprocess.Popen(
            command("wait", "--local-processes", 2),
            env=ENVIRONMENT,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        while process.stdout.readline() != "waiting\n":
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM
        assert errors.splitlines() == ["error: process 0 was ended by SIGTERM"]


class TestWithoutALauncher:
    """As on a cluster: nobody ends the others but they themselves."""

    pytestmark = started

    @contextlib.contextmanager
    def waiting(
        self, address: str, count: int, prefixes: Sequence[Sequence[str]] = ()
    ) -> Iterator[list[subprocess.Popen[str]]]:
        """Processes that have begun to wait; each behind its prefix, as `ip netns exec NAME`."""
        flags = ["--coordinator", address, "--processes", count, "--process"]
        processes = [
            subprocess.Popen(
                [*(prefixes[i] if prefixes else ()), *command("wait", *flags, i)],
                env=ENVIRONMENT,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(count)
        ]
        try:
            first = processes[0].stdout
            assert first is not None
            while first.readline() != "waiting\n":
                assert processes[0].poll() is None, processes[0].communicate()[1]
            time.sleep(0.5)
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.wait()
                for stream in (process.stdout, process.stderr):
                    if stream is not None:
                        stream.close()

    def test_a_kill_ends_the_others_in_a_line(self):
        """Long before a heartbeat is late."""
        with self.waiting(f"localhost:{_free_port()}", 3) as processes:
            processes[2].kill()
            errors = [process.communicate(timeout=15)[1] for process in processes]
            assert [process.returncode for process in processes] == [LOST, LOST, -signal.SIGKILL]
            assert errors[0] == "process 2 was lost: all processes end\n"
            assert errors[1] == ""

    def test_a_process_that_stands_still_is_given_up(self):
        """Its connection stands, since the operating system answers for it: heartbeats are late."""
        with self.waiting(f"localhost:{_free_port()}", 2) as processes:
            processes[1].send_signal(signal.SIGSTOP)
            begin = time.monotonic()
            processes[0].communicate(timeout=60)
            assert processes[0].returncode != 0
            print(f"ended {time.monotonic() - begin:.1f} s after SIGSTOP")

    def test_both_sides_of_a_cut_network_end(self, two_hosts: tuple[str, str]):
        prefixes = [("ip", "netns", "exec", name) for name in two_hosts]
        with self.waiting(f"10.77.0.1:{_free_port()}", 2, prefixes) as processes:
            subprocess.run(["ip", "-n", two_hosts[1], "link", "set", "wire", "down"], check=True)
            begin = time.monotonic()
            errors = [process.communicate(timeout=60)[1] for process in processes]
            print(f"ended {time.monotonic() - begin:.1f} s after the cut", errors)
            assert [process.returncode for process in processes] == [LOST, LOST]
            assert errors[0] == "process 1 was lost: all processes end\n"


@pytest.fixture
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a wire between them; it takes root's rights to make these."""
    first, second = (f"muon-jax-{os.getpid()}-{i}" for i in range(2))
    lines = [
        f"ip netns add {first}",
        f"ip netns add {second}",
        f"ip -n {first} link add wire type veth peer name wire netns {second}",
        *(f"ip -n {name} link set lo up" for name in (first, second)),
        *(f"ip -n {n} addr add 10.77.0.{i}/24 dev wire" for i, n in enumerate((first, second), 1)),
        *(f"ip -n {name} link set wire up" for name in (first, second)),
    ]
    try:
        for line in lines:
            subprocess.run(line.split(), check=True, capture_output=True)
        yield first, second
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    finally:
        for name in (first, second) if shutil.which("ip") else ():
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
