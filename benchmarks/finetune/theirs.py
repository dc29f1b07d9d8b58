"""The other side of `benchmarks/finetune`: peft's adapters on transformers' model, in torch.

The base is read from the same directory, and the adapter that our side wrote is where it begins.
The step is a trainer's: micro-batches' losses, summed over the tokens that count and divided by all
of a step's, `clip_grad_norm_`, one optimizer step.
"""

import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers

from benchmarks.finetune.work import Work, draw, serve
from examples.one_thread import available_cores

# What torch leaves out of a loss.
IGNORED = -100


def make(work: Work) -> tuple[Callable[[], float], dict[str, Any]]:
    """Reads base and adapter; torch compiles nothing."""
    torch.set_num_threads(available_cores())
    transformers.utils.logging.disable_progress_bar()
    # peft 0.21 asks transformers 5.24 for what it will lose in version 6.
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated")
    base = transformers.AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
    model: Any = peft.PeftModel.from_pretrained(base, work.adapter, is_trainable=True)
    model.train()
    factors = [param for param in model.parameters() if param.requires_grad]
    optimizer = make_optimizer(work, factors)
    drawn = draw(work)
    tokens_abt = torch.tensor(drawn.tokens_abt, dtype=torch.long)
    counts_abt = torch.tensor(drawn.weight_abt) > 0
    targets_abt = torch.tensor(drawn.targets_abt, dtype=torch.long).masked_fill(
        ~counts_abt, IGNORED
    )
    weight = int(counts_abt.sum())

    def step() -> float:
        total = 0.0
        for tokens_bt, targets_bt in zip(tokens_abt, targets_abt, strict=True):
            logits = model(input_ids=tokens_bt, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets_bt.flatten(), ignore_index=IGNORED, reduction="sum"
            )
            loss = loss / weight
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(factors, work.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    told = {
        "trained": sum(param.numel() for param in factors),
        "class": type(base).__name__,
        "attention": base.config._attn_implementation,
        "optimizer": type(optimizer).__name__,
    }
    return step, told


def make_optimizer(work: Work, factors: list[Any]) -> Any:
    """AdamW or Muon of torch; both take the factors, each of which is a matrix of two axes."""
    if work.optimizer == "adamw":
        return torch.optim.AdamW(
            factors,
            lr=work.learning_rate,
            betas=work.betas,
            weight_decay=work.weight_decay,
            fused=True,
        )
    return torch.optim.Muon(
        factors,
        lr=work.learning_rate,
        weight_decay=work.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )


if __name__ == "__main__":
    serve(make)
