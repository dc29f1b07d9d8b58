"""Whether a cluster started this process as one of several, by what it puts into the environment.

JAX finds addresses and numbers by itself where this says that there is something to find. It is not
asked outright: it takes an allocation of Slurm for a job of as many processes as that has tasks,
also from its one shell, and would wait there for processes that nobody started.
"""

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path

# Slurm's own variables of a step, all of which JAX reads. A shell inside of an allocation has some.
_SLURM = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A job of several processes.

    Attributes:
        name: What started it, in words.
        method: What JAX calls the way to its addresses.
        processes: How many there are; None, where JAX has to ask.
        process: Which of them this one is; None likewise.
    """

    name: str
    method: str
    processes: int | None = None
    process: int | None = None


def find_cluster(environment: Mapping[str, str], devices: Path = Path("/dev")) -> Cluster | None:
    """The job that this process is one of; None where it was started alone.

    Args:
        environment: The process's.
        devices: Where the system lists devices, of which TPUs are some.

    Raises:
        RuntimeError: There is a job, and a package that JAX needs to enter it is missing.
    """
    for find in (_open_mpi, _slurm, _gke, _cloud_tpu):
        if (cluster := find(environment, devices)) is not None:
            return cluster
    return _kubernetes(environment)


def _open_mpi(environment: Mapping[str, str], _: Path) -> Cluster | None:
    processes = _number(environment, "OMPI_COMM_WORLD_SIZE")
    process = _number(environment, "OMPI_COMM_WORLD_RANK")
    if processes is None or processes < 2 or process is None:
        return None
    # Since its version 5, it says nowhere in the environment where process 0 is.
    old = "OMPI_MCA_orte_hnp_uri" in environment
    return Cluster("Open MPI", "ompi" if old else "mpi4py", processes, process)


def _slurm(environment: Mapping[str, str], _: Path) -> Cluster | None:
    if not all(name in environment for name in _SLURM):
        return None
    # `srun` counts the tasks of its step. In the one shell of an allocation of eight tasks, which
    # may be a step as well, SLURM_NTASKS is 8, and this is 1.
    processes = _number(environment, "SLURM_STEP_NUM_TASKS")
    processes = processes or _number(environment, "SLURM_NTASKS") or 1
    process = _number(environment, "SLURM_PROCID")
    return Cluster("Slurm", "slurm", processes, process) if processes > 1 else None


def _gke(environment: Mapping[str, str], _: Path) -> Cluster | None:
    names = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    slices = _number(environment, "MEGASCALE_NUM_SLICES") or 1
    processes = len([name for name in names.split(",") if name]) * slices
    return Cluster("GKE, on TPUs", "gketpu") if processes > 1 else None


def _cloud_tpu(environment: Mapping[str, str], devices: Path) -> Cluster | None:
    """A virtual machine with TPUs: how many there are of it, JAX asks Google's metadata server."""
    chips = [*devices.glob("accel[0-9]*"), *devices.glob("vfio/[0-9]*")]
    elsewhere = "TPU_SKIP_MDS_QUERY" in environment or "TPU_WORKER_HOSTNAMES" in environment
    if not chips or elsewhere or importlib.util.find_spec("libtpu") is None:
        return None
    return Cluster("Cloud TPU", "gcetpu")


def _kubernetes(environment: Mapping[str, str]) -> Cluster | None:
    """A pod of an indexed Job; others have no numbers, and any service runs in a pod."""
    process = _number(environment, "JOB_COMPLETION_INDEX")
    if process is None or "KUBERNETES_SERVICE_HOST" not in environment:
        return None
    return Cluster("Kubernetes", "k8s", None, process)


def check_package(cluster: Cluster) -> None:
    """Raises RuntimeError where a package is missing with which JAX asks a cluster."""
    package = {"mpi4py": "mpi4py", "k8s": "kubernetes"}.get(cluster.method)
    if package is not None and importlib.util.find_spec(package) is None:
        count = cluster.processes or "N"
        raise RuntimeError(
            f"{cluster.name} started this process as one of several, and JAX asks it for the "
            f"others by the package {package}, which is not installed: install it, or give "
            f"--coordinator HOST:PORT --processes {count}, or --processes 1 to work alone"
        )


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else None
