"""A folder's tokenizer and chat template: Moonlight's tiktoken file, jinja, text in pieces."""

import base64
import json
import random
from pathlib import Path

import pytest
import tiktoken
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from examples.moonlight.data.corpus import load_documents
from examples.moonlight.data.tokenizer import (
    MOONLIGHT_PATTERN,
    TextStream,
    _byte_characters,
    load_tokenizer,
)
from examples.moonlight.generation.chat import END, MIDDLE, ROLES, Message, load_chat_template

pytestmark = pytest.mark.one_stack

# In the order of the published ids, with a gap that no name is given for.
SPECIAL = ["[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", None, "[EOT]"]
SPECIAL += ["<|im_system|>", None, None, "<|im_middle|>"]

CONVERSATION = [
    Message("system", "Be brief."),
    Message("user", "Who wrote <|im_end|>?"),
    Message("assistant", "Nobody."),
    Message("user", "汉字 it is, isn't it?"),
]

# Moonlight's, as its folder has it, but for the system message.
JINJA = """{%- for message in messages -%}
    {%- if loop.first and messages[0]['role'] != 'system' -%}
        {{- '<|im_system|>system<|im_middle|>Help.<|im_end|>' -}}
    {%- endif -%}
    {{- '<|im_' + message['role'] + '|>' + message['role'] + '<|im_middle|>' -}}
    {{- message['content'] + '<|im_end|>' -}}
{%- endfor -%}
{%- if tools is not none -%}{{ raise_exception('there are no tools') }}{%- endif -%}
{%- if add_generation_prompt -%}{{ '<|im_assistant|>assistant<|im_middle|>' }}{%- endif -%}"""


def random_text(rng: random.Random) -> str:
    """Short text of a few scripts, with whatever the pattern cuts at."""
    kinds = [
        lambda: chr(rng.randrange(0x20, 0x7F)),
        lambda: chr(rng.randrange(0x4E00, 0x4E80)),
        lambda: chr(rng.randrange(0xA0, 0x600)),
        lambda: chr(rng.randrange(0x3040, 0x30FF)),
        lambda: chr(rng.choice([0x1F600, 0x1F468, 0x200D, 0x1F3FD, 0x2764, 0xFE0F])),
        lambda: rng.choice(" \t\n\r\u3000\u00a0\u2028\x85\x0b"),
        lambda: rng.choice("0123456789٣५½"),
        lambda: rng.choice(
            ["'s", "'LL", "don't", "I'M", "'\u017f", "[BOS]", "<|im_end|>", "<|im_"]
        ),
        lambda: rng.choice(["def ", "return", "self.", "\n    "]),
        lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])),
    ]
    kinds = rng.sample(kinds, rng.randrange(1, 5))
    return "".join(rng.choice(kinds)() for _ in range(rng.randrange(1, 30)))


@pytest.fixture(scope="module", name="texts")
def _texts() -> list[str]:
    rng = random.Random(0)
    return [random_text(rng) for _ in range(3000)]


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A model's folder as Moonlight's, with 3000 tokens learnt from code and from random text."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(MOONLIGHT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    sources = [document.text for document in load_documents(None)[:60]]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        sources + texts,
        trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False),
    )
    byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
    folder = tmp_path_factory.mktemp("model")
    vocab = trained.get_vocab()
    ranked = sorted(vocab, key=lambda token: vocab[token])
    tokens = [base64.b64encode(bytes(byte_of[c] for c in token)).decode() for token in ranked]
    (folder / "tiktoken.model").write_text(
        "".join(f"{token} {rank}\n" for rank, token in enumerate(tokens))
    )
    named = {str(3000 + i): {"content": name} for i, name in enumerate(SPECIAL) if name}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": named}))
    return folder


