"""Records of every form, sources with and without a number, and lines that are no record."""

import json
import os
from pathlib import Path

import pytest

from examples.finetune.data import sources as sources_module
from examples.finetune.data.conversations import Malformed, parse_record, with_system
from examples.finetune.data.self_cognition import fill_identity
from examples.finetune.data.sources import hold_out, load_conversations, parse_source
from examples.moonlight.generation.chat import Message
from tests.finetune.chat_toy import conversation

QUESTION, ANSWER = Message("user", "q"), Message("assistant", "a")


def line(*roles: str, **more) -> dict:
    return {"messages": [{"role": role, "content": role[0]} for role in roles]} | more


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"query": "q", "response": "a"}, [QUESTION, ANSWER]),
        (
            {"system": "s", "query": "q", "response": "a", "history": [["q1", "a1"], ["q2", "a2"]]},
            [
                Message("system", "s"),
                Message("user", "q1"),
                Message("assistant", "a1"),
                Message("user", "q2"),
                Message("assistant", "a2"),
                QUESTION,
                ANSWER,
            ],
        ),
        ({"query": "q", "response": "a", "system": "", "history": None}, [QUESTION, ANSWER]),
        ({"instruction": "q", "output": "a", "input": ""}, [QUESTION, ANSWER]),
        ({"instruction": "q", "output": "a", "id": 7}, [QUESTION, ANSWER]),
        ({"instruction": "q", "input": "x", "output": "a"}, [Message("user", "q\nx"), ANSWER]),
        ({"messages": [QUESTION._asdict(), ANSWER._asdict()], "images": []}, [QUESTION, ANSWER]),
        (
            {"system": "s", "messages": [QUESTION._asdict(), ANSWER._asdict()]},
            [Message("system", "s"), QUESTION, ANSWER],
        ),
    ],
)
def test_every_form_is_a_conversation(record, messages):
    found = parse_record(record, "here")
    assert list(found.messages) == messages
    assert found.counts == tuple(message.role == "assistant" for message in messages)


def test_loss_says_which_answers_count():
    record = line("user", "assistant", "user", "assistant", "user", "assistant")
    for i, value in {0: 0, 1: False, 2: None, 3: 1, 5: 0.0}.items():
        record["messages"][i]["loss"] = value
    assert parse_record(record, "here").counts == (False, False, False, True, False, False)


def messages(**changes) -> dict:
    return {"messages": [{"role": "user", "content": "q"}, ANSWER._asdict() | changes]}


MALFORMED = [
    ("{", "no JSON", r"not valid JSON \(.*\); expected an object a line"),
    ('{"query": "a", "query": "b"}', "no JSON", "'query' occurs twice"),
    ("[" * 99999, "no JSON", "nested too deep"),
    ("[]", "no object", r'expected \{"messages": .* got \[\]'),
    ('{"text": "a"}', "no known form", r"expected .* got the fields \['text'\]"),
    (
        '{"query": "q", "response": "a", "output": "a"}',
        "several forms at once",
        "expected .* got the fields",
    ),
    (
        json.dumps(messages() | {"images": ["a.png"]}),
        "more than text",
        "images: the models here read text only",
    ),
    ('{"messages": []}', "no messages", r"messages: expected a list of objects, got \[\]"),
    ('{"messages": ["q"]}', "a message that is no object", r"messages\[0\]: expected .* got 'q'"),
    (json.dumps(messages(role="bot")), "unknown role", r"messages\[1\]: expected .* got 'bot'"),
    (json.dumps(messages(role=["x"])), "unknown role", r"messages\[1\]: expected .* got \['x'\]"),
    (
        json.dumps(messages(content=[{"type": "text"}])),
        "no text",
        r"messages\[1\].content: expected a text, got \[",
    ),
    (json.dumps(messages(content=" \n")), "empty text", r"messages\[1\].content: expected some"),
    ('{"query": "q"}', "no text", "response: expected a text, got None"),
    ('{"instruction": "q", "input": 3, "output": "a"}', "no text", "input: expected a text, got 3"),
    (
        json.dumps(messages(content="\ud800")),
        "half a character",
        r"content: '\\ud800' at character 0 is no character",
    ),
    (json.dumps(messages(loss="yes")), "wrong loss", r"loss: expected true or false, .* 'yes'"),
    (json.dumps(messages(loss=0.5)), "wrong loss", r"messages\[1\].loss: .* got 0.5"),
    (
        '{"messages": [{"role": "user", "content": "q", "loss": true}]}',
        "wrong loss",
        r"messages\[0\].loss: only an assistant's message counts",
    ),
    (
        '{"query": "q", "response": "a", "history": [["q"]]}',
        "wrong history",
        r"history: expected \[\[query, response\], ...\], got \[\['q'\]\]",
    ),
    *(
        (json.dumps(line(*roles)), "wrong order of roles", f"; got {', '.join(roles[:3])}")
        for roles in (
            ("user",),
            ("assistant",),
            ("system",),
            ("user", "user", "assistant"),
            ("user", "assistant", "system"),
            ("assistant", "user"),
            ("user", "assistant", "user"),
            ("system", "system", "user", "assistant"),
        )
    ),
]


