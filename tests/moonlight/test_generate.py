"""The command that writes text: from directories and runs, prompts and talk, told as it grows."""

import dataclasses
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from examples.moonlight.data.tokenizer import _byte_characters
from examples.moonlight.generate import Args, cache_length, generate, read_prompts
from examples.moonlight.generation.chat import Message
from examples.moonlight.generation.model_folder import (
    ModelFolder,
    copy_companions,
    open_model,
    stop_tokens,
)
from examples.moonlight.generation.texts import continue_texts, converse
from examples.moonlight.huggingface.pretrained import load_pretrained
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.run_folder.checkpoint import Checkpoints
from examples.moonlight.run_folder.retention import Retention
from tests.moonlight import hf_toy

pytestmark = pytest.mark.one_stack

CONFIG = dataclasses.replace(hf_toy.MOONLIGHT, vocab_size=300, max_position_embeddings=64)
SPECIAL = ["[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>"]
SPECIAL += ["<|im_middle|>"]


@pytest.fixture(scope="module", name="tokenizer")
def _tokenizer() -> Tokenizer:
    """One token a byte."""
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A Hugging Face directory."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    hf_toy.write_model(folder, CONFIG, hf_toy.hard_tensors(CONFIG))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module", name="run")
def _run(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A training run's folder, whose best checkpoint has the directory's weights."""
    run = tmp_path_factory.mktemp("run")
    (run / "settings.json").write_text(json.dumps({"config": dataclasses.asdict(CONFIG)}))
    (run / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    _, params, bias = load_pretrained(folder)
    checkpoints = Checkpoints(run / "checkpoints", Retention(2))
    for step, loss in ((1, 0.5), (2, 0.7)):
        zeroed = jax.tree.map(lambda x, step=step: x * (step == 1), params)
        model = {"params": zeroed, "router_bias": bias}
        checkpoints.save(step, model=model, optimizer=bias, progress={}, val_loss=loss)
    checkpoints.close()
    return run


def written(args: Args) -> tuple[list[str], str]:
    """What `generate` returns, and what it printed."""
    out = io.StringIO()
    return generate(args, Console(file=out, highlight=False, width=40)), out.getvalue()


@pytest.fixture(scope="module", name="greedy")
def _greedy(folder: Path) -> tuple[list[str], str]:
    prompts = ("one", "a longer prompt", "é")
    args = Args(folder, prompt=prompts, temperature=0, max_new_tokens=20, batch_size=2)
    return written(args)


def test_prompts_are_continued_in_their_order(greedy):
    texts, out = greedy
    assert len({text for text in texts if len(text) > 5}) == 3
    expected = ""
    for number, (prompt, text) in enumerate(
        zip(("one", "a longer prompt", "é"), texts, strict=True), start=1
    ):
        rule = f" {number} of 3 ".center(40, "─")
        expected += ("\n" if number > 1 else "") + f"{rule}\n{prompt}{text}"
    assert out == expected + "\n"


def test_a_run_and_a_directory_with_the_same_weights_write_the_same(run, greedy, capsys):
    args = Args(run, prompt=("a longer prompt",), temperature=0, max_new_tokens=20)
    args = dataclasses.replace(args, checkpoint="best", prefill_chunk=1)
    texts, out = written(args)
    assert texts == [greedy[0][1]]
    assert out == f"a longer prompt{texts[0]}\n"
    assert "prefill 15 tokens, " in capsys.readouterr().err
    # The last checkpoint is another: zeros. One that is being written is left to its run.
    half_written = run / "checkpoints" / "3.orbax-checkpoint-tmp-7"
    half_written.mkdir()
    opened = [open_model(run, Execution(), checkpoint=which) for which in ("last", "best", 1)]
    largest = [max(float(x.max()) for x in jax.tree.leaves(model.params)) for model in opened]
    assert largest[0] == 0 < largest[1] == largest[2]
    assert half_written.is_dir()


def test_a_talk_and_a_message_get_the_same_answer(folder, monkeypatch):
    settings = {"temperature": 0.9, "top_k": 50, "max_new_tokens": 9, "prefill_chunk": 1}
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi!\n\n"))
    talked, out = written(Args(folder, chat=True, system="Go.", **settings))
    assert len(talked) == 1
    assert out == f"\n> {talked[0]}\n> \n> "
    messages = ("Hi!",)
    [answer], out = written(Args(folder, message=messages, system="Go.", **settings))
    assert answer == talked[0]
    assert out == f"Hi!\n\n{answer}\n"


# --------------------------------------------------------------------------------------------------
# Told as it grows
# --------------------------------------------------------------------------------------------------


class Scripted:
    """Stands in for a generator: its rows' answers are given."""

    batch, length = 2, 64

    def __init__(self, *answers: bytes):
        self.answers, self.asked = list(answers), []

    def stream(self, prompts: Sequence[list[int]], **settings) -> Iterator[list[int | None]]:
        self.asked.append((prompts, settings))
        rows = [self.answers.pop(0) for _ in prompts]
        for step in range(max(map(len, rows))):
            tokens = [row[step] if step < len(row) else None for row in rows]
            if ord("!") in tokens:
                raise KeyboardInterrupt
            yield tokens


def test_texts_are_told_one_after_the_other_as_soon_as_they_can_be(tokenizer):
    told = []
    script: Any = Scripted(b"abc", "défg".encode() + b"\xf0\x9f", b"hi")
    texts = continue_texts(
        script,
        tokenizer,
        [[1], [2, 3], [4]],
        max_new_tokens=7,
        tell=lambda number, piece: told.append((number, piece)),
    )
    assert texts == ["abc", "défg�", "hi"]
    # The second waits for the first, and what its bytes leave unfinished for its end.
    assert told == [
        *((0, ""), (0, "a"), (0, "b"), (0, "c"), (1, ""), (1, "dé"), (1, "f"), (1, "g"), (1, "�")),
        *((2, ""), (2, "h"), (2, "i")),
    ]
    first_rows = [settings["first_row"] for _, settings in script.asked]
    assert first_rows == [0, 2]


def test_a_talk_keeps_its_cache_forgets_its_beginning_and_can_be_stopped(tokenizer):
    def encode(messages: Sequence[Message]) -> list[int]:
        return list("".join(f"{role[0]}{content}|" for role, content in messages).encode())

    def talk(script: Any, *said: str) -> tuple[list[Message], str, list[str]]:
        lines, told, notes = iter(said), [], []
        messages = converse(
            script,
            tokenizer,
            encode,
            system="S",
            max_new_tokens=20,
            stop_ids={0},
            read=lambda: next(lines, None),
            tell=told.append,
            note=notes.append,
        )
        return messages, "".join(told), notes

    script = Scripted(b"yes", b"no\xf0", b"never!")
    messages, told, notes = talk(script, "a", " ", "b", "c")
    assert told == "yesno�never"
    assert notes == ["stopped"]
    assert [bytes(prompts[0]) for prompts, _ in script.asked] == [
        b"sS|ua|",
        b"sS|ua|ayes|ub|",
        "sS|ua|ayes|ub|ano�|uc|".encode(),
    ]
    assert all(settings["keep"] for _, settings in script.asked)
    assert [content for _, content in messages] == ["S", "a", "yes", "b", "no�", "c", "never"]

    messages, told, notes = talk(Scripted(b"A", b"B"), "x" * 30, "y" * 50, "z" * 20)
    assert told == "AB"
    assert [content for _, content in messages] == ["S", "z" * 20, "B"]
    assert "that message makes 55 tokens and leaves no room" in notes[0]
    assert notes[1:] == ["the conversation outgrows the cache: its beginning is forgotten"]


# --------------------------------------------------------------------------------------------------
# What there is to read, and what is refused
# --------------------------------------------------------------------------------------------------


def test_whatever_a_folder_calls_an_end_ends_a_text(tmp_path, tokenizer):
    end, im_end = (tokenizer.token_to_id(name) for name in ("[EOS]", "<|im_end|>"))
    assert stop_tokens(tmp_path, tokenizer) == {end, im_end}
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "!"}}')
    assert stop_tokens(tmp_path, tokenizer) == {end, im_end, 7, 8, 9, ord("!")}
    # A run that begins with the model ends texts as it does, and shares no config.json.
    (tmp_path / "run").mkdir()
    copy_companions(tmp_path, tmp_path / "run")
    assert stop_tokens(tmp_path / "run", tokenizer) == {end, im_end, 8, 9, ord("!")}
    (tmp_path / "config.json").write_text('{"eos_token_id": "7"}')
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id: expected an id or a list"):
        stop_tokens(tmp_path, tokenizer)


