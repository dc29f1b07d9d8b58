"""How far a mesh's losses are from one device's, and why: `python -m benchmarks.rounding`.

The example's model takes the same steps on one device and on meshes of eight, on the same weights
and batches. Sharded programs add in another order, so that their float32 gradients differ in the
last bits. Newton-Schulz in bfloat16 rounds to 8 bits: where a last bit of float32 makes an entry
round the other way, it becomes 2^-8 of the entry, and five steps carry it on. With
`ns_dtype="float32"` nothing is rounded to 8 bits; what is left is float32's own difference. AdamW
stands beside both.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from rich.table import Table

from benchmarks.harness import check_known, environment, make_console, write_json
from examples.moonlight.common.command_line import CommandLine
from examples.moonlight.model.config import MoonlightConfig
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.execution.sharding import BATCH_AXES, ModelSharding, make_mesh
from examples.moonlight.model.experts import RouterBias
from examples.moonlight.model.language_model import next_token_loss
from examples.moonlight.model.moonlight import Moonlight
from muon_jax import muon, opt_state_shardings

DEVICES = 8
OPTIMIZERS = ("muon bfloat16", "muon float32", "adamw")
"""The dtype is that of Newton-Schulz."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Losses on meshes of eight devices against those on one.

    Attributes:
      optimizers: of "muon bfloat16", "muon float32" and "adamw".
      meshes: as the example's --mesh.
      preset: the architecture.
      steps: optimizer steps.
      batch_size: sequences of a step.
      sequence_length: tokens that the model reads of each.
      learning_rate: of every step.
      seeds: each with weights and batches of its own.
      output: where the JSON goes.
    """

    optimizers: tuple[str, ...] = OPTIMIZERS
    meshes: tuple[str, ...] = ("data=8", "data=2,expert=2,tensor=2", "fsdp=2,expert=2,tensor=2")
    preset: str = "tiny"
    steps: int = 10
    batch_size: int = 8
    sequence_length: int = 64
    learning_rate: float = 2e-3
    seeds: int = 3
    output: Path = Path("runs/benchmarks/rounding.json")


def text_batches(steps: int, batch: int, length: int, seed: int) -> np.ndarray:
    """Bytes of the licence, a text that stays: int32 `[steps, batch, length + 1]`."""
    text = np.frombuffer((Path(__file__).parents[1] / "LICENSE").read_bytes(), np.uint8)
    starts = np.random.default_rng(seed).integers(0, len(text) - length, (steps, batch, 1))
    return text[starts + np.arange(length + 1)].astype(np.int32)


class Trainer:
    """A model and an optimizer on a mesh, compiled once.

    Args:
      config: the architecture.
      optimizer: one of `OPTIMIZERS`.
      learning_rate: of every step.
      mesh: as the example's --mesh; None is one device.
    """

    def __init__(
        self, config: MoonlightConfig, optimizer: str, learning_rate: float, mesh: str | None
    ):
        self._where = ModelSharding(None if mesh is None else make_mesh(mesh))
        execution = Execution(sharding=self._where)
        self._make = lambda seed: Moonlight(
            config, rngs=nnx.Rngs(jax.random.key(seed)), execution=execution
        )
        model = nnx.eval_shape(lambda: self._make(0))
        graphdef, params, bias = nnx.split(model, nnx.Param, RouterBias)
        self._shardings = self._where.param_shardings(params)
        tx = self._make_optimizer(optimizer, learning_rate)
        self._batch = self._where.place(None, BATCH_AXES)

        def start(seed: jax.Array):
            params, bias = nnx.split(self._make(seed), nnx.Param, RouterBias)[1:]
            return params, bias, tx.init(params)

        def loss_fn(params: nnx.State, bias: nnx.State, tokens_bt: jax.Array) -> jax.Array:
            return next_token_loss(nnx.merge(graphdef, params, bias), tokens_bt)[0]

        def run(state: Any, tokens_sbt: jax.Array) -> jax.Array:
            def step(state: Any, tokens_bt: jax.Array):
                params, bias, opt_state = state
                loss, grads = jax.value_and_grad(loss_fn)(params, bias, tokens_bt)
                updates, opt_state = tx.update(grads, opt_state, params)
                return (optax.apply_updates(params, updates), bias, opt_state), loss

            return jax.lax.scan(step, state, tokens_sbt)[1]

        bias_shardings = jax.tree.map(lambda _: self._where.place(), bias)
        # AdamW's moments lie as its parameters do, without being told.
        zero1 = self._where.mesh is not None and optimizer != "adamw"
        opt_state = self._state_shardings(tx, params) if zero1 else None
        self._start = jax.jit(start, out_shardings=(self._shardings, bias_shardings, opt_state))
        self._run = jax.jit(run)

    def losses(self, seed: int, tokens_sbt: np.ndarray) -> np.ndarray:
        """The loss before each step's update, float32 `[steps]`."""
        return np.asarray(self._run(self._start(seed), jax.device_put(tokens_sbt, self._batch)))

    def _make_optimizer(self, name: str, rate: float) -> optax.GradientTransformation:
        """The example's, but for the dtype of Newton-Schulz."""
        if name == "adamw":
            optimizer = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.1)
        else:
            mesh = self._where.mesh
            specs = None if mesh is None else self._shardings
            optimizer = muon(rate, ns_dtype=name.split()[1], mesh=mesh, param_specs=specs)
        return optax.chain(optax.clip_by_global_norm(1.0), optimizer)

    def _state_shardings(self, tx: optax.GradientTransformation, params: nnx.State) -> Any:
        placed = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            params,
            self._shardings,
        )
        return opt_state_shardings(tx, placed)


def measure(
    config: MoonlightConfig,
    optimizer: str,
    meshes: Sequence[str],
    batches: Sequence[np.ndarray],
    learning_rate: float,
) -> dict[str, list[list[float]]]:
    """Losses on one device, under "one device", and on each mesh: one list for each seed."""
    losses = {}
    for name in ("one device", *meshes):
        mesh = None if name == "one device" else name
        trainer = Trainer(config, optimizer, learning_rate, mesh)
        losses[name] = [trainer.losses(seed, x).tolist() for seed, x in enumerate(batches)]
    return losses


def differences(losses: dict[str, list[list[float]]]) -> dict[str, dict[str, float]]:
    """Largest distance of a mesh's losses from one device's, over seeds: first, last, any step."""
    one = np.array(losses["one device"])
    rows = {}
    for mesh, there in losses.items():
        if mesh != "one device":
            away = np.abs(np.array(there) - one)
            rows[mesh] = {
                "first": float(away[:, 0].max()),
                "last": float(away[:, -1].max()),
                "largest": float(away.max()),
            }
    return rows


def main(args: Args) -> dict[str, Any]:
    """Train with every optimizer on every mesh, print the differences, write the JSON."""
    check_known(args.optimizers, OPTIMIZERS)
    console = make_console()
    config = dataclasses.replace(MoonlightConfig.preset(args.preset), vocab_size=256)
    batches = [
        text_batches(args.steps, args.batch_size, args.sequence_length, seed)
        for seed in range(args.seeds)
    ]
    table = Table(title=f"distance of the loss from one device's, {args.steps} steps")
    for column in ("optimizer", "mesh", "first step", "last step", "largest"):
        table.add_column(column, justify="left" if column in ("optimizer", "mesh") else "right")
    record: dict[str, Any] = {"losses": {}, "differences": {}}
    for name in args.optimizers:
        losses = measure(config, name, args.meshes, batches, args.learning_rate)
        record["losses"][name] = losses
        record["differences"][name] = differences(losses)
        for mesh, row in record["differences"][name].items():
            table.add_row(name, mesh, *(f"{row[x]:.1e}" for x in ("first", "last", "largest")))
            console.print(f"{name}, {mesh}: {row['last']:.1e} at the end", highlight=False)
    console.print(table)
    settings = {k: v for k, v in dataclasses.asdict(args).items() if k != "output"}
    record |= {
        "arguments": settings,
        "environment": environment("jax", "jaxlib", "flax", "optax", "muon-jax"),
    }
    write_json(args.output, record)
    console.print(f"written to {args.output}", soft_wrap=True)
    return record


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    CommandLine("benchmarks.rounding", Args, __doc__).run(main)
