"""Machines to compile for, most of which are not there.

JAX compiles for a TPU slice or a group of GPUs on any Linux machine, from a description of them
(`jax.experimental.topologies`), with the compiler that comes in a wheel: `libtpu`, or the JAX CUDA
plugin without any of NVIDIA's packages. The compiled program shows its collectives and FLOPs.

The wheels belong in a folder of their own, `.aot`, beside the environment:

    python -m pip install --no-deps --target .aot $(python -m benchmarks.targets)

In the environment itself they work as well, but on a machine without the device JAX then tries it
whenever it starts: libtpu writes logs, a lock file and five lines of warnings, the CUDA plugin a
traceback. `python -m benchmarks.targets tpu` names the TPU's wheel alone.

It is the libtpu that `pip install jax[tpu]` installs: JAX 0.10.2 asks for 0.0.42.*, 0.12 for
0.0.50.*. Others compile as well (both with 0.0.42.1, 0.0.50.1 and 0.0.52), to programs that send
and multiply the same and take other memory; so every table says which it was.
"""

import dataclasses
import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
AOT = ROOT / ".aot"

Platform = Literal["cpu", "tpu", "cuda"]


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      name: as on the command line.
      platform: whose compiler.
      topology: JAX's name of the arrangement; "" for the CPU.
      mesh: the sizes of the mesh axes that suit it, one for each ring of chips.
    """

    name: str
    platform: Platform
    topology: str
    mesh: tuple[int, ...]

    @property
    def devices(self) -> int:
        """How many."""
        return math.prod(self.mesh)


TARGETS = {
    target.name: target
    for target in (
        Target("cpu-8", "cpu", "", (8,)),
        Target("v5e-8", "tpu", "v5e:2x4", (8,)),
        Target("v5e-4x2", "tpu", "v5e:2x4", (4, 2)),
        Target("h100-8", "cuda", "1x1x8", (8,)),
        Target("v5e-256", "tpu", "v5e:16x16", (16, 16)),
        Target("v6e-256", "tpu", "v6e:16x16", (16, 16)),
        Target("v5p-128", "tpu", "v5p:4x4x8", (16, 8)),
    )
}

# The GPU of a free Colab. Apart, because it is one device: no benchmark of meshes runs on it.
T4 = Target("t4", "cuda", "1x1x1", (1,))

# What XLA:GPU asks of the hardware, for an H100 SXM.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 2 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# The same for a Tesla T4, by NVIDIA's data sheet and the CUDA programming guide's table for 7.5.
_T4 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 65536
  shared_memory_per_core: 65536
  threads_per_core_limit: 1024
  core_count: 40
  fpus_per_core: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 320000000000
  l2_cache_size: 4194304
  clock_rate_ghz: 1.59
  device_memory_size: 15835660288
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 7 minor: 5 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 2 }
device_description_str: "Tesla T4"
"""


def requirements(*platforms: Platform) -> list[str]:
    """The wheels that compile for these platforms, in the versions that fit the installed JAX."""
    wanted = []
    if "tpu" in platforms:
        pinned = [r for r in metadata.requires("jax") or [] if r.startswith("libtpu")]
        wanted.append(pinned[0].split(";")[0].strip() if pinned else "libtpu")
    if "cuda" in platforms:
        version = metadata.version("jaxlib")
        wanted += [f"jax-cuda13-plugin=={version}", f"jax-cuda13-pjrt=={version}"]
    return wanted


def install_line(*platforms: Platform) -> str:
    """The pip command that installs them beside this environment."""
    wheels = " ".join(f'"{wheel}"' for wheel in requirements(*platforms))
    return f"{Path(sys.executable).name} -m pip install --no-deps --target .aot {wheels}"


