"""The base that both sides of `benchmarks/finetune` adapt: a Qwen2 with drawn weights."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from examples.moonlight.huggingface import names as hf_names
from examples.moonlight.huggingface.config import CONFIG_FILE, config_fields
from examples.moonlight.model.dense import DenseConfig

# Qwen2's own, of its matrices.
STDDEV = 0.02


def write_base(folder: Path, config: DenseConfig, seed: int) -> None:
    """Writes a Hugging Face directory, float32: the same bytes for a seed.

    Its tokenizer knows one token. Models are not read without one, and no text is read here.
    """
    folder.mkdir(parents=True)
    rng, tensors = np.random.default_rng(seed), {}
    for name, shape in hf_names.shapes(hf_names.table(config)).items():
        if name.endswith("norm.weight"):
            tensors[name] = np.ones(shape, np.float32)
        else:
            tensors[name] = STDDEV * rng.standard_normal(shape, np.float32)
    (folder / CONFIG_FILE).write_text(json.dumps(config_fields(config, dtype="float32")))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    Tokenizer(models.WordLevel({"?": 0}, unk_token="?")).save(str(folder / "tokenizer.json"))
