"""Tuned models as others see them: exported, loaded by transformers, and talked with."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from examples.finetune import answers as answers_room
from examples.finetune import export, infer
from examples.finetune.checkpoint import find_checkpoint
from examples.finetune.sft import finetune
from examples.finetune.tuned import open_checkpoint
from examples.moonlight.model.execution.options import Execution
from tests.finetune import sft_toy

torch = pytest.importorskip("torch", reason="torch is part of the test extra")
transformers = pytest.importorskip("transformers", reason="transformers is part of the test extra")
peft = pytest.importorskip("peft", reason="peft is part of the test extra")

pytestmark = pytest.mark.one_stack

# Float32 on both sides; measured 1e-6 of the largest logit.
LOGIT_TOLERANCE = 5e-6

# How each family is tuned here: both ways for both kinds of attention would only take time.
TUNERS = {"qwen2": "lora", "llama": "full", "deepseek_v3": "lora"}


@pytest.fixture(scope="module", name="run", params=list(TUNERS))
def _run(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, its base beside it, moved by a step far enough to be told from that."""
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    ask = sft_toy.arguments(
        folder,
        family,
        tuner_type=TUNERS[family],
        learning_rate=0.03,
        max_steps=1,
        system="Add.",
        packing=True,
        max_length=64,
    )
    finetune(ask)
    return folder / "run"


def logits_of(folder: Path, tokens: np.ndarray) -> np.ndarray:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def test_the_merged_model_has_our_logits_and_our_words(run: Path, tmp_path: Path):
    checkpoint = run / "checkpoint-1"
    merged = export.export(
        export.Args(adapters=checkpoint, merge_lora=True, output_dir=tmp_path / "merged")
    )
    opened = open_checkpoint(find_checkpoint(checkpoint), Execution())
    tokens = np.random.default_rng(0).integers(0, 200, (2, 12)).astype(np.int32)
    model: Any = nnx.merge(opened.graphdef, opened.params, opened.bias)
    ours = np.asarray(model(jnp.asarray(tokens))[0])
    theirs = logits_of(merged, tokens)
    np.testing.assert_allclose(ours, theirs, atol=LOGIT_TOLERANCE * np.abs(theirs).max())
    base = logits_of(next(path for path in run.parent.iterdir() if path.name in TUNERS), tokens)
    assert np.abs(theirs - base).max() > 0.05 * np.abs(base).max()

    prompts = ("sum 3 1", "sum 20 1")
    said = io.StringIO()
    answers = infer.infer(
        infer.Args(adapters=checkpoint, prompt=prompts, max_new_tokens=8),
        Console(file=said, highlight=False),
    )
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(merged)
    reference: Any = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer.apply_chat_template(
            # --system comes from args.json.
            [{"role": "system", "content": "Add."}, {"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        new = reference.generate(
            **ids, max_new_tokens=8, do_sample=False, eos_token_id=tokenizer.eos_token_id
        )[0, ids["input_ids"].shape[1] :]
        assert answer == tokenizer.decode(new, skip_special_tokens=True)
        assert answer in said.getvalue()


# peft asks transformers by a name that this has replaced.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_loads_the_adapters_and_ours_reads_peft(run: Path, tmp_path: Path):
    family = next(name for name in TUNERS if (run.parent / name).is_dir())
    ask = export.Args(adapters=run, output_dir=tmp_path / "peft")
    if family == "deepseek_v3":
        with pytest.raises(ValueError, match="merge"):
            export.export(ask)
        return
    folder = export.export(ask)
    merged = export.export(
        export.Args(adapters=run, merge_lora=True, output_dir=tmp_path / "merged")
    )
    if TUNERS[family] == "full":  # no adapters: the model itself
        assert (folder / "model.safetensors").read_bytes() == (
            merged / "model.safetensors"
        ).read_bytes()
        return
    tokens = np.random.default_rng(0).integers(0, 200, (2, 12)).astype(np.int32)
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(
        run.parent / family, dtype=torch.float32
    )
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(base, folder)(
            torch.from_numpy(tokens).long()
        ).logits
    ours = logits_of(merged, tokens)
    np.testing.assert_allclose(ours, theirs, atol=LOGIT_TOLERANCE * np.abs(ours).max())
    asked = {"prompt": ("sum 3 1",), "system": "Add.", "max_new_tokens": 4}
    console = Console(file=io.StringIO())
    answers = [infer.infer(infer.Args(adapters=path, **asked), console) for path in (run, folder)]
    assert answers[0] == answers[1]


def test_a_conversation_in_the_terminal(run: Path, monkeypatch):
    typed = iter(["sum 3 1", "", "sum 4 1", " exit "])
    monkeypatch.setattr(answers_room, "ask", lambda console: next(typed))
    said = io.StringIO()
    ask = infer.Args(adapters=run, stream=False, max_new_tokens=4, max_length=64)
    answers = infer.infer(ask, Console(file=said, highlight=False))
    assert len(answers) == 2
    first = infer.infer(
        infer.Args(adapters=run, prompt=("sum 3 1",), max_new_tokens=4, max_length=64),
        Console(file=io.StringIO()),
    )
    assert answers[:1] == first
    assert "".join(answers) == said.getvalue()


def test_answers_of_a_file_are_written_beside_what_is_expected(run: Path, tmp_path: Path):
    said, path = io.StringIO(), tmp_path / "answers.jsonl"
    ask = infer.Args(
        adapters=run / "checkpoint-1",
        val_dataset=(f"{run.parent / 'sums.jsonl'}#3",),
        result_path=path,
        max_new_tokens=4,
        batch_size=2,
    )
    answers = infer.infer(ask, Console(file=said, highlight=False))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["response"] for record in records] == answers
    for record in records:
        assert record["messages"][0] == {"role": "system", "content": "Add."}
        asked = record["messages"][-1]["content"].split()[1]
        assert record["labels"] == str(int(asked) + 1)
        assert f"[expected] {record['labels']}\n" in said.getvalue()


def test_a_checkpoint_is_found_wherever_it_is_copied_to(run: Path, tmp_path: Path):
    moved = shutil.copytree(run / "checkpoint-1", tmp_path / "mine")
    there = find_checkpoint(run)
    if there.base is None:  # trained in full: the tokenizer lay beside it
        shutil.copy(run / "tokenizer.json", moved)
    here = open_checkpoint(find_checkpoint(moved), Execution())
    for a, b in zip(
        *map(jax.tree.leaves, (here.params, open_checkpoint(there, Execution()).params)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    (moved / "args.json").write_text("{}")
    with pytest.raises(ValueError, match=r"args\.json: its config describes no model"):
        find_checkpoint(moved)
    (moved / "args.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"mine: found no args\.json: give a checkpoint"):
        find_checkpoint(moved)


def test_arguments_that_do_not_go_together():
    for ask, message in (
        (infer.Args(), "give --adapters with a checkpoint"),
        (infer.Args(model="a", prompt=("b",), val_dataset=("c",)), "both say what to answer"),
        (infer.Args(model="a", temperature=-1.0), "--temperature must be 0"),
    ):
        with pytest.raises(ValueError, match=message):
            infer.infer(ask)
    with pytest.raises(ValueError, match="give --adapters"):
        export.export(export.Args())
    assert export.bytes_of("5GB") == 5 * 10**9
    assert export.bytes_of("1.5 mb") == 1_500_000
    for size in ("0", "GB", "5XB", "-1GB"):
        with pytest.raises(ValueError, match="--max_shard_size: expected a size such as 5GB"):
            export.bytes_of(size)
