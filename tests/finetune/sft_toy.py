"""Fine-tunings of seconds: toy models of every family, and sums."""

import dataclasses
import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.finetune.args import Args
from tests.moonlight.hf_toy import FAMILIES, hard_tensors, write_model

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]


def make_tokenizer() -> Tokenizer:
    """Bytes, ChatML's tokens, and the roles as one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user assistant system sum"] * 3, trainer)
    return tokenizer


def write_base(folder: Path, family: str, seed: int = 0) -> Path:
    """A Hugging Face directory with a toy model of a family, its tokenizer and its template."""
    tokenizer = make_tokenizer()
    size = tokenizer.get_vocab_size()
    config = dataclasses.replace(
        FAMILIES[family], vocab_size=size + size % 2, max_position_embeddings=64
    )
    write_model(folder, config, hard_tensors(config, seed=seed))
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


def replace_weights(folder: Path, family: str, seed: int) -> None:
    """Gives a base other weights of the same shapes."""
    shutil.rmtree(folder)
    write_base(folder, family, seed)


def write_sums(path: Path, count: int = 40) -> Path:
    """Records of two turns and one, in two forms, of unequal lengths."""
    with path.open("w") as file:
        for i in range(count):
            record = {"query": f"sum {i} 1", "response": str(i + 1)}
            if i % 3 == 0:
                record["history"] = [[f"sum {i * i}", "no"]]
            file.write(json.dumps(record) + "\n")
    return path


def arguments(folder: Path, family: str = "qwen2", **changes) -> Args:
    """Arguments of a toy run in `folder/run`, with its base and its data beside it."""
    base, data = folder / family, folder / "sums.jsonl"
    settings = {
        "model": str(base if base.exists() else write_base(base, family)),
        "dataset": (str(data if data.exists() else write_sums(data)),),
        "output_dir": folder / "run",
        "gradient_accumulation_steps": 4,
        "learning_rate": 1e-3,
        "max_steps": 6,
        "save_steps": 2,
        "logging_steps": 2,
        "unroll": False,
    }
    return Args(**settings | changes)
