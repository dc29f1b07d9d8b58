r"""Makes tokens of texts that no memory holds, once, for any number of trainings.

    python -m examples.moonlight.data.prepare --input texts/ --tokenizer hf/ --output tokens/
    python -m examples.moonlight.data.prepare --input a.jsonl.zst --input b.parquet \
        --tokenizer runs/moonlight --output tokens/ --held-out 0.001
    python -m examples.moonlight.data.prepare --check --output tokens/

It reads text files, .jsonl files with one {"text": ...} a line, plain or packed with gzip or
Zstandard, Parquet files, and folders of all of them, piece by piece, and encodes as many pieces at
a time as there are cores. Killed at any moment, the same command goes on; on finished tokens it
says what they are. `--check` reads them whole, and compares them with the digests in tokens.json.

Training takes the folder in the place of texts, and reads windows where it needs them:

    python -m examples.moonlight.train --data tokens/ --output-dir runs/prepared
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, Any

import rich
import tyro
from rich import progress
from rich.console import Console

from examples.moonlight.common.command_line import CommandLine
from examples.moonlight.data.corpus import VALIDATION_FRACTION, Tally
from examples.moonlight.data.prepare import encoding
from examples.moonlight.data.prepare.encoding import Encoded, Settings
from examples.moonlight.data.prepare.output import Output
from examples.moonlight.data.prepare.pieces import Piece, Source, find_sources, read_pieces
from examples.moonlight.data.prepared import (
    FORMAT,
    MANIFEST,
    check_digests,
    smallest_dtype,
    vocabulary_size,
)
from examples.moonlight.data.tokenized import read_vocabulary
from examples.one_thread import available_cores

# Pieces that wait for a process, or to be written behind one that takes longer.
_AHEAD = 4

# Seconds between lines of progress where no terminal shows a bar.
LINE_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Args:
    """What `prepare` is asked for."""

    output: Path
    """Folder of the tokens: new, or what the same command began."""
    check: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compare the finished tokens in --output with their digests, and do nothing else."""
    input: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """Text file, .jsonl file, Parquet file, or folder of them; may be given several times."""
    tokenizer: Path | None = None
    """Folder of a Hugging Face model or of a run, or a tokenizer.json."""
    field: str = "text"
    """Where the text is: the field of a .jsonl file's objects, the column of a Parquet file."""
    held_out: float = VALIDATION_FRACTION
    """Share of the documents to hold out for validation; of billions of tokens 0.001 is plenty."""
    jobs: int = available_cores()
    """Processes that encode, each with one thread."""


GROUPS = {"output": "tokens", "input": "texts", "jobs": "machine"}


def prepare(args: Args) -> dict[str, Any]:
    """Makes tokens of texts, or finishes that, and returns what `tokens.json` holds.

    Raises:
        FileExistsError: The output folder holds something else.
        FileNotFoundError: A text or the tokenizer is not there.
        RuntimeError: Another process works in the output folder, a package is not installed, or a
            process ended without a word.
        ValueError: An argument is out of range; a text or the tokenizer cannot be read; there is
            nothing to train on, or nothing held out; or the folder holds other tokens.
    """
    console = rich.get_console()
    if args.tokenizer is None or not args.input:
        raise ValueError("give texts with --input and a tokenizer with --tokenizer, or --check")
    if not 0 < args.held_out < 1:
        raise ValueError(f"--held-out must be between 0 and 1, got {args.held_out}")
    if args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {args.jobs}")
    vocabulary = read_vocabulary(args.tokenizer)
    size = vocabulary_size(vocabulary.tokenizer)
    dtype = smallest_dtype(size)
    sources = find_sources(args.input)
    settings = {
        "format": FORMAT,
        "texts": _described(sources),
        "tokenizer": hashlib.sha256(vocabulary.tokenizer.to_str().encode()).hexdigest()[:16],
        "end_of_text": vocabulary.end,
        "field": args.field,
        "held_out": args.held_out,
    }
    with Output(args.output, settings, vocabulary.tokenizer, dtype) as output:
        if output.finished is None:
            how = Settings(args.tokenizer, args.field, args.held_out, dtype)
            _encode_all(sources, how, output, args.jobs, console)
            _check_sides(output, args)
            output.finish(size, vocabulary.end)
    finished = output.finished
    assert finished is not None
    _present(args.output, finished, console)
    return finished


def _described(sources: list[Source]) -> str:
    """The files by number, bytes, and 16 digits over their names and sizes, in their order."""
    listed = json.dumps([[source.name, source.size] for source in sources])
    size = sum(source.size for source in sources)
    digest = hashlib.sha256(listed.encode()).hexdigest()[:16]
    return f"{len(sources):,} files of {size:,} bytes ({digest})"