@pytest.fixture(scope="module", name="tokenizer")
def _tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def test_a_rebuilt_tiktoken_file_has_the_ids_of_tiktoken(folder, tokenizer, texts):
    lines = [line.split() for line in (folder / "tiktoken.model").read_text().splitlines()]
    names = [name or f"<|reserved_token_{3000 + i}|>" for i, name in enumerate(SPECIAL)]
    theirs = tiktoken.Encoding(
        "reference",
        pat_str=MOONLIGHT_PATTERN,
        mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in lines},
        special_tokens={name: 3000 + i for i, name in enumerate(names)},
    )
    rng = random.Random(1)
    unseen = [random_text(rng) for _ in range(3000)]
    seen = set()
    for text in [*texts, *unseen, *(document.text for document in load_documents(None)[60:80])]:
        ids = theirs.encode(text, allowed_special="all")
        assert tokenizer.encode(text).ids == ids, ascii(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        seen.update(ids)
    assert len(seen) > 2400
    assert tokenizer.get_vocab_size() == theirs.n_vocab == 3011


def test_text_is_cut_as_moonlight_cuts_it(tokenizer):
    text = "中文English混合 Pascal 北京 don't I'LL12345, (x) == y;\n\n  def\t\tHelloWorld  "
    pieces = [text[slice(*span)] for _, span in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert pieces == [
        *(
            "中文",
            "English",
            "混合",
            " Pascal",
            " ",
            "北京",
            " don't",
            " I'LL",
            "123",
            "45",
            ",",
            " (",
            "x",
        ),
        *(")", " ==", " y", ";\n\n", " ", " def", "\t", "\tHello", "World", "  "),
    ]


def test_a_token_that_no_merging_leads_to_is_still_taken_whole(folder, tmp_path):
    lines = (folder / "tiktoken.model").read_text().splitlines()[:256]
    # "abc" before its halves: merged last in tiktoken too, and "xyz" has no halves at all.
    for token in (b"abc", b"ab", b"xyz"):
        lines.append(f"{base64.b64encode(token).decode()} {len(lines)}")
    (tmp_path / "tiktoken.model").write_text("\n".join(lines))
    tokenizer = load_tokenizer(tmp_path)
    theirs = tiktoken.Encoding(
        "reference",
        pat_str=MOONLIGHT_PATTERN,
        mergeable_ranks={base64.b64decode(x.split()[0]): i for i, x in enumerate(lines)},
        special_tokens={},
    )
    for text in ("abc", "xyz", "abcabc", "xyzabc", "ab abc xyz xyzz"):
        assert tokenizer.encode(text).ids == theirs.encode(text), text


def test_a_tokenizer_json_goes_first(folder, tokenizer, tmp_path):
    (tmp_path / "tiktoken.model").write_text("not read")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("isn't it").ids == tokenizer.encode("isn't it").ids


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json: not a tokenizer of Hugging Face's"),
        ("tiktoken.model", "IQ== 0\nIg== one\n", r"tiktoken\.model, line 2: expected a base64"),
        ("tiktoken.model", "IQ== 0\n!!! 1\n", r"tiktoken\.model, line 2: expected a base64"),
        ("tiktoken.model", "IQ== 0\nIg==\n", r"tiktoken\.model, line 2: expected a base64"),
        ("tiktoken.model", "IQ== 0\n\nIg== 2\n", r"line 3: expected a new token of rank 1, got"),
        ("tiktoken.model", "IQ== 0\nIQ== 1\n", r"line 2: expected a new token of rank 1, got b'!'"),
        ("tiktoken.model", "IQ== 0\n", r"tiktoken\.model: no token for the byte 0, and 254 more"),
        ("tokenizer_config.json", "{\n,}", r"tokenizer_config\.json, line 2: not valid JSON"),
        ("tokenizer_config.json", b'{"a": "\xff"}', r"tokenizer_config\.json is not UTF-8 text"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: expected a JSON object, got li"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"3000": "[BOS]"}}',
            r"added_tokens_decoder: expected .* got '3000': '\[BOS\]'",
        ),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"12": {"content": "[BOS]"}}}',
            r"calls 12 '\[BOS\]', but tiktoken\.model has 3000 tokens",
        ),
    ],
)
def test_malformed_files_are_named(folder, tmp_path, name, content, message):
    (tmp_path / "tiktoken.model").write_bytes((folder / "tiktoken.model").read_bytes())
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor tiktoken\.model"):
        load_tokenizer(tmp_path)


# --------------------------------------------------------------------------------------------------
# Text in pieces
# --------------------------------------------------------------------------------------------------


