"""Documents, their split, the cache and the pipeline: all deterministic, all repairable."""

import gzip
import json
import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, processors

from examples.moonlight.data import corpus
from examples.moonlight.data import tokenized as data
from tests.moonlight.hostile import bounded, sparse

VOCAB = 300


def write_folder(root: Path, files: int = 40) -> Path:
    folder = root / "texts"
    (folder / "inner").mkdir(parents=True)
    for i in range(files):
        place = folder / ("inner" if i % 2 else ".") / f"{i}.txt"
        place.write_text("".join(f"file {i} says {i * j % 97} times\n" for j in range(20)))
    return folder


def load(path: Path, cache: Path) -> data.TokenizedCorpus:
    return data.load_corpus(path, vocab_size=VOCAB, cache_dir=cache)


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


def test_the_same_text_gives_the_same_tokens_wherever_it_lies(tmp_path: Path):
    first = load(write_folder(tmp_path / "a"), tmp_path / "cache_a")
    second = load(write_folder(tmp_path / "b"), tmp_path / "cache_b")
    assert first.corpus_hash == second.corpus_hash
    assert first.tokenizer.to_str() == second.tokenizer.to_str()
    np.testing.assert_array_equal(first.train, second.train)
    np.testing.assert_array_equal(first.validation, second.validation)


def test_the_hash_follows_content_names_and_settings(folder: Path, tmp_path: Path):
    hashes = [load(folder, tmp_path / "cache").corpus_hash]
    wider = data.load_corpus(folder, vocab_size=VOCAB + 1, cache_dir=tmp_path / "cache")
    hashes.append(wider.corpus_hash)
    (folder / "0.txt").rename(folder / "renamed.txt")
    hashes.append(load(folder, tmp_path / "cache").corpus_hash)
    (folder / "1.md").write_text("more")
    hashes.append(load(folder, tmp_path / "cache").corpus_hash)
    assert len(set(hashes)) == 4


def test_tokens_decode_to_the_documents(folder: Path, tmp_path: Path):
    loaded = load(folder, tmp_path / "cache")
    train, validation = corpus.split_documents(corpus.load_documents(folder))
    for tokens, documents in ((loaded.train, train), (loaded.validation, validation)):
        text = loaded.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
        assert text == "".join(document.text + data.END_OF_TEXT for document in documents)
        size = sum(len(document.text.encode()) for document in documents)
        assert data.token_byte_lengths(loaded.tokenizer)[tokens].sum() == size


def test_the_split_is_disjoint_complete_and_by_name(folder: Path):
    documents = corpus.load_documents(folder)
    train, validation = corpus.split_documents(documents)
    assert len(validation) == round(corpus.VALIDATION_FRACTION * len(documents))
    assert not set(train) & set(validation)
    assert set(train) | set(validation) == set(documents)
    changed = [corpus.Document(name, text + "!") for name, text in reversed(documents)]
    names = {document.name for document in corpus.split_documents(changed)[1]}
    assert names == {document.name for document in validation}


def test_a_repeated_jsonl_line_is_never_on_both_sides(tmp_path: Path):
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": f"line {i % 4}"}) for i in range(40)]
    path.write_text("\n".join([*lines, "", ""]))
    train, validation = corpus.split_documents(corpus.load_documents(path))
    assert len(train) + len(validation) == 40
    assert not {document.text for document in train} & {document.text for document in validation}


def test_a_lone_text_holds_out_its_tail(tmp_path: Path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i}\n" for i in range(100)))
    (train,), (validation,) = corpus.split_documents(corpus.load_documents(path))
    assert train.text + validation.text == path.read_text()
    assert validation.text.splitlines()[0] == "line 95"


def test_the_default_corpus_is_this_pythons_library_without_tests():
    documents = corpus.load_documents(None)
    names = {document.name for document in documents}
    assert {"ast.py", "json/decoder.py"} <= names
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "encodings"}
    assert not any(name.startswith("_sysconfigdata") for name in names)
    assert not names & {"html/entities.py", "stringprep.py", "locale.py"}
    assert sum(len(document.text) for document in documents) > 5_000_000
    tables = {document.name for document in corpus.standard_library(tables=True)} - names
    others = {name for name in tables if not name.startswith("encodings/")}
    assert "encodings/cp1252.py" in tables and 5 < len(others) < 20


