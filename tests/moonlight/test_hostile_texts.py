"""Texts, tokenizers and chat templates that mean harm, or are just broken."""

import base64
import gc
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from examples.moonlight.common import program
from examples.moonlight.data.corpus import load_documents, split_documents
from examples.moonlight.data.tokenized import load_sources
from examples.moonlight.data.tokenizer import _last_merge, encode_text, load_tokenizer
from examples.moonlight.generate import read_prompts
from examples.moonlight.generation.chat import Message, load_chat_template
from examples.moonlight.generation.template_process import Limits, TemplateProcess
from tests.moonlight.hostile import bounded, edit_json, sparse

pytestmark = pytest.mark.one_stack

HELLO = [Message("user", "hello")]

# --- data -----------------------------------------------------------------------------------------


def test_half_a_character_in_a_line_is_named(tmp_path):
    path = tmp_path / "texts.jsonl"
    for field, read in (("text", load_documents), ("prompt", read_prompts)):
        path.write_text(f'{{"{field}": "good"}}\n{{"{field}": "bad \\ud83d"}}\n')
        message = rf"jsonl, line 2: the {field} has a lone surrogate, '\\ud83d', at character 4"
        with pytest.raises(ValueError, match=message):
            read(path)
    path.write_text(r'{"text": "\ud83d\ude00"}' + "\n" + '{"text": "x", "score": NaN}')
    assert [document.text for document in load_documents(path)] == ["\U0001f600", "x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "line 2: brackets are nested too deep"),
        ('{"text": "a", "text": "b"}', "line 2: 'text' occurs twice"),
        ('{"text": "a", "n": ' + "1" * 5000 + "}", "line 2: a number of 5,000 digits"),
        ('{"text": null}', r'line 2: expected an object {"text": "\.\.\."}, got'),
        ("x" * 10**6, "line 2: not valid JSON"),
        ('"' + "x" * 10**6 + '"', "line 2: expected an object"),
    ],
    ids=lambda value: value[:20],
)
def test_a_line_that_is_none_is_named_shortly(line, message, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "good"}\n' + line)
    with bounded(seconds=5), pytest.raises(ValueError, match=message) as caught:
        load_documents(path)
    assert len(str(caught.value)) < 500


def test_a_folder_of_texts_is_read_to_its_edge_and_no_further(tmp_path, monkeypatch):
    """Nothing is followed out of it, waited for, or left out without a word."""
    folder, outside = tmp_path / "texts", tmp_path / "outside"
    for place in (folder / "inner", outside):
        place.mkdir(parents=True)
    (outside / "secret.txt").write_text("secret")
    (folder / "a.txt").write_text("a")
    (folder / "inner" / "b.txt").write_text("b")
    (folder / "to_a.txt").symlink_to("a.txt")
    (folder / "loop").symlink_to("inner")  # a folder in it, which is read where it lies
    (folder / "inner" / "up").symlink_to("..")
    (folder / ".hidden").symlink_to(outside)
    expected = [("a.txt", "a"), ("inner/b.txt", "b"), ("to_a.txt", "a")]
    assert load_documents(folder) == expected

    def refused(path, error, message):
        with bounded(seconds=5), pytest.raises(error, match=message):
            load_documents(folder)
        path.unlink()
        assert load_documents(folder) == expected

    bad = folder / "inner" / "bad.txt"
    for target, message in (
        (outside / "secret.txt", r"bad\.txt is a link to \S+secret\.txt, out of the folder: copy"),
        (outside, r"bad\.txt is a link to \S+outside, out of the folder: copy the folder into"),
        ("/dev/zero", r"bad\.txt is a link to /dev/zero, out of the folder: remove it"),
        ("bad.txt", r"bad\.txt is a link to itself"),
    ):
        bad.symlink_to(target)
        refused(bad, ValueError, message)
    bad.symlink_to("nothing")
    refused(bad, FileNotFoundError, r"bad\.txt is a link to a file that is not there")
    os.mkfifo(bad)
    refused(bad, ValueError, r"bad\.txt is a pipe, where a file is expected")
    sparse(bad, b"text " * 10)
    with bounded(seconds=5):
        assert load_documents(folder) == expected
    monkeypatch.setattr(os, "sysconf", lambda name: 4096)
    sparse(bad, b"text " * 1000)
    refused(bad, ValueError, r"texts: 10,000,000,\d+ bytes of text, .* memory of 16,777,216: give")


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    """Names decide what is held out, and the split hashes them."""
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("text")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    with pytest.raises(ValueError, match=r"caf\\udce9\.txt'?: the file's name is not UTF-8"):
        load_documents(tmp_path)
    (path,) = tmp_path.iterdir()
    lone = load_documents(path)  # alone, its name decides nothing
    assert lone[0].text == "text"
    with pytest.raises(ValueError, match="has 4 characters: too few to hold some out"):
        split_documents(lone)


