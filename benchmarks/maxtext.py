"""MaxText's training step of Moonlight-16B-A3B, compiled and counted, beside `benchmarks.scale`'s.

It runs in an environment of its own, on Python 3.12, which MaxText asks for:

    python3.12 -m venv .maxtext
    .maxtext/bin/python -m pip install "maxtext[tpu]==0.2.5"
    .maxtext/bin/python -m benchmarks.maxtext v5e-8 --layers 3 --context 1024 --batch 16

The model is MaxText's `deepseek2-16b` with Moonlight's sizes; mesh, batch, recomputation of every
layer, dtypes and clipping are those of `benchmarks.scale` for the same target, and the optimizer is
the Muon that it has. One sequence of a device goes at a time. Arguments behind `--set`, as
`use_ring_of_experts=true`, are MaxText's own.
Tokens go to their experts in buffers that hold the worst case; of the products there each
row counts that balanced routing brings, and of attention's kernels the causal half.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import hlo, targets
from benchmarks.memory import sizes_of
from benchmarks.scale.cases import GIB, SCALES, Scale

BLOCK = 512
"""Of queries and of keys in MaxText's attention."""

MODEL = """
model_name=deepseek2-16b override_model_config=true base_mlp_dim=11264 vocab_size=163840
routed_score_func=sigmoid routed_bias=true routed_scaling_factor=2.446
rope_type=default rope_max_timescale=50000 max_position_embeddings=8192
"""
TRAINING = """
dtype=bfloat16 weight_dtype=float32 remat_policy=full scan_layers=true attention=flash
opt_type=muon muon_consistent_rms=0.2 muon_weight_decay=0.1 gradient_clipping_threshold=1.0
per_device_batch_size=1 dataset_type=synthetic enable_checkpointing=false
run_name=compiled base_output_directory=runs/maxtext compile_topology_num_slices=1
"""


def settings(scale: Scale, layers: int, context: int, batch: int) -> list[str]:
    """MaxText's arguments for a step that is laid out as on this machine."""
    _, fsdp, expert, _ = scale.mesh
    return [
        *MODEL.split(),
        *TRAINING.split(),
        f"base_num_decoder_layers={layers}",
        f"max_target_length={context}",
        f"gradient_accumulation_steps={batch // scale.devices}",
        f"compile_topology={scale.name}",
        f"ici_fsdp_parallelism={fsdp}",
        f"ici_expert_parallelism={expert}",
    ]


def kernels(context: int) -> dict[str, float]:
    """FLOPs of each kernel of MaxText's, of one sequence on each device.

    Attention has 16 heads, of 192 for queries and keys and 128 for values; its kernels multiply the
    blocks on and below the diagonal. Experts are 2048 by 1408, and each token takes six.
    """
    pairs = 16 * context * (context + BLOCK) / 2
    experts = 2.0 * 6 * context * 2048 * 1408
    return {
        "splash_mha_fwd": 2 * pairs * (192 + 128),
        "splash_mha_dkv": 2 * pairs * 2 * (192 + 128),
        "splash_mha_dq": 2 * pairs * (2 * 192 + 128),
        "gmm": experts,
        "tgmm": experts,
    }


def compiled_step(arguments: Sequence[str]) -> Any:
    """What MaxText's `train_compile` compiles, not written to a file."""
    import jax

    jax.config.update("jax_default_prng_impl", "unsafe_rbg")
    load = importlib.import_module
    package = Path(str(load("maxtext").__file__)).parent
    pyconfig = load("maxtext.configs.pyconfig")
    compiling = load("maxtext.trainers.pre_train.train_compile")
    sharding, utils = load("maxtext.utils.sharding"), load("maxtext.utils.maxtext_utils")
    config = pyconfig.initialize(["", str(package / "configs/base.yml"), *arguments])
    mesh = compiling.get_topology_mesh(config)
    args, kwargs, state, _, model = compiling.get_shaped_inputs(mesh, config)
    params, state = sharding.maybe_update_params_sharding_with_opt(config, state)
    step, *places, static, donated = utils.get_functional_train_with_signature(
        compiling.train.train_step,
        sharding.get_input_data_sharding(config, mesh),
        sharding.build_zero1_input_state_mesh_shardings(config, state, params),
        model,
        config,
        params,
    )
    rules = load("flax.core.spmd").logical_axis_rules(config.logical_axis_rules)
    return compiling.jit_and_compile(
        step, args, kwargs, mesh, *places, static, donated, config, rules
    )


def is_optimizers(scope: str) -> bool:
    """Whether an instruction belongs to what follows the loop over micro-batches."""
    return "jvp(" not in scope and "/while" not in scope


def report(text: str, context: int) -> list[str]:
    """FLOPs and bytes of the step, and what of them is the optimizer's."""
    found = hlo.flops_by_scope(text, kernels=kernels(context))
    sent = hlo.collectives(text)
    lines = []
    for name, of_optimizer in (("model", False), ("optimizer", True)):
        flops = sum(n for scope, n in found.items() if is_optimizers(scope) == of_optimizer)
        wire = sum(c.wire_bytes for c in sent if is_optimizers(c.scope) == of_optimizer)
        lines.append(f"{name}: {flops / 1e12:,.3f} TFLOPs, sends {wire / 1e9:,.3f} GB")
    return lines


def main() -> None:
    """Compile, and print memory, FLOPs and bytes of one device and step."""
    parser = argparse.ArgumentParser(
        "benchmarks.maxtext", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("target", choices=[n for n, s in SCALES.items() if s.platform == "tpu"])
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=2048, help="sequences of a step")
    parser.add_argument("--set", nargs="*", default=[], help="key=value, as MaxText reads them")
    given = parser.parse_args()
    scale = SCALES[given.target]
    if given.batch % scale.devices:
        parser.error(f"--batch must be a multiple of the {scale.devices} devices")
    variables = targets.environment(scale.target) | {"DECOUPLE_GCLOUD": "TRUE"}
    if variables.items() - os.environ.items():  # the compiler reads them when JAX starts
        command = [sys.executable, "-m", "benchmarks.maxtext", *sys.argv[1:]]
        os.execve(sys.executable, command, variables)
    sizes = (given.layers, given.context, given.batch)
    compiled = compiled_step([*settings(scale, *sizes), *given.set])
    parts = sizes_of(compiled, scale.platform)
    print(f"{scale.name}, {targets.compiler(scale.target)}")
    shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    print(f"memory: {sum(parts.values()) / GIB:.2f} GiB ({shown})")
    print(*report(compiled.as_text(), given.context), sep="\n")


if __name__ == "__main__":
    main()
