"""How a Moonlight lies on a mesh of devices.

    data     shards the batch
    fsdp     shards the batch, and stores a part of every matrix, which is gathered when it is used
    expert   shards the routed experts, and the batch everywhere else
    tensor   shards attention heads, the inner width of every MLP and expert, and the vocabulary

`--mesh data=2,expert=2,tensor=2` names the sizes. An axis that is not named has one device, so that
every mesh has the same axes. With Muon the optimizer state is ZeRO-1: sharded, besides, over every
axis along which its parameter is replicated. With AdamW it lies as the parameters do.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

PyTree = Any

MESH_AXES = ("data", "fsdp", "expert", "tensor")

# Outside of the experts, the axis that shards them shards the batch: no device repeats another's
# attention.
BATCH_AXES = ("data", "fsdp", "expert")

# Columns, then rows: between the two products of attention or an MLP, nothing crosses `tensor`
# (Shoeybi et al. 2019, arXiv 1909.08053, Section 3).
COLUMNS, ROWS = P("fsdp", "tensor"), P("tensor", "fsdp")

# What all heads, or all experts, read.
SHARED = P("fsdp", None)

# Of one layer, by the last two names of a parameter's path.
PARAM_SPECS: dict[tuple[str, ...], P] = {
    ("embed", "embedding"): ROWS,
    ("input_layernorm", "scale"): P(None),
    ("q_proj", "kernel"): COLUMNS,
    ("q_proj", "bias"): P("tensor"),
    ("k_proj", "kernel"): COLUMNS,
    ("k_proj", "bias"): P("tensor"),
    ("v_proj", "kernel"): COLUMNS,
    ("v_proj", "bias"): P("tensor"),
    ("kv_a_proj", "kernel"): SHARED,
    ("kv_a_layernorm", "scale"): P(None),
    ("kv_b_proj", "kernel"): COLUMNS,
    ("o_proj", "kernel"): ROWS,
    ("post_attention_layernorm", "scale"): P(None),
    ("gate_proj", "kernel"): COLUMNS,
    ("up_proj", "kernel"): COLUMNS,
    ("down_proj", "kernel"): ROWS,
    ("router", "kernel"): SHARED,
    ("router", "bias"): P(None),
    ("experts", "gate_proj"): P("expert", "fsdp", "tensor"),
    ("experts", "up_proj"): P("expert", "fsdp", "tensor"),
    ("experts", "down_proj"): P("expert", "tensor", "fsdp"),
    ("norm", "scale"): P(None),
    ("lm_head", "kernel"): COLUMNS,
}


def _adapter_specs() -> dict[tuple[str, ...], P]:
    """Of adapters: each factor lies as its side of the matrix does, the rank replicated."""
    specs: dict[tuple[str, ...], P] = {}
    for (module, name), spec in PARAM_SPECS.items():
        if module.endswith("_proj") and name == "kernel":
            rows, cols = spec
            specs[module, "lora_a"], specs[module, "lora_b"] = P(rows, None), P(None, cols)
            specs[module, "lora_key"] = P(None)
        elif module == "experts":
            experts, rows, cols = spec
            specs[module, f"{name}_lora_a"] = P(experts, rows, None)
            specs[module, f"{name}_lora_b"] = P(experts, None, cols)
    return specs


PARAM_SPECS |= _adapter_specs()


@dataclasses.dataclass(frozen=True)
class ModelSharding:
    """Where a model's arrays lie: on one device, or on a mesh with the axes `MESH_AXES`, all Auto.

    Attributes:
        mesh: The devices; None is the first one, without a mesh.
    """

    mesh: Mesh | None = None

    def __post_init__(self):
        """Raises ValueError for a mesh with other axes."""
        if self.mesh is not None and (
            self.mesh.axis_names != MESH_AXES
            or any(kind != AxisType.Auto for kind in self.mesh.axis_types)
        ):
            raise ValueError(
                f"the mesh must have the axes {MESH_AXES}, all AxisType.Auto; got "
                f"{self.mesh.axis_names} of {self.mesh.axis_types}: use make_mesh"
            )

    def __str__(self) -> str:
        """The mesh as `make_mesh` takes it, axes of one device left out."""
        if self.mesh is None:
            return "one device"
        sizes = ((axis, size) for axis, size in self.mesh.shape.items() if size > 1)
        return ",".join(f"{axis}={size}" for axis, size in sizes) or "data=1"

    def size(self, axis: str) -> int:
        """Devices along an axis."""
        return 1 if self.mesh is None else self.mesh.shape[axis]

    @property
    def batch_shards(self) -> int:
        """Into how many parts a batch is divided."""
        return math.prod(self.size(axis) for axis in BATCH_AXES)

    @property
    def compiler_options(self) -> dict[str, str | bool]:
        """What XLA has to be told when it compiles a training step for these devices.

        XLA:TPU hides collectives behind products within loops. A product of rows sorted by expert
        that it takes for that loses its table of the tiles to skip: each row is then multiplied
        with all of a device's experts. It took three of nine in the step of Moonlight-16B on 32
        chips: 2.37 times the formula's FLOPs, in the place of 1.31. libtpu 0.0.42 and 0.0.52, those
        of jax 0.10 and 0.12, know the option.
        """
        if self.mesh is None or self.mesh.devices.flat[0].platform != "tpu":
            return {}
        return {"xla_tpu_enable_async_collective_fusion_while_loops": False}

    def place(self, *spec: Any) -> Sharding:
        """The sharding for a PartitionSpec's entries; without any, replicated."""
        if self.mesh is None:
            return SingleDeviceSharding(jax.devices()[0])
        return NamedSharding(self.mesh, P(*spec))

    def spread(self, x: Any, *spec: Any) -> Any:
        """Host data that every process has, as an argument of a program compiled for the mesh.

        Of one process, a compiled program takes it as it is. Of several, each puts up the parts of
        its own devices.

        Args:
            x: A NumPy array or a number, the same in all processes.
            *spec: How the program has it; see `place`.
        """
        if jax.process_count() == 1:
            return x
        array = np.asarray(x, jax.dtypes.canonicalize_dtype(np.asarray(x).dtype))
        return jax.make_array_from_callback(array.shape, self.place(*spec), lambda at: array[at])

    def spread_all(self, tree: PyTree, *spec: Any) -> PyTree:
        """The same of every array of a tree."""
        return jax.tree.map(lambda x: self.spread(x, *spec), tree)

    def local_rows(self, batch: int) -> list[int]:
        """Which rows of a batch lie on this process's devices, in order."""
        rows: set[int] = set()
        places = self.place(BATCH_AXES) if self.mesh is not None else self.place()
        for index in places.addressable_devices_indices_map((batch,)).values():
            rows |= {*range(batch)[index[0] if index else slice(None)]}
        return sorted(rows)

    def spread_rows(self, local: np.ndarray, batch: int, axis: int) -> Any:
        """Rows that each process has of its own, as an array of the whole batch; see `spread`.

        Args:
            local: This process's `local_rows`, along an axis; nothing else need be read.
            batch: Rows of all.
            axis: Which axis the rows are.
        """
        if jax.process_count() == 1:
            return local
        place = {row: i for i, row in enumerate(self.local_rows(batch))}
        shape = (*local.shape[:axis], batch, *local.shape[axis + 1 :])
        spec = (*(None,) * axis, BATCH_AXES)

        def part(at: Any) -> np.ndarray:
            # One device's rows follow each other in the batch, and so they do here.
            first, last, _ = at[axis].indices(batch)
            rows = slice(place[first], place[first] + last - first)
            return local[(*at[:axis], rows, *at[axis + 1 :])]

        return jax.make_array_from_callback(shape, self.place(*spec), part)

    def constrain(self, x: jax.Array, *spec: Any) -> jax.Array:
        """`x`, laid out by a PartitionSpec's entries; on one device as it is."""
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(*spec)))

    def check_divides(self, *lengths: tuple[str, str, int]) -> None:
        """Checks lengths `(axis, name, length)` that their mesh axis has to divide.

        Raises:
            ValueError: One is not divided; the message names it.
        """
        for axis, name, length in lengths:
            count = self.batch_shards if axis == "batch" else self.size(axis)
            if length % count:
                axis = " x ".join(BATCH_AXES) if axis == "batch" else axis
                raise ValueError(
                    f"--mesh: {axis} = {count} does not divide {name} = {length}; change one of "
                    "them"
                )

    def param_spec(self, path: tuple[Any, ...], shape: tuple[int, ...]) -> P:
        """How a parameter lies: as `PARAM_SPECS` says, leading axes of stacked layers replicated.

        A dimension that its mesh axis does not divide is replicated: a tokenizer decides how large
        the vocabulary is.

        Args:
            path: Its key path, or its names.
            shape: Its shape, stacked or not.

        Raises:
            ValueError: The parameter is not in `PARAM_SPECS`.
        """
        names = tuple(name for key in path if isinstance(name := getattr(key, "key", key), str))
        if (spec := PARAM_SPECS.get(names[-2:])) is None:
            raise ValueError(
                f"PARAM_SPECS does not say how {'/'.join(names)} lies on a mesh: add it there"
            )
        stacks = (None,) * (len(shape) - len(spec))
        divided = (
            axis if axis is None or length % self.size(axis) == 0 else None
            for axis, length in zip(spec, shape[len(stacks) :], strict=True)
        )
        return P(*stacks, *divided)

    def param_shardings(self, params: PyTree) -> PyTree:
        """Where each of a model's parameters lies; they may be abstract.

        Raises:
            ValueError: A parameter is not in `PARAM_SPECS`.
        """
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: self.place(*self.param_spec(path, leaf.shape)), params
        )

    def gather_weights(self, params: PyTree, dtype: Any) -> PyTree:
        """A layer's parameters as its products use them: those stored in parts over `fsdp`, whole.

        They travel in the compute dtype, but for the router's, which is float32 everywhere. Routed
        experts stay in parts: `dispatch.py` gathers them.
        """
        if self.size("fsdp") == 1:
            return params

        def whole(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
            spec = self.param_spec(path, leaf.shape)
            names = [getattr(key, "key", None) for key in path]
            if "fsdp" not in spec or "experts" in names:
                return leaf
            if "router" not in names:
                # Pinned to its parts, or the cast could come after the gathering.
                leaf = self.constrain(leaf.astype(dtype), *spec)
            return self._gather(leaf, spec)

        return jax.tree_util.tree_map_with_path(whole, params)

    def _gather(self, leaf: jax.Array, spec: P) -> jax.Array:
        """`leaf`, stored as `spec` says, whole over `fsdp`.

        Its gradient goes from the products' partial sums to the parts at once: left to JAX, it
        would first be laid out like what was gathered, every device summing all of it.
        """

        @jax.custom_vjp
        def gather(leaf: jax.Array) -> jax.Array:
            return self.constrain(leaf, *(axis if axis != "fsdp" else None for axis in spec))

        gather.defvjp(lambda leaf: (gather(leaf), None), lambda _, g: (self.constrain(g, *spec),))
        return gather(leaf)


def on_host(x: jax.Array) -> np.ndarray:
    """All of a small array, also of one whose parts lie in other processes; all processes ask."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def make_sharding(text: str | None) -> ModelSharding:
    """The devices that `--mesh` names.

    Args:
        text: The sizes of the axes, see `make_mesh`; None is one device, or `data` over those of
            several processes.

    Raises:
        ValueError: The text cannot be read, or its product is not the number of devices.
    """
    if text is None and jax.process_count() > 1:
        text = f"data={jax.device_count()}"
    return ModelSharding(None if text is None else make_mesh(text))


def make_mesh(text: str) -> Mesh:
    """A mesh of all devices from a text such as "data=4,tensor=2".

    Its axes are Auto: the model leaves most activations to XLA's propagation.

    Raises:
        ValueError: The text cannot be read, or its product is not the number of devices.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in MESH_AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"--mesh {text}: cannot read {part!r}. Write the size of each axis once, such as "
                f"data=2,expert=2,tensor=2; the axes are {', '.join(MESH_AXES)}"
            )
        sizes[name] = int(size)
    needed, there = math.prod(sizes.values()), jax.device_count()
    if needed != there:
        advice = f"choose sizes whose product is {there}"
        if jax.default_backend() == "cpu":
            advice += f", or start with XLA_FLAGS=--xla_force_host_platform_device_count={needed}"
        raise ValueError(f"--mesh {text} needs {needed} devices, and JAX sees {there}: {advice}")
    shape = tuple(sizes.get(name, 1) for name in MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def bytes_per_device(tree: PyTree, shardings: PyTree) -> int:
    """Bytes of a tree's arrays, which may be abstract, that one device holds."""
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    )
