"""How a Moonlight lies on a mesh of devices.

    data     shards the batch
    expert   shards the routed experts, and the batch everywhere else
    tensor   shards attention heads, the inner width of every MLP and expert, and the vocabulary

`--mesh data=2,expert=2,tensor=2` names the sizes. An axis that is not named has one device, so that
every mesh has the same axes. With Muon the optimizer state is ZeRO-1: sharded, besides, over every
axis along which its parameter is replicated. With AdamW it lies as the parameters do.

Functions take `mesh` None for one device without a mesh.
"""

import math
from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from examples.moonlight.model import BATCH_AXES, MESH_AXES, MoonlightConfig
from examples.moonlight.steps import TrainState
from muon_jax import opt_state_shardings

PyTree = Any

# Columns, then rows: between the two products of attention or an MLP, nothing crosses `tensor`
# (Shoeybi et al. 2019, arXiv 1909.08053, Section 3).
COLUMNS, ROWS = P(None, "tensor"), P("tensor", None)

# By the last two names of a parameter's path.
PARAM_SPECS = {
    ("embed", "embedding"): ROWS,
    ("input_layernorm", "scale"): P(),
    ("q_proj", "kernel"): COLUMNS,
    ("kv_a_proj", "kernel"): P(),  # the latent, which every head reads
    ("kv_a_layernorm", "scale"): P(),
    ("kv_b_proj", "kernel"): COLUMNS,
    ("o_proj", "kernel"): ROWS,
    ("post_attention_layernorm", "scale"): P(),
    ("gate_proj", "kernel"): COLUMNS,
    ("up_proj", "kernel"): COLUMNS,
    ("down_proj", "kernel"): ROWS,
    ("router", "kernel"): P(),
    ("experts", "gate_proj"): P("expert", None, "tensor"),
    ("experts", "up_proj"): P("expert", None, "tensor"),
    ("experts", "down_proj"): P("expert", "tensor", None),
    ("norm", "scale"): P(),
    ("lm_head", "kernel"): COLUMNS,
}

# The tokenizer decides how large the vocabulary is: these are replicated where it does not divide.
VOCABULARY = {("embed", "embedding"): 0, ("lm_head", "kernel"): 1}


# --------------------------------------------------------------------------------------------------
# The mesh
# --------------------------------------------------------------------------------------------------


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


def check_divides(mesh: Mesh | None, config: MoonlightConfig, batch_size: int) -> None:
    """Checks that every axis divides what it shards.

    Raises:
        ValueError: One does not.
    """
    if mesh is None:
        return
    c, batch_axes = config, " x ".join(BATCH_AXES)
    experts, tensor = mesh.shape["expert"], mesh.shape["tensor"]
    for axes, count, what, length in (
        ("expert", experts, "n_routed_experts", c.n_routed_experts),
        ("tensor", tensor, "num_attention_heads", c.num_attention_heads),
        ("tensor", tensor, "intermediate_size", c.intermediate_size),
        ("tensor", tensor, "moe_intermediate_size", c.moe_intermediate_size),
        (batch_axes, batch_shards(mesh), "--batch-size", batch_size),
    ):
        if length % count:
            raise ValueError(
                f"--mesh: {axes} = {count} does not divide {what} = {length}; change one of them"
            )


def batch_shards(mesh: Mesh | None) -> int:
    """Into how many parts a batch is divided."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def describe(mesh: Mesh | None) -> str:
    """The mesh as `--mesh` takes it, axes of one device left out."""
    if mesh is None:
        return "one device"
    sizes = ((axis, size) for axis, size in mesh.shape.items() if size > 1)
    return ",".join(f"{axis}={size}" for axis, size in sizes) or "data=1"


# --------------------------------------------------------------------------------------------------
# What lies where
# --------------------------------------------------------------------------------------------------


def place(mesh: Mesh | None, *spec: Any) -> Sharding:
    """The sharding for a PartitionSpec's entries; without any, replicated."""
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(mesh, P(*spec))


def param_shardings(params: PyTree, mesh: Mesh | None) -> PyTree:
    """Where each of the model's parameters lies, which may be abstract.

    Raises:
        ValueError: A parameter is not in `PARAM_SPECS`.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> Sharding:
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))[-2:]
        if names not in PARAM_SPECS:
            raise ValueError(f"PARAM_SPECS does not say how {names} lies on a mesh: add it there")
        spec = PARAM_SPECS[names]
        if mesh and names in VOCABULARY and leaf.shape[VOCABULARY[names]] % mesh.shape["tensor"]:
            spec = P()
        return place(mesh, *spec)

    return jax.tree_util.tree_map_with_path(sharding, params)


def state_shardings(
    state: TrainState, optimizer: optax.GradientTransformation, name: str, mesh: Mesh | None
) -> TrainState:
    """Where everything that training changes lies.

    Args:
        state: Abstract or not.
        optimizer: Whose state it is; on a mesh, a Muon that knows the mesh.
        name: "muon" or "adamw".
        mesh: The mesh.
    """
    one, params = place(mesh), param_shardings(state.params, mesh)
    if mesh is None:
        opt_state = jax.tree.map(lambda _: one, state.opt_state)
    elif name == "muon":
        opt_state = opt_state_shardings(optimizer, state.params)
    else:
        opt_state = optax.tree_map_params(
            optimizer,
            lambda _, sharding: sharding,
            state.opt_state,
            params,
            transform_non_params=lambda _: one,
        )
    return TrainState(params, jax.tree.map(lambda _: one, state.bias), opt_state)


def bytes_per_device(tree: PyTree, shardings: PyTree) -> int:
    """Bytes of a tree's arrays, which may be abstract, that one device holds."""
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    )
