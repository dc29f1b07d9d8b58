"""Which modules of a model get adapters: `target_modules`.

`all-linear` is, by architecture:

    Qwen2, Llama    q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj
    Moonlight       q_proj, kv_a_proj, kv_b_proj, o_proj, and gate_proj, up_proj, down_proj of the
                    dense first layers and of the shared experts

Not in it: the head and the embedding, which PEFT leaves out as well; the router, whose choices the
rest of the model has learnt to live with; and the routed experts, whose pairs are many (Moonlight's
64 experts have 3 each in 26 layers). Experts get theirs when they are asked for by their name.

A name is a module's, or the end of its path: `q_proj`, `self_attn.q_proj`,
`shared_experts.up_proj`.
The names on Hugging Face's side are understood where they differ: `kv_a_proj_with_mqa`.
"""

from collections.abc import Iterable
from typing import Any

from flax import nnx

from examples.moonlight.model.experts import Experts
from examples.moonlight.model.layers import Linear

ALL_LINEAR, EXPERTS = "all-linear", "experts"

ALIASES = {"kv_a_proj_with_mqa": "kv_a_proj"}

_OFF = {
    "lm_head": "the head has no adapters: its loss never holds all logits, and reads the matrix",
    "router": "the router has no adapters: it would send tokens to experts that never saw them",
    "embed": "the embedding has no adapters",
}
_OFF |= {"embed_tokens": _OFF["embed"], "gate": _OFF["router"]}


def find_targets(
    model: nnx.Module, target_modules: str | Iterable[str]
) -> dict[str, Linear | Experts]:
    """The modules that are meant, by their dotted path, in the order of these.

    Args:
        model: A `LanguageModel`.
        target_modules: One name, or several; "all-linear" and "experts" among them.

    Raises:
        ValueError: A name fits no module, or one that has no adapters.
    """
    wanted = (target_modules,) if isinstance(target_modules, str) else tuple(target_modules)
    there = _candidates(model)
    if not wanted:
        raise ValueError(f"target_modules is empty: name some of {_names(there)}.")
    found: set[str] = set()
    for name in wanted:
        fitting = {path for path, module in there.items() if _fits(name, path, module)}
        if not fitting:
            last = name.rsplit(".", 1)[-1]
            reason = f" ({_OFF[last]})" if last in _OFF else ""
            raise ValueError(
                f"--target_modules: no module is named {name!r}{reason}; there are {ALL_LINEAR}, "
                f"{_names(there)}."
            )
        found |= fitting
    return {path: module for path, module in there.items() if path in found}


def _candidates(model: nnx.Module) -> dict[str, Linear | Experts]:
    there: dict[str, Any] = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear | Experts) and path != ("lm_head",):
            there[".".join(map(str, path))] = module
    # iter_modules goes by depth; the order of draws should not depend on that.
    return dict(sorted(there.items()))


def _fits(name: str, path: str, module: Linear | Experts) -> bool:
    if name == ALL_LINEAR:
        return isinstance(module, Linear)
    *inner, last = name.split(".")
    name = ".".join([*inner, ALIASES.get(last, last)])
    return path == name or path.endswith(f".{name}")


def _names(there: dict[str, Linear | Experts]) -> str:
    return ", ".join(sorted({path.rsplit(".", 1)[-1] for path in there}))