def test_one_file_is_read_as_carefully_as_many(tmp_path):
    path = tmp_path / "texts.txt"
    for name in ("texts.txt", "texts.jsonl"):
        path = tmp_path / name
        os.mkfifo(path)
        with bounded(seconds=5), pytest.raises(ValueError, match=rf"{name} is a pipe"):
            load_documents(path)
        with bounded(seconds=5), pytest.raises(ValueError, match=rf"{name} is a pipe"):
            read_prompts(path)
        path.unlink()
        with pytest.raises(ValueError, match="zero is a device"):
            load_documents(Path("/dev/zero"))
        sparse(path)
        with bounded(seconds=5), pytest.raises(ValueError, match=r"byte 0 is zero|memory of"):
            load_documents(path)
        path.unlink()
    path = tmp_path / "texts.txt"
    path.write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    assert load_documents(path)[0].text == "one\ntwo\n"
    path.write_bytes(b"\xef\xbb\xbf\xe9")
    with pytest.raises(ValueError, match=r"texts\.txt is not UTF-8 text \(byte 3\)"):
        load_documents(path)
    lines = tmp_path / "texts.jsonl"
    lines.write_bytes(b'\xef\xbb\xbf{"text": "a"}')
    assert load_documents(lines)[0].text == "a"


# --- tokenizers -----------------------------------------------------------------------------------

BYTES = [bytes([i]) for i in range(256)]


def write_tiktoken(folder, tokens):
    lines = (f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens))
    (folder / "tiktoken.model").write_text("".join(lines))


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ({"1000000000": {"content": "x"}}, r"calls 1000000000 'x', but .* has 256 tokens"),
        ({"1537": {"content": "x"}}, r"calls 1537 'x', but .* has 256 tokens, and special ids"),
        ({"9" * 19: {"content": "x"}}, r"calls 9{19} 'x'"),
        ({"9" * 5000: {"content": "x"}}, r"expected \"id\": .* got '99"),
        ({"٣٠٠": {"content": "x"}}, r"expected \"id\": "),
        ({"-1": {"content": "x"}}, r"expected \"id\": "),
        ([1], r": expected an object, got \[1\]"),
        ({"256": {"content": "a"}}, r"calls 256 'a', which is the name of \d+, too"),
        (
            {"256": {"content": "xx"}, "257": {"content": "xx"}},
            r"calls 257 'xx', which is the name of 256, too",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_special_ids_follow_the_vocabulary(decoder, message, tmp_path):
    """An id of 10^9 in a file of 60 bytes made as many tokens."""
    write_tiktoken(tmp_path, BYTES)
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder=decoder)
    with (
        bounded(seconds=5, megabytes=100),
        pytest.raises(ValueError, match=r"_config\.json: added_tokens_decoder.*" + message),
    ):
        load_tokenizer(tmp_path)