def _encode_all(
    sources: list[Source], settings: Settings, output: Output, jobs: int, console: Console
) -> None:
    """Encodes what is left, in as many processes as are asked for, and appends it in order."""
    total = sum(source.size for source in sources)
    done = f", after the first {output.progress.read:,}" if output.progress.read else ""
    console.print(
        f"encoding {len(sources):,} files of {total:,} bytes{done}; processes: {jobs}",
        highlight=False,
    )
    pieces = read_pieces(sources, output.progress.place, field=settings.field)
    first = next(pieces)
    # Without the last piece, which has no text, there is no second one where all fits into one.
    second = next(pieces, None)
    alone = output.progress.read == 0 and second is None
    rest = itertools.chain([first], () if second is None else [second], pieces)
    # Processes from nothing: a copy of this one would have its threads' locks.
    jobs = 1 if alone else jobs
    pool = ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), encoding.start, (settings,)
    )
    waiting: deque[tuple[Piece, Future[Encoded]]] = deque()
    try:
        with _told(output, total, console) as tell:
            for piece in rest:
                future = pool.submit(encoding.encode_here, piece, alone)
                # Of the piece only its end is of use here; its texts are in the pool's queue.
                waiting.append((piece._replace(blocks=()), future))
                # In memory are one piece for each process, and some for those that end early.
                while waiting and (len(waiting) >= jobs + _AHEAD or waiting[0][1].done()):
                    _append(output, *waiting.popleft())
                    tell()
            while waiting:
                _append(output, *waiting.popleft())
                tell()
        pool.shutdown()
        here, child = _peaks()
        console.print(
            f"most memory: {here} MB here, {child} MB in the largest process that encodes",
            highlight=False,
        )
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _append(output: Output, piece: Piece, future: Future[Encoded]) -> None:
    try:
        encoded = future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process that encodes was ended from outside, perhaps for want of memory: the same "
            "command goes on, with fewer --jobs perhaps"
        ) from error
    except ValueError as error:
        # Raised in words there, and here for whoever reads them.
        raise ValueError(str(error)) from error
    output.add(piece, encoded)


@contextlib.contextmanager
def _told(output: Output, total: int, console: Console) -> Iterator[Any]:
    """Shows how far it is: a bar, or lines where no terminal is."""
    begun = time.perf_counter()
    before = output.progress.read, sum(output.progress.tokens.values())
    told = begun
    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[status]}"),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task("encoding", total=total, completed=before[0], status="")

    def tell() -> None:
        nonlocal told
        now, done = time.perf_counter(), output.progress
        tokens, seconds = sum(done.tokens.values()), now - begun
        speed = f"{(tokens - before[1]) / seconds:,.0f} tokens/s"
        bar.update(task, completed=done.read, status=speed)
        if not console.is_terminal and now - told > LINE_SECONDS:
            told = now
            console.print(
                f"{done.read / max(total, 1):4.0%} of {total / 1e9:,.2f} GB  {tokens:,} tokens  "
                f"{speed}  {(done.read - before[0]) / seconds / 1e6:,.1f} MB/s",
                highlight=False,
            )

    with bar:
        yield tell
    tokens = sum(output.progress.tokens.values()) - before[1]
    seconds = time.perf_counter() - begun
    console.print(
        f"encoded {tokens:,} tokens in {seconds:,.1f} s, {tokens / seconds:,.0f} tokens/s",
        highlight=False,
    )


def _check_sides(output: Output, args: Args) -> None:
    done = output.progress
    if not done.documents:
        found = f", only {done.left_out}" if done.left_out.counts else ""
        raise ValueError(f"--input: no text in it{found}; give files with text")
    for kind, count in done.tokens.items():
        if not count:
            what = "train on" if kind == "train" else "validate on"
            raise ValueError(
                f"of {done.documents} documents, {args.held_out:.1%} held out by their digests, "
                f"none is left to {what}: remove {args.output}, and give another --held-out or "
                "more documents"
            )


def _present(folder: Path, finished: dict[str, Any], console: Console) -> None:
    counts = {kind: sum(s["tokens"] for s in finished[kind]) for kind in ("train", "validation")}
    lines = [
        f"{folder} holds {counts['train']:,} training tokens and {counts['validation']:,} held out "
        f"({finished['documents']:,} documents, {finished['held_out_documents']:,} held out; "
        f"{finished['text_bytes'] / sum(counts.values()):.2f} bytes a token), as "
        f"{finished['dtype']}; corpus {finished['corpus']}"
    ]
    if finished["left_out"]:
        lines.append(f"left out what is no text: {Tally(finished['left_out'])}")
    lines.append(f"train on it: python -m examples.moonlight.train --data {folder} ...")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _peaks() -> tuple[int, int]:
    """The most memory that this process, and the largest of its children, ever had, in MB."""
    unit = 1e6 if sys.platform == "darwin" else 1e3
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    here, child = (round(resource.getrusage(who).ru_maxrss / unit) for who in both)
    return here, child


def check(args: Args) -> None:
    """Compares finished tokens with their digests.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: They are unfinished or damaged; the message names the file.
    """
    console = rich.get_console()
    if not args.output.is_dir():
        raise FileNotFoundError(f"--output {args.output}: there is no such folder")
    total = sum(path.stat().st_size for path in args.output.glob("*"))
    with progress.Progress(
        *progress.Progress.get_default_columns(), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("checking", total=total)
        manifest = check_digests(args.output, lambda read: bar.update(task, completed=read))
    shards = len(manifest.train) + len(manifest.validation)
    console.print(
        f"{args.output}: {shards} files and the tokenizer are as {MANIFEST} says",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def run(args: Args) -> None:
    """Prepares, or checks."""
    if args.check:
        check(args)
    else:
        prepare(args)


COMMAND_LINE = CommandLine("examples.moonlight.data.prepare", Args, __doc__, groups=GROUPS)


def main() -> None:
    """The program."""
    COMMAND_LINE.run(run)


if __name__ == "__main__":
    main()
