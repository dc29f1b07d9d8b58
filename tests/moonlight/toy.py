"""A run of seconds: a toy architecture and corpus. As a script, the subject of the kill tests."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

from examples.moonlight.model.config import MoonlightConfig
from examples.moonlight.model.dense import DenseConfig
from examples.moonlight.model.experts import RouterBias
from examples.moonlight.model.moonlight import Moonlight
from examples.moonlight.run_folder.checkpoint import Checkpoints, Restored
from examples.moonlight.run_folder.retention import Retention
from examples.moonlight.train import main
from examples.moonlight.training.args import Args
from examples.moonlight.training.optimizers import make_optimizer
from examples.moonlight.training.steps import TrainState

CONFIG = dataclasses.replace(
    MoonlightConfig.preset("tiny"),
    vocab_size=300,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    intermediate_size=32,
    moe_intermediate_size=8,
    n_routed_experts=4,
)

DENSE = DenseConfig(
    vocab_size=300,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=32,
    max_position_embeddings=16,
)


def write_corpus(path: Path) -> Path:
    path.write_text("".join(f"line {i} holds {i * i % 101}\n" for i in range(2000)))
    return path


def arguments(folder: Path, **changes) -> Args:
    """Arguments of a toy run in `folder/run`, with its data and its cache beside it."""
    corpus = folder / "corpus.txt"
    settings = {
        "output_dir": folder / "run",
        "data": (str(corpus if corpus.exists() else write_corpus(corpus)),),
        "cache_dir": folder / "cache",
        "steps": 12,
        "batch_size": 2,
        "sequence_length": 16,
        "eval_every": 4,
        "eval_windows": 4,
        "checkpoint_every": 4,
        "steps_per_call": 3,
        "prompt": "line ",
    }
    return Args(**settings | changes)


def split(
    config: MoonlightConfig, optimizer: optax.GradientTransformation
) -> tuple[nnx.GraphDef, TrainState]:
    """A model and the state that its training begins with."""
    model = Moonlight(config, rngs=nnx.Rngs(0))
    graphdef, params, bias = nnx.split(model, nnx.Param, RouterBias)
    return graphdef, TrainState(params, bias, optimizer.init(params))


def restore(run: Path) -> Restored:
    """The newest checkpoint of a toy run with the default optimizer."""
    settings = json.loads((run / "settings.json").read_text())
    optimizer = make_optimizer("muon", lambda _: 1.0, 0.1)
    _, state = split(MoonlightConfig(**settings["config"]), optimizer)
    checkpoints = Checkpoints(run / "checkpoints", Retention(100))
    model = {"params": state.params, "router_bias": state.bias}
    restored = checkpoints.restore(model=model, optimizer=state.opt_state)
    checkpoints.close()
    return restored


def assert_same_state(ours: Path, theirs: Path) -> None:
    """Checks that two runs' newest checkpoints have the same bits."""
    trees = [
        (run.model, run.optimizer, run.progress["data"]) for run in map(restore, (ours, theirs))
    ]
    for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_array_equal(a, b)


def to_be_killed(folder: Path, steps: int) -> Args:
    """Arguments of a run that is resumed wherever it was killed."""
    settings = {"checkpoint_every": 7, "gradient_accumulation": 2, "resume": True}
    return arguments(folder, steps=steps, **settings)


if __name__ == "__main__":
    main(to_be_killed(Path(sys.argv[1]), int(sys.argv[2])), CONFIG)