def test_prompts_come_from_files(tmp_path):
    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("one \n\ntwo\n")
    lines.write_text('{"prompt": "a\\nb"}\n\n{"prompt": "c", "id": 1}')
    assert read_prompts(text) == ["one ", "two"]
    assert read_prompts(lines) == ["a\nb", "c"]
    for content, message in (
        ('{"prompt": "a"}\n{', r"prompts\.jsonl, line 2: not valid JSON"),
        ('{"text": "a"}', r'prompts\.jsonl, line 1: expected an object {"prompt": "\.\.\."}, got'),
        ("", r"prompts\.jsonl: no prompt in it"),
    ):
        lines.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_prompts(lines)
    with pytest.raises(FileNotFoundError, match=r"--prompts-file .*none: no such file"):
        read_prompts(tmp_path / "none")


def test_caches_have_few_lengths():
    lengths = {cache_length(None, needed, 8192) for needed in range(2, 8192)}
    assert lengths == {128, 256, 512, 1024, 2048, 4096, 8192}
    assert [cache_length(None, needed, 200) for needed in (3, 129, 500)] == [128, 200, 200]
    assert cache_length(77, 500, 8192) == 77
    for asked in (1, 201):
        with pytest.raises(ValueError, match=f"from 2 to the model's 200 positions, got {asked}"):
            cache_length(asked, 10, 200)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "give one of --prompt"),
        ({"prompt": ("a",), "chat": True}, "give one of --prompt"),
        ({"prompt": ("a",), "system": "b"}, "--system goes with --message or --chat"),
        ({"prompt": ("a",), "batch_size": 0}, "--batch-size must be positive, got 0"),
        ({"prompt": ("a",), "top_p": 2.0}, "--top-p must be above 0"),
        ({"prompt": ("",)}, "prompt 1 is empty: give"),
        (
            {"prompt": ("a" * 64,)},
            "prompt 1 has 64 tokens, and the model reads texts of at most 64, the answer",
        ),
        (
            {"prompt": ("a" * 20,), "max_length": 9},
            "--max-length 9 leaves .* up to --max-length 64",
        ),
    ],
)
def test_wrong_arguments_are_refused_before_weights_are_read(folder, changes, message, monkeypatch):
    monkeypatch.setattr(ModelFolder, "load", lambda *_, **__: pytest.fail("read the weights"))
    with pytest.raises(ValueError, match=message):
        generate(Args(folder, **changes))


