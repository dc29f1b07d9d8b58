"""What a prepared corpus of any size costs a training: seconds to start, memory, windows read.

    python -m benchmarks.prepared_data --gigabytes 10 --folder runs/prepared_data

writes random tokens in the layout of `examples.moonlight.data.prepare`, opens them in a process of
its own as a training does, and reads windows in a training's order, first from a disk whose pages
were dropped from memory, then again. Beside it, 400 random windows of one file, one after the
other: read as the training does, mapped into memory, and as ArrayRecord, in records of 2,048
tokens. The last line is what the largest target consumes: all of the peak of 256 chips of v5e,
divided by the FLOPs that the 16B model's formula has for a token. The folder is removed at the end.
"""

import dataclasses
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models

from examples.moonlight.common.command_line import CommandLine
from examples.moonlight.data.batches import Tokens, train_batches
from examples.moonlight.data.prepare.output import SHARD
from examples.moonlight.data.prepared import (
    MANIFEST,
    Manifest,
    Shard,
    digest_of,
    open_sources,
    shard_name,
)
from examples.moonlight.data.tokenizer import TOKENIZER

# Moonlight's own has 163,840; 16 bits hold this one.
VOCABULARY = 2**16

# Tokens of a record, and of the file that the formats are compared on; windows of each.
RECORD, COMPARED, WINDOWS = 2048, 2**29, 400

# Google's data sheet of TPU v5e: 197 TFLOP/s in bfloat16 a chip.
V5E_PEAK, CHIPS = 197e12, 256

# FLOPs of a token in the 16B step, as `python -m benchmarks.scale` counts them by formula: 6 for
# each active parameter (2.24B, and the head's 0.34B), and 3 times the causal half of attention's
# two products (27 layers, 16 heads of 192 and 128, on average 4,096 keys).
TOKEN_FLOPS = 6 * (2.24e9 + 0.34e9) + 3 * 2 * 27 * 16 * (192 + 128) * 4096


@dataclasses.dataclass(frozen=True)
class Args:
    """What is measured."""

    folder: Path = Path("runs/prepared_data")
    """Folder for the tokens: new, and removed at the end."""
    gigabytes: float = 10.0
    """Size of the tokens."""
    sequence_length: int = 8192
    """Tokens of a window."""
    batch_size: int = 8
    """Windows of a batch: those of one host's chips."""
    seconds: float = 10.0
    """Seconds of reading as a training does."""
    part: str | None = None
    """Measure one part, in this process: how the program calls itself."""


