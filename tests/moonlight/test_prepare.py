"""Tokens made once: the same that a training makes of its texts, packed, cut or killed."""

import gzip
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path

import grain
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.moonlight.data import prepared, text_files
from examples.moonlight.data.batches import Span, Tokens, train_batches
from examples.moonlight.data.corpus import Document, is_held_out, load_documents
from examples.moonlight.data.prepare import __main__ as program
from examples.moonlight.data.prepare import encoding, pieces
from examples.moonlight.data.prepare.output import Output
from examples.moonlight.data.prepared import PreparedTokens, open_sources, read_manifest
from examples.moonlight.data.tokenized import END_OF_TEXT, load_sources, read_vocabulary
from examples.moonlight.training.args import Args
from examples.moonlight.training.job import make_job
from examples.moonlight.training.texts import load_texts

WORDS = [f"word{i}" for i in range(50)] + ["größe", "字", "\U0001f600"]


def text(seed: int, words: int = 30) -> str:
    chosen = random.Random(seed).choices(WORDS, k=words)
    return "\n".join(" ".join(chosen[i : i + 7]) for i in range(0, words, 7)) + "\n"


TEXTS = [text(seed) for seed in range(60)]


@pytest.fixture(name="tokenizer", scope="module")
def _tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level byte-pair encoding, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return folder


def lines(texts: Sequence[str], field: str = "text") -> bytes:
    return "".join(json.dumps({field: each}) + "\n" for each in texts).encode()


