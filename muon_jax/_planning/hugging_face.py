"""The shapes of a Hugging Face directory, from the headers of its files alone.

A safetensors file begins with the length of its header, 8 bytes, and with the header, JSON::

    {"model.norm.weight": {"dtype": "BF16", "shape": [2048], "data_offsets": [0, 4096]}, ...}

so a model of 32 GB is read in less than a second. Which files belong together says an index; where
there is none, all files do.
"""

import json
from pathlib import Path
from typing import Any

from muon_jax._planning.tensors import Model, Tensor

_DTYPES = {
    **{
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "C64": "complex64",
    },
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "BOOL": "bool"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
}
# The format's own limit; a published shard's header has some 100 kB.
_MAX_HEADER = 100_000_000
# Their linear layers are transformers' Conv1D, which keeps [in, out].
_LIKE_JAX = ("gpt2", "openai-gpt")


def is_hugging_face(path: Path) -> bool:
    """Whether a path is a safetensors file, or a folder that holds some or a ``config.json``."""
    if path.suffix == ".safetensors":
        return True
    return path.is_dir() and bool(
        [*path.glob("*.safetensors"), *path.glob("*.safetensors.index.json")]
        or (path / "config.json").is_file()
    )


def read_hugging_face(path: Path) -> Model:
    """What a directory, or one file, holds.

    Raises:
      ValueError: for quantized weights, for a damaged header or index, for a tensor that lies in
        two files, and where there are no safetensors files.
      OSError: for a file that is not there, or cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    config = _read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    if config.get("quantization_config"):
        raise ValueError(
            f"{folder / 'config.json'} has a quantization_config: its tensors are packed, and an "
            "optimizer trains none of them. Give the directory of the model before quantization."
        )
    tensors: dict[str, Tensor] = {}
    where: dict[str, Path] = {}
    for file in _files(path):
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise ValueError(
                    f"{name} lies in {where[name].name} and in {file.name}, and no index says "
                    "which counts: remove the file that does not belong to the model."
                )
            tensors[name], where[name] = tensor, file
    kind = config.get("model_type")
    return Model(
        f"Hugging Face directory, model_type {kind}" if kind else "safetensors",
        tensors,
        "in_out" if kind in _LIKE_JAX else "out_in",
    )


def _files(path: Path) -> list[Path]:
    """The files of a model: those of its index, or all."""
    if not path.is_dir():
        return [path]
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        listed = ", ".join(index.name for index in indices)
        raise ValueError(f"{path} holds several models ({listed}): give a folder with one.")
    if not indices:
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise ValueError(
                f"{path} holds no *.safetensors files. Other weights, such as pytorch_model.bin, "
                "are pickles: save them with transformers' save_pretrained first."
            )
        return files
    names = _read_object(indices[0]).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{indices[0]} has no weight_map from names of tensors to files.")
    files = [path / name for name in dict.fromkeys(names.values())]
    for file in files:
        if not file.is_file():
            raise ValueError(
                f"{indices[0].name} lists {file.name}, which is not in {path}: fetch it. Its "
                "header, the file's first bytes, is all that is read here."
            )
    return files


def read_header(file: Path) -> dict[str, Tensor]:
    """The names, shapes and dtypes in one file; its tensors' bytes are not read.

    Raises:
      ValueError: for what is no safetensors file, or has a dtype that cannot be trained.
    """
    if not file.is_file():
        raise ValueError(f"{file} is no file.")
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= _MAX_HEADER:
            raise _damaged(file, f"its header would have {length:,} bytes")
        content = opened.read(length)
    if len(content) < length:
        raise _damaged(file, f"it ends within its header of {length:,} bytes")
    header = _parse(content, file)
    return {
        name: _tensor(name, entry, file) for name, entry in header.items() if name != "__metadata__"
    }


def _tensor(name: str, entry: Any, file: Path) -> Tensor:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise _damaged(file, f"its header says of {name!r}: {entry!r}")
    if entry.get("dtype") not in _DTYPES:
        raise ValueError(
            f"{name} in {file} has the dtype {entry.get('dtype')}, which is too narrow to take "
            "updates. Give the directory of the model before quantization."
        )
    return Tensor(tuple(shape), _DTYPES[entry["dtype"]])


def _read_object(file: Path) -> dict[str, Any]:
    return _parse(file.read_bytes(), file)


def _parse(content: bytes, file: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:  # JSON's errors, and those of UTF-8
        raise _damaged(file, str(error)) from error
    if not isinstance(parsed, dict):
        raise _damaged(file, "it holds no JSON object")
    return parsed


def _damaged(file: Path, what: str) -> ValueError:
    return ValueError(f"{file} cannot be read as what its name says ({what}): fetch it again.")