def write(folder: Path, gigabytes: float) -> None:
    """Writes random tokens as a prepared corpus."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, "t0"))
    (folder / TOKENIZER).write_text(tokenizer.to_str())
    block = np.random.default_rng(0).integers(0, VOCABULARY, 2**24, "<u2")
    left, shards = int(gigabytes * 1e9) // 2, []
    while left:
        digest, count = hashlib.sha256(), min(left, SHARD)
        with (folder / shard_name("train", len(shards))).open("wb") as file:
            for start in range(0, count, len(block)):
                content = np.roll(block, start // len(block))[: count - start].tobytes()
                digest.update(content)
                file.write(content)
            os.fsync(file.fileno())
        shards.append(Shard(count, digest.hexdigest()))
        left -= count
    held_out = block[: 2**22].tobytes()
    (folder / shard_name("validation", 0)).write_bytes(held_out)
    validation = (Shard(2**22, hashlib.sha256(held_out).hexdigest()),)
    manifest = Manifest(
        "uint16", VOCABULARY, 0, digest_of(folder / TOKENIZER), tuple(shards), validation
    )
    (folder / MANIFEST).write_text(json.dumps(manifest.record()))


def forget(folder: Path) -> None:
    """Drops the files' pages from memory."""
    for path in folder.glob("*"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def training(args: Args) -> dict[str, Any]:
    """Start, reading and memory of what a training does."""
    begun, before = time.perf_counter(), _memory()
    sources = open_sources({"": args.folder})
    batches = train_batches(
        sources.train,
        (),
        sequence_length=args.sequence_length,
        batch_size=args.batch_size,
        seed=0,
    )
    next(batches)
    started = time.perf_counter() - begun
    # What was read ahead at the start is not counted.
    for _ in range(64):
        next(batches)
    rate, read = _rate(iter(batches), args)
    return {
        "start, s": started,
        "tokens/s": rate * args.batch_size,
        "disk bytes a token": read / args.batch_size,
        "memory before, MB": before,
        "memory at most, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def compared(args: Args, name: str) -> dict[str, Any]:
    """Random windows of one file, as one format has them, one after the other."""
    path = args.folder / shard_name("train", 0)
    count = min(COMPARED, path.stat().st_size // 2)
    length = args.sequence_length
    get = {"plain file": _plain, "mapped": _mapped, "ArrayRecord": _array_record}[name]
    window = get(path, count, length)
    draws = random.Random(0)

    def windows() -> Iterator[np.ndarray]:
        for _ in range(WINDOWS):
            yield window(draws.randrange((count - 1) // length) * length)

    rate, read = _rate(windows(), args)
    return {"tokens/s": rate, "disk bytes a token": read}


def _plain(path: Path, count: int, length: int) -> Callable[[int], np.ndarray]:
    tokens: Tokens = open_sources({"": path.parent}).train[""]
    return lambda start: tokens[start : start + length + 1].astype(np.int32)


def _mapped(path: Path, count: int, length: int) -> Callable[[int], np.ndarray]:
    tokens = np.memmap(path, "<u2", "r")
    return lambda start: tokens[start : start + length + 1].astype(np.int32)


def _array_record(path: Path, count: int, length: int) -> Callable[[int], np.ndarray]:
    import grain

    source: Any = grain.sources.ArrayRecordDataSource([str(path.with_name("tokens.array_record"))])

    def window(start: int) -> np.ndarray:
        first, last = start // RECORD, (start + length) // RECORD
        records = b"".join(source.__getitems__(range(first, last + 1)))
        skipped = start - first * RECORD
        return np.frombuffer(records, "<u2")[skipped : skipped + length + 1].astype(np.int32)

    return window


def _write_array_record(folder: Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    # One record a group: what is read at random is not unpacked with its neighbours.
    writer = ArrayRecordWriter(str(folder / "tokens.array_record"), "group_size:1,uncompressed")
    with (folder / shard_name("train", 0)).open("rb") as file:
        for _ in range(COMPARED // RECORD):
            if record := file.read(2 * RECORD):
                writer.write(record)
    writer.close()


def _rate(batches: Iterator[Any], args: Args) -> tuple[float, float]:
    """Windows' tokens a second, and bytes that the disk gave for each."""
    begun, before, count = time.perf_counter(), _disk_bytes(), 0
    for _ in batches:
        count += 1
        if time.perf_counter() - begun > args.seconds:
            break
    seconds = time.perf_counter() - begun
    tokens = count * args.sequence_length
    return tokens / seconds, (_disk_bytes() - before) / tokens


def _disk_bytes() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def _memory() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def run(args: Args) -> None:
    """Writes, measures in processes of their own, prints and removes."""
    if args.part is not None:
        measured = training(args) if args.part == "training" else compared(args, args.part)
        print(json.dumps(measured))
        return
    if args.folder.exists():
        raise ValueError(f"--folder {args.folder} is there already: choose another one")
    try:
        begun = time.perf_counter()
        write(args.folder, args.gigabytes)
        print(f"wrote {args.gigabytes:g} GB of tokens in {time.perf_counter() - begun:.0f} s")
        _write_array_record(args.folder)
        for part in ("training", "plain file", "mapped", "ArrayRecord"):
            forget(args.folder)
            for state in ("from the disk", "again"):
                line = ", ".join(f"{k} {v:,.3g}" for k, v in _in_process(args, part).items())
                print(f"{part}, {state}: {line}", flush=True)
        need = V5E_PEAK * CHIPS / TOKEN_FLOPS
        print(
            f"v5e-256 at all of its peak, {V5E_PEAK * CHIPS:.3g} FLOP/s, and {TOKEN_FLOPS:.3g} "
            f"FLOPs a token: {need:,.0f} tokens/s, {need / (CHIPS / 8):,.0f} for each of 32 hosts"
        )
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)


def _in_process(args: Args, part: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.prepared_data", "--part", part]
    command += ["--folder", str(args.folder), "--seconds", str(args.seconds)]
    command += ["--sequence-length", str(args.sequence_length)]
    command += ["--batch-size", str(args.batch_size)]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(ended.stdout.splitlines()[-1])


COMMAND_LINE = CommandLine("benchmarks.prepared_data", Args, __doc__)

if __name__ == "__main__":
    COMMAND_LINE.run(run)