@pytest.mark.parametrize(("text", "reason", "detail"), MALFORMED, ids=lambda value: value[:30])
def test_a_malformed_line_is_an_error_or_counted(text, reason, detail, tmp_path):
    path = tmp_path / "data.jsonl"
    good = json.dumps(line("user", "assistant"))
    path.write_text(f"\ufeff{good}\r\n\n \n{text}\n{good}\n{text}")
    with pytest.raises(Malformed, match=rf"data\.jsonl, line 4: {reason}: .*{detail}") as caught:
        load_conversations([str(path)], seed=0)
    assert caught.value.reason == reason
    assert len(str(caught.value)) < 1000
    loaded = load_conversations([str(path)], seed=0, skip_malformed=True)
    assert [chat.origin for chat in loaded.conversations] == [f"{path}, line 1", f"{path}, line 5"]
    assert loaded.reports[0].malformed == {reason: 2}
    said = "\n".join(loaded.reports[0].lines())
    assert said.startswith(f"{path}: 2 of 2 conversations\n  2 skipped ({reason}), as ")
    assert str(caught.value) in said


def test_bytes_that_are_no_text_are_a_malformed_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(line("user", "assistant")).encode() + b'\n{"query": "\xff"}')
    with pytest.raises(Malformed, match=r"line 2: not UTF-8: byte 11 of the line is 0xff"):
        load_conversations([str(path)], seed=0)


def test_what_cannot_be_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "data.jsonl"
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"data.jsonl: no conversation in it \(1 lines were skip"):
        load_conversations([str(path)], seed=0, skip_malformed=True)
    with pytest.raises(ValueError, match=r"is a folder, where a file is expected"):
        load_conversations([str(tmp_path)], seed=0)
    with pytest.raises(FileNotFoundError, match=r"none: no such file"):
        load_conversations([str(tmp_path / "none")], seed=0)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"is a pipe, where a file is expected"):
        load_conversations([str(tmp_path / "pipe")], seed=0)
    monkeypatch.setattr(sources_module, "MAX_LINE", 20)
    path.write_text("\n" + "x" * 21)
    with pytest.raises(ValueError, match=r"line 2: longer than 20 bytes: expected one record"):
        load_conversations([str(path)], seed=0, skip_malformed=True)


def write(path: Path, count: int) -> Path:
    records = ({"query": f"q{i}", "response": f"{path.stem}{i}"} for i in range(count))
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def answers(loaded) -> list[str]:
    return [chat.messages[-1].content for chat in loaded.conversations]