def missing(target: Target) -> str | None:
    """What keeps this machine from compiling for the target, with the line that mends it."""
    if target.platform == "cpu":
        return None
    module = {"tpu": "libtpu", "cuda": "jax_plugins.xla_cuda13"}[target.platform]
    wheels = {"tpu": "the libtpu wheel", "cuda": "the JAX CUDA plugin's wheels"}[target.platform]
    if _location(module) is None:
        return f"needs {wheels}: {install_line(target.platform)}"
    if target.platform == "cuda":
        versions = {"jaxlib": metadata.version("jaxlib")}
        for name in ("jax-cuda13-plugin", "jax-cuda13-pjrt"):
            versions[name] = _version(name) or "missing"
        if len(set(versions.values())) > 1:
            found = ", ".join(f"{name} {version}" for name, version in versions.items())
            return f"needs {wheels} of jaxlib's version ({found}): {install_line('cuda')} --upgrade"
    return None


def compiler_versions() -> dict[str, str]:
    """The versions of the compilers found, in the environment or beside it."""
    found = {name: _version(name) for name in ("libtpu", "jax-cuda13-plugin")}
    return {name: version for name, version in found.items() if version}


def compiler(target: Target) -> str:
    """Whose program for the target this is, with its version: what every table says beside it."""
    package = {"cpu": "jaxlib", "tpu": "libtpu", "cuda": "jax-cuda13-plugin"}[target.platform]
    version = _version(package) or "missing"
    with_jax = "" if target.platform == "cpu" else f" with jax {metadata.version('jax')}"
    return f"compiled by {package} {version}{with_jax}"


def environment(target: Target) -> dict[str, str]:
    """The environment variables of a process that compiles for the target.

    It runs on the CPU and leaves a TPU or GPU of this machine alone.
    """
    variables = dict(os.environ) | {"JAX_PLATFORMS": "cpu"}
    if target.platform == "cpu":
        flag = f"--xla_force_host_platform_device_count={target.devices}"
        variables["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    if target.platform == "tpu":
        folder = _location("libtpu")
        variables |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
        variables |= {"TPU_LOG_DIR": "disabled", "TPU_MIN_LOG_LEVEL": "3"}
        variables |= {"TPU_LIBRARY_PATH": str(folder / "libtpu.so")} if folder else {}
    if target.platform == "cuda":
        # Last, so that whatever else lies there cannot hide the environment's own packages.
        paths = [*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT), str(AOT)]
        variables["PYTHONPATH"] = os.pathsep.join(paths)
    return variables


def devices(target: Target) -> list:
    """The target's devices, in a process started with `environment(target)`."""
    import jax
    from jax.experimental import topologies

    if target.platform == "cpu":
        return jax.devices("cpu")[: target.devices]
    if target.platform == "tpu":
        return topologies.get_topology_desc(target.topology, "tpu").devices
    described = {"topology": target.topology, "target_config": _T4 if target is T4 else _H100}
    return topologies.get_topology_desc(target.name, "cuda", **described).devices


def make_mesh(target: Target, shape: Sequence[int], names: Sequence[str]):
    """A mesh of Auto axes over the target's devices, along the chips' rings where it can be."""
    import jax
    from jax.experimental import mesh_utils

    arranged = mesh_utils.create_device_mesh(
        tuple(shape), devices(target), allow_split_physical_axes=True
    )
    types = (jax.sharding.AxisType.Auto,) * len(names)
    return jax.sharding.Mesh(arranged, tuple(names), axis_types=types)


def _location(module: str) -> Path | None:
    """The folder of a module, in the environment or beside it."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is not None and found.origin:
        return Path(found.origin).parent
    folder = AOT.joinpath(*module.split("."))
    return folder if folder.is_dir() else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        beside = metadata.distributions(name=package, path=[str(AOT)])
        return next((found.version for found in beside), None)


if __name__ == "__main__":
    asked: list[Platform] = [p for p in ("tpu", "cuda") if p in sys.argv[1:]] or ["tpu", "cuda"]
    print(*requirements(*asked), sep="\n")
