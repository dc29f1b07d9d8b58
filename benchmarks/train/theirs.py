"""The other side of `benchmarks.train`: the same model in transformers, trained by torch.

It begins with our weights, by the names of `huggingface/names.py`, so that the losses
show that both sides compute the same. The calls are those of `ours.py`.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
import transformers
from flax import nnx

from benchmarks.train.ours import LEARNING_RATE, WEIGHT_DECAY, Calls, Optimizer
from examples.moonlight.huggingface import names as hf_names
from examples.moonlight.huggingface import pretrained as hf_import
from examples.moonlight.huggingface.config import ModelConfig, config_fields
from examples.moonlight.huggingface.fetching import fetch
from examples.one_thread import available_cores

# What transformers offers for the same result. The fastest is timed, so that the peer is at its
# best; ours runs as `examples.moonlight.train` does by default.
ATTENTION = ("eager", "sdpa")
EXPERTS = ("eager", "batched_mm", "grouped_mm")


class Theirs:
    """The same model in transformers, trained as torch trains it.

    Muon is `torch.optim.Muon`, which takes matrices: of a stack of experts, it gets views of each
    expert's. Embedding, head, norms and biases go to the fused AdamW, as everything does without
    Muon. The router biases' update, which transformers leaves to the user, is left out.

    Args:
        config: The architecture.
        params: Weights of the other side.
        bias: Router biases of the other side.
        tokens_bt: One batch, int32 `[batch, time + 1]`.
        optimizers: Which to build steps for.
        device: Where it runs; on "cuda" `torch.compile` compiles Muon's step.
        bfloat16: Whether the model computes in bfloat16 where `torch.autocast` lets it.

    Attributes:
        calls: By the names above; those of a step return the loss.
        routes: Which of transformers' implementations was the fastest, and is used.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: nnx.State,
        bias: nnx.State,
        tokens_bt: np.ndarray,
        optimizers: tuple[Optimizer, ...],
        device: str = "cpu",
        bfloat16: bool = False,
    ):
        torch.set_num_threads(available_cores())
        fields = config_fields(config, dtype="float32")
        theirs = transformers.AutoConfig.for_model(**fields)
        self.model = transformers.AutoModelForCausalLM.from_config(theirs).float().to(device)
        self._weights = _theirs(config, params, bias)
        self._tokens = torch.tensor(tokens_bt, dtype=torch.long, device=device)
        self._device, self._bfloat16 = device, bfloat16
        self.reset()
        self.calls: Calls = {"forward": self._forward, "gradient": self._gradient}
        self.routes = self._choose_routes(has_experts=bool(jax.tree.leaves(bias)))
        for name in optimizers:
            update = self._make_update(name)
            self.calls[f"update {name}"] = update
            self.calls[f"step {name}"] = self._make_step(update)

    def reset(self) -> None:
        """Puts back the weights with which both sides began; optimizers keep their state."""
        self.model.load_state_dict(self._weights, strict=not self.model.config.tie_word_embeddings)

    def _loss(self) -> Any:
        # Not its own loss, which reads a column more to shift it away.
        with torch.autocast(self._device, torch.bfloat16, enabled=self._bfloat16):
            logits = self.model(input_ids=self._tokens[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), self._tokens[:, 1:].flatten()
        )

    def _forward(self) -> float:
        with torch.no_grad():
            return self._loss().item()

    def _gradient(self) -> float:
        self.model.zero_grad(set_to_none=True)
        loss = self._loss()
        loss.backward()
        return loss.item()

    def _choose_routes(self, *, has_experts: bool) -> dict[str, str]:
        def fastest(names: tuple[str, ...], choose: Callable[[str], None]) -> str:
            seconds = {}
            for name in names:
                choose(name)
                self._gradient()
                start = time.perf_counter()
                self._gradient()
                seconds[name] = time.perf_counter() - start
            best = min(seconds, key=seconds.__getitem__)
            choose(best)
            return best

        routes = {"attention": fastest(ATTENTION, self.model.set_attn_implementation)}
        if has_experts:
            routes["experts"] = fastest(EXPERTS, self.model.set_experts_implementation)
        return routes

    def _make_update(self, name: Optimizer) -> Callable[[], None]:
        adam, muon, views = [], [], []
        for path, param in self.model.named_parameters():
            if name == "adamw" or param.ndim < 2 or "embed_tokens" in path or "lm_head" in path:
                adam.append(param)
            elif param.ndim == 2:
                muon.append(param)
            else:
                views += [(param, *index) for index in _matrices(path, param)]
        leaves = [torch.nn.Parameter(param.data[e, rows]) for param, e, rows in views]
        optimizers: list[Any] = [
            torch.optim.AdamW(
                adam, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True
            )
        ]
        if name == "muon":
            optimizers.append(
                torch.optim.Muon(
                    muon + leaves,
                    lr=LEARNING_RATE,
                    weight_decay=WEIGHT_DECAY,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        params = list(self.model.parameters())
        compiles = self._device == "cuda" and name == "muon"
        steps = [torch.compile(x.step) if compiles else x.step for x in optimizers]

        def update() -> None:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            for leaf, (param, expert, rows) in zip(leaves, views, strict=True):
                leaf.grad = param.grad[expert, rows]
            for step in steps:
                step()

        return update

    def _make_step(self, update: Callable[[], None]) -> Callable[[], float]:
        def step() -> float:
            loss = self._gradient()
            update()
            return loss

        return step


def _matrices(path: str, param: Any) -> list[tuple[int, slice]]:
    """The matrices of a stack of experts `[e, out, in]`, of which gate and up share one."""
    rows = param.shape[1]
    parts = [slice(0, rows // 2), slice(rows // 2, rows)] if "gate_up" in path else [slice(rows)]
    return [(expert, part) for expert in range(param.shape[0]) for part in parts]


def _theirs(config: ModelConfig, params: nnx.State, bias: nnx.State) -> dict[str, Any]:
    """Our weights by transformers' names, experts fused as it holds them."""
    leaves = {
        hf_import.path_names(path): leaf
        for tree in (params, bias)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    tensors: dict[str, np.ndarray] = {}
    for row in hf_names.table(config, fused=True):
        tensor = tensors.setdefault(row.name, np.empty(row.shape, np.float32))
        rows = slice(row.first, row.first + row.rows) if row.rows else slice(None)
        tensor[(..., rows, slice(None)) if row.transposed else ...] = fetch(row, leaves[row.path])
    return {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
