"""What tells early whether a large training stays stable (arXiv 2502.16982, 3.4 and Appendix F).

Three sources, each at its own price:

- The forward pass hands out `ModelStats`: attention logits and output RMS by layer and head, loads
  of the experts. It measures them while it computes, in every step of a monitored run.
- The last step of a call into XLA takes the RMS of weights and updates, layer by layer and matrix
  by matrix: one pass over both, in the program of the step.
- At a record, the singular values of every matrix, outside of the program, one layer at a time.

A record is of one step, not of those since the last record: it depends on nothing that a checkpoint
would have to keep, and a resumed run writes the same records.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from examples.moonlight.model.execution.sharding import on_host
from examples.moonlight.model.language_model import ModelStats
from examples.moonlight.model.moonlight import max_violation
from muon_jax import svd_entropy, update_rms

Record = dict[str, Any]

# The groups of the paper's Figure 4, by parameters' names. Embedding, head and norms are in none.
# The joint projection to latent and rotary key counts as keys and values, whose it is but for the
# rotary part; a model with grouped queries has k_proj and v_proj there.
GROUPS = {
    "AttnQO": r"self_attn/(q_proj|o_proj)",
    "AttnKV": r"self_attn/(kv_a_proj|kv_b_proj|k_proj|v_proj)",
    "Experts": r"mlp/experts/(gate_proj|up_proj|down_proj)",
    "SharedExperts": r"mlp/shared_experts/(gate_proj|up_proj|down_proj)",
    "Router": r"mlp/router",
    "Dense": r"mlp/(gate_proj|up_proj|down_proj)",
}


# --------------------------------------------------------------------------------------------------
# In the program of the step
# --------------------------------------------------------------------------------------------------


class Watched(NamedTuple):
    """What a call into XLA brings back of its last step.

    Attributes:
        stats: The forward pass's statistics, over all micro-batches.
        weight_rms: The RMS of the weights after the step, from `layer_rms`.
        update_rms: The RMS of the update, weight decay and clipping included, divided by the
            learning rate.
    """

    stats: ModelStats
    weight_rms: dict[str, jax.Array]
    update_rms: dict[str, jax.Array]


def layer_rms(tree: Any) -> dict[str, jax.Array]:
    """Root mean square of each parameter, of a stack's layers one by one.

    Args:
        tree: Parameters, or updates.

    Returns:
        From paths such as `layers/self_attn/q_proj` to float32 `[layers of the stack]` or scalars.
    """
    return {
        path: jax.vmap(update_rms)(leaf) if _is_stack(path) else update_rms(leaf)
        for path, leaf in _named(tree)
    }


# --------------------------------------------------------------------------------------------------
# At a record
# --------------------------------------------------------------------------------------------------


def svd_entropies(params: nnx.State) -> dict[str, float]:
    """SVD entropy of the weights, averaged over the matrices of each of the `GROUPS`.

    A layer's matrices of one name are taken at a time, so that of sharded weights never more than
    that is gathered on a device.

    Args:
        params: The model's parameters.

    Returns:
        From the names of those groups that the model has to values in [0, 1].
    """
    found: dict[str, list[np.ndarray]] = {group: [] for group in GROUPS}
    for path, leaf in _named(params):
        group = group_of(_split_layer(path)[1])
        if group is None:
            continue
        layers = list(leaf) if _is_stack(path) else [leaf]
        # A matrix and its transpose have one entropy: as wide ones, they share a program.
        wide = (x.mT if x.shape[-2] > x.shape[-1] else x for x in layers)
        found[group] += [on_host(_entropy(x)) for x in wide]
    return {
        group: float(np.mean(np.concatenate([np.ravel(value) for value in values])))
        for group, values in found.items()
        if values
    }


_entropy = jax.jit(svd_entropy)


def make_record(watched: Watched, svd: Mapping[str, float], grad_norm: float) -> Record:
    """A record for `MetricsLog`: plain numbers and lists.

    Args:
        watched: What the step measured.
        svd: What `svd_entropies` returned for the weights after it.
        grad_norm: Norm of the step's gradient, before clipping.

    Returns:
        `max_logit` and `hot_share` by layer and head; `attention_rms` and `mlp_rms` by layer;
        `load` and `max_violation` by layer with experts, and `dropped_share` if there is a
        capacity; `weight_rms` and `update_rms` by kind of parameter, then by layer (None where a
        layer has no such parameter; one number outside of the layers); `svd_entropy` by group;
        `grad_norm`.
    """
    stats, weight_rms, update_rms = jax.device_get(watched)
    layers = len(stats.max_logit_lh)
    record: Record = {
        "grad_norm": grad_norm,
        "max_logit": stats.max_logit_lh.tolist(),
        "hot_share": stats.hot_share_lh.tolist(),
        "attention_rms": stats.attention_rms_l.tolist(),
        "mlp_rms": stats.mlp_rms_l.tolist(),
    }
    if stats.load_le is not None:
        record["load"] = stats.load_le.tolist()
        record["max_violation"] = np.asarray(max_violation(stats.load_le)).tolist()
        if stats.dropped_l is not None:
            record["dropped_share"] = (stats.dropped_l / stats.load_le.sum(axis=1)).tolist()
    return record | {
        "weight_rms": _by_kind(weight_rms, layers),
        "update_rms": _by_kind(update_rms, layers),
        "svd_entropy": dict(svd),
    }


def board_scalars(record: Record) -> dict[str, float]:
    """A record's scalars for TensorBoard: one per layer, or one per kind of matrix, or one."""
    scalars = {"grad_norm": record["grad_norm"]}
    for name, reduce in (("max_logit", max), ("hot_share", np.mean)):
        for layer, heads in enumerate(record[name]):
            scalars[f"{name}/layer_{layer:02}"] = float(reduce(heads))
    for name in ("attention_rms", "mlp_rms", "max_violation", "dropped_share"):
        values = record.get(name, [])
        first = len(record["max_logit"]) - len(values)  # those with experts come last
        for layer, value in enumerate(values, first):
            scalars[f"{name}/layer_{layer:02}"] = value
    for name in ("weight_rms", "update_rms"):
        for kind, values in record[name].items():
            scalars[f"{name}/{kind.replace('/', '.')}"] = rms_over_layers(values)
    for group, value in record["svd_entropy"].items():
        scalars[f"svd_entropy/{group}"] = value
    return scalars