def tokenizer_json(**changes):
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    return json.loads(tokenizer.to_str()) | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            tokenizer_json(model={"type": "BPE", "vocab": {"a": 10**9}, "merges": []}),
            r"the token 'a' has the id 1,000,000,000, and there are 1 tokens",
        ),
        (tokenizer_json(model={"type": "BPE", "vocab": {}, "merges": []}), "has no tokens"),
        (tokenizer_json(model={"type": "BPE", "vocab": {"a": 10**10}, "merges": []}), "not a tok"),
        (
            tokenizer_json(model={"type": "BPE", "vocab": {"a": -1}, "merges": []}),
            "not a tokenizer",
        ),
        ({}, "not a tokenizer"),
        (None, "not a tokenizer"),
        ("x" * 10**6, "not a tokenizer"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_tokenizer_that_is_none_is_refused(content, message, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with bounded(seconds=5), pytest.raises(ValueError, match=rf"tokenizer\.json: .*{message}") as e:
        load_tokenizer(tmp_path)
    assert len(str(e.value)) < 500
    for text in ("", "[" * 100_000, "\0", '{"model": ' + "[" * 100_000):
        path.write_text(text)
        with bounded(seconds=5), pytest.raises(ValueError, match=r"tokenizer\.json: not a token"):
            load_tokenizer(tmp_path)


def test_a_tokenizer_neither_fills_nor_cuts_texts(tmp_path):
    """As in transformers. A length of 10^12 to fill texts to would take all memory."""
    padding = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
    cut = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    content = tokenizer_json(padding=padding, truncation=cut)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with bounded(seconds=5):
        assert encode_text(load_tokenizer(tmp_path), "abab") == [0, 1, 0, 1]


def test_a_pattern_that_takes_forever_is_given_up(tmp_path, capfd):
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    with bounded(seconds=10), pytest.raises(ValueError, match="cannot encode the text 'aaa"):
        encode_text(tokenizer, "a" * 100 + "!")
    with pytest.raises(ValueError, match=r"a lone surrogate, '\\udce9', at character 3"):
        encode_text(tokenizer, "caf\udce9")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "texts.txt").write_text("a\n" * 20 + "a" * 100 + "!\nb\n")

    def load():
        paths: dict[str, Path | None] = {"": tmp_path / "texts.txt"}
        load_sources(paths, vocab_size=0, cache_dir=tmp_path / "cache", pretrained=tmp_path)

    for value, message in (
        (10**30, "eos_token_id: expected an id"),
        (-1, "names no token"),
        (1, "names no token"),
        (0, "tokenizer cannot encode the texts"),
    ):
        edit_json(tmp_path / "config.json", eos_token_id=value)
        with bounded(seconds=10), pytest.raises(ValueError, match=message):
            load()
    assert "retry-limit" in capfd.readouterr().err  # tokenizers' own words


def test_long_tokens_are_merged_in_no_time_and_as_before():
    """Merging was quadratic in a token's length, 0.16 s for 1,000 bytes; a file may hold many."""

    def slow(token, ranks):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = (left + right for left, right in itertools.pairwise(parts))
            rank, i = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairs))
            if rank == len(ranks):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts

    rng = random.Random(0)
    for _ in range(300):
        words = {bytes(rng.choices(b"ab", k=rng.randrange(2, 7))) for _ in range(rng.randrange(30))}
        ranks = {
            token: i for i, token in enumerate([b"a", b"b", *rng.sample([*words], len(words))])
        }
        token = bytes(rng.choices(b"ab", k=rng.randrange(1, 20)))
        assert _last_merge(token, ranks) == slow(token, ranks)
    doubling = {b"a" * 2**i: i for i in range(15)}
    with bounded(seconds=5):
        assert _last_merge(b"a" * 2**15, doubling) == [b"a" * 2**14] * 2
        assert len(_last_merge(b"ab" * 10_000, {b"a": 0, b"b": 1, b"ab": 2})) == 10_000


# --- chat templates -------------------------------------------------------------------------------


@pytest.fixture(name="tokenizer", scope="module")
def _tokenizer():
    return Tokenizer(models.BPE({chr(i): i for i in range(32, 127)}, []))