def zstandard(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(content)
    return sink.getvalue().to_pybytes()


@pytest.fixture(name="texts")
def _texts(tmp_path: Path) -> Path:
    """The texts in every kind of file, ten of them in each, in their order."""
    folder = tmp_path / "texts"
    (folder / "c").mkdir(parents=True)
    for i in range(10):
        mark = b"\xef\xbb\xbf" * (i == 3)
        content = TEXTS[i].replace("\n", "\r\n") if i == 4 else TEXTS[i]
        codec = "utf-16" if i == 5 else "utf-8"
        (folder / f"a{i}.txt").write_bytes(mark + content.encode(codec))
    (folder / "b.jsonl").write_bytes(lines(TEXTS[10:20]).replace(b"\n", b"\n\n", 1))
    (folder / "c" / "c.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS[20:30])))
    # Two frames, one behind the other.
    packed = zstandard(lines(TEXTS[30:35])) + zstandard(lines(TEXTS[35:40]))
    (folder / "d.jsonl.zst").write_bytes(packed)
    (folder / "e.parquet").write_bytes(as_parquet([*TEXTS[40:50], None, ""]))
    (folder / "f.jsonl").write_bytes(lines(TEXTS[50:60]))
    (folder / "g.png").write_bytes(b"\x89PNG\0")
    return folder


def as_parquet(texts: Sequence[str | None], column: str = "text") -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({column: pa.array(texts, pa.string()), "n": range(len(texts))})
    parquet.write_table(table, sink, row_group_size=4)
    return sink.getvalue().to_pybytes()


def cut(folder: Path, start: pieces.Place = pieces.START, size: int = 200) -> list[pieces.Piece]:
    return [*pieces.read_pieces(pieces.find_sources([folder]), start, size=size)]


def documents(found: Sequence[pieces.Piece]) -> list[str]:
    blocks = [block for piece in found for block in piece.blocks]
    return [document.text for block in blocks for _, document in encoding._documents(block, "text")]


def write(
    folder: Path, found: Sequence[pieces.Piece], tokenizer: Path, shard: int = 64, held_out=0.2
) -> Output:
    """What the program does with pieces, in one process; left without an end."""
    vocabulary = read_vocabulary(tokenizer)
    how = encoding.Settings(tokenizer, "text", held_out, "uint16")
    output = Output(folder, {"texts": "some"}, vocabulary.tokenizer, "uint16", shard=shard)
    with output:
        behind = output.progress.place
        for piece in found:
            if piece.end > behind:
                output.add(piece, encoding.encode(piece, False, how, vocabulary))
                output.note()
    return output


def finish(output: Output) -> None:
    with output:
        output.finish(400, 0)


# --- pieces ---------------------------------------------------------------------------------------


def test_every_kind_of_file_is_read_however_it_is_cut(texts, monkeypatch):
    monkeypatch.setattr(pieces, "_ROWS", 3)
    # The names' order: the folder c comes between b and d.
    expected = TEXTS[:20] + TEXTS[20:50] + ["", ""] + TEXTS[50:]
    whole = cut(texts, size=10**6)
    assert documents(whole) == expected and len(whole) == 1
    assert whole[0].left_out == [("g.png", "PNG")]
    small = cut(texts, size=1000)
    assert documents(small) == expected and len(small) > 10
    reads = [piece.read for piece in small]
    assert reads == sorted(reads)
    assert reads[-1] == sum(path.stat().st_size for path in texts.rglob("*") if path.is_file())
    for i, piece in enumerate(small):
        assert cut(texts, piece.end, size=1000) == small[i + 1 :] or i == len(small) - 1


def test_long_texts_are_cut_between_lines(tmp_path):
    content = "".join(f"line {i}\n" for i in range(100)) + "x" * 500 + " " + "y" * 90
    (tmp_path / "long.txt").write_text(content)
    found = documents(cut(tmp_path, size=100))
    assert "".join(found) == content and max(map(len, found)) <= 100
    assert all(part.endswith("\n") for part in found[:8])


def test_a_long_text_is_encoded_as_if_it_were_short(tokenizer, monkeypatch):
    vocabulary = read_vocabulary(tokenizer)
    content = "".join(TEXTS)
    whole = vocabulary.tokenizer.encode(content, add_special_tokens=False).ids
    monkeypatch.setattr(encoding, "_STRETCH", 300)
    monkeypatch.setattr(encoding, "_LAST", 100)
    monkeypatch.setattr(encoding, "_AT_A_TIME", 500)
    assert len([*encoding._stretches(content)]) > 20
    encoded = encoding._encode(vocabulary, [Document("", content)] * 2, "uint32")
    assert encoded.tolist() == 2 * [*whole, vocabulary.end]


def test_a_text_is_held_out_by_its_content_alone():
    kept = [is_held_out(Document(f"{i}", each), 0.2) for i, each in enumerate(TEXTS)]
    assert kept == [is_held_out(Document("x", each), 0.2) for each in TEXTS]
    share = np.mean([is_held_out(Document("", str(i)), 0.1) for i in range(4000)])
    assert abs(share - 0.1) < 0.02


def test_what_is_read_half_is_no_text_by_name(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"text " * 100 + b"\xe9")
    assert cut(tmp_path, size=1000)[0].left_out == [("a.txt", "not UTF-8")]
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text \(byte 500\)"):
        cut(tmp_path, size=100)
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text \(byte 500\)"):
        cut(tmp_path / "a.txt", size=1000)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.zst", zstandard(lines(TEXTS))[:-9], "damaged Zstandard file .*fetch it again"),
        ("a.jsonl.gz", gzip.compress(lines(TEXTS))[:-9], "damaged gzip file .*fetch it again"),
        ("a.parquet", as_parquet(TEXTS)[:-9], "damaged Parquet file .*fetch it again"),
        ("a.parquet", as_parquet(TEXTS, "x"), "no column 'text'; it has x, n: name .* by --field"),
    ],
)
def test_a_file_that_is_not_whole_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        cut(tmp_path)


def test_a_column_has_to_hold_texts(tmp_path):
    (tmp_path / "a.parquet").write_bytes(as_parquet(TEXTS))
    with pytest.raises(ValueError, match="'n' holds int64, where texts are expected"):
        [*pieces.read_pieces(pieces.find_sources([tmp_path]), field="n")]


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(lines(["x" * 1000]))
    monkeypatch.setattr(pieces, "LONGEST_LINE", 500)
    with pytest.raises(ValueError, match=r"a\.jsonl has a line of more than 500 characters"):
        cut(tmp_path, size=100)


