"""Models on disk of which nothing is there but the shapes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

Shapes = Mapping[str, Sequence[int]]


def write_header(path: Path, shapes: Shapes, dtype: str = "BF16") -> None:
    """A safetensors file that ends behind its header: who reads on finds nothing."""
    header = {"__metadata__": {"format": "pt"}} | {
        name: {"dtype": dtype, "shape": [*shape], "data_offsets": [0, 0]}
        for name, shape in shapes.items()
    }
    content = json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content)


def write_model(folder: Path, shapes: Shapes, shards: int = 1, model_type: str = "llama") -> Path:
    """A Hugging Face directory, in one file or in shards with their index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if shards == 1:
        write_header(folder / "model.safetensors", shapes)
        return folder
    files = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict([*shapes.items()][i::shards])
        write_header(folder / name, part)
        files |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder
