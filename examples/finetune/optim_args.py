"""`--optim_args NAME=VALUE,...`: arguments of the optimizers, each with its type."""

from collections.abc import Callable
from typing import Any, NamedTuple

from muon_jax import SCHEDULES


class Option(NamedTuple):
    """An argument of an optimizer.

    Attributes:
        keyword: What `muon` calls it.
        read: Makes a value of a word, or raises ValueError.
        values: What a user may write.
    """

    keyword: str
    read: Callable[[str], Any]
    values: str


def _one_of(*words: str) -> tuple[Callable[[str], str], str]:
    def read(word: str) -> str:
        if word not in words:
            raise ValueError(word)
        return word

    return read, " or ".join(words)


def _boolean(word: str) -> bool:
    return {"true": True, "false": False}[word.lower()]


_NUMBER, _INTEGER, _BOOLEAN = (float, "a number"), (int, "an integer"), (_boolean, "true or false")

_MUON = {
    "beta": Option("beta", *_NUMBER),
    "momentum": Option("beta", *_NUMBER),  # upstream's word
    "nesterov": Option("nesterov", *_BOOLEAN),
    "ns_steps": Option("ns_steps", *_INTEGER),
    "ns_coeffs": Option("ns_coeffs", *_one_of(*SCHEDULES)),
    "consistent_rms": Option("consistent_rms", *_NUMBER),
    "preconditioning": Option(
        "preconditioning", *_one_of("frobenius", "spectral", "aol", "schatten")
    ),
    "adam_learning_rate": Option("adam_learning_rate", *_NUMBER),
    "adam_weight_decay": Option("adam_weight_decay", *_NUMBER),
}
_LORA = {"lora_a": Option("lora_a", *_one_of("muon", "adamw"))}
_CLIP = {
    "qk_clip_tau": Option("qk_clip_threshold", *_NUMBER),  # upstream's word
    "qk_clip_threshold": Option("qk_clip_threshold", *_NUMBER),
}


def options_of(optimizer: str, tuner_type: str) -> dict[str, Option]:
    """The arguments that an optimizer has."""
    if optimizer == "adamw":
        return {}
    clip = _CLIP if optimizer == "muonclip" else {}
    return _MUON | (_LORA if tuner_type == "lora" else {}) | clip


def parse_optim_args(text: str | None, optimizer: str, tuner_type: str) -> dict[str, Any]:
    """Reads `NAME=VALUE,NAME=VALUE`.

    Args:
        text: What the command line says; None has no arguments.
        optimizer: Whose arguments they are.
        tuner_type: "lora" has one more.

    Returns:
        Values by the keywords of `muon`, `lora_a` and `qk_clip_threshold` among them.

    Raises:
        ValueError: A name is unknown or given twice, or its value has another type.
    """
    options, found = options_of(optimizer, tuner_type), {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        name, equals, word = (piece.strip() for piece in part.partition("="))
        if name not in options:
            listed = ", ".join(f"{key} ({option.values})" for key, option in options.items())
            raise ValueError(
                f"--optim_args: {optimizer} has no argument {name!r}; "
                + (f"it has {listed}" if listed else "it has none: leave it out")
            )
        option = options[name]
        if option.keyword in found:
            raise ValueError(f"--optim_args: {name} is given twice")
        try:
            if not equals:
                raise ValueError(part)
            found[option.keyword] = option.read(word)
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"--optim_args: {name} must be {option.values}, got {word or 'nothing'}; write "
                f"{name}=VALUE"
            ) from error
    return found
