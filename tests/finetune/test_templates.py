"""Tokens and the loss mask of conversations, against what transformers makes of them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.finetune.data.template import Sample, Template, encode, load_template
from examples.moonlight.generation.chat import Message, load_chat_template
from tests.finetune.chat_toy import (
    LLAMA3,
    MOONLIGHT_TOKENS,
    QWEN2,
    TEMPLATES,
    conversation,
    make_tokenizer,
    marked,
    model_folder,
    plain,
)

transformers = pytest.importorskip("transformers", reason="transformers is part of the test extra")

pytestmark = pytest.mark.one_stack

TOKENIZER = make_tokenizer()

CONVERSATIONS = [
    conversation("Hi.", "Hello."),
    conversation("Two\n\nlines?", "Yes:\n\none\n\ntwo\n", "And a space ? ", " a tail. "),
    conversation("你好。你是谁", "我是一个小模型。", "再见", "再见。🙂", system="你说中文。"),
    conversation("Hello.", "Hello.", "Hello.", "Hello.", "assistant\n", "user\n\nassistant"),
    conversation("What ends it?", "<|im_end|> or <|eot_id|> does.", "Thanks", "<|im_end|>"),
]


def transformers_says(tagged: str, chat) -> Sample:
    """Ids and mask of a template that marks its answers."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZER, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )
    found = tokenizer.apply_chat_template(
        [message._asdict() for message in chat.messages],
        chat_template=tagged,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    return Sample(list(found["input_ids"]), [bool(x) for x in found["assistant_masks"]])


def counted_text(sample: Sample, tokenizer=TOKENIZER) -> str:
    chosen = [token for token, counts in zip(*sample, strict=True) if counts]
    return tokenizer.decode(chosen, skip_special_tokens=False)


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """Each template without marks and with them, as our loader reads it."""
    folder = tmp_path_factory.mktemp("templates")
    return {
        (name, form.__name__): load_template(
            model_folder(folder / f"{name}-{form.__name__}", form(text)), TOKENIZER
        )
        for name, text in TEMPLATES.items()
        for form in (plain, marked)
    }


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("chat", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_tokens_and_mask_are_those_of_transformers(templates, name, chat):
    expected = transformers_says(marked(TEMPLATES[name]), chat)
    assert 1 < sum(expected.counts) < len(expected.tokens)
    assert encode(chat, templates[name, "plain"]) == expected
    assert encode(chat, templates[name, "marked"]) == expected


TEXTS = st.text("aeru A\n\t.<|im_end>你好🙂é", min_size=1, max_size=12).filter(str.strip)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), st.sampled_from([*TEMPLATES]))
def test_any_texts_have_the_mask_of_transformers(templates, pairs, name):
    chat = conversation(*(text for pair in pairs for text in pair))
    expected = transformers_says(marked(TEMPLATES[name]), chat)
    assert encode(chat, templates[name, "plain"]) == expected


def test_an_answer_counts_to_its_end_token_and_no_further(templates):
    chat = conversation("Hi.", "One.", "More?", "Two.", system="Be brief.")
    ends = {"qwen2": "<|im_end|>", "llama3": "<|eot_id|>", "moonlight": "<|im_end|>"}
    for name, end in ends.items():
        sample = encode(chat, templates[name, "plain"])
        assert counted_text(sample) == f"One.{end}Two.{end}"


@pytest.mark.parametrize("form", ["plain", "marked"])
def test_a_message_with_loss_0_does_not_count(templates, form):
    chat = conversation("Hi.", "One.", "More?", "Two.", "Last?", "Three.", loss=[False, 1, 0])
    sample = encode(chat, templates["qwen2", form])
    assert counted_text(sample) == "Two.<|im_end|>"
    nothing = encode(conversation("Hi.", "One.", loss=[0]), templates["qwen2", form])
    assert not any(nothing.counts)


def test_a_system_prompt_goes_where_a_conversation_has_none(templates):
    template = templates["qwen2", "plain"]
    bare, own = conversation("Hi.", "Ho."), conversation("Hi.", "Ho.", system="Mine.")
    assert encode(bare, template, system="Mine.") == encode(own, template)
    assert encode(own, template, system="Yours.") == encode(own, template)
    default = TOKENIZER.decode(encode(bare, template).tokens, skip_special_tokens=False)
    assert default.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    assert encode(bare, template, system="") == encode(bare, template)


@pytest.mark.parametrize("where", ["config", "list", "file"])
def test_training_goes_on_from_the_prompt_that_generation_has(where, tmp_path):
    folder = model_folder(tmp_path, plain(LLAMA3), where)
    chat = conversation("Hi.", "One.", "More?", "Two.")
    prompt = load_chat_template(folder, TOKENIZER)(chat.messages[:-1])
    sample = encode(chat, load_template(folder, TOKENIZER))
    assert sample.tokens[: len(prompt)] == prompt
    assert all(sample.counts[len(prompt) :])
    assert not sample.counts[len(prompt) - 1]


# --- models without a template of their own -------------------------------------------------------


def test_moonlights_built_in_template_is_its_own_but_for_special_names(templates, tmp_path):
    chat = conversation("Hi.", "One.", "More 你好?", "Two.", system="Be brief.", loss=[1, 0])
    built_in = load_template(tmp_path, TOKENIZER)
    assert built_in.source is None
    assert encode(chat, built_in) == encode(chat, templates["moonlight", "plain"])
    names = conversation("What is <|im_end|>?", "It is <|im_end|>.")
    sample = encode(names, built_in)
    assert sample.tokens.count(TOKENIZER.token_to_id("<|im_end|>")) == 2
    assert sum(sample.counts) == len("It is <|im_end|>.") + 1


