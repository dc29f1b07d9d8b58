"""From a Hugging Face directory to a run, and from a run to a directory."""

import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, models

from examples.moonlight import hf_export
from examples.moonlight.generation.model_folder import open_model
from examples.moonlight.huggingface.pretrained import make_model
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.experts import RouterBias
from examples.moonlight.run_folder import metrics
from examples.moonlight.train import train
from tests.moonlight import hf_toy, toy

pytestmark = pytest.mark.one_stack


def losses(run: Path, kind: str) -> list[float]:
    name = {metrics.TRAIN: "loss", metrics.VALIDATION: "val_loss"}[kind]
    return [record[name] for record in metrics.read_metrics(run / metrics.FILE, kind)]


def test_a_run_from_exported_weights_is_the_run_that_had_them(tmp_path):
    """The initial weights of a run, exported, and a run that begins with them: bit for bit."""
    train(toy.arguments(tmp_path), toy.CONFIG)
    run = tmp_path / "run"
    config = open_model(run, Execution()).config
    _, params, bias = nnx.split(
        make_model(config, rngs=nnx.Rngs(0), execution=Execution()), nnx.Param, RouterBias
    )
    hf_export.export_pretrained(
        tmp_path / "hf", config, params, bias, tokenizer=run, dtype="float32"
    )
    again = tmp_path / "again"
    # Another seed, as the weights are not drawn.
    result = train(
        toy.arguments(tmp_path, output_dir=again, init_from=str(tmp_path / "hf"), seed=5)
    )
    for kind in (metrics.TRAIN, metrics.VALIDATION):
        assert losses(again, kind) == losses(run, kind)
    assert result["settings"]["init_from"] == str(tmp_path / "hf")
    assert (again / "tokenizer.json").read_text() == (run / "tokenizer.json").read_text()


def test_a_dense_model_is_trained_and_exported(tmp_path):
    source = hf_toy.write_model(tmp_path / "qwen2", hf_toy.QWEN2, hf_toy.hard_tensors(hf_toy.QWEN2))
    Tokenizer(models.BPE({c: i for i, c in enumerate("line 1")}, [])).save(
        str(source / "tokenizer.json")
    )
    fields = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(fields | {"eos_token_id": 0}))
    changes = {"optimizer": "adamw", "unroll": False, "steps": 20, "warmup_steps": 2}
    result = train(toy.arguments(tmp_path, init_from=str(source), **changes))
    validation = losses(tmp_path / "run", metrics.VALIDATION)
    assert np.isfinite(validation).all() and validation[-1] < validation[0] - 0.5
    assert result["parameters"]["router_bias"] == 0
    hf_export.export(hf_export.Args(tmp_path / "run", tmp_path / "hf"))
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["model_type"] == "qwen2" and written["tie_word_embeddings"] is True


def test_what_does_not_go_together_is_refused(tmp_path):
    config = hf_toy.LLAMA
    source = hf_toy.write_model(tmp_path / "hf", config, hf_toy.hard_tensors(config))
    tokens = {"<|endoftext|>": 0} | {chr(i + 64): i for i in range(1, 63)}
    Tokenizer(models.BPE(tokens, [])).save(str(source / "tokenizer.json"))
    with pytest.raises(ValueError, match="has 63 tokens, and its model a vocab_size of 62: they"):
        train(toy.arguments(tmp_path, init_from=str(source)))
    with pytest.raises(ValueError, match="--init-from and --branch-from both say"):
        train(toy.arguments(tmp_path, init_from="x", branch_from="y@1"))
