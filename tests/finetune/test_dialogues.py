"""The repository's own dialogues: whole, varied, short, and as many as their page says."""

import re
from collections import Counter
from pathlib import Path

import pytest

from examples.finetune.data.conversations import Conversation
from examples.finetune.data.self_cognition import PLACEHOLDER, fill_identity
from examples.finetune.data.sources import load_conversations

CORPUS = Path("examples/finetune/corpus")
FILES = sorted(CORPUS.glob("*.jsonl"))
IDENTITY = CORPUS / "self_cognition.jsonl"

HAN = re.compile("[\u4e00-\u9fff]")
LATIN = re.compile("[A-Za-zÀ-ž]+")


def read(*paths: Path) -> list[Conversation]:
    return load_conversations([str(path) for path in paths], seed=0).conversations


def language(chat: Conversation) -> str:
    text = " ".join(message.content for message in chat.messages)
    han, words = len(HAN.findall(text)), len(LATIN.findall(PLACEHOLDER.sub("", text)))
    return "English" if not han else "Chinese" if han > words else "mixed"


def test_the_page_says_how_many_dialogues_there_are():
    topics = [path for path in FILES if path != IDENTITY]
    counted = Counter(language(chat) for chat in read(*topics))
    assert counted.total() >= 300
    assert min(counted["English"], counted["Chinese"]) >= 100
    page = " ".join((CORPUS / "README.md").read_text().split())
    assert (
        f"{counted.total()} dialogues in twelve files by topic, {counted['English']} in English, "
        f"{counted['Chinese']} in Chinese and {counted['mixed']} from one to the other, and "
        f"{len(read(IDENTITY))} on who the model is"
    ) in page
    assert len(topics) == 12


def test_dialogues_are_of_every_kind():
    chats = read(*FILES)
    assert sum(chat.messages[0].role == "system" for chat in chats) >= 30
    assert sum(len(chat.messages) > 3 for chat in chats) >= 50


def test_no_dialogue_occurs_twice():
    def opening(chat: Conversation) -> tuple[str, ...]:
        return tuple(message.content for message in chat.messages[:-1])

    assert not [key for key, n in Counter(map(opening, read(*FILES))).items() if n > 1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_messages_are_short_and_clean(path):
    for chat in read(path):
        for role, content in chat.messages:
            size = len(HAN.findall(content)) + len(LATIN.findall(content))
            assert size <= 60, (chat.origin, size)
            assert content == content.strip(), chat.origin
            assert "\ufffd" not in content and "||" not in content and "#S" not in content, role


def test_the_identity_is_filled_in():
    chats = read(IDENTITY)
    filled, count = fill_identity(chats, names=["小缪", "Mu"], authors=["某人", "someone"])
    assert count >= 40
    for chat in filled:
        text = " ".join(message.content for message in chat.messages)
        assert "{{" not in text
        assert ("Mu" in text) + ("小缪" in text) < 2
    for name in ("Mu", "小缪", "someone", "某人"):
        assert sum(name in chat.messages[-1].content for chat in filled) >= 5
    # The other files hold no placeholder, so that they train without a name.
    others = read(*(path for path in FILES if path != IDENTITY))
    assert fill_identity(others, names=[], authors=[]).filled == 0
