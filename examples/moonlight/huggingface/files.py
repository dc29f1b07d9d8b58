"""The safetensors files of a model directory, checked before anything is read from them.

A directory comes from somewhere else: its index must not lead out of it, its files may be damaged
or not belong together, and a pickle runs whatever code it holds, so none is opened. Everything is
checked while only headers are in memory.
"""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from examples.moonlight.common.files import read_json
from examples.moonlight.common.untrusted import (
    check_file,
    check_inside,
    is_there,
    shown,
    shown_name,
)
from examples.moonlight.huggingface.header import check_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# In bytes, of a file's name: what file systems allow.
_LONGEST_NAME = 255

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# By safetensors' code. Integers, float8 and the like need scales or meanings that are elsewhere.
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}


_EXPONENT = {
    DTYPES["F32"]: (np.uint32, np.uint32(0x7F80_0000)),
    DTYPES["BF16"]: (np.uint16, np.uint16(0x7F80)),
    DTYPES["F16"]: (np.uint16, np.uint16(0x7C00)),
}
_PIECE = 1 << 16


class TensorInfo(NamedTuple):
    """What a header says of a tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class TensorFiles:
    """The tensors of a model directory, opened for reading parts of them; a context manager.

    Args:
        folder: Holds `model.safetensors`, or shards and their index.
        file: The one file to open, where it has another name than a model's.

    Attributes:
        folder: The directory.
        tensors: What there is, by name.

    Raises:
        FileNotFoundError: The folder, its weights or one of its shards is not there.
        ValueError: The weights are pickles, a file is damaged, the index leads out of the folder or
            contradicts the shards, or a tensor has a dtype that is no plain float.
    """

    def __init__(self, folder: Path, file: str | None = None):
        self.folder = folder
        self._stack = contextlib.ExitStack()
        self._open: dict[Path, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            assigned = _assigned(folder) if file is None else {}
            files = dict.fromkeys(assigned.values()) if assigned else [file or SINGLE_FILE]
            for name in files:
                self._add(_inside(folder, name), assigned, name)
            for name, file in assigned.items():
                if name not in self.tensors:
                    raise ValueError(
                        f"{folder / INDEX_FILE} says that {shown_name(name)} lies in {file}, where "
                        "it is not"
                    )
        except BaseException:
            self.close()
            raise

    def _add(self, path: Path, assigned: dict[str, str], file: str) -> None:
        check_header(path)
        try:
            handle = self._stack.enter_context(safe_open(path, framework="numpy"))
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged or no safetensors file ({shown_name(error)}): fetch or export "
                "it again"
            ) from error
        for name in handle.keys():  # noqa: SIM118, the handle is no dict
            label = shown_name(name)
            if assigned and name not in assigned:
                raise ValueError(f"{path} holds {label}, which {INDEX_FILE} does not list")
            if assigned.get(name, file) != file:
                raise ValueError(
                    f"{label} lies twice, in {shown_name(assigned[name])} and in {file}"
                )
            part = handle.get_slice(name)
            dtype, shape = part.get_dtype(), tuple(part.get_shape())
            if dtype not in DTYPES:
                raise ValueError(
                    f"{label} in {path} has the dtype {dtype}; supported are {', '.join(DTYPES)}"
                )
            self.tensors[name] = TensorInfo(path, dtype, shape)
        self._open[path] = handle

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Reads a part of a tensor, and nothing besides, in its own dtype.

        Raises:
            ValueError: A number in it is NaN or infinite.
        """
        info = self.tensors[name]
        index = index or tuple(slice(None) for _ in info.shape)
        part = self._open[info.file].get_slice(name)[index]
        if (place := first_not_finite(part)) is not None:
            at = [i + (axis.start or 0) for i, axis in zip(place, index, strict=True)]
            raise ValueError(
                f"{shown_name(name)} in {info.file} holds {part[place]} at {at}: the file is "
                "damaged, or a run that diverged wrote it; fetch it again, or export an earlier "
                "checkpoint"
            )
        return part

    def close(self) -> None:
        """Closes every file."""
        self._stack.close()

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def first_not_finite(block: np.ndarray) -> tuple[int, ...] | None:
    """Where the first NaN or infinity is, or None.

    The bits are compared, because NumPy takes four times as long for bfloat16: a number that is not
    finite has all bits of its exponent.
    """
    bits, exponent = _EXPONENT[block.dtype]
    flat = np.ascontiguousarray(block).reshape(-1).view(bits)
    # In pieces that stay in a core's cache.
    for start in range(0, flat.size, _PIECE):
        wrong = flat[start : start + _PIECE] & exponent == exponent
        if wrong.any():
            first = np.unravel_index(start + int(wrong.argmax()), block.shape)
            return tuple(int(i) for i in first)
    return None


def _assigned(folder: Path) -> dict[str, str]:
    """The index: the file of each tensor. Empty where one file holds everything."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: give the folder of a Hugging Face model")
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if is_there(index) and is_there(single):
        raise ValueError(
            f"{folder} holds both {SINGLE_FILE} and {INDEX_FILE}: remove what does not belong there"
        )
    if is_there(single):
        return {}
    if not is_there(index):
        found = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if found:
            raise ValueError(
                f"{folder} holds its weights as a pickle ({found[0]}), which could run any code; "
                "save them as safetensors with transformers' save_pretrained first"
            )
        raise FileNotFoundError(
            f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: fetch the model's weights"
        )
    files = read_json(index).get("weight_map")
    if (
        not isinstance(files, dict)
        or not files
        or not all(isinstance(file, str) for file in files.values())
    ):
        raise ValueError(f"{index} must have a weight_map from the tensors' names to their files")
    return files


def _inside(folder: Path, file: str) -> Path:
    """The path of a shard, which must lie in the folder."""
    if (
        Path(file).name != file
        or not file.isprintable()
        or len(file.encode()) > _LONGEST_NAME
        or "\\" in file
        or not file.endswith(".safetensors")
    ):
        raise ValueError(
            f"{folder / INDEX_FILE} names {shown(file)}; a shard is a .safetensors file beside the "
            "index"
        )
    path = folder / file
    check_inside(path, folder)
    if not is_there(path):
        raise FileNotFoundError(f"{path} is missing: the model is not complete, fetch that file")
    check_file(path)
    return path
