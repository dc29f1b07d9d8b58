"""The optimizer of a fine-tuning: its schedule, what are matrices for it, its arguments."""

from typing import Any

import optax
from flax import nnx

from examples.finetune.training.job import Job
from examples.finetune.training.schedule import make_schedule, warmup_of
from examples.moonlight.training import optimizers
from examples.moonlight.training.args import QK_CLIP_THRESHOLD
from examples.moonlight.training.attention import attention_heads
from examples.moonlight.training.routing import read_roles
from muon_jax import MuonDimensionNumbers, by_path, qk_clip


def make_optimizer(
    job: Job, steps: int, trained: nnx.State
) -> tuple[optax.Schedule, Any, optax.GradientTransformation]:
    """Clipping, the optimizer, and QK-Clip where it is asked for.

    Args:
        job: What the run is to do.
        steps: How many the whole run has.
        trained: The shapes of what is trained.

    Returns:
        The learning rate by step, which trained parameters are matrices, and the optimizer.
    """
    args, sharding = job.args, job.sharding
    warmup = warmup_of(
        steps,
        warmup_steps=args.warmup_steps,
        warmup_ratio=args.warmup_ratio,
        kind=args.lr_scheduler_type,
    )
    schedule = make_schedule(
        args.lr_scheduler_type, peak=args.peak_rate, steps=steps, warmup=warmup
    )
    options = dict(job.options)
    roles = _roles(job, options.pop("lora_a", "muon"))
    clip = []
    if args.optimizer == "muonclip":
        threshold = options.pop("qk_clip_threshold", QK_CLIP_THRESHOLD)
        clip = [qk_clip(attention_heads(job.config), threshold)]
    optimizer = optimizers.make_optimizer(
        args.optimizer,
        schedule,
        args.weight_decay,
        sharding.mesh,
        None if sharding.mesh is None else sharding.param_shardings(trained),
        clip,
        roles,
        max_norm=args.max_grad_norm,
        b1=args.adam_beta1,
        b2=args.adam_beta2,
        eps=args.adam_epsilon,
        options=options,
    )
    return schedule, roles, optimizer


def _roles(job: Job, lora_a: str) -> Any:
    """Which trained parameters are matrices: each factor is one, of every layer by itself."""
    if not job.lora:
        return read_roles(job.config)
    factor = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return by_path({"lora_a$": factor if lora_a == "muon" else None, "lora_b$": factor})