def test_a_table_is_known_by_its_lines():
    row = "    0x2b: (1, -0.5e3, 'a, b'),  # PLUS SIGN\n"
    code = "def f(x):\n    return x + g(1)\n"
    assert corpus.is_table("table = {\n" + 9 * row + "}\n")
    assert not corpus.is_table("table = {\n" + row + "}\n" + 9 * code)
    assert not corpus.is_table(9 * code + 99 * "# 0x2b: 1\n\n")
    assert not corpus.is_table("x = y\n" * 99 + '"""' + "0 " * 99 + '"""\n' + "")
    assert not corpus.is_table("")
    with bounded(seconds=2):  # no way through a line is tried twice
        assert not corpus.is_table("0, " * 20_000 + "x\n" + "'" * 20_001)


def test_the_cache_is_read_the_second_time(folder: Path, tmp_path: Path, monkeypatch):
    first = load(folder, tmp_path / "cache")
    monkeypatch.setattr(data, "_build", lambda *_: pytest.fail("built again"))
    np.testing.assert_array_equal(load(folder, tmp_path / "cache").train, first.train)


@pytest.mark.parametrize("name", ["tokenizer.json", "train.npy", "validation.npy", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "altered"])
def test_a_damaged_cache_is_repaired(folder: Path, tmp_path: Path, name: str, damage: str):
    first = load(folder, tmp_path / "cache")
    path = tmp_path / "cache" / first.corpus_hash / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    second = load(folder, tmp_path / "cache")
    assert path.read_bytes() == content
    assert second.tokenizer.to_str() == first.tokenizer.to_str()
    np.testing.assert_array_equal(second.train, first.train)
    np.testing.assert_array_equal(second.validation, first.validation)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "half', r"line 3: not valid JSON"),
        ('["text"]', r"line 3: expected an object"),
        ('{"txt": "misspelt"}', r"line 3: expected an object .* got '\{\"txt\""),
        ('{"text": 5}', r"line 3: expected an object"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: str, message: str):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        corpus.load_documents(path)


