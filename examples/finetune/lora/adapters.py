"""LoRA (Hu et al. 2021, arXiv 2106.09685) on the linear layers of the Moonlight example's models.

    y = x W + alpha / r * drop(x) A B        A [in, r], B [r, out]; W is not trained

A starts uniform in +-1/sqrt(in), which is PEFT's `kaiming_uniform_(a=sqrt(5))`, and B at zero, so
that a model with new adapters computes what it did before. Layers are stacks here: a pair of a
stack is `[l, in, r]` and `[l, r, out]`, every layer with its own draws.

A factor is an `nnx.LoRAParam`, and that *is* an `nnx.Param`: split with the narrower type first,

    nnx.split(model, nnx.LoRAParam, DropoutKey, nnx.Param, RouterBias)

or the base is trained along. `model.eval()` turns dropout off; `merge.py` makes a plain model.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from examples.finetune.lora.targets import EXPERTS, find_targets
from examples.moonlight.model.execution.sharding import ModelSharding
from examples.moonlight.model.experts import EXPERT_STACKS, Experts
from examples.moonlight.model.layers import Linear

LoraParam = nnx.LoRAParam


class DropoutKey(nnx.Variable):
    """Data of a random key, one per layer of a stack, uint32 `[*stack, key size]`.

    A stream of `nnx.Rngs` would not do: `scan_layers` drops what a layer does to its state, and the
    mask would be the same at each step. Here the trainer folds the step into the keys: `folded`.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What adapters a model gets.

    Attributes:
        rank: Inner width r of a pair.
        alpha: The product is scaled by `alpha / rank`.
        dropout: Share of the inputs of A that is zeroed in training, the others being divided by
            what is left. Experts have none: their pairs are added to the weights.
        target_modules: "all-linear", or names, see `targets.py`. Experts only by their name.
    """

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.05
    target_modules: str | tuple[str, ...] = "all-linear"

    def __post_init__(self):
        """Raises ValueError for a field out of its range."""
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank must be a positive integer, got {self.rank!r}.")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be a positive number, got {self.alpha!r}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, got {self.dropout!r}.")
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))

    @property
    def scale(self) -> float:
        """Factor of `A B`."""
        return self.alpha / self.rank


def add_lora(model: Any, config: LoraConfig, rngs: nnx.Rngs) -> tuple[str, ...]:
    """Gives linear layers of a model adapters, in place, where they lie on its mesh.

    Works on a model with weights, and under `jax.jit` or `nnx.eval_shape`.

    Args:
        model: A `LanguageModel`.
        config: Which layers, and how.
        rngs: Source of the initial A and of dropout's keys, streams `params` and `dropout`: the
            same numbers on every mesh.

    Returns:
        The modules that have adapters now, such as "layers.self_attn.q_proj".

    Raises:
        ValueError: A target is not there, the model has adapters already, or experts are asked for
            with dropout.
    """
    if has_adapters(model):
        raise ValueError("the model has adapters already: merge them first, see merge.py")
    where = model.execution.sharding
    found = find_targets(model, config.target_modules)
    experts = [path for path, module in found.items() if isinstance(module, Experts)]
    if experts and config.dropout:
        raise ValueError(
            f"dropout is {config.dropout}, and {EXPERTS} are among the targets: their pairs are "
            "added to the weights, behind which no input is left to drop. Set it to 0."
        )
    for path, module in found.items():
        names = tuple(path.split("."))
        if isinstance(module, Experts):
            for name in EXPERT_STACKS:
                pair = _pair(getattr(module, name).shape, config, rngs)
                for factor, value in zip("ab", pair, strict=True):
                    placed = _placed(where, (*names, f"{name}_lora_{factor}"), value)
                    setattr(module, f"{name}_lora_{factor}", LoraParam(placed))
        else:
            a, b = _pair(module.kernel.shape, config, rngs)
            module.lora_a = LoraParam(_placed(where, (*names, "lora_a"), a))
            module.lora_b = LoraParam(_placed(where, (*names, "lora_b"), b))
            if config.dropout:
                keys = _keys(rngs.dropout(), module.kernel.shape[:-2])
                module.lora_key = DropoutKey(_placed(where, (*names, "lora_key"), keys))
            module.lora_dropout, module.deterministic = config.dropout, False
        module.lora_scale = config.scale
    return tuple(found)


def adapted_modules(model: Any) -> Iterator[tuple[str, Any]]:
    """The `Linear` and `Experts` modules of a model that have adapters, by their dotted path."""
    for path, module in nnx.iter_modules(model):
        factor = {Linear: "lora_a", Experts: f"{EXPERT_STACKS[0]}_lora_a"}.get(type(module))
        if factor is not None and getattr(module, factor) is not None:
            yield ".".join(map(str, path)), module


def has_adapters(model: Any) -> bool:
    """Whether a model has any."""
    return next(adapted_modules(model), None) is not None


def trainable(tuner_type: Literal["lora", "full"]) -> Any:
    """The variables that training changes, as an nnx filter; the router's bias is in neither.

    Raises:
        ValueError: There is no such tuner.
    """
    if tuner_type not in ("lora", "full"):
        raise ValueError(f'tuner_type must be "lora" or "full", got {tuner_type!r}.')
    return nnx.LoRAParam if tuner_type == "lora" else nnx.Param


def folded(keys: nnx.State, number: int | jax.Array) -> nnx.State:
    """Dropout's keys for one step, or one micro-batch: other masks for every number.

    Args:
        keys: The `DropoutKey` part of a split model.
        number: An integer, such as the step.
    """

    def fold(data: jax.Array) -> jax.Array:
        keys = jax.random.wrap_key_data(data.reshape(-1, data.shape[-1]))
        folded = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
        return jax.random.key_data(folded).reshape(data.shape)

    return jax.tree.map(fold, keys)


def _pair(
    shape: tuple[int, ...], config: LoraConfig, rngs: nnx.Rngs
) -> tuple[jax.Array, jax.Array]:
    *stack, rows, cols = shape
    bound = rows**-0.5
    a = jax.random.uniform(rngs.params(), (*stack, rows, config.rank), jnp.float32, -bound, bound)
    return a, jnp.zeros((*stack, config.rank, cols), jnp.float32)


def _keys(key: jax.Array, stack: tuple[int, ...]) -> jax.Array:
    return jax.random.key_data(jax.random.split(key, stack))


def _placed(where: ModelSharding, names: tuple[str, ...], value: jax.Array) -> jax.Array:
    spec = where.param_spec(names, value.shape)
    if isinstance(value, Tracer):
        return where.constrain(value, *spec)
    return where.constrain(where.spread(value, *spec), *spec)
