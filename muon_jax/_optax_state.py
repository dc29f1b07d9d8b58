"""The state of `optax.contrib.muon` as that of `muon`, and back.

    Optax    m_t = mu m_{t-1} + (1 - mu) G_t         an average
    muon     M_t = mu M_{t-1} + G_t                  a sum: M_t = m_t / (1 - mu)

From zeros, both hold the same to a factor, which Newton-Schulz does not see. What Optax has besides
is bias correction, which divides the two terms of its Nesterov direction by different numbers:

    Optax    mu m_t / (1 - mu^(t+1)) + (1 - mu) G_t / (1 - mu^t)
    muon     mu M_t + G_t

The last gradient weighs (1 - mu^(t+1)) / (1 - mu^t) times as much: 1.03 at step 20 for mu = 0.95,
1.0003 at step 100. Without Nesterov, the directions differ in a factor alone, at every step.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonState as OptaxMuonState

from muon_jax._common.checks import check_scalar
from muon_jax._common.paths import Path, flatten_with_names, show
from muon_jax._muon_step import MuonState

_STATES: dict[str, type] = {"optax": OptaxMuonState, "muon_jax": MuonState}
_CALLED = {"optax": "optax.contrib.muon", "muon_jax": "muon_jax.muon"}
_SHOWN = 5


def state_from_optax(
    state: Any,
    tx: Any,
    params: Any,
    *,
    beta: float | int = 0.95,
) -> Any:
    """Go on with `muon` from a state of `optax.contrib.muon`.

    The momentum is what `muon` would hold after the same gradients, and AdamW's moments stay as
    they are. The next updates are Optax's too, to rounding, where the settings agree and
    ``nesterov=False``; with Nesterov, bias correction keeps them apart, by 3% of the last
    gradient's weight after 20 steps and 0.03% after 100. The settings are
    ``muon(rate, nesterov=..., weight_decay=0, adam_b2=0.999, consistent_rms=None)`` for Optax's
    defaults, and the same leaves for Muon.

    Args:
      state: the state of `optax.contrib.muon` or its `scale_by_muon`, or of a wrapper around one,
        such as `optax.chain` or `optax.MultiSteps`.
      tx: the optimizer to go on with: `muon` or `scale_by_muon` in the same wrappers.
      params: the parameters, arrays.
      beta: the momentum coefficient of both optimizers.

    Returns:
      A state of `tx`, in its dtypes and, on a mesh, in its layout.

    Raises:
      ValueError: where the two update different leaves with Muon, where a momentum is missing or
        has another shape, and where the wrappers differ.
      TypeError: for a `tx` that is no optimizer.

    Examples:
      >>> params = {"proj": jnp.ones((8, 4))}
      >>> before = optax.contrib.muon(1e-3).init(params)
      >>> tx = muon(1e-3, consistent_rms=None)
      >>> state = state_from_optax(before, tx, params)
    """
    return _convert(state, tx, params, "optax", "muon_jax", lambda beta: 1 / (1 - beta), beta)


def state_to_optax(
    state: Any,
    tx: Any,
    params: Any,
    *,
    beta: float | int = 0.95,
) -> Any:
    """The inverse of `state_from_optax`: go on with `optax.contrib.muon` from a state of `muon`.

    Args:
      state: the state of `muon` or `scale_by_muon`, or of a wrapper around one.
      tx: the optimizer to go on with: `optax.contrib.muon` in the same wrappers.
      params: the parameters, arrays.
      beta: the momentum coefficient of both optimizers.

    Returns:
      A state of `tx`.

    Raises:
      ValueError, TypeError: as `state_from_optax`.

    Examples:
      >>> params = {"proj": jnp.ones((8, 4))}
      >>> before = muon(1e-3).init(params)
      >>> tx = optax.contrib.muon(1e-3)
      >>> state = state_to_optax(before, tx, params)
    """
    return _convert(state, tx, params, "muon_jax", "optax", lambda beta: 1 - beta, beta)


def _convert(
    state: Any,
    tx: Any,
    params: Any,
    source: str,
    target: str,
    factor: Callable[[float], float],
    beta: float | int,
) -> Any:
    if not callable(getattr(tx, "init", None)):
        raise TypeError(f"tx must be the optimizer to go on with; got {tx!r}.")
    check_scalar("beta", beta, below=1.0)
    like = tx.init(params)
    for what, tree, library in (("state", state, source), ("tx.init(params)", like, target)):
        if not any(isinstance(node, _STATES[library]) for node in _states_in(tree)):
            raise ValueError(f"{what} holds no state of {_CALLED[library]}; got {type(tree)!r}.")
    return _node(state, like, _STATES[source], factor(beta))


def _states_in(tree: Any) -> list[Any]:
    """The states of Muon in a tree, of either library."""
    is_state = lambda node: isinstance(node, MuonState | OptaxMuonState)  # noqa: E731
    return [node for node in jax.tree.leaves(tree, is_leaf=is_state) if is_state(node)]


def _node(node: Any, like: Any, kind: type, factor: float) -> Any:
    """A state, or a part of one, with the structure of `like`."""
    if isinstance(node, kind) and isinstance(like, MuonState | OptaxMuonState):
        return _momentum(node, like, factor)
    if _is_partition(node) and _is_partition(like):
        return _partition(node, like, kind, factor)
    if not _states_in(node):
        return _unchanged(node, like)
    if isinstance(node, Mapping) and isinstance(like, Mapping) and {*node} == {*like}:
        make: Any = type(like)
        return make({key: _node(node[key], like[key], kind, factor) for key in like})
    if isinstance(node, tuple | list) and type(node) is type(like) and len(node) == len(like):
        parts = [_node(*pair, kind, factor) for pair in zip(node, like, strict=True)]
        make = type(like)
        return make(*parts) if hasattr(like, "_fields") else make(parts)
    raise _wrapped_differently(node, like)


def _unchanged(node: Any, like: Any) -> Any:
    """The state of another transformation, which is the same in both."""
    if jax.tree.structure(node) != jax.tree.structure(like):
        raise _wrapped_differently(node, like)
    return jax.tree.map(_put, node, like)


def _wrapped_differently(node: Any, like: Any) -> ValueError:
    return ValueError(
        f"The state holds a {type(node).__name__} where tx has a {type(like).__name__}, or one of "
        "another structure: wrap both optimizers alike, and change nothing but the one inside."
    )


def _is_partition(node: Any) -> bool:
    groups = getattr(node, "inner_states", None)
    return isinstance(groups, Mapping) and {*groups} == {"muon", "adam"}


def _partition(node: Any, like: Any, kind: type, factor: float) -> Any:
    """The state of a whole optimizer: Muon's group and AdamW's, each a chain behind a mask."""
    new = {}
    held = {name: _held(group) for name, group in node.inner_states.items()}
    wanted = {name: _held(group) for name, group in like.inner_states.items()}
    _check_groups(held, wanted)
    for name, group in like.inner_states.items():
        theirs = [*node.inner_states[name].inner_state]
        new[name] = group._replace(
            inner_state=tuple(_link(theirs, part, kind, factor) for part in group.inner_state)
        )
    return like._replace(inner_states=new)


def _link(theirs: list[Any], like: Any, kind: type, factor: float) -> Any:
    """One transformation's state in a group's chain, which has other links in each library."""
    first = theirs[0]
    if isinstance(like, MuonState | OptaxMuonState):
        return _momentum(first, like, factor)
    if isinstance(like, optax.ScaleByAdamState):
        moments = [_by_path(getattr(first, name), getattr(like, name)) for name in ("mu", "nu")]
        return like._replace(count=_put(first.count, like.count), mu=moments[0], nu=moments[1])
    if isinstance(like, optax.ScaleByScheduleState):
        return like._replace(count=_put(first.count, like.count))
    return like


def _held(group: Any) -> dict[Path, tuple[int, ...]]:
    """The leaves that a group has moments of."""
    leaves, _ = flatten_with_names(group.inner_state[0].mu)
    return {path: tuple(leaf.shape) for path, leaf in leaves}


def _check_groups(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise where a leaf changes its optimizer: no momentum can be made of AdamW's moments."""
    moved = [
        f"{show(path)} {shape}: {_NAME[other]} updated it, and {_NAME[name]} would now"
        for name, other in (("muon", "adam"), ("adam", "muon"))
        for path, shape in wanted[name].items()
        if path in held[other]
    ]
    if moved:
        listed = "; ".join(moved[:_SHOWN]) + (f"; {len(moved)} leaves" if moved[_SHOWN:] else "")
        raise ValueError(
            f"The two optimizers divide the parameters differently, and one's moments are none of "
            f"the other's: {listed}. Give both the same muon_weight_dimension_numbers. Optax's "
            "default is lambda params: jax.tree.map(lambda x: MuonDimensionNumbers() if x.ndim == "
            "2 else None, params)."
        )