@pytest.mark.parametrize(
    ("special", "eos", "start", "end"),
    [
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_start|>", None),
        (["<|endoftext|>"], None, "", "<|endoftext|>"),
        (["<|im_start|>", "</s>'\\"], "</s>'\\", "<|im_start|>", "</s>'\\"),
    ],
)
def test_a_model_without_a_template_gets_chatml(special, eos, start, end, tmp_path):
    end = end or "<|im_end|>"
    tokenizer = make_tokenizer(special)
    # What the settings call the end of a text ends a message where nothing does it better.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    template = load_template(tmp_path, tokenizer)
    chat = conversation("Hi.", "One.", system="Be brief.")
    sample = encode(chat, template)
    assert tokenizer.decode(sample.tokens, skip_special_tokens=False) == (
        f"{start}system\nBe brief.{end}\n{start}user\nHi.{end}\n{start}assistant\nOne.{end}\n"
    )
    assert counted_text(sample, tokenizer) == f"One.{end}"
    assert sample.tokens.count(tokenizer.token_to_id(end)) == 3
    # The tuned model's folder gets the template: generation and transformers write the same.
    assert template.source is not None
    (tmp_path / "chat_template.jinja").write_text(template.source)
    prompt = load_chat_template(tmp_path, tokenizer)(chat.messages[:-1])
    assert sample.tokens[: len(prompt)] == prompt
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template.source
    )
    messages = [message._asdict() for message in chat.messages]
    assert theirs.apply_chat_template(messages, return_dict=False) == sample.tokens


def test_a_tokenizer_that_cannot_end_a_message_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no chat template, and its tokenizer no token that ends"):
        load_template(tmp_path, make_tokenizer(MOONLIGHT_TOKENS))


# --- templates that hide their answers ------------------------------------------------------------

# What some write of an answer when the conversation goes on, or only at its end.
FORGETS = QWEN2.replace(
    "[[", "{% if not loop.last %}{{ '(...)' }}{% else %}{{ '<think></think>' }}{% endif %}"
).replace("]]", "")
ENDS = "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}{{ eos_token }}"
PROMPT = plain(QWEN2).replace("'<|im_start|>assistant\n' }}{% endif %}", "'<think>' }}{% endif %}")
SILENT = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            FORGETS,
            r"message 2, an answer, lies: it is written otherwise when the conversation goes",
        ),
        (ENDS, r"message 2, an answer, lies: the prompt before it is no beginning of the whole"),
        (PROMPT, r"message 2, an answer, lies: the prompt before it is no beginning"),
        (SILENT, r"message 2, an answer, lies: it is left out"),
        ("{{ raise_exception('no') }}", r"toy\.jsonl, line 7: .*the chat template refuses .*: no"),
    ],
)
def test_a_template_that_hides_its_answers_is_refused(template, message, tmp_path):
    loaded = load_template(model_folder(tmp_path, template), TOKENIZER)
    with pytest.raises(ValueError, match=message) as caught:
        encode(conversation("Hi.", "One.", "More?", "Two."), loaded)
    assert str(caught.value).startswith("toy.jsonl, line 7: ")


def test_a_template_that_writes_one_answer_well_trains_on_single_turns(tmp_path):
    loaded = load_template(model_folder(tmp_path, FORGETS), TOKENIZER)
    sample = encode(conversation("Hi.", "One."), loaded)
    assert counted_text(sample) == "<think></think>One.<|im_end|>"


def test_text_that_ends_an_answer_counts_where_no_token_does(tmp_path):
    text = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n\n' }}{% endfor %}"
    text += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    sample = encode(
        conversation("Hi.", "One.", "More?", "Two."),
        load_template(model_folder(tmp_path, text), TOKENIZER),
    )
    assert counted_text(sample) == "One.\n\nTwo.\n\n"


def test_marks_are_followed_or_refused(tmp_path):
    twice = marked(QWEN2.replace("message['content'] + '<|im_end|>' }}]]", "'(' }}]][[{{ ')' }}]]"))
    loaded = load_template(model_folder(tmp_path / "twice", twice), TOKENIZER)
    assert counted_text(encode(conversation("Hi.", "One."), loaded)) == "()"
    with pytest.raises(ValueError, match=r"marks 4 parts of 2 answers, so that `loss` of a single"):
        encode(conversation("Hi.", "One.", "More?", "Two.", loss=[0, 1]), loaded)
    buffered = "{% set x %}{% generation %}a{% endgeneration %}{% endset %}b{{ x }}"
    loaded = load_template(model_folder(tmp_path / "set", buffered), TOKENIZER)
    with pytest.raises(ValueError, match=r"\{% generation %\} stands inside a macro or a set"):
        encode(conversation("Hi.", "One."), loaded)


def test_spans_that_do_not_match_the_answers_are_refused():
    template = Template("toy", lambda messages: ([1, 2], []))
    with pytest.raises(ValueError, match=r"toy: the template marks no answer"):
        encode(conversation("Hi.", "One."), template)


def test_a_generation_tag_does_not_keep_a_model_from_talking(tmp_path):
    encoder = load_chat_template(model_folder(tmp_path, marked(QWEN2)), TOKENIZER)
    text = TOKENIZER.decode(encoder([Message("user", "Hi.")]), skip_special_tokens=False)
    assert text.endswith("<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n")
