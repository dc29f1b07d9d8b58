"""A checkpoint of a fine-tuning: what it says of itself, before any of its weights is read."""

from pathlib import Path
from typing import Any, NamedTuple

from examples.finetune.base import Base, find_base
from examples.finetune.lora.adapters import LoraConfig
from examples.finetune.training.place import ARGS, PREFIX
from examples.moonlight.common.files import read_json
from examples.moonlight.common.untrusted import is_there, shown
from examples.moonlight.data.tokenizer import TOKENIZER
from examples.moonlight.generation.model_folder import config_of
from examples.moonlight.huggingface.config import ModelConfig
from examples.moonlight.run_folder.storage import kept_steps


class Checkpoint(NamedTuple):
    """A checkpoint of a fine-tuning, nothing of its weights being read yet.

    Attributes:
        folder: checkpoint-N, or what it was copied to.
        args: Its `args.json`.
        config: The architecture of its model.
        lora: The adapters that it holds; None of a model that was trained in full.
        base: The model that it began with; None of a model that was trained in full.
        texts: The folder with its tokenizer and its chat template.
    """

    folder: Path
    args: dict[str, Any]
    config: ModelConfig
    lora: LoraConfig | None
    base: Base | None
    texts: Path

    @property
    def system(self) -> str | None:
        """The system message that it was trained with, a text or the name of a .txt file."""
        return self.args.get("system")


def find_checkpoint(folder: Path, model: str | None = None) -> Checkpoint:
    """Reads what a checkpoint says of itself.

    Args:
        folder: checkpoint-N; or a run's output folder, whose last is taken.
        model: The base, where it has moved since; None takes it from `args.json`.

    Raises:
        FileNotFoundError: It is no checkpoint, or its base or its tokenizer is not there.
        ValueError: Its `args.json` is none of this version's.
    """
    if kept := kept_steps(folder, PREFIX):
        folder = folder / f"{PREFIX}{kept[-1]}"
    path = folder / ARGS
    if not is_there(path):
        raise FileNotFoundError(
            f"--adapters {folder}: found no {ARGS}: give a checkpoint of examples.finetune.sft, "
            "such as output/checkpoint-20"
        )
    args = read_json(path)
    config = config_of(args, path)
    lora, base = None, None
    try:
        if args["tuner_type"] == "lora":
            targets = tuple(args["target_modules"])
            lora = LoraConfig(
                rank=args["lora_rank"],
                alpha=args["lora_alpha"],
                dropout=args["lora_dropout"],
                target_modules="all-linear" if targets == ("all-linear",) else targets,
            )
            base = find_base(model or args["base"]["folder"], args["base"]["checkpoint"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: {shown(error)} is missing or no value: the file is damaged, or of another "
            "version; train again"
        ) from error
    candidates = [folder, folder.absolute().parent, *([] if base is None else [base.folder])]
    texts = next((place for place in candidates if is_there(place / TOKENIZER)), candidates[-1])
    return Checkpoint(folder, args, config, lora, base, texts)
