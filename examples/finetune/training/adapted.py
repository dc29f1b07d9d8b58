"""A model with the adapters that a command line asks for."""

from typing import Any

from flax import nnx

from examples.finetune.lora.adapters import LoraConfig, add_lora
from examples.moonlight.huggingface.config import ModelConfig
from examples.moonlight.huggingface.pretrained import make_model
from examples.moonlight.model.execution.options import Execution


def lora_config(args: Any) -> LoraConfig:
    """The adapters that a command line asks for."""
    targets = tuple(args.target_modules)
    return LoraConfig(
        rank=args.lora_rank,
        alpha=args.lora_alpha,
        dropout=args.lora_dropout,
        target_modules="all-linear" if targets == ("all-linear",) else targets,
    )


def adapted(config: ModelConfig, execution: Execution, lora: LoraConfig, seed: int = 0) -> Any:
    """A model with new adapters, all else of it being shapes only."""
    model = nnx.eval_shape(lambda: make_model(config, rngs=nnx.Rngs(0), execution=execution))
    add_lora(model, lora, nnx.Rngs(seed))
    return model