def test_a_number_samples_a_file_and_repeats_what_it_must(tmp_path):
    a, b = write(tmp_path / "a", 10), write(tmp_path / "b", 4)
    every = [f"a{i}" for i in range(10)]
    assert answers(load_conversations([str(a)], seed=0)) == every
    some = load_conversations([f"{a}#6", f"{b}#11"], seed=0)
    assert answers(load_conversations([f"{a}#6", f"{b}#11"], seed=0)) == answers(some)
    assert answers(load_conversations([f"{a}#6"], seed=1)) != answers(some)[:6]
    assert len(set(answers(some)[:6])) == 6
    assert set(answers(some)[:6]) < set(every)
    assert sorted(answers(some)[6:].count(f"b{i}") for i in range(4)) == [2, 3, 3, 3]
    assert some.reports[1].lines() == [f"{b}: 11 of 4 conversations, each 2 or 3 times"]


def test_a_source_is_a_path_or_a_path_and_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_source("a.jsonl") == (Path("a.jsonl"), None)
    assert parse_source("a.jsonl#500") == (Path("a.jsonl"), 500)
    assert parse_source("a#1#2") == (Path("a#1"), 2)
    for text in ("a#", "a#0", "a#-1", "a#1.5", "a#x", "#5", "a#٣"):
        with pytest.raises(ValueError, match=r"--dataset .*: expected a path, or path#N"):
            parse_source(text)
    Path("a#x").touch()
    assert parse_source("a#x") == (Path("a#x"), None)


def test_what_is_held_out_is_not_trained_on(tmp_path):
    path = write(tmp_path / "a", 10)
    loaded = load_conversations([f"{path}#25"], seed=0)
    train, held = hold_out(loaded.conversations, 0.2, seed=0)
    assert len(train) + len(held) == 25
    assert len({chat.origin for chat in held}) == 2
    assert not {chat.origin for chat in train} & {chat.origin for chat in held}
    assert hold_out(loaded.conversations, 0.2, seed=0) == (train, held)
    assert len(hold_out(loaded.conversations, 0.001, seed=0)[1]) > 0
    for share, some in ((0, loaded.conversations), (1.0, loaded.conversations), (0.5, held[:1])):
        with pytest.raises(ValueError, match=r"cannot hold out .* of \d+ conversations"):
            hold_out(some, share, seed=0)


def test_a_system_message_is_put_before_what_has_none():
    bare, own = conversation("q", "a"), conversation("q", "a", system="s")
    added = with_system(bare, "s")
    assert (added.messages, added.counts) == (own.messages, own.counts)
    assert with_system(own, "other") is own
    assert with_system(bare, None) is bare


# --- self-cognition -------------------------------------------------------------------------------


def test_names_are_filled_in_by_language():
    chats = [
        conversation("Who are you?", "I am {{NAME}}, made by {{ AUTHOR }}."),
        conversation("你是谁", "我是{{NAME}}。由{{AUTHOR}}开发。"),
        conversation("What is {{ x }}?", "A jinja variable."),
    ]
    two = fill_identity(chats, names=["小缪", "Mu"], authors=["作者", "the authors"])
    assert two.filled == 2
    assert two.conversations[0].messages[1].content == "I am Mu, made by the authors."
    assert two.conversations[1].messages[1].content == "我是小缪。由作者开发。"
    assert two.conversations[2] is chats[2]
    one = fill_identity(chats, names=["Mu"], authors=[r"\1 {{NAME}}"])
    assert one.conversations[0].messages[1].content == r"I am Mu, made by \1 {{NAME}}."
    assert one.conversations[1].messages[1].content == r"我是Mu。由\1 {{NAME}}开发。"


def test_a_placeholder_without_a_name_is_an_error():
    chats = [conversation("Who are you?", "I am {{NAME}}.")]
    message = r"toy\.jsonl, line 7: \{\{NAME\}\} stands for what --model_name says: give it"
    with pytest.raises(ValueError, match=message):
        fill_identity(chats, names=[], authors=["x"])
    for names in (["a", "b", "c"], [" "]):
        with pytest.raises(ValueError, match=r"--model_name: expected one value, or two for Chi"):
            fill_identity(chats, names=names, authors=[])
    with pytest.raises(ValueError, match=r"--model_author: expected one value"):
        fill_identity(chats, names=["a"], authors=[""])
    assert fill_identity(chats[:0], names=[], authors=[]) == ([], 0)