def test_wrong_data_paths_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        corpus.load_documents(tmp_path / "nothing.txt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        corpus.load_documents(tmp_path / "nothing.jsonl")
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\xff")
    with pytest.raises(ValueError, match=r"picture\.txt is PNG, not text \(byte 0\): convert"):
        corpus.load_documents(tmp_path / "picture.txt")
    with pytest.raises(ValueError, match=r"no text in it, only 1 PNG \(picture\.txt\); give"):
        corpus.load_documents(tmp_path)
    (tmp_path / "picture.txt").write_text(" \n")
    for path in (tmp_path, tmp_path / "picture.txt"):
        with pytest.raises(ValueError, match="no text in it"):
            corpus.load_documents(path)


def test_a_folder_is_read_as_people_have_it(folder: Path):
    """Texts in what form they may be; what is none is left out, and told by kind."""
    plain = corpus.load_documents(folder, tell=pytest.fail)
    text = "one\ntwo caf\u00e9 \U0001f600\n"
    files = {
        "bom.txt": b"\xef\xbb\xbf" + text.encode(),
        "windows.txt": text.replace("\n", "\r\n").encode(),
        "little.txt": b"\xff\xfe" + text.encode("utf-16-le"),
        "big.txt": b"\xfe\xff" + text.replace("\n", "\r\n").encode("utf-16-be"),
        "packed.txt.gz": gzip.compress(text.encode()) + gzip.compress(b"more\n"),
    }
    others = {
        "a.png": b"\x89PNG\r\n\x1a\n\0\0",
        "b.png": b"\x89PNG\xff",
        "c.png": b"\x89PNG\xff",
        "d.png": b"\x89PNG\xff",
        "data.parquet": b"PAR1\0",
        "empty.txt": b"",
        "holes.bin": bytes(99),
        "latin.txt": "caf\u00e9".encode("latin-1"),
        "lone.txt": b"\xff\xfe\x3d\xd8",
        "space.md": b" \n",
        "tar.gz": gzip.compress(b"name" + bytes(253) + b"ustar" + bytes(99)),
        "zeros.txt": b"\xff\xfe" + "a\0b".encode("utf-16-le"),
    }
    for name, content in (files | others).items():
        (folder / name).write_bytes(content)
    lines = "".join(json.dumps({"text": f"line {i}"}) + "\r\n" for i in range(3))
    (folder / "lines.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "blank.jsonl").write_text('{"text": "not"}\n\n{"text": " "}\n')
    (folder / "other.jsonl").write_text('{"a": 1}\n')

    told: list[str] = []
    found = corpus.load_documents(folder, tell=told.append)
    added = {document.name: document.text for document in found if document not in plain}
    assert {name: added.get(name) for name in files} == dict.fromkeys(files, text) | {
        "packed.txt.gz": text + "more\n"
    }
    assert added["other.jsonl"] == '{"a": 1}\n'
    assert len(found) == len(plain) + len(files) + 5
    assert {"line 0", "line 1", "line 2", "not"} < set(added.values())
    assert told == [
        f"--data {folder}: left out what is no text: 4 PNG (a.png; b.png; c.png; ...), 1 Parquet "
        "(data.parquet), 3 empty (blank.jsonl, line 3; empty.txt; space.md), 2 not UTF-16 "
        "(lone.txt; zeros.txt), 2 not UTF-8 (holes.bin; latin.txt), 1 tar (tar.gz)"
    ]
    (folder / "lines.jsonl.gz").write_bytes(gzip.compress(lines.encode() + b"{"))
    with pytest.raises(ValueError, match=r"lines\.jsonl\.gz, line 4: not valid JSON"):
        corpus.load_documents(folder)


@pytest.mark.parametrize("name", ["texts.txt.gz", "texts.jsonl.gz"])
def test_a_damaged_gzip_file_is_named(tmp_path: Path, name: str):
    content = gzip.compress(b'{"text": "a line of many"}\n' * 99)
    path = tmp_path / name
    for damaged in (content[:-9], content[:40] + b"\xff" + content[41:], content + b"x"):
        path.write_bytes(damaged)
        for place in (path, tmp_path):
            with pytest.raises(ValueError, match=rf"{name} is a damaged gzip file .*: fetch it"):
                corpus.load_documents(place)


def test_no_more_is_unpacked_than_fits_into_memory(tmp_path: Path, monkeypatch):
    path = tmp_path / "bomb.txt.gz"
    path.write_bytes(gzip.compress(b"a" * 40_000_000, compresslevel=1))
    monkeypatch.setattr(os, "sysconf", lambda name: 4096)
    with pytest.raises(ValueError, match=r"bomb\.txt\.gz: more than 8,388,608 bytes of text"):
        corpus.load_documents(path)
    path.write_bytes(gzip.compress(bytes(40_000_000), compresslevel=1))
    with pytest.raises(ValueError, match=r"bomb\.txt\.gz is not UTF-8 text \(byte 0 is zero\)"):
        corpus.load_documents(path)
    # What is no text takes no memory, however large.
    path.unlink()
    sparse(tmp_path / "film.mp4")
    (tmp_path / "a.txt").write_text("a")
    assert corpus.load_documents(tmp_path) == [("a.txt", "a")]


def test_what_may_not_be_read_is_named(folder: Path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", denied)
        with pytest.raises(PermissionError, match=r"0\.txt may not be read by this user: change"):
            corpus.load_documents(folder)
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError, match="texts may not be read by this user: change its"):
        corpus.load_documents(folder)


def test_one_long_line_is_divided_between_words(tmp_path: Path, monkeypatch):
    path = tmp_path / "line.txt"
    path.write_text("word " * 2000)
    (train,), (validation,) = corpus.split_documents(corpus.load_documents(path))
    assert train.text == "word " * 1900 and validation.text == "word " * 100
    path.write_text("ACGT" * 5000)  # and inside of a word, where it is all that there is
    (train,), (validation,) = corpus.split_documents(corpus.load_documents(path))
    assert (len(train.text), len(validation.text)) == (19_000, 1000)
    given: list[str] = []
    train_tokenizer = data._train_tokenizer

    def noted(texts, size):
        given.extend(texts)
        return train_tokenizer(iter(given), size)

    monkeypatch.setattr(data, "_train_tokenizer", noted)
    loaded = load(path, tmp_path / "cache")
    assert [len(part) for part in given] == [1000] * 19
    assert loaded.tokenizer.decode(loaded.train.tolist()) == train.text
    pieces = [*data._cut_words("ab " + "x" * 2500 + " cd")]
    assert "".join(pieces) == "ab " + "x" * 2500 + " cd"
    assert [len(piece) for piece in pieces] == [1003, 1000, 503]


def test_a_python_without_sources_is_told_to_bring_data(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="--data PATH"):
        corpus.load_documents(None)


def test_data_that_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="a has 1 characters: too few to hold some out; give more"):
        corpus.split_documents([corpus.Document("a", "1")])
    with pytest.raises(ValueError, match="all 2 documents are the same"):
        corpus.split_documents([corpus.Document("a", "same")] * 2)


def test_too_small_a_vocabulary_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="at least 257"):
        data.load_corpus(folder, vocab_size=256, cache_dir=tmp_path)