def test_pieces_join_to_the_text_and_never_cut_a_character(tokenizer, texts):
    rng = random.Random(2)
    for text in texts[:300]:
        stream = TextStream(tokenizer, tokenizer.encode("a prompt").ids)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        pieces = [stream.step(token) for token in ids]
        assert "".join(pieces) == tokenizer.decode(ids)
        assert stream.finish() == ""
        # Noise, as an untrained model draws it: only what is unfinished at the end is left.
        ids = [rng.choice([rng.randrange(3000), *range(95, 100)]) for _ in range(20)]
        stream = TextStream(tokenizer)
        joined = "".join(stream.step(token) for token in ids)
        rest = stream.finish()
        assert joined + rest == tokenizer.decode(ids)
        assert set(rest) <= {"�"}
    stream = TextStream(tokenizer)
    snowman = tokenizer.encode("\u2603").ids
    assert len(snowman) == 3
    assert [stream.step(token) for token in snowman] == ["", "", "\u2603"]


# --------------------------------------------------------------------------------------------------
# Chat
# --------------------------------------------------------------------------------------------------


def test_moonlights_template_is_built_in(folder, tokenizer):
    encode = load_chat_template(folder, tokenizer)
    system, user, assistant, middle, end = (
        tokenizer.token_to_id(name) for name in (*ROLES.values(), MIDDLE, END)
    )
    text = {word: tokenizer.encode(word).ids for word in ("user", "assistant", "system", "Hi!")}
    opening = [assistant, *text["assistant"], middle]
    assert encode([Message("user", "Hi!")]) == [
        user, *text["user"], middle, *text["Hi!"], end, *opening,
    ]  # fmt: skip
    ids = encode(CONVERSATION)
    assert ids[0] == system
    # A name of a special token that somebody types is text.
    assert ids.count(end) == len(CONVERSATION)
    assert "Who wrote <|im_end|>?" in tokenizer.decode(ids)
    assert tokenizer.encode("<|im_end|>").ids == [end]
    with pytest.raises(ValueError, match="role is one of system, user, assistant; got 'tool'"):
        encode([Message("tool", "42")])


@pytest.mark.parametrize("place", ["file", "config", "named"])
def test_a_folders_own_template_goes_first(folder, tokenizer, tmp_path, place):
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(JINJA)
        content = {"chat_template": "not read"}
    else:
        named = [{"name": "tools", "template": "no"}, {"name": "default", "template": JINJA}]
        content = {"chat_template": JINJA if place == "config" else named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    own, built_in = (load_chat_template(path, tokenizer) for path in (tmp_path, folder))
    safe = [m._replace(content=m.content.replace("<|im_end|>", "this")) for m in CONVERSATION]
    assert own(safe) == built_in(safe)
    # Its default system message, which the built-in template does not have.
    assert own(safe[1:]) == built_in([Message("system", "Help."), *safe[1:]])


def test_a_template_has_the_folders_tokens_and_what_templates_call(tokenizer, tmp_path):
    template = (
        "{{ bos_token }}{{ eos_token }}{{ messages[0] | tojson }}{{ strftime_now('%%') }}\n"
        "    {% for m in messages %}\n{% if loop.index > 1 %}{% break %}{% endif %}\n"
        "{{ m.content }}{% endfor %}"
    )
    config = {"bos_token": {"content": "[BOS]"}, "eos_token": "[EOS]", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ids = load_chat_template(tmp_path, tokenizer)([Message("user", "汉'<"), Message("user", "no")])
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text == "[BOS][EOS]" + '{"role": "user", "content": "汉\'<"}%\n汉\'<'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", r"cannot be compiled: its line 1"),
        ([{"name": "tools", "template": ""}], r'chat_template: expected .* named "default"'),
        ("{{ raise_exception('no such role') }}", r"chat template refuses this: no such role"),
        ("{{ ''.__class__.__mro__ }}", r"chat template refuses this: .*unsafe"),
    ],
)
def test_templates_that_fail(tokenizer, tmp_path, template, message):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: .*{message}"):
        load_chat_template(tmp_path, tokenizer)([Message("user", "hello")])


def test_no_template_and_none_of_moonlights_tokens(tmp_path):
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    with pytest.raises(ValueError, match=r"no chat template: .* lacks <\|im_assistant\|>"):
        load_chat_template(tmp_path, tokenizer)
