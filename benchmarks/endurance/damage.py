"""What can happen to a checkpoint on disk, done on purpose."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path


def _weights(step: Path) -> Path:
    """The file that holds most of the weights."""
    files = [path for path in (step / "model").rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def _change(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def _flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def _empty(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def _make_file(step: Path) -> None:
    shutil.rmtree(step)
    step.write_text("")


def _make_folder(step: Path) -> None:
    path = _weights(step)
    path.unlink()
    path.mkdir()


def _make_another(step: Path) -> None:
    """Puts an older checkpoint in its place, whole."""
    [older] = [path for path in step.parent.iterdir() if path.name.isdecimal() and path != step]
    shutil.rmtree(step)
    shutil.copytree(older, step)


def _say_another_loss(step: Path) -> None:
    content = json.loads((step / "seal.json").read_text())
    (step / "seal.json").write_text(json.dumps(content | {"val_loss": 0.0}))


# By what happens: a function of the checkpoint's folder, beside which there is one older.
DAMAGE: dict[str, Callable[[Path], object]] = {
    "one bit of the weights": lambda step: _change(_weights(step), _flip),
    "one bit of the optimizer": lambda step: _change(step / "optimizer" / "_METADATA", _flip),
    "weights cut off": lambda step: _change(_weights(step), lambda content: content[:-100]),
    "weights of no length": lambda step: _change(_weights(step), lambda _: b""),
    "weights grown": lambda step: _change(_weights(step), lambda content: content + b"0"),
    "weights gone": lambda step: _weights(step).unlink(),
    "model gone": lambda step: shutil.rmtree(step / "model"),
    "optimizer gone": lambda step: shutil.rmtree(step / "optimizer"),
    "progress gone": lambda step: shutil.rmtree(step / "progress"),
    "progress that is no JSON": lambda step: (step / "progress/metadata").write_text("{"),
    "progress with one bit": lambda step: _change(step / "progress/metadata", _flip),
    "a folder in the place of a file": _make_folder,
    "Orbax' metadata gone": lambda step: (step / "_CHECKPOINT_METADATA").unlink(),
    "an empty folder": _empty,
    "a file in its place": _make_file,
    "seal gone": lambda step: (step / "seal.json").unlink(),
    "seal cut off": lambda step: _change(step / "seal.json", lambda content: content[:100]),
    "seal that is a list": lambda step: (step / "seal.json").write_text("[]"),
    "seal that says something else": _say_another_loss,
    "another step's": _make_another,
}
