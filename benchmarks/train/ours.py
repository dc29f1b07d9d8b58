"""Our side of `benchmarks.train`: the example's model and training step.

Both sides have the same calls, which block until their work is done:

    forward            the loss, without what a backward pass needs
    gradient           the loss and every gradient
    update NAME        clipping and the optimizer, of gradients that are there
    step NAME          all of a training step; returns its loss
"""

import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.moonlight.huggingface.config import ModelConfig
from examples.moonlight.model.config import MoonlightConfig
from examples.moonlight.model.dense import Dense, DenseConfig
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.experts import RouterBias
from examples.moonlight.model.language_model import next_token_loss
from examples.moonlight.model.moonlight import Moonlight
from examples.moonlight.training.optimizers import make_optimizer
from examples.moonlight.training.steps import TrainState, make_train_steps

Family = Literal["moonlight", "llama", "qwen2"]
Optimizer = Literal["muon", "adamw"]
Calls = dict[str, Callable[[], Any]]

LEARNING_RATE, WEIGHT_DECAY, BIAS_RATE = 3e-4, 0.1, 1e-3


def config_of(family: Family, moonlight: MoonlightConfig) -> ModelConfig:
    """A Moonlight, or a dense model of its width, depth and vocabulary."""
    if family == "moonlight":
        return moonlight
    return DenseConfig(
        vocab_size=moonlight.vocab_size,
        hidden_size=moonlight.hidden_size,
        num_hidden_layers=moonlight.num_hidden_layers,
        num_attention_heads=moonlight.num_attention_heads,
        num_key_value_heads=moonlight.num_attention_heads // 2,
        intermediate_size=moonlight.intermediate_size,
        max_position_embeddings=moonlight.max_position_embeddings,
        tie_word_embeddings=family == "qwen2",
        attention_bias=family == "qwen2",
    )


def build_model(
    config: ModelConfig, seed: int = 0, dtype: jax.typing.DTypeLike = jnp.float32
) -> Moonlight | Dense:
    """The model as the example runs it here: float32 weights, computing in `dtype`."""
    on_cpu = jax.default_backend() == "cpu"
    execution = Execution(dtype=dtype, experts="dense" if on_cpu else "ragged", unroll=on_cpu)

    def make() -> Moonlight | Dense:
        if isinstance(config, MoonlightConfig):
            return Moonlight(config, rngs=nnx.Rngs(seed), execution=execution)
        return Dense(config, rngs=nnx.Rngs(seed), execution=execution)

    return nnx.jit(make)()


def build_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    tokens_bt: jax.Array,
) -> tuple[Callable[[], float], float]:
    """A training step of one batch that goes on from the last one, and returns its loss.

    Args:
        graphdef: The model's structure.
        optimizer: With the learning rate in it.
        state: Where the first step begins; its buffers are used again.
        tokens_bt: The batch, int32 `[batch, time + 1]`.

    Returns:
        The step, and the seconds of tracing and compiling it.
    """
    steps = make_train_steps(
        graphdef, optimizer, optax.constant_schedule(LEARNING_RATE), bias_rate=BIAS_RATE
    )
    args = (tokens_bt[None, None], jnp.int32(0), jnp.int32(1))
    start = time.perf_counter()
    compiled = jax.jit(steps, donate_argnums=0).lower(state, *args).compile()
    compile_s = time.perf_counter() - start
    held = [state]

    def call() -> float:
        held[0], measured, _ = jax.block_until_ready(compiled(held[0], *args))
        return float(measured.loss[0])

    return call, compile_s


class Ours:
    """The example's model and training step.

    Args:
        config: The architecture.
        tokens_bt: One batch, int32 `[batch, time + 1]`.
        optimizers: Which to build steps for.
        seed: Of the weights.

    Attributes:
        calls: By the names above.
        model: The model that was split.
        params: Its first weights.
        bias: Its first router biases.
        compile_seconds: Tracing and compiling, by call.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokens_bt: np.ndarray,
        optimizers: tuple[Optimizer, ...],
        seed: int = 0,
    ):
        model = build_model(config, seed)
        graphdef, params, bias = nnx.split(model, nnx.Param, RouterBias)
        self.model, self.params, self.bias = model, params, bias
        self.compile_seconds: dict[str, float] = {}
        tokens = jnp.asarray(tokens_bt)
        held: dict[str, Any] = {}

        def loss(params: nnx.State, bias: nnx.State, tokens_bt: jax.Array) -> jax.Array:
            return next_token_loss(nnx.merge(graphdef, params, bias), tokens_bt)[0]

        forward = self._compiled("forward", jax.jit(loss), params, bias, tokens)
        gradient = self._compiled(
            "gradient", jax.jit(jax.value_and_grad(loss)), params, bias, tokens
        )
        self.calls: Calls = {
            "forward": lambda: jax.block_until_ready(forward(params, bias, tokens)),
            "gradient": lambda: jax.block_until_ready(gradient(params, bias, tokens)),
        }
        _, grads = gradient(params, bias, tokens)
        for name in optimizers:
            optimizer = make_optimizer(name, optax.constant_schedule(LEARNING_RATE), WEIGHT_DECAY)
            # Copies, because both calls donate what they are given.
            opt_state = jax.jit(optimizer.init)(params)
            state = jax.tree.map(jnp.copy, TrainState(params, bias, opt_state))
            held[f"update {name}"] = jax.tree.map(jnp.copy, (state.params, state.opt_state))
            self.calls[f"update {name}"] = self._update(name, optimizer, held, grads)
            step, seconds = build_step(graphdef, optimizer, state, tokens)
            self.calls[f"step {name}"], self.compile_seconds[f"step {name}"] = step, seconds

    def _compiled(self, name: str, jitted: Any, *args: Any) -> Any:
        start = time.perf_counter()
        compiled = jitted.lower(*args).compile()
        self.compile_seconds[name] = time.perf_counter() - start
        return compiled

    def _update(
        self,
        name: str,
        optimizer: optax.GradientTransformation,
        held: dict[str, Any],
        grads: nnx.State,
    ) -> Callable[[], Any]:
        name = f"update {name}"

        def update(state: Any, grads: nnx.State) -> Any:
            params, opt_state = state
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        compiled = self._compiled(name, jax.jit(update, donate_argnums=0), held[name], grads)

        def call() -> None:
            held[name] = jax.block_until_ready(compiled(held[name], grads))

        return call