# --- several sources ------------------------------------------------------------------------------


def write_sources(root: Path) -> dict[str, Path | None]:
    """Two sources with one text in common, which the first of them holds out."""
    general = write_folder(root)
    quality = root / "quality.jsonl"
    held_out = corpus.split_documents(corpus.load_documents(general))[1][0].text
    texts = [held_out, *(f"proof {i} of {i * i}\n" * 9 for i in range(30))]
    quality.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return {"general": general, "quality": quality}


def test_sources_share_a_tokenizer_and_nothing_that_is_held_out(tmp_path: Path, monkeypatch):
    paths = write_sources(tmp_path)
    loaded = data.load_sources(paths, vocab_size=VOCAB, cache_dir=tmp_path / "cache")
    alone = load(paths["general"], tmp_path / "cache")
    assert loaded.corpus_hash != alone.corpus_hash
    assert loaded.tokenizer.to_str() != alone.tokenizer.to_str()
    texts = {
        name: [
            loaded.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
            for tokens in (loaded.train[name], loaded.validation[name])
        ]
        for name in paths
    }
    (text, *_), _ = corpus.split_documents(corpus.load_documents(paths["quality"]))
    assert text.text in texts["general"][1]  # what the other source holds out
    assert text.text not in texts["quality"][0]
    assert "proof 3 of 9" in "".join(texts["quality"])

    monkeypatch.setattr(data, "_build", lambda *_: pytest.fail("built again"))
    again = data.load_sources(paths, vocab_size=VOCAB, cache_dir=tmp_path / "cache")
    np.testing.assert_array_equal(again.train["quality"], loaded.train["quality"])


def test_a_source_that_is_all_held_out_elsewhere_is_refused(tmp_path: Path):
    paths = write_sources(tmp_path)
    _, held_out = corpus.split_documents(corpus.load_documents(paths["general"]))
    lines = [json.dumps({"text": text}) for text in (held_out[0].text, held_out[1].text)]
    paths["quality"].write_text("\n".join(lines))
    with pytest.raises(ValueError, match="hold out every text that 'quality' has to train on"):
        data.load_sources(paths, vocab_size=VOCAB, cache_dir=tmp_path / "cache")


def test_a_models_own_tokenizer_is_taken(folder: Path, tmp_path: Path):
    tokenizer = Tokenizer(models.BPE({"a": 0, "i": 1, "[END]": 2, "[BEGIN]": 3}, []))
    tokenizer.add_special_tokens(["[END]", "[BEGIN]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BEGIN] $A", special_tokens=[("[BEGIN]", 3)]
    )
    model = tmp_path / "model"
    model.mkdir()
    tokenizer.save(str(model / "tokenizer.json"))

    def load_with(eos):
        (model / "config.json").write_text(json.dumps({"eos_token_id": eos}))
        return data.load_sources(
            {"": folder}, vocab_size=0, cache_dir=tmp_path / "cache", pretrained=model
        )

    for eos in (None, 4, []):
        with pytest.raises(ValueError, match=r"names no token of it as eos_token_id \(got"):
            load_with(eos)
    loaded = load_with([2, 3])
    train, _ = corpus.split_documents(corpus.load_documents(folder))
    expected = "".join("".join(c for c in d.text if c in "ai") + "." for d in train)
    assert "".join("ai."[token] for token in loaded.train[""]) == expected
    assert data.token_byte_lengths(loaded.tokenizer).tolist() == [1, 1, 0, 0]
    assert load_with(2).corpus_hash == loaded.corpus_hash != load_with(3).corpus_hash


def test_the_bytes_of_a_tokenizer_that_writes_text():
    vocab = {"<0x0A>": 0, "\u2581the": 1, "\u00e9": 2, "<s>": 3}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    assert data.token_byte_lengths(tokenizer).tolist() == [1, 4, 2, 0]
