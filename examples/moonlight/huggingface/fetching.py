"""One tensor after the other from where a model's parts lie to the host that writes it.

Of several processes each puts its parts into zeros, and the sum of all is the tensor: at any time a
host and a device hold one tensor in whole, never a stack of experts, as indexing the sharded array
would. What is added is the numbers' bits, of which all but one are zero: so nothing is rounded, and
a minus zero stays one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.moonlight.huggingface import names as hf_names
from examples.moonlight.huggingface.pretrained import Bounds, bounds_of

_BITS = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}


def fetch(row: hf_names.Row, leaf: jax.Array) -> np.ndarray:
    """Copies one tensor to the host, as it is on disk, from the devices that hold its parts.

    Of several processes all fetch the same tensors in the same order, and the first gets the whole;
    what the others get is of no use, since they send nothing where the first has all parts.

    Args:
        row: Which tensor.
        leaf: The parameter that it is, or that it is one matrix of.
    """
    parts = {
        bounds: process
        for bounds, process in _owners(leaf).items()
        if _inside(row.at, bounds[: len(row.at)])
    }
    tensor = np.zeros(row.param_shape, leaf.dtype)
    written = set()
    for shard in leaf.addressable_shards:
        bounds = bounds_of(shard.index, leaf.shape)
        if parts.get(bounds) != jax.process_index() or bounds in written:
            continue
        written.add(bounds)
        stack, inner = bounds[: len(row.at)], bounds[len(row.at) :]
        local = tuple(np.int32(i - a) for i, (a, _) in zip(row.at, stack, strict=True))
        # Memory of a CPU device is the host's: NumPy looks into it without a copy.
        in_memory = shard.device.platform == "cpu"
        part = np.asarray(shard.data)[local] if in_memory else _take(shard.data, local)
        tensor[tuple(slice(*axis) for axis in inner)] = part
    if {*parts.values()} != {0} and jax.process_count() > 1:
        tensor = _sum(tensor)
    return np.swapaxes(tensor, -1, -2) if row.transposed else tensor


def _owners(leaf: jax.Array) -> dict[Bounds, int]:
    """The parts of an array, each with the first process that holds it: the same everywhere."""
    owners: dict[Bounds, int] = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        process = device.process_index
        assert index is not None and process is not None
        bounds = bounds_of(index, leaf.shape)
        if process < owners.get(bounds, process + 1):
            owners[bounds] = process
    return owners


def _inside(at: tuple[int, ...], stack: Bounds) -> bool:
    return all(first <= i < last for i, (first, last) in zip(at, stack, strict=True))


@jax.jit
def _take(stack: jax.Array, index: tuple[np.int32, ...]) -> jax.Array:
    """One matrix of a stack, compiled once for all: indexing with numbers compiles for each."""
    for i in index:
        stack = jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)
    return stack


def _sum(tensor: np.ndarray) -> np.ndarray:
    """What all processes have of a tensor, put together; their parts do not overlap."""
    mesh, add = _adder()
    bits = tensor.view(_BITS[tensor.itemsize])[None]
    mine = jax.make_array_from_process_local_data(NamedSharding(mesh, P("process")), bits)
    return np.asarray(add(mine).addressable_data(0)).view(tensor.dtype)


@functools.cache
def _adder():
    """One device of each process, and the program that adds what they hold."""
    first = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([first[i] for i in range(jax.process_count())]), ("process",))
    add = jax.jit(
        lambda bits: jnp.sum(bits, axis=0, dtype=bits.dtype), out_shardings=NamedSharding(mesh, P())
    )
    return mesh, add