def rms_over_layers(values: float | list[float | None]) -> float:
    """One number for a kind of parameter, from a record's numbers by layer."""
    there = values if isinstance(values, list) else [values]
    return float(np.sqrt(np.mean([value**2 for value in there if value is not None])))


# --------------------------------------------------------------------------------------------------
# Paths
# --------------------------------------------------------------------------------------------------


def group_of(kind: str) -> str | None:
    """Which of the `GROUPS` a kind of parameter belongs to, if any."""
    return next((group for group, names in GROUPS.items() if re.fullmatch(names, kind)), None)


def _split_layer(path: str) -> tuple[int | None, str]:
    """A parameter's layer, if that is one of `first_layers`, and its name within a layer."""
    first = re.match(r"first_layers/(\d+)/", path)
    if first:
        return int(first[1]), path[first.end() :]
    return None, path.removeprefix("layers/")


def _is_stack(path: str) -> bool:
    return path.startswith("layers/")


def _by_kind(values: Mapping[str, np.ndarray], layers: int) -> dict[str, Any]:
    kinds: dict[str, Any] = {}
    for path, value in values.items():
        layer, name = _split_layer(path)
        if layer is None and not _is_stack(path):
            kinds[name] = float(value)
            continue
        of_layers = kinds.setdefault(name, [None] * layers)
        if layer is None:
            of_layers[layers - len(value) :] = value.tolist()
        else:
            of_layers[layer] = float(value)
    return kinds


def _named(tree: Any) -> list[tuple[str, Any]]:
    """Arrays by path; a layer's kernel or scale has its layer's name."""
    named = []
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        names = [jax.tree_util.keystr((key,), simple=True) for key in keys]
        names = [*names[:-1], *(n for n in names[-1:] if n != "value")]
        path = re.sub(r"/(kernel|scale|embedding)$", "", "/".join(names))
        named.append((path, leaf))
    return named
