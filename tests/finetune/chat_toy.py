"""Published chat templates in their documented form, with and without marks, and a tokenizer."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from examples.finetune.data.conversations import Conversation, parse_record

# [[ and ]] stand where a template for training has {% generation %} and {% endgeneration %}.
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}[[{{ message['content'] + '<|im_end|>' }}]]"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['role'] == 'assistant' %}[[{{ message['content'] | trim + '<|eot_id|>' }}]]"
    "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
MOONLIGHT = (
    "{%- for message in messages -%}{%- if loop.first and messages[0]['role'] != 'system' -%}"
    "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>{%- endif -%}"
    "{{ '<|im_' + message['role'] + '|>' + message['role'] + '<|im_middle|>' }}"
    "{% if message['role'] == 'assistant' %}[[{{ message['content'] + '<|im_end|>' }}]]"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"
)
TEMPLATES = {"qwen2": QWEN2, "llama3": LLAMA3, "moonlight": MOONLIGHT}

MOONLIGHT_TOKENS = ["<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>"]
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    *MOONLIGHT_TOKENS,
]


def make_tokenizer(special: list[str] = SPECIAL) -> Tokenizer:
    """A byte-level BPE of bytes and some merges: of letters, of a space with one, of line ends."""
    vocab = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("e", "r"), ("u", "s"), ("us", "er"), ("Ġ", "a"), ("Ċ", "Ċ"), ("ä", "½")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    # As Llama-3's and Qwen2's: line ends stay together whatever follows them.
    pattern = Regex(r"\p{L}+| ?[^\s\p{L}]+|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in special]
    )
    return tokenizer


def plain(template: str) -> str:
    return template.replace("[[", "").replace("]]", "")


def marked(template: str) -> str:
    return template.replace("[[", "{% generation %}").replace("]]", "{% endgeneration %}")


def model_folder(folder: Path, template: str, where: str = "config") -> Path:
    """What of a model's folder says how it writes conversations."""
    config = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|eot_id|>"}}
    folder.mkdir(exist_ok=True)
    if where == "file":
        (folder / "chat_template.jinja").write_text(template)
    elif where == "list":
        config["chat_template"] = [{"name": "default", "template": template}]
    else:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def conversation(*turns: str, system: str | None = None, loss=()) -> Conversation:
    """User and assistant in turn; `loss` holds what the assistant's messages say of it."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for i, text in enumerate(turns):
        messages.append({"role": ("user", "assistant")[i % 2], "content": text})
    answers = [message for message in messages if message["role"] == "assistant"]
    for message, value in zip(answers, loss, strict=False):
        message["loss"] = value
    return parse_record({"messages": messages}, "toy.jsonl, line 7")