_NAME = {"muon": "Muon", "adam": "AdamW"}


def _momentum(node: Any, like: Any, factor: float) -> Any:
    scaled = jax.tree.map(lambda m: _times(m, factor), node.mu)
    return like._replace(count=_put(node.count, like.count), mu=_by_path(scaled, like.mu))


def _times(moment: jax.Array, factor: float) -> jax.Array:
    wide = jnp.promote_types(moment.dtype, jnp.float32)
    return moment.astype(wide) * jnp.asarray(factor, jnp.finfo(wide).dtype)


def _by_path(tree: Any, like: Any) -> Any:
    """The arrays of `tree` in the places of `like`."""
    found = dict(flatten_with_names(tree)[0])
    leaves, structure = flatten_with_names(like)
    for path, leaf in leaves:
        if path not in found:
            raise ValueError(f"The state holds nothing for {show(path)}, shape {leaf.shape}.")
        if found[path].shape != leaf.shape:
            raise ValueError(
                f"{show(path)} has shape {leaf.shape}, but its moment in the state has "
                f"{found[path].shape}."
            )
    return structure.unflatten([_put(found[path], leaf) for path, leaf in leaves])


def _put(value: Any, like: Any) -> Any:
    """A value in the dtype and the place of another."""
    if not isinstance(like, jax.Array):
        return value
    value = jnp.asarray(value).astype(like.dtype)
    return jax.device_put(value, like.sharding) if like.committed else value
