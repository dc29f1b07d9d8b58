"""The table between PEFT's tensors and our adapters.

PEFT names a factor after the module, as transformers has it, in a wrapper of its own, and stores it
`[out, in]` as every matrix of PyTorch; layers are not stacked there:

    base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight    [r, in]
        layers/self_attn/q_proj/lora_a [7]                            [in, r]
    base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight    [out, r]
        layers/self_attn/q_proj/lora_b [7]                            [r, out]

Of Moonlight only attention can be exchanged. PEFT takes the names `gate_proj`, `up_proj` and
`down_proj` there for the fused experts of transformers 5, wherever they stand, and says nothing of
the tensors that it then ignores; and experts of ours have pairs one by one. A model with such
adapters goes out merged.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from examples.finetune.lora.adapters import adapted_modules
from examples.moonlight.huggingface import names as hf_names
from examples.moonlight.huggingface.config import ModelConfig
from examples.moonlight.model.config import MoonlightConfig

PREFIX = "base_model.model."
FACTORS = {"lora_a": ".lora_A.weight", "lora_b": ".lora_B.weight"}


class Place(NamedTuple):
    """A matrix that may have a pair.

    Attributes:
        name: Its module in transformers, such as "model.layers.7.self_attn.q_proj".
        module: Its module here, dotted, such as "layers.self_attn.q_proj".
        at: Its layer in the stack; empty of a module in no stack.
        rows: Width of its input.
        cols: Width of its output.
    """

    name: str
    module: str
    at: tuple[int, ...]
    rows: int
    cols: int


def places(config: ModelConfig) -> Iterator[Place]:
    """Every matrix that PEFT can adapt as we do, in the order of the layers."""
    for row in hf_names.rows(config):
        *module, last = row.path
        attention = "self_attn" in module
        if last == "kernel" and (attention or not isinstance(config, MoonlightConfig)):
            if row.name == hf_names.HEAD:
                continue
            rows, cols = row.param_shape
            name, dotted = row.name.removesuffix(".weight"), ".".join(map(str, module))
            yield Place(name, dotted, row.at, rows, cols)


def adapted_places(model: Any) -> list[Place]:
    """The matrices of a model that have a pair.

    Raises:
        ValueError: There are none, or some that PEFT would not apply.
    """
    adapted = {path for path, _ in adapted_modules(model)}
    if not adapted:
        raise ValueError("the model has no adapters to write")
    found = [place for place in places(model.config) if place.module in adapted]
    if unknown := adapted - {place.module for place in found}:
        raise ValueError(
            f"PEFT has no adapter for {min(unknown)} of this architecture: it takes such a name "
            "for the fused experts, and ignores the tensors. Export merged "
            "weights, with --merge_lora true, or train adapters of attention alone"
        )
    return found


def target_names(config: ModelConfig, adapted: Iterable[Place]) -> list[str]:
    """What `target_modules` has to say, so that PEFT adapts these and no others.

    A short name, `q_proj`, where all modules of that name are adapted; else their whole names.
    """
    chosen = {place.name for place in adapted}
    everywhere: dict[str, set[str]] = {}
    for place in places(config):
        everywhere.setdefault(place.name.rsplit(".", 1)[-1], set()).add(place.name)
    targets: list[str] = []
    for short, names in everywhere.items():
        targets += [short] if names <= chosen else sorted(names & chosen)
    return targets


def is_target(name: str, targets: Iterable[str]) -> bool:
    """Whether PEFT adapts a module, by a list of names."""
    return any(name == target or name.endswith(f".{target}") for target in targets)
