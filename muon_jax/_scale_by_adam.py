"""AdamW's moments, with a state that is a fixed point, and ZeRO-1 on a mesh.

The mathematics is `optax.scale_by_adam`'s. Element by element it needs no neighbours, so on a mesh
each device runs it on its shards, and the float32 updates are gathered.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Inexact, PyTree

from muon_jax._checks import Scalar
from muon_jax._dtypes import promote
from muon_jax._layout import Layout
from muon_jax._momentum import accumulator_dtype, check_mu_dtype, momentum_dtype
from muon_jax._paths import flatten_with_names, is_absent
from muon_jax._record import note_state
from muon_jax._specs import partition_spec
from muon_jax._zero1 import Zero1, gather_to_params, on_shards


def scale_by_adam(
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    eps_root: Scalar,
    mu_dtype: jax.typing.DTypeLike | None,
    zero1: Zero1 | None = None,
    layouts: list[Layout] | None = None,
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with a state that is a fixed point.

    Optax drops the moments of a leaf whose gradient is None or masked, lets the first moment take
    the gradient's dtype after the first step, casts a complex one to a real `mu_dtype`, and squares
    float16 gradients in float16, where the square of 1e-4 is 0: the update would be infinite.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root.
      eps_root: added under the root.
      mu_dtype: of the first moment; None means each parameter's own, and float32 for float16. The
        second moment is float32 for float16 in any case.
      zero1: the mesh, if any.
      layouts: there, the layout of each leaf, in the order of the parameters' leaves.
    """
    inner = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    dtype = check_mu_dtype(mu_dtype)

    def init_fn(params: PyTree) -> Any:
        state: Any = jax.eval_shape(inner.init, params)
        leaves, structure = jax.tree.flatten(params)
        shapes = [jnp.shape(leaf) for leaf in leaves]
        first = [momentum_dtype(dtype, jnp.result_type(leaf)) for leaf in leaves]
        second = [accumulator_dtype(nu.dtype) for nu in jax.tree.leaves(state.nu)]
        if zero1 is None:
            zeros = [jnp.zeros(s, d) for s, d in zip(2 * shapes, first + second, strict=True)]
            count = jnp.zeros([], jnp.int32)
        else:
            assert layouts is not None
            paths = [path for path, _ in flatten_with_names(params)[0]]
            note_state("adam", paths, layouts, [*zip(first, second, strict=True)])
            zeros = zero1.zeros([*zip(2 * layouts, first + second, strict=True)])
            (count,) = zero1.replicate([jnp.zeros([], jnp.int32)])
        return state._replace(
            count=count,
            mu=structure.unflatten(zeros[: len(leaves)]),
            nu=structure.unflatten(zeros[len(leaves) :]),
        )

    def update_fn(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        mu, structure = jax.tree.flatten(state.mu)
        nu = jax.tree.leaves(state.nu)
        gradients = structure.flatten_up_to(updates)
        present = [i for i, g in enumerate(gradients) if not is_absent(g)]
        like = gradients if params is None else structure.flatten_up_to(params)
        given = [promote(jnp.result_type(gradients[i]), jnp.result_type(like[i])) for i in present]

        def step(
            gradients: list[Any], mu: list[Any], nu: list[Any], count: Any, numbers: list[Any]
        ) -> Any:
            # Not by closure, which JAX refuses for arrays on Explicit axes.
            inner = optax.scale_by_adam(*numbers)
            gradients = [_squarable(g) for g in gradients]
            updates: Any
            new: Any
            # Optax takes powers of floats by integers, which a user may have forbidden.
            with jax.numpy_dtype_promotion("standard"):
                updates, new = inner.update(gradients, state._replace(count=count, mu=mu, nu=nu))
            updates = [
                u.astype(dtype) if dtype == jnp.float16 else u
                for u, dtype in zip(updates, given, strict=True)
            ]
            like = lambda new, old: [n.astype(o.dtype) for n, o in zip(new, old, strict=True)]  # noqa: E731
            return updates, like(new.mu, mu), like(new.nu, nu), new.count

        g, m, v = ([tree[i] for i in present] for tree in (gradients, mu, nu))
        args = (g, m, v, state.count, [b1, b2, eps, eps_root])
        if zero1 is None:
            out = step(*args)
        else:
            assert layouts is not None
            out = _step_on_shards(step, zero1, [layouts[i] for i in present], args)
        for old, new in zip((gradients, mu, nu), out, strict=False):
            for i, value in zip(present, new, strict=True):
                old[i] = value
        new_state = state._replace(
            count=out[3], mu=structure.unflatten(mu), nu=structure.unflatten(nu)
        )
        return structure.unflatten(gradients), new_state

    return optax.GradientTransformation(init_fn, update_fn)


def _squarable(gradient: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
    return gradient.astype(jnp.float32) if gradient.dtype == jnp.float16 else gradient


def _step_on_shards(step: Any, zero1: Zero1, layouts: list[Layout], args: Any) -> Any:
    gradients, mu, nu, count, numbers = args
    # Python's numbers stay constants of the program.
    arrays = [x for x in numbers if isinstance(x, jax.Array)]

    def body(
        gradients: list[Any], mu: list[Any], nu: list[Any], count: Any, arrays: list[Any]
    ) -> Any:
        left = iter(arrays)
        given = [next(left) if isinstance(x, jax.Array) else x for x in numbers]
        updates, mu, nu, count = step(gradients, mu, nu, count, given)
        return gather_to_params(updates, layouts, zero1.sizes), mu, nu, count

    state = [partition_spec(layout.state, zero1.mesh) for layout in layouts]
    param = [partition_spec(layout.param, zero1.mesh) for layout in layouts]
    everywhere = PartitionSpec()
    return on_shards(
        body,
        zero1.mesh,
        (zero1.arrive(gradients, layouts), mu, nu, count, arrays),
        (state, state, state, everywhere, [everywhere] * len(arrays)),
        (param, state, state, everywhere),
    )
