"""Files of any size, cut into pieces that a process can hold.

How they are cut depends on the files alone, not on who reads them or where reading began: a program
that goes on in the midst of them finds the same pieces.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from examples.moonlight.common.untrusted import MEBIBYTE, check_file, shown_name
from examples.moonlight.data.corpus import LeftOut, begins_with_a_text, list_files
from examples.moonlight.data.text_files import (
    PARQUET,
    NotText,
    TextFile,
    first_bytes,
    import_pyarrow,
    is_jsonl,
)

# Bytes of UTF-8 from which on a piece is full. A process encodes some megabytes in a second: so a
# piece takes seconds, and what is lost at a kill is little.
PIECE = 16 * MEBIBYTE

# Characters of a line, at most: it is held whole.
LONGEST_LINE = 256 * MEBIBYTE

# Bytes of a text file, and rows of a Parquet file, that are read at a time.
_BLOCK, _ROWS = 4 * MEBIBYTE, 256


class Source(NamedTuple):
    """One file to read.

    Attributes:
        path: Where it lies.
        name: What it is called in its folder.
        lone: Whether it was named itself, and not its folder: then it has to be what its name says.
        size: Its bytes.
    """

    path: Path
    name: str
    lone: bool
    size: int


class Place(NamedTuple):
    """Where in the files a piece ends, and the next one begins.

    Attributes:
        files: The files that are behind.
        blocks: The blocks of the next file that are behind.
    """

    files: int
    blocks: int


START = Place(0, 0)


class Block(NamedTuple):
    """Part of a file, with whole documents.

    Attributes:
        source: The file.
        text: Its lines, if it has an object a line, or else one document, in UTF-8: as characters
            a text takes up to four times as much.
        rows: The texts of a Parquet file's rows; None if it is none.
        start: The number of the first line or row; 0 if the text is one document.
    """

    source: Source
    text: bytes
    rows: Sequence[str | None] | None
    start: int


class Piece(NamedTuple):
    """What is encoded at a time.

    Attributes:
        blocks: Its texts, in order.
        left_out: The files that were found, since the piece before, to be no text.
        end: Where the next piece begins.
        read: Bytes of all files, as they lie there, up to its end.
    """

    blocks: Sequence[Block]
    left_out: Sequence[LeftOut]
    end: Place
    read: int


def find_sources(inputs: Sequence[Path]) -> list[Source]:
    """The files that are named, or lie in folders that are.

    Raises:
        FileNotFoundError: There is nothing of a name.
        ValueError: A file is no regular one, or a link out of its folder.
    """
    sources = []
    for given in inputs:
        if not given.exists():
            raise FileNotFoundError(
                f"--input {shown_name(given)}: no such file or folder; give a text file, a .jsonl "
                "file, a Parquet file or a folder of them"
            )
        if given.is_dir():
            sources += [
                Source(path, path.relative_to(given).as_posix(), False, check_file(path))
                for path in list_files(given)
            ]
        else:
            sources.append(Source(given, shown_name(given.name), True, check_file(given)))
    return sources


def read_pieces(
    sources: Sequence[Source], start: Place = START, *, field: str = "text", size: int = PIECE
) -> Iterator[Piece]:
    """Reads files, from a place on.

    Args:
        sources: The files.
        start: The end of an earlier piece, or the beginning of all.
        field: The field of a `.jsonl` file's objects, or the column of a Parquet file, with the
            text.
        size: Bytes from which on a piece is full.

    Yields:
        The pieces; the last one may have no text.

    Raises:
        RuntimeError: A file needs a package that is not installed.
        ValueError: A file is damaged; a file that was named is no text, or one of a folder is none
            after `size` characters that are one; a line is too long, a column is not there.
    """
    blocks: list[Block] = []
    left_out: list[LeftOut] = []
    count, before = 0, sum(source.size for source in sources[: start.files])
    for number, source in enumerate(sources[start.files :], start.files):
        reader = _Reader(source, field, size)
        done = 0
        try:
            for block in reader:
                done += 1
                if number == start.files and done <= start.blocks:
                    continue
                blocks.append(block)
                count += len(block.text) + sum(len(row or "") for row in block.rows or ())
                if count >= size:
                    yield Piece(blocks, left_out, Place(number, done), before + reader.read)
                    blocks, left_out, count = [], [], 0
        except NotText as error:
            if source.lone or done:
                raise
            left_out.append(LeftOut(source.name, error.kind))
        before += source.size
    yield Piece(blocks, left_out, Place(len(sources), 0), before)


class _Reader:
    """Reads one file in blocks."""

    def __init__(self, source: Source, field: str, size: int):
        self._source, self._field, self._size = source, field, size
        self._file: TextFile | None = None
        self._share = 0.0

    @property
    def read(self) -> int:
        """How many bytes of the file are behind."""
        return round(self._share * self._source.size) if self._file is None else self._file.read

    def __iter__(self) -> Iterator[Block]:
        if first_bytes(self._source.path) == PARQUET:
            return self._rows()
        return self._texts()

    def _texts(self) -> Iterator[Block]:
        source = self._source
        self._file = TextFile(source.path, block=min(_BLOCK, self._size))
        texts = iter(self._file)
        # Files up to this long are known to be text before any of it is used.
        first, count = [], 0
        for text in texts:
            first.append(text)
            count += len(text)
            if count > self._size:
                break
        texts = itertools.chain(first, texts)
        del first
        if is_jsonl(source.path):
            lines = self._lines(texts)
            head = next(lines, "")
            if source.lone or begins_with_a_text(head, self._field):
                start = 1
                for text in itertools.chain([head], lines):
                    yield Block(source, text.encode(), None, start)
                    start += text.count("\n")
                return
            texts = itertools.chain([head], lines)
        yield from self._parts(texts)

    def _lines(self, texts: Iterator[str]) -> Iterator[str]:
        """Texts that end where a line does."""
        kept: list[str] = []
        for text in texts:
            head, end, rest = text.rpartition("\n")
            if end:
                yield "".join([*kept, head, end])
                kept = []
            kept.append(rest)
            if sum(map(len, kept)) > LONGEST_LINE:
                raise ValueError(
                    f"{shown_name(self._source.path)} has a line of more than {LONGEST_LINE:,} "
                    "characters: cut it"
                )
        yield "".join(kept)

    def _parts(self, texts: Iterator[str]) -> Iterator[Block]:
        """A text as one document, or, where it is longer than a piece, as several.

        It is then cut between two lines, or else between two words, or anywhere.
        """
        kept = ""
        for text in texts:
            kept += text
            while len(kept) > self._size:
                cut = kept.rfind("\n", 0, self._size) + 1 or kept.rfind(" ", 1, self._size)
                cut = cut if cut > 0 else self._size
                yield Block(self._source, kept[:cut].encode(), None, 0)
                kept = kept[cut:]
        yield Block(self._source, kept.encode(), None, 0)

    def _rows(self) -> Iterator[Block]:
        path, field = self._source.path, self._field
        name = shown_name(path)
        import_pyarrow(f"{name} is a Parquet file")
        import pyarrow as pa
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(path, pre_buffer=False) as file:
                _check_column(file.schema_arrow, field, name)
                start = 1
                for batch in file.iter_batches(batch_size=_ROWS, columns=[field]):
                    rows = batch.column(0).to_pylist()
                    self._share = (start - 1 + len(rows)) / file.metadata.num_rows
                    yield Block(self._source, b"", rows, start)
                    start += len(rows)
        except (pa.ArrowInvalid, UnicodeDecodeError, OSError) as error:
            raise ValueError(
                f"{name} is a damaged Parquet file ({error}): fetch it again"
            ) from error


def _check_column(schema: Any, field: str, name: str) -> None:
    import pyarrow as pa

    kind = schema.field(field).type if field in schema.names else None
    if kind is None:
        raise ValueError(
            f"{name} has no column {field!r}; it has {', '.join(schema.names)}: name the one with "
            "the text by --field"
        )
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"{name}: the column {field!r} holds {kind}, where texts are expected")
