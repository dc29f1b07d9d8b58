"""The parts that the repository's language models share, from a linear layer to the loss.

Between the embedding and the head, activations stay `[n, d]`: every linear layer and its weight
gradient is then a plain matrix product, which XLA:CPU runs up to three times faster than one over
`[b, t, d]`. Parameters are float32 whatever the compute dtype: at a learning rate times weight
decay of 3e-5, decay would vanish in a bfloat16 weight.

Shapes are suffixes, see `moonlight.py`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from examples.moonlight.model.draws import normal
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.execution.sharding import BATCH_AXES

PyTree = Any


# --------------------------------------------------------------------------------------------------
# Layers with parameters
# --------------------------------------------------------------------------------------------------


def normal_param(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float) -> nnx.Param:
    """A float32 parameter from N(0, stddev^2), the same bits eager, in jit and on any mesh."""
    return nnx.Param(normal(rngs.params(), shape, stddev))


class Linear(nnx.Module):
    """`x @ kernel + bias`, in the dtype of `x`; the kernel is float32 `[in, out]`.

    With adapters (LoRA, arXiv 2106.09685), `lora_scale * drop(x) @ lora_a @ lora_b` is added:
    `examples.finetune.lora` makes them, and a model has none by itself.

    Attributes:
        kernel: The matrix; a stack of layers has a leading axis here and below.
        bias: Float32 `[out]`, or None.
        lora_a: Float32 `[in, r]`, or None.
        lora_b: Float32 `[r, out]`, or None.
        lora_key: Data of a random key for the dropout, uint32, or None: no dropout.
        lora_scale: Factor of the adapter's product, alpha / r.
        lora_dropout: Share of the adapter's inputs that is dropped in training.
        deterministic: Whether nothing is dropped; `model.eval()` and `model.train()` set it.
    """

    def __init__(
        self, rows: int, cols: int, *, stddev: float, rngs: nnx.Rngs, use_bias: bool = False
    ):
        self.kernel = normal_param(rngs, (rows, cols), stddev)
        self.bias = nnx.data(nnx.Param(jnp.zeros((cols,), jnp.float32)) if use_bias else None)
        self.lora_a: Any = nnx.data(None)
        self.lora_b: Any = nnx.data(None)
        self.lora_key: Any = nnx.data(None)
        self.lora_scale, self.lora_dropout, self.deterministic = 0.0, 0.0, True

    def __call__(self, x_nd: jax.Array) -> jax.Array:
        """Maps `[n, in]` to `[n, out]`."""
        out = x_nd @ self.kernel[...].astype(x_nd.dtype)
        if self.lora_a is not None:
            a_dr, b_rd = (w[...].astype(x_nd.dtype) for w in (self.lora_a, self.lora_b))
            out = out + self.lora_scale * ((self._drop(x_nd) @ a_dr) @ b_rd)
        return out if self.bias is None else out + self.bias[...].astype(x_nd.dtype)[None]

    def whole_kernel(self) -> jax.Array:
        """The matrix that `x` is multiplied with when nothing is dropped, adapters included."""
        if self.lora_a is None:
            return self.kernel[...]
        return self.kernel[...] + lora_product(self.lora_a, self.lora_b, self.lora_scale)

    def _drop(self, x_nd: jax.Array) -> jax.Array:
        if self.deterministic or self.lora_key is None or self.lora_dropout == 0:
            return x_nd
        key = jax.random.wrap_key_data(self.lora_key[...])
        kept_nd = jax.random.bernoulli(key, 1 - self.lora_dropout, x_nd.shape)
        return jnp.where(kept_nd, x_nd / (1 - self.lora_dropout), 0)


def check_drops_nothing(model: nnx.Module) -> None:
    """Checks that no adapter of a model drops inputs, before it generates.

    Raises:
        ValueError: One does.
    """
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear) and module.lora_key is not None and not module.deterministic:
            raise ValueError(
                f"the adapters of {'.'.join(map(str, path))} drop inputs, as in training: call "
                "model.eval(), or merge them into the weights."
            )


def lora_product(lora_a: Any, lora_b: Any, scale: float) -> jax.Array:
    """`scale * a @ b`: what a pair adds to its matrix, float32 `[..., in, out]`."""
    return scale * jnp.matmul(lora_a[...], lora_b[...], precision="highest")


class RMSNorm(nnx.Module):
    """`scale * x / sqrt(mean(x^2) + eps)`, in float32, returned in the dtype of `x`."""

    def __init__(self, width: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.eps = eps

    def __call__(self, x_nd: jax.Array) -> jax.Array:
        """Normalises the last axis of `[n, width]`."""
        wide_nd = x_nd.astype(jnp.float32)
        mean_n1 = jnp.mean(jnp.square(wide_nd), axis=-1, keepdims=True)
        return (wide_nd * jax.lax.rsqrt(mean_n1 + self.eps) * self.scale[...][None]).astype(
            x_nd.dtype
        )


class MLP(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, hidden: int, inner: int, *, stddev: float, rngs: nnx.Rngs):
        self.gate_proj = Linear(hidden, inner, stddev=stddev, rngs=rngs)
        self.up_proj = Linear(hidden, inner, stddev=stddev, rngs=rngs)
        self.down_proj = Linear(inner, hidden, stddev=stddev, rngs=rngs)

    def __call__(self, act_nd: jax.Array) -> jax.Array:
        """Maps `[n, hidden]` to `[n, hidden]`."""
        return self.down_proj(jax.nn.silu(self.gate_proj(act_nd)) * self.up_proj(act_nd))


class Embed(nnx.Module):
    """Rows of a table by token id."""

    def __init__(
        self, vocab: int, hidden: int, *, stddev: float, rngs: nnx.Rngs, execution: Execution
    ):
        self.embedding = normal_param(rngs, (vocab, hidden), stddev)
        self.execution = execution

    def __call__(self, tokens_n: jax.Array) -> jax.Array:
        """Maps ids `[n]` to `[n, hidden]`; an id past its end gives NaN, not a row."""
        run, table_vd = self.execution, self.embedding[...]
        where = run.sharding
        if where.mesh is None or tokens_n.shape[0] % where.batch_shards:
            # Cast afterwards: gradients of a frequent token's rows are then added in float32.
            return jnp.take(table_vd, tokens_n, axis=0).astype(run.dtype)
        spec = where.param_spec(("embed", "embedding"), table_vd.shape)
        return jax.shard_map(
            functools.partial(_look_up, *spec, run.dtype),
            mesh=where.mesh,
            in_specs=(P(*spec), P(BATCH_AXES)),
            out_specs=P(BATCH_AXES),
        )(table_vd, tokens_n)


def _look_up(
    vocab: str | None, hidden: str | None, dtype: Any, table_vd: jax.Array, tokens_n: jax.Array
) -> jax.Array:
    """Rows of a table that lies over two axes, the table itself staying where it is.

    Those who store columns of it look up each other's tokens, and send each the columns of theirs:
    `n d` numbers, and as many of the gradient, where a gathered table has `v d`.
    """
    if hidden is not None:
        tokens_n = jax.lax.all_gather(tokens_n, hidden, tiled=True)
    if vocab is None:
        rows_nd = jnp.take(table_vd, tokens_n, axis=0).astype(dtype)
    else:
        local_n = tokens_n - jax.lax.axis_index(vocab) * table_vd.shape[0]
        mine_n = (local_n >= 0) & (local_n < table_vd.shape[0])
        rows_nd = jnp.take(table_vd, jnp.where(mine_n, local_n, 0), axis=0).astype(dtype)
        found_n = jax.lax.psum(mine_n.astype(jnp.int32), vocab) > 0
        rows_nd = jax.lax.psum(jnp.where(mine_n[:, None], rows_nd, 0), vocab)
        rows_nd = jnp.where(found_n[:, None], rows_nd, jnp.nan)
    if hidden is not None:
        rows_nd = jax.lax.all_to_all(rows_nd, hidden, 0, 1, tiled=True)
    return rows_nd


# --------------------------------------------------------------------------------------------------
# Stacks of layers
# --------------------------------------------------------------------------------------------------


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` layers as one module: parameters have a leading axis, each layer its own draws."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs)

    return stacked(rngs)


def run_layer(
    layer: nnx.Module,
    run: Callable[[Any, PyTree, Any], tuple[PyTree, PyTree]],
    carry: PyTree,
    xs: Any,
    execution: Execution,
) -> tuple[PyTree, PyTree]:
    """One step of `scan_layers`, for a layer that lies in no stack."""
    graphdef, state = nnx.split(layer)
    return _step(graphdef, run, execution, looped=False)(carry, (state, xs))


def scan_layers(
    layers: nnx.Module,
    run: Callable[[Any, PyTree, Any], tuple[PyTree, PyTree]],
    carry: PyTree,
    xs: Any,
    execution: Execution,
) -> tuple[PyTree, PyTree]:
    """Runs stacked layers one after the other: one compiled layer, whatever the depth.

    Args:
        layers: What `stack_layers` returned.
        run: `run(layer, carry, x) -> (carry, y)`, given each layer in turn.
        carry: What goes from layer to layer.
        xs: A pytree whose leaves have a leading axis of layers, one slice for each; or None.
        execution: Decides on `remat`, `unroll`, and how weights lie when they are used.

    Returns:
        The last carry, and every layer's `y`, stacked.
    """
    graphdef, state = nnx.split(layers)
    step = _step(graphdef, run, execution, looped=not execution.unroll)
    return jax.lax.scan(step, carry, (state, xs), unroll=execution.unroll or 1)


def _step(graphdef: nnx.GraphDef, run: Callable[..., Any], execution: Execution, *, looped: bool):
    def step(carry: PyTree, slices: tuple[nnx.State, Any]):
        state, x = slices
        state = execution.sharding.gather_weights(state, execution.dtype)
        return run(nnx.merge(graphdef, state), carry, x)

    # In a loop XLA can't merge the recomputation with the first computation anyway.
    return jax.checkpoint(step, prevent_cse=not looped) if execution.remat else step


def mean_square(x_nd: jax.Array) -> jax.Array:
    """Mean of the squares of all entries, a float32 scalar without gradient."""
    return jnp.mean(jnp.square(jax.lax.stop_gradient(x_nd).astype(jnp.float32)))