def write_template(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    return folder


NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set ns = namespace(x='x') %}"
    "{% for _ in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
)
LONG = "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}"
RECURSION = "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NESTED, "takes more than 2 seconds"),
        ("{{ (6 + messages | length) ** 100000000 }}", "takes more than 2 seconds"),
        ("{{ 'x' * 10 ** 10 }}", "refuses this: it needs more memory"),
        ("{{ messages[0].role * 10 ** 10 }}", "refuses this: it needs more memory"),
        (DOUBLING, "refuses this: it needs more memory"),
        ("{{ messages[0].content.center(10 ** 10) }}", "refuses this: it needs more memory"),
        (LONG, "refuses this: its text is longer than 8,000,000 characters"),
        (RECURSION, "refuses this: it is nested too deep"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "cannot be compiled: it is nested too deep"),
        ("{% if 1 %}" * 500 + "{% endif %}" * 500, "cannot be compiled"),
        ("{{ range(10 ** 9) }}", "refuses this: .*Range too big"),
        ("{{ messages[0].a.b.c }}", "refuses this: .*has no attribute 'a'"),
        ("{{ 1 / 0 }}", "refuses this: ZeroDivisionError"),
        ("{{ raise_exception('x' * 10 ** 6) }}", "refuses this: x{500}$"),
        ("{{ ''.__class__.__mro__ }}", "refuses this: .*unsafe"),
        ("{% include '/etc/passwd' %}", "refuses this: .*no loader"),
        ("{{ '\\ud800' }}", r"lone surrogate, '\\ud800'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_template_costs_no_more_than_its_limits(template, message, tokenizer, tmp_path):
    write_template(tmp_path, template)
    # A busy machine is no reason to end what another limit ends.
    limits = Limits(seconds=2 if "seconds" in message else 25)
    with bounded(seconds=30, megabytes=200), pytest.raises(ValueError, match=message) as caught:
        load_chat_template(tmp_path, tokenizer, limits)(HELLO)
    if "surrogate" not in message:
        assert "chat_template.jinja: the chat template" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_template_goes_on_after_what_it_refused_and_what_was_killed(tokenizer, tmp_path):
    template = (
        "{% if messages[0].content == 'loop' %}" + NESTED + "{% endif %}"
        "{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}"
        "{{ messages[0].content }}"
    )
    encode = load_chat_template(write_template(tmp_path, template), tokenizer, Limits(seconds=1))
    for content, message in (("no", "refuses this: no"), ("loop", "more than 1 seconds")):
        assert tokenizer.decode(encode(HELLO)) == "h e l l o"
        with pytest.raises(ValueError, match=message):
            encode([Message("user", content)])
    assert tokenizer.decode(encode(HELLO)) == "h e l l o"


def test_a_templates_process_is_one_and_ends_with_it(tmp_path):
    template = TemplateProcess("{{ a }}", tmp_path / "t", Limits())
    process = template._process
    assert [template.render({"a": i}) for i in range(100)] == [str(i) for i in range(100)]
    assert template._process is process and process.poll() is None
    if hasattr(signal, "SIGINT"):
        process.send_signal(signal.SIGINT)  # Ctrl-C is for the model's answer
    assert template.render({"a": "汉"}) == "汉"
    process.kill()  # whoever did it: the next one starts another
    process.wait()
    assert template.render({"a": 1}) == "1"
    again = template._process
    assert again is not process and again.poll() is None
    del template
    gc.collect()
    assert again.poll() is not None


def test_a_templates_process_imports_jinja2_only():
    """Nothing of JAX, so that it starts at once; and nothing of the folder that it lies in."""
    worker = Path(program.__file__).parents[1] / "generation" / "template_worker.py"
    code = f"import runpy, sys; runpy.run_path({str(worker)!r}); print(*sorted(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = {name.split(".")[0] for name in found.stdout.split()}
    assert "jinja2" in modules and not modules & {"jax", "numpy", "tokenizers", "examples"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"chat_template": 3}, "chat_template: expected a text, or a list"),
        ({"chat_template": [{"name": "default", "template": 3}]}, "chat_template: expected a text"),
        ({"chat_template": [["default", "x"]]}, "chat_template: expected a text, or a list"),
        ({"chat_template": "", "bos_token": 3}, "bos_token: expected .* got 3"),
        ({"chat_template": "", "eos_token": {"content": []}}, "eos_token: expected a text"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_tokenizers_configuration_says_has_its_type(config, message, tokenizer, tmp_path):
    edit_json(tmp_path / "tokenizer_config.json", **config)
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {message}"):
        load_chat_template(tmp_path, tokenizer)


def test_a_template_is_a_text_of_the_folder(tokenizer, tmp_path):
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not UTF-8 text \(byte 3\)"):
        load_chat_template(tmp_path, tokenizer)
    sparse(path)
    with bounded(), pytest.raises(ValueError, match=r"jinja has 10,000,000,000 bytes, and such a"):
        load_chat_template(tmp_path, tokenizer)
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match=r"jinja is a link to /etc/passwd, out of the folder"):
        load_chat_template(tmp_path, tokenizer)


# --- programs -------------------------------------------------------------------------------------


def test_a_users_mistake_ends_a_program_with_a_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        program.run_program(lambda: load_documents(tmp_path / "caf\udce9"))
    error = capsys.readouterr().err
    assert error.startswith("error: --data ") and error.count("\n") == 1
    with pytest.raises(SystemExit, match="1"):
        program.run_program((tmp_path / "none").read_bytes)
    assert "No such file or directory" in capsys.readouterr().err
    with pytest.raises(ValueError, match="invalid literal"):  # nobody wrote that for a user
        program.run_program(lambda: int("x"))
    program.run_program(lambda: None)
