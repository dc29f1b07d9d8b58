"""The model that fine-tuning begins with: a Hugging Face directory, or a run of ours."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from tokenizers import Tokenizer

from examples.moonlight.common.untrusted import is_there
from examples.moonlight.data.tokenizer import load_tokenizer
from examples.moonlight.generation.model_folder import OpenModel, open_model, run_config
from examples.moonlight.huggingface.config import CONFIG_FILE, ModelConfig
from examples.moonlight.huggingface.pretrained import check_pretrained
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.run_folder.folder import SETTINGS, checkpoints_of
from examples.moonlight.run_folder.storage import kept_steps

# What `make train` makes.
DEFAULT = Path("runs/moonlight")


class Base(NamedTuple):
    """A model that is there, nothing of its weights being read yet.

    Attributes:
        folder: A Hugging Face directory, or the folder of a run.
        checkpoint: The run's step; None of a directory.
        config: The architecture.
    """

    folder: Path
    checkpoint: int | None
    config: ModelConfig

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            ValueError: It cannot be read, or has more tokens than the model.
        """
        tokenizer = load_tokenizer(self.folder)
        if tokenizer.get_vocab_size() > self.config.vocab_size:
            raise ValueError(
                f"{self.folder}: the tokenizer has {tokenizer.get_vocab_size()} tokens, and the "
                f"model's vocabulary {self.config.vocab_size}: they do not belong together"
            )
        return tokenizer

    def load(self, execution: Execution, console: Console | None = None) -> OpenModel:
        """Reads the weights, as float32, onto the devices of an execution."""
        return open_model(
            self.folder,
            execution,
            checkpoint="last" if self.checkpoint is None else self.checkpoint,
            param_dtype=jnp.float32,
            console=console,
        )

    def record(self) -> dict[str, Any]:
        """What `args.json` holds of it."""
        return {"folder": str(self.folder.resolve()), "checkpoint": self.checkpoint}


def base_folder(model: str | None) -> Path:
    """The folder that `--model` names."""
    return DEFAULT if model is None else Path(model)


def find_base(model: str | None, checkpoint: int | None = None) -> Base:
    """The model that a command line names.

    Args:
        model: `--model`; None is what `make train` makes.
        checkpoint: The step of a run; None is the last.

    Raises:
        FileNotFoundError: It is not there; the message says what to type.
        ValueError: Its configuration or its files cannot be read.
    """
    folder = base_folder(model)
    if model is None and not is_there(folder / SETTINGS):
        raise FileNotFoundError(
            f"no --model is given, and the small one that `make train` makes is not in {DEFAULT}: "
            "type `make train`, which takes some minutes, or give --model with the folder of a "
            "Hugging Face model"
        )
    if not folder.is_dir():
        advice = "give the folder of a Hugging Face model, or of a run"
        if str(model).count("/") == 1 and not str(model).startswith((".", "/")):
            advice = (
                "nothing is downloaded here. If it is a model of Hugging Face's hub, fetch it with "
                f"`hf download {model} --local-dir {folder.name}` and give --model {folder.name}"
            )
        raise FileNotFoundError(f"--model {model}: there is no such folder; {advice}")
    if is_there(folder / CONFIG_FILE):
        return Base(folder, None, check_pretrained(folder))
    if not is_there(folder / SETTINGS):
        raise FileNotFoundError(
            f"--model {folder}: found neither {CONFIG_FILE}, of a Hugging Face directory, nor "
            f"{SETTINGS}, of a run of examples.moonlight.train"
        )
    kept = kept_steps(checkpoints_of(folder))
    if not kept or (checkpoint is not None and checkpoint not in kept):
        wanted = "no checkpoint" if checkpoint is None else f"no checkpoint of step {checkpoint}"
        raise FileNotFoundError(
            f"--model {folder}: that run has {wanted}; it keeps "
            f"{', '.join(map(str, kept)) or 'none'}"
        )
    return Base(folder, kept[-1] if checkpoint is None else checkpoint, run_config(folder))


def digest(tree: Any) -> str:
    """16 hexadecimal digits over every bit of a model's float32 arrays, wherever they lie.

    Each array is a sum of its words, times numbers that tell its places apart, modulo 2^32: exact,
    so that no order of adding and no mesh changes it.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get(_sums([leaf for _, leaf in leaves]))
    text = "".join(
        f"{jax.tree_util.keystr(path)}{leaf.shape}{int(total)}\n"
        for (path, leaf), total in zip(leaves, sums, strict=True)
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_base(expected: str, weights: Any, folder: Any) -> None:
    """Makes sure that adapters meet the weights that they were trained beside.

    Raises:
        ValueError: The weights are others.
    """
    if (found := digest(weights)) != expected:
        raise ValueError(
            f"{folder}: the adapters were trained beside the weights {expected}, and these are "
            f"{found}: give --model with the folder of the model that was fine-tuned"
        )


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    def one(leaf: jax.Array) -> jax.Array:
        words = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, length in enumerate(leaf.shape):
            index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            place = place * jnp.uint32(length) + index
        # Odd, so that no word is multiplied by something that loses bits.
        return jnp.sum(words * (place * jnp.uint32(2654435762) + jnp.uint32(1)), dtype=jnp.uint32)

    return [one(leaf) for leaf in leaves]