def test_wrong_folders_are_refused(folder, run, tmp_path, tokenizer):
    def check(error: type[Exception], message: str, path: Path = tmp_path, **settings) -> None:
        with pytest.raises(error, match=message):
            open_model(path, Execution(), **settings)

    check(FileNotFoundError, r"found neither config\.json, .* nor settings\.json")
    check(
        FileNotFoundError,
        "no checkpoint first: give last, best, or a step",
        run,
        checkpoint="first",
    )
    check(ValueError, "--checkpoint best: .* one set of weights", folder, checkpoint="best")
    check(
        FileNotFoundError,
        r"no checkpoint 5: give last, best, or a step of those that are kept, 1, 2",
        run,
        checkpoint=5,
    )
    settings = tmp_path / "settings.json"
    settings.write_text('{"config": {"kv_lora_rank": 3}}')
    check(ValueError, r"settings\.json: its config describes no model of this version")
    settings.write_bytes((run / "settings.json").read_bytes())
    check(FileNotFoundError, "has no tokenizer")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    check(FileNotFoundError, "no checkpoint last: the run has saved none yet")
    larger = Tokenizer.from_str(tokenizer.to_str())
    larger.add_tokens([f"word{i}" for i in range(50)])
    larger.save(str(tmp_path / "tokenizer.json"))
    check(ValueError, "the tokenizer has 312 tokens, and the model's vocabulary 300")
