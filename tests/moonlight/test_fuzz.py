"""Readers of files from elsewhere, fed with what nobody wrote by hand.

Each returns a value, or raises a `ValueError` or an `OSError` that names the file; nothing else,
and within seconds. What a fuzzer found is kept as an explicit example. `FUZZ_EXAMPLES=20000` draws
that many for each reader; fewer are drawn always, the same ones every time.
"""

import base64
import copy
import gzip
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from examples.moonlight.common.files import read_json
from examples.moonlight.data.corpus import load_documents
from examples.moonlight.data.tokenizer import encode_text, load_tokenizer
from examples.moonlight.generate import read_prompts
from examples.moonlight.generation import template_worker
from examples.moonlight.generation.chat import Message, load_chat_template
from examples.moonlight.generation.model_folder import stop_tokens
from examples.moonlight.generation.template_process import Limits, TemplateProcess
from examples.moonlight.huggingface.config import FAMILIES, config_fields, read_config
from examples.moonlight.huggingface.files import TensorFiles
from examples.moonlight.huggingface.pretrained import check_pretrained
from examples.moonlight.model.dense import DenseConfig
from tests.moonlight import hf_toy

pytestmark = pytest.mark.one_stack

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
SECONDS = 10


def fuzz(few: int):
    """The same examples every time; many where they are asked for."""
    return settings(
        max_examples=EXAMPLES or few,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def check(read, path: Path):
    """Calls a reader; returns its value, or None for an error that names the file."""
    start = time.monotonic()
    try:
        return read()
    except (ValueError, OSError) as error:
        words = str(error)
        # The folder stands for all files in it, where none of them is wrong alone.
        assert path.name in words or f"{path.parent}:" in words, words
        assert len(words) < 2000, words
        words.encode()  # a message that can be printed
        return None
    finally:
        assert time.monotonic() - start < SECONDS


@pytest.fixture(scope="module", name="place")
def _place(tmp_path_factory):
    """An empty folder for every example, since a function's fixture would be shared by all."""
    root, count = tmp_path_factory.mktemp("fuzz"), iter(range(10**9))

    def new(**files) -> Path:
        folder = root / f"{next(count) % 8}"
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_bytes(content)
        return folder

    return new


# --- what is drawn --------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=()), max_size=8)
NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([10**6, 10**9, 2**31 - 1, 2**31, 2**63, -(2**63), 10**400, 1e308, 1e-320]),
    st.floats(),
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw, content: bytes):
    """Bytes with some of them removed, repeated, or replaced."""
    pieces = st.binary(max_size=6) | st.sampled_from(
        [b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b"NaN", b"1e999", b"\\ud800", b"\xef\xbb\xbf",
         b"\0", b"\xff", b'"', b",", b"}", b"\n", b"-1", b"null", b"true"]
    )  # fmt: skip
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.integers(0, 20)))
        content = content[:start] + draw(pieces) + content[stop:]
    return content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content


