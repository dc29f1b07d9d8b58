"""Adapters into the weights: `W + alpha / r * A B`, and no adapters left.

What decodes or leaves the repository is a merged model: it is faster, and nothing that reads a
kernel by itself, as Moonlight's decoding does, can miss an adapter.
"""

from typing import Any

import jax
from flax import nnx
from jax.core import Tracer

from examples.finetune.lora.adapters import adapted_modules
from examples.moonlight.model.experts import EXPERT_STACKS, Experts


def merged(model: Any) -> Any:
    """A model without adapters that computes what this one does, dropout apart.

    Products are float32 at full precision, so that both agree to rounding. Weights without adapters
    are shared with the model that is given, which stays as it is.

    Args:
        model: A `LanguageModel`, with adapters or without; on a mesh, weights stay where they lie.
    """
    graphdef, state = nnx.split(model)
    plain: Any = nnx.merge(graphdef, state)
    for _, module in list(adapted_modules(plain)):
        if isinstance(module, Experts):
            for name in EXPERT_STACKS:
                setattr(module, name, _new(getattr(module, name), module.whole_stack(name)))
                setattr(module, f"{name}_lora_a", None)
                setattr(module, f"{name}_lora_b", None)
        else:
            module.kernel = _new(module.kernel, module.whole_kernel())
            module.lora_a = module.lora_b = module.lora_key = None
            module.lora_dropout, module.deterministic = 0.0, True
        module.lora_scale = 0.0
    return plain


def _new(variable: nnx.Param, value: jax.Array) -> nnx.Param:
    """Another variable: `nnx.merge` gives both models the same ones."""
    old = variable[...]
    value = value.astype(old.dtype)
    if not isinstance(value, Tracer):
        value = jax.device_put(value, old.sharding)
    return nnx.Param(value)
