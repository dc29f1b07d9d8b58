"""What several processes do in the test of texts and exports: `python -m` this, in a folder.

The folder has a `model`; process 0 says on the standard output, as JSON, what came of it.
"""

import dataclasses
import io
import json
import os
import signal
from pathlib import Path

from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from examples.moonlight import generate, hf_export
from examples.moonlight.common.command_line import CommandLine
from examples.moonlight.common.processes import group
from examples.moonlight.common.processes.args import ProcessArgs
from examples.moonlight.common.processes.together import work_together
from examples.moonlight.data.tokenizer import _byte_characters
from examples.moonlight.huggingface.files import TensorFiles
from tests.moonlight import hf_toy

CONFIG = dataclasses.replace(hf_toy.MOONLIGHT, vocab_size=300, max_position_embeddings=128)
SPECIAL = ["[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>"]
SPECIAL += ["<|im_middle|>"]

PROMPTS = ("one", "a longer prompt", "é")

# Pieces of an answer after which Ctrl-C comes.
PIECES = 3


@dataclasses.dataclass(frozen=True)
class Args:
    """What is asked for."""

    mesh: str = "fsdp=2,tensor=2"
    """The mesh."""
    processes: ProcessArgs = dataclasses.field(default_factory=ProcessArgs)
    """Which of several processes this one is."""


def write_model(folder: Path) -> Path:
    """A Hugging Face directory with one token a byte."""
    hf_toy.write_model(folder, CONFIG, hf_toy.hard_tensors(CONFIG), shards=2)
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def continued(model: Path, mesh: str | None) -> list[str]:
    """Texts of a model, greedy."""
    args = generate.Args(
        model, prompt=PROMPTS, temperature=0, max_new_tokens=12, batch_size=2, mesh=mesh
    )
    return generate.generate(args, Console(file=io.StringIO()))


def talked(model: Path, mesh: str | None) -> list[str]:
    """The answers of a conversation that is read from the input, the first one interrupted."""
    args = generate.Args(model, chat=True, max_new_tokens=12, prefill_chunk=1, mesh=mesh)
    quiet = not group.is_first()
    return generate.generate(args, Console(file=_Interrupting(), highlight=False, quiet=quiet))


class _Interrupting(io.StringIO):
    """A terminal at which somebody presses Ctrl-C in the midst of the first answer."""

    pieces = 0

    def write(self, text: str) -> int:
        if "> " not in text:
            self.pieces += bool(text)
            if self.pieces == PIECES:
                os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


def _work(args: Args) -> None:
    read = 0
    real = TensorFiles.read

    def counted(*words):
        nonlocal read
        part = real(*words)
        read += part.size
        return part

    TensorFiles.read = counted
    texts = continued(Path("model"), args.mesh)
    numbers = [int(text) for text in group.exchange(str(read))]
    hf_export.export(
        hf_export.Args(Path("model"), Path("exported"), dtype="float32", mesh=args.mesh)
    )
    answers = group.exchange(json.dumps(talked(Path("model"), None)))
    if group.is_first():
        print(json.dumps({"texts": texts, "numbers": numbers, "answers": answers}))


if __name__ == "__main__":
    line = CommandLine("tests.moonlight.text_processes", Args, __doc__)
    line.run(lambda args: work_together(_work, args))