@st.composite
def edited(draw, value):
    """A JSON value with some of its parts, at any depth, replaced, removed or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        at = value
        while True:
            if not isinstance(at, dict | list) or not at:
                break
            keys = sorted(at) if isinstance(at, dict) else list(range(len(at)))
            key = draw(st.sampled_from(keys))
            if isinstance(at[key], dict | list) and at[key] and draw(st.booleans()):
                at = at[key]
                continue
            kind = draw(st.sampled_from(["set", "set", "set", "remove", "add"]))
            if kind == "set":
                at[key] = draw(JSON)
            elif kind == "remove":
                del at[key]
            elif isinstance(at, dict):
                at[draw(TEXTS)] = draw(JSON)
            else:
                at.append(draw(JSON))
            break
    return value


def as_json(value) -> bytes:
    return json.dumps(value).encode()


def variants(value):
    """A JSON file: edited as a value, damaged as bytes, or another one."""
    content = as_json(value)
    return edited(value).map(as_json) | damaged(content) | JSON.map(as_json)


CONFIGS = st.sampled_from(list(hf_toy.FAMILIES)).flatmap(
    lambda family: variants(config_fields(hf_toy.FAMILIES[family], dtype="float32"))
)

# --- configurations and JSON ----------------------------------------------------------------------


@fuzz(150)
@given(content=CONFIGS)
@example(content=b'{"model_type": []}')
@example(content=b"[" * 100_000)
@example(content=b'{"a": ' + b"9" * 5000 + b"}")
def test_configurations(content, place):
    folder = place(config__json=content)
    config = check(lambda: read_config(folder), folder / "config.json")
    if config is not None:
        assert isinstance(config, tuple(family.config for family in FAMILIES.values()))


@fuzz(150)
@given(content=st.binary(max_size=40) | variants({"a": [1, {"b": "c"}], "d": 1.5}))
@example(content=b'{"\xed\xa0\x80": 1}')
@example(content=b'{"a": 1e999}')
@example(content=b'{"\\ud800": "\\udfff"}')
def test_json(content, place):
    path = place(x__json=content) / "x.json"
    found = check(lambda: read_json(path), path)
    if found is not None:
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        json.dumps(found, ensure_ascii=False).encode()


@fuzz(100)
@given(
    config=variants({"eos_token_id": [1, 2]}),
    generation=variants({"eos_token_id": 3, "temperature": 0.5}),
    tokenizer=variants({"eos_token": {"content": "a"}, "bos_token": "b"}),
)
def test_ends_of_texts(config, generation, tokenizer, place):
    files = {"config__json": config, "generation_config__json": generation}
    folder = place(**files, tokenizer_config__json=tokenizer)
    vocabulary = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    found = check(lambda: stop_tokens(folder, vocabulary), folder / "config.json")
    assert found is None or all(type(item) is int and 0 <= item < 2**31 for item in found)


# --- safetensors ----------------------------------------------------------------------------------

SMALL = DenseConfig(
    vocab_size=4,
    hidden_size=2,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    intermediate_size=2,
    max_position_embeddings=4,
)
SAFETENSORS = save(hf_toy.hard_tensors(SMALL))
LENGTH = int.from_bytes(SAFETENSORS[:8], "little")
HEADER, DATA = SAFETENSORS[8 : 8 + LENGTH], SAFETENSORS[8 + LENGTH :]
INDEX = {"weight_map": dict.fromkeys(hf_toy.hard_tensors(SMALL), "a.safetensors")}


def with_length(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + DATA


@fuzz(150)
@given(
    content=damaged(SAFETENSORS)
    | damaged(HEADER).map(with_length)
    | edited(json.loads(HEADER)).map(as_json).map(with_length)
)
@example(content=with_length(HEADER.rstrip()[:-1] + b", " + HEADER.rstrip()[1:]))
@example(content=with_length(HEADER.replace(b'"F32"', b'"' + b"[" * 5000 + b'"', 1)))
@example(content=b"\xff" * 16)
@example(content=(10**18).to_bytes(8, "little") + HEADER + DATA)
def test_tensors(content, place):
    config = as_json(config_fields(SMALL, dtype="float32"))
    folder = place(config__json=config, model__safetensors=content)
    path = folder / "model.safetensors"
    check(lambda: check_pretrained(folder), path)

    def read_all():
        with TensorFiles(folder) as files:
            return {name: files.read(name) for name in files.tensors}

    for name, tensor in (check(read_all, path) or {}).items():
        assert name and np.isfinite(tensor.astype(np.float32)).all()


@fuzz(80)
@given(content=variants(INDEX))
@example(content=as_json({"weight_map": {"a": "\0.safetensors"}}))
@example(content=as_json({"weight_map": {"a": "x" * 5000 + ".safetensors"}}))
def test_indices(content, place):
    files = {"model__safetensors__index__json": content, "a__safetensors": SAFETENSORS}
    folder = place(**files)

    def read():
        with TensorFiles(folder) as files:
            return files.tensors

    try:
        check(read, folder / "model.safetensors.index.json")
    except AssertionError as error:  # a shard is missing, or has what the index does not list
        assert ".safetensors" in str(error)


# --- texts ----------------------------------------------------------------------------------------

LINES = [{"text": "one line\n"}, {"text": "\u6c49\U0001f600", "score": 0.5}, {"text": "c"}]
JSONL = b"\n".join(map(as_json, LINES))


@fuzz(150)
@given(content=damaged(JSONL) | st.lists(edited(LINES[1]).map(as_json)).map(b"\n".join))
@example(content=rb'{"text": "\ud800"}')
@example(content=b'{"text": ' + b"[" * 100_000)
@example(content=b'{"text": "a", "x": ' + b"1" * 5000 + b"}")
def test_lines(content, place):
    path = place(x__jsonl=content) / "x.jsonl"
    for document in check(lambda: load_documents(path), path) or ():
        assert document.text.strip() and document.text.encode()
    path.write_bytes(content.replace(b'"text"', b'"prompt"'))
    for prompt in check(lambda: read_prompts(path), path) or ():
        prompt.encode()


@fuzz(80)
@given(content=st.binary(max_size=30) | damaged(b"\xef\xbb\xbfcaf\xc3\xa9\r\n\x0c one"))
@example(content=b"\0")
@example(content=b"\xff\xfea\0")
@example(content=b"\x1f\x8b")
@example(content=gzip.compress(b"one")[:-1])
def test_texts(content, place):
    path = place(x__txt=content) / "x.txt"
    for where in (path, path.parent):
        found = check(lambda where=where: load_documents(where), where)
        if found is not None:
            text = found[0].text
            if content.startswith((b"\xff\xfe", b"\xfe\xff")):
                assert text == content.decode("utf-16").replace("\r\n", "\n")
            else:
                plain = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
                assert text.encode() == plain


# --- tokenizers -----------------------------------------------------------------------------------


def a_tokenizer() -> dict:
    vocab = {"a": 0, "b": 1, "ab": 2, "[E]": 3}
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["[E]"])
    tokenizer.enable_padding(length=4)
    return json.loads(tokenizer.to_str())


@fuzz(150)
@given(content=variants(a_tokenizer()))
@example(content=as_json(a_tokenizer() | {"model": {"vocab": {"a": 10**9}, "merges": []}}))
def test_tokenizers(content, place):
    folder = place(tokenizer__json=content)
    tokenizer = check(lambda: load_tokenizer(folder), folder / "tokenizer.json")
    if tokenizer is not None:
        assert max(tokenizer.get_vocab().values()) < 10_000
        try:
            assert len(encode_text(tokenizer, "abba [E] ab")) < 100
        except ValueError as error:
            assert "tokenizer cannot encode" in str(error)


RANKS = [*(bytes([i]) for i in range(256)), b"ab", b"abc"]
TIKTOKEN = b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(RANKS))
SPECIAL = {"added_tokens_decoder": {"258": {"content": "[E]"}, "260": {"content": "[B]"}}}


@fuzz(100)
@given(content=st.just(TIKTOKEN) | damaged(TIKTOKEN), special=variants(SPECIAL))
@example(
    content=TIKTOKEN, special=as_json({"added_tokens_decoder": {"9" * 5000: {"content": "x"}}})
)
@example(content=TIKTOKEN, special=as_json({"added_tokens_decoder": [1]}))
def test_tiktoken(content, special, place):
    folder = place(tiktoken__model=content, tokenizer_config__json=special)
    try:
        tokenizer = check(lambda: load_tokenizer(folder), folder / "tiktoken.model")
    except AssertionError as error:
        assert "tokenizer_config.json" in str(error)
        return
    if tokenizer is not None:
        assert tokenizer.get_vocab_size() < 2000
        assert tokenizer.decode(encode_text(tokenizer, "abc d")) == "abc d"


# --- chat templates -------------------------------------------------------------------------------

SNIPPETS = st.sampled_from(
    [
        "{%", "%}", "{{", "}}", "{#", "#}", "-", " ", "\n", "if ", "else", "endif", "for ", "in ",
        "endfor", "set ", "macro ", "m", "messages", "[0]", ".content", ".role", "['a']", "|tojson",
        "|length", "|join", "|trim", "|map('upper')", "|list", "|first", "(", ")", "'x'", "1", "0",
        "+", "~", "/", "%", "==", "raise_exception('no')", "strftime_now('%Y')", "loop.index",
        "{% break %}", "{% for m in messages %}", "{{ m.content }}", "{% endfor %}", "namespace()",
        "{% if m %}", "{% endif %}", "__class__", ".__globals__", "\\ud800", "汉", "\0", "none",
        "{% generation %}", "cycler", "lipsum(1)", "range(9)", "{% call f() %}", "{% raw %}",
    ]
)  # fmt: skip
TEMPLATES = st.lists(SNIPPETS, max_size=14).map("".join) | TEXTS
VARIABLES = {"messages": [{"role": "user", "content": "hi"}], "tools": None}


@fuzz(150)
@given(source=TEMPLATES)
@example(source="{{ 1 / 0 }}")
@example(source="{{ messages.append(1) }}")
@example(source="{% for a in messages %}{{ a.b.c }}{% endfor %}")
@example(source="{% generation %}{{ messages }}")
def test_templates_without_loops_in_this_process(source):
    """What the worker does with a template; those drawn here cannot take long."""
    template, error = template_worker.attempt(lambda: template_worker.compile_template(source))
    assert bool(error) == (template is None)
    if template is not None:
        work = lambda: template_worker.render(template, VARIABLES, 10**6)  # noqa: E731
        rendered, error = template_worker.attempt(work)
        assert error or isinstance(rendered[0], str)
    assert len(error) <= 500


@settings(fuzz(12), max_examples=min(EXAMPLES // 40, 500) or 12)
@given(source=TEMPLATES)
@example(source="{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
@example(source="{% set x = messages[0].role * 10 ** 10 %}")
@example(source="{{ '\\ud800' }}")
def test_templates(source, place):
    folder = place(chat_template__jinja=source.encode(errors="ignore"))
    tokenizer = Tokenizer(models.BPE({chr(i): i for i in range(32, 127)}, []))
    path = folder / "chat_template.jinja"

    def read():
        encode = load_chat_template(folder, tokenizer, Limits(seconds=1))
        return encode([Message("user", "hi")])

    try:
        check(read, path)
    except AssertionError as error:
        assert "the text holds a lone surrogate" in str(error)


def test_conversations(tmp_path):
    """One process for all of them."""
    template = TemplateProcess("{{ messages | tojson }}", tmp_path / "t", Limits())

    @fuzz(100)
    @given(value=JSON)
    def conversation(value):
        found = check(lambda: template.render({"messages": value}), tmp_path / "t")
        assert found is None or json.dumps(json.loads(found)) == json.dumps(value)

    conversation()
    template.close()