def test_pyarrow_is_asked_for_where_it_is_needed(texts, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    for name in ("d.jsonl.zst", "e.parquet"):
        with pytest.raises(RuntimeError, match=rf"{name} is .*: pip install pyarrow"):
            cut(texts / name)
    assert documents(cut(texts / "b.jsonl")) == TEXTS[10:20]


# --- writing and reading --------------------------------------------------------------------------


def test_tokens_are_those_of_a_training_and_of_tokenizers_alone(texts, tokenizer, tmp_path):
    for path in texts.rglob("*.*"):
        if path.suffix in (".parquet", ".png"):
            path.unlink()
    args = program.Args(
        tmp_path / "tokens", input=(texts,), tokenizer=tokenizer, held_out=0.05, jobs=1
    )
    finished = program.prepare(args)
    made = open_sources({"": args.output})
    read = load_sources(
        {"": texts}, vocab_size=0, cache_dir=tmp_path / "cache", pretrained=tokenizer
    )
    for kind in ("train", "validation"):
        ours, theirs = getattr(made, kind)[""], getattr(read, kind)[""]
        assert len(ours) == len(theirs) > 100
        np.testing.assert_array_equal(ours[0 : len(ours)], theirs)
    alone = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    count = sum(len(alone.encode(each.text).ids) + 1 for each in load_documents(texts))
    assert count == sum(shard["tokens"] for kind in prepared.KINDS for shard in finished[kind])
    assert program.prepare(args) == finished
    # A training reads the same windows in the same order.
    settings = {"output_dir": tmp_path / "run", "sequence_length": 8, "batch_size": 4, "steps": 9}
    batches = []
    for data in (args.output, texts):
        job = make_job(Args(data=(str(data),), **settings))
        if data == texts:
            sources, job = read, None
            batches.append(
                train_batches(sources.train, (), sequence_length=8, batch_size=4, seed=0)
            )
        else:
            batches.append(load_texts(job, Console(quiet=True)).batches)
    for _ in range(20):
        np.testing.assert_array_equal(next(batches[0]), next(batches[1]))


def test_an_end_at_any_moment_costs_nothing(texts, tokenizer, tmp_path):
    found = cut(texts, size=1000)
    finish(write(tmp_path / "whole", found, tokenizer))
    prepared.check_digests(tmp_path / "whole")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(expected) > 8
    for end in range(0, len(found) + 1, 4):
        folder = tmp_path / f"ended{end}"
        write(folder, found[:end], tokenizer)
        # What was appended behind the last note was not brought to the disk, or only partly.
        for number in range(50):
            path = folder / f"train-{number:05d}.bin"
            if not path.exists():
                path.write_bytes(b"rest")
                break
            if not (folder / f"train-{number + 1:05d}.bin").exists():
                path.write_bytes(path.read_bytes() + b"res")
        finish(write(folder, found, tokenizer))
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected


@pytest.fixture(name="folder")
def _folder(texts, tokenizer, tmp_path) -> Path:
    """A prepared corpus of many small shards."""
    finish(write(tmp_path / "tokens", cut(texts, size=1000), tokenizer))
    return tmp_path / "tokens"


def all_of(folder: Path, kind: str) -> np.ndarray:
    files = sorted(folder.glob(f"{kind}-*.bin"))
    return np.concatenate([np.frombuffer(file.read_bytes(), "<u2") for file in files])


def mixed_batches(source: Tokens, rows: Sequence[int] | None = None) -> grain.DatasetIterator:
    return train_batches(
        {"a": source, "b": source},
        [Span(7, {"a": 1, "b": 0}), Span(1, {"a": 1, "b": 2})],
        sequence_length=16,
        batch_size=3,
        seed=5,
        rows=rows,
    )


def test_shards_read_as_one_array(folder):
    manifest = read_manifest(folder)
    tokens, expected = PreparedTokens(folder, manifest, "train"), all_of(folder, "train")
    assert len(tokens) == len(expected) and len(manifest.train) > 10
    for start in range(0, len(expected), 37):
        for stop in (start, start + 1, start + 64, start + 200):
            np.testing.assert_array_equal(tokens[start:stop], expected[start:stop])
    mixed = [mixed_batches(source) for source in (tokens, expected)]
    # A process reads its own rows of the same batches, from any one on.
    second = mixed_batches(tokens, rows=[2, 1])
    second.set_state({"next_index": 20})
    for i in range(40):
        batch = next(mixed[0])
        np.testing.assert_array_equal(batch, next(mixed[1]))
        if i >= 20:
            np.testing.assert_array_equal(batch[[2, 1]], next(second))


def test_damage_is_found(folder):
    def refused(message, call=lambda: open_sources({"": folder})):
        with pytest.raises(ValueError, match=message):
            call()

    def check():
        program.run(program.Args(folder, check=True))

    check()
    path = folder / "train-00002.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    refused(r"train-00002\.bin has 126 bytes, and had 128 when it was written")
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    open_sources({"": folder})  # at the start of a training only sizes are looked at
    refused(r"train-00002\.bin is damaged: its SHA-256", check)
    path.write_bytes(b"\xff\xff" + content[2:])
    refused(
        r"train-00002\.bin has the token 65535, of a vocabulary of 400",
        lambda: open_sources({"": folder}).train[""][100:200],
    )
    tokens = open_sources({"": folder}).train[""]
    path.write_bytes(b"")
    refused(r"train-00002\.bin became shorter", lambda: tokens[100:200])
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00002\.bin is not there"):
        open_sources({"": folder})
    path.write_bytes(content)
    (folder / "tokenizer.json").write_text("{}")
    refused(r"tokenizer\.json is damaged")
    record = json.loads((folder / "tokens.json").read_text())

    def with_changes(**changes):
        (folder / "tokens.json").write_text(json.dumps(record | changes))

    for changes in ({"end_of_text": 1}, {"train": [1]}, {"corpus": "x"}, {"train": None}):
        with_changes(**changes)
        refused(r"tokens\.json is damaged")
    with_changes(format=2)
    refused("expected the format 1, got 2: prepare the texts again")
    manifest = read_manifest_of(record)._replace(vocabulary=163_840)
    with_changes(**manifest.record())
    refused("tokens of the type 'uint16' cannot hold a vocabulary of 163,840: it takes uint32")
    (folder / "tokens.json").rename(folder / "unfinished.json")
    refused(r"tokens is unfinished: the command that began it goes on")


def read_manifest_of(record) -> prepared.Manifest:
    shards = {k: tuple(prepared.Shard(**each) for each in record[k]) for k in prepared.KINDS}
    return prepared.Manifest(*(record[name] for name in prepared.Manifest._fields[:4]), **shards)


def test_a_vocabulary_takes_the_smallest_type_that_holds_it():
    assert [prepared.smallest_dtype(n) for n in (2**16, 2**16 + 1, 2**32)] == [
        *("uint16", "uint32", "uint32")
    ]
    with pytest.raises(ValueError, match="has ids of more than 32 bits"):
        prepared.smallest_dtype(2**32 + 1)


def test_tokenizers_have_to_be_the_same(folder, texts, tokenizer, tmp_path):
    other = json.loads((tokenizer / "tokenizer.json").read_text())
    other["added_tokens"].append(other["added_tokens"][0] | {"id": 400, "content": "<|another|>"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(other))
    open_sources({"": folder}, pretrained=tokenizer)
    with pytest.raises(ValueError, match=r"was prepared with another tokenizer than that of"):
        open_sources({"": folder}, pretrained=tmp_path / "other")
    finish(write(tmp_path / "tokens2", cut(texts), tmp_path / "other"))
    with pytest.raises(ValueError, match=r"tokens2 has another tokenizer than .*tokens: prepare"):
        open_sources({"a": folder, "b": tmp_path / "tokens2"})
    with pytest.raises(ValueError, match=r"prepared corpora are mixed with nothing else"):
        open_sources({"a": folder, "b": texts})
    both = open_sources({"a": folder, "b": folder})
    assert both.corpus_hash != open_sources({"": folder}).corpus_hash


def test_a_window_has_to_fit(folder):
    tokens = open_sources({"": folder}).train
    with pytest.raises(ValueError, match="are fewer than one window of 100000"):
        train_batches(tokens, (), sequence_length=100_000, batch_size=1, seed=0)

    class Long:
        def __len__(self):
            return 2**34

        def __getitem__(self, where):
            return np.zeros(0)

    with pytest.raises(ValueError, match=r"more windows of 4 than can be put into an order"):
        train_batches({"": Long()}, (), sequence_length=4, batch_size=1, seed=0)


def test_a_folder_in_use_is_left_alone(texts, tokenizer, tmp_path):
    vocabulary = read_vocabulary(tokenizer).tokenizer
    folder = tmp_path / "tokens"

    def enter(place: Path = folder, texts: str = "some"):
        with Output(place, {"texts": texts}, vocabulary, "uint16", shard=64):
            pass

    in_use = pytest.raises(RuntimeError, match="in use by another process: wait until it ends")
    with Output(folder, {"texts": "some"}, vocabulary, "uint16"), in_use:
        enter()
    enter()
    with pytest.raises(ValueError, match="other texts or settings: texts was some and is now x"):
        enter(texts="x")
    write(folder, cut(texts), tokenizer)
    (folder / "train-00000.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train-00000\.bin has 0 bytes, and had 128 when"):
        enter()
    with pytest.raises(FileExistsError, match="is not empty: choose another folder"):
        enter(texts.parent)
    with pytest.raises(FileExistsError, match="is a file: choose a folder"):
        enter(texts / "b.jsonl")


def test_both_sides_get_something(texts, tokenizer, tmp_path, monkeypatch):
    def prepare(source: Path, held_out: float = 0.05, output: str = "out"):
        args = program.Args(
            tmp_path / output, input=(source,), tokenizer=tokenizer, held_out=held_out, jobs=1
        )
        monkeypatch.setattr(program, "_encode_all", encode_all)
        program.prepare(args)

    def encode_all(sources, how, output, *_):
        for piece in pieces.read_pieces(sources, size=500):
            output.add(piece, encoding.encode(piece, False, how, read_vocabulary(tokenizer)))

    for share, what in ((1e-9, "validate on"), (1 - 1e-9, "train on")):
        with pytest.raises(ValueError, match=rf"of 10 documents, .* none is left to {what}: remo"):
            prepare(texts / "b.jsonl", share, what)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.png").write_bytes(b"\x89PNG\0")
    with pytest.raises(ValueError, match=r"no text in it, only 1 PNG \(a\.png\); give files"):
        prepare(tmp_path / "none")


def test_a_process_that_is_killed_is_told_of(monkeypatch):
    from concurrent.futures import Future
    from concurrent.futures.process import BrokenProcessPool

    broken: Future = Future()
    broken.set_exception(BrokenProcessPool())
    with pytest.raises(RuntimeError, match=r"was ended from outside, .* the same command goes on"):
        program._append(None, None, broken)  # pyright: ignore[reportArgumentType]


def test_files_are_read_in_blocks_as_they_are_whole(tmp_path):
    for codec in ("utf-8", "utf-16"):
        content = "größe\r\n字\U0001f600\r\r\n\n" * 5
        (tmp_path / "a.txt").write_bytes(content.encode(codec))
        for size in (1, 2, 3, 7, 1000):
            read = "".join(text_files.TextFile(tmp_path / "a.txt", block=size))
            assert read == content.replace("\r\n", "\n")
    os.truncate(tmp_path / "a.txt", 5)
    with pytest.raises(ValueError, match=r"not UTF-16 text \(byte 4\)"):
        text_files.read_text_file(tmp_path / "a.txt")
