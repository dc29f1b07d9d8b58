"""Two parts, each with text held out: four sets of documents that share none."""

import json
from pathlib import Path

import numpy as np
import pytest

from examples.scaling_law.corpus import (
    TUNING_SHARE,
    Args,
    Corpus,
    Part,
    load_corpus,
    main,
    repeated_share,
)
from examples.scaling_law.protocol import Run

pytestmark = pytest.mark.one_stack

FILES = 60


def text(index: int) -> str:
    return f"file {index} is about {index * index}\nand no other\n"


def write_folder(folder: Path, files: int = FILES) -> Path:
    (folder / "inner").mkdir(parents=True)
    for i in range(files):
        place = folder / ("inner" if i % 2 else ".") / f"{i}.txt"
        place.write_text(text(i))
    return folder


def quarters(corpus: Corpus) -> list[list[str]]:
    """Documents of tuning and study, each training and held out."""
    parts = (corpus.tuning, corpus.study)
    return [half.tobytes().decode().split("\0") for part in parts for half in part]


def assert_same(a: Corpus, b: Corpus) -> None:
    assert a.hash == b.hash and quarters(a) == quarters(b)


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "texts")


def test_the_four_quarters_share_no_document_and_leave_out_none(folder):
    found = quarters(load_corpus(folder))
    together = [document for quarter in found for document in quarter]
    assert sorted(together) == sorted(text(i) for i in range(FILES))
    assert all(found)


def test_the_parts_have_their_shares(folder):
    tune, tune_held_out, study, study_held_out = map(len, quarters(load_corpus(folder)))
    assert tune + tune_held_out == TUNING_SHARE * FILES
    # A twentieth of 18 and of 42.
    assert (tune_held_out, study_held_out) == (1, 2)
    assert study + study_held_out == FILES - 18


def test_all_is_bytes(folder):
    corpus = load_corpus(folder)
    for half in (*corpus.tuning, *corpus.study):
        assert half.dtype == np.uint8 and half.ndim == 1


def test_text_beyond_ascii_is_utf_8(tmp_path):
    folder = write_folder(tmp_path / "texts", 8)
    for file in folder.rglob("*.txt"):
        file.write_text("naïve 一\n" + file.read_text(), encoding="utf-8")
    found = quarters(load_corpus(folder))
    assert sorted(d for quarter in found for d in quarter) == sorted(
        "naïve 一\n" + text(i) for i in range(8)
    )


def test_the_same_folder_gives_the_same_bytes_wherever_it_lies(folder, tmp_path):
    assert_same(load_corpus(folder), load_corpus(folder))
    assert_same(load_corpus(folder), load_corpus(write_folder(tmp_path / "elsewhere")))


def test_the_hash_follows_every_files_content_and_name(tmp_path):
    folder = write_folder(tmp_path / "texts", 8)
    hashes = [load_corpus(folder).hash]
    for i in range(8):
        (file,) = folder.rglob(f"{i}.txt")
        file.write_text(file.read_text() + "!")
        hashes.append(load_corpus(folder).hash)
        file.rename(file.with_name(f"renamed_{i}.md"))
        hashes.append(load_corpus(folder).hash)
    assert len(set(hashes)) == 17


def test_other_text_under_the_same_name_stays_where_it_was(folder):
    before = quarters(load_corpus(folder))
    for i in range(FILES):
        (file,) = folder.rglob(f"{i}.txt")
        file.write_text(file.read_text() + "and more\n")
    after = quarters(load_corpus(folder))
    assert after == [[document + "and more\n" for document in quarter] for quarter in before]


def test_lines_of_a_jsonl_file_are_documents(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text(i)}) + "\n" for i in range(10)))
    found = quarters(load_corpus(path))
    assert [len(quarter) for quarter in found] == [2, 1, 6, 1]
    assert len({document for quarter in found for document in quarter}) == 10


def test_four_documents_are_enough(tmp_path):
    found = quarters(load_corpus(write_folder(tmp_path / "texts", 4)))
    assert [len(quarter) for quarter in found] == [1, 1, 1, 1]


@pytest.mark.parametrize("files", [1, 3])
def test_too_few_documents_raise(tmp_path, files):
    folder = write_folder(tmp_path / "texts", files)
    with pytest.raises(
        ValueError, match=rf"--data .*texts: {files} different documents are too few"
    ):
        load_corpus(folder)


def test_a_path_to_nothing_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_corpus(tmp_path / "nowhere")


def test_a_repeated_document_is_on_one_side(tmp_path):
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": f"text {i % 9}, again"}) for i in range(18)]
    path.write_text("\n".join(lines))
    corpus = load_corpus(path)
    sides = [
        set(bytes(side).split(b"\0")) for part in (corpus.tuning, corpus.study) for side in part
    ]
    assert len(set().union(*sides)) == sum(map(len, sides)) == 9


def test_files_that_repeat_others_are_left_out_of_the_distinct_part(tmp_path):
    folder = write_folder(tmp_path / "texts", 12)
    table = "".join(f"    {i}: 'a line of a long table that files share'\n" for i in range(40))
    for i in range(12):
        (folder / f"table_{i}.txt").write_text(f"the table {i}\n{table}")
    corpus = load_corpus(folder)
    assert b"a long table" in b"".join(map(bytes, corpus.study))
    assert b"a long table" not in b"".join(map(bytes, corpus.distinct))
    kept = {text for side in corpus.distinct for text in bytes(side).split(b"\0")}
    assert kept <= {text for side in corpus.study for text in bytes(side).split(b"\0")}


def test_a_corpus_of_nothing_but_repeats_has_no_distinct_part(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(8):
        (tmp_path / "texts" / f"{i}.txt").write_text(
            f"{i}\n" + "the same long line in every file\n"
        )
    corpus = load_corpus(tmp_path / "texts")
    run = Run(part="distinct", layers=1, tokens=1, batch=1, learning_rate=1.0, optimizer="adamw")
    with pytest.raises(ValueError, match="all repeat each other: give another --data"):
        corpus.part(run)


def test_repeated_bytes_are_those_of_long_lines_that_training_text_has():
    def as_bytes(*documents: str) -> np.ndarray:
        return np.frombuffer("\0".join(documents).encode(), np.uint8)

    known, other = "k" * 30, "o" * 30
    train = as_bytes(f"{known}\nshort\n", "last")
    assert repeated_share(Part(train, as_bytes(f"{known}\n", other))) == 30 / 62
    assert repeated_share(Part(train, as_bytes("short\nlast", other))) == 0


def test_the_parts_are_printed(folder, capsys):
    main(Args(data=folder))
    printed = capsys.readouterr().out
    assert load_corpus(folder).hash in printed
    files = {
        line.split("│")[1].strip(): int(line.split("│")[2])
        for line in printed.splitlines()
        if "│" in line
    }
    assert files == {"tuning": 18, "study": 42, "distinct": 42}
