r"""Trains a Moonlight on real text: arguments, data, model, optimizer, loop, results.

    python -m examples.moonlight.train --preset tiny --output-dir runs/moonlight --resume

A run lives in its output folder: settings, metrics (JSONL and TensorBoard), checkpoints, and at the
end the loss curves, a sample of text and `results.json`. Killed at any moment and called again with
`--resume`, it goes on from its last checkpoint, and its losses are bit for bit those of an
uninterrupted run on the same machine.

    python -m examples.moonlight.train --schedule moonlight --output-dir runs/stages \
        --data general=texts/ --data quality=best.jsonl \
        --mix general=9,quality=1 --mix general=9,quality=1 --mix general=1,quality=1

trains through the paper's three stages (see `stages.py`), each with its own mix of the data. With
`--resume-step` such a run goes back to any checkpoint that it kept, and with `--branch-from
RUN@STEP` another run begins there, with another cooldown, say.

    python -m examples.moonlight.train --init-from hf/ --bias-rate 0 --data texts/ \
        --output-dir runs/continued

goes on with the weights of a Hugging Face directory, on its own tokenizer: a Moonlight, or a dense
Qwen2 or Llama (`hf_import.py`).

    XLA_FLAGS=--xla_force_host_platform_device_count=8 \
        python -m examples.moonlight.train --mesh data=2,expert=2,tensor=2 --output-dir runs/mesh

trains on a mesh (see `sharding.py`), here of eight virtual CPU devices. Its losses are those of one
device to rounding, and a run may change its mesh, or leave it, each time it is resumed.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import rich
import tyro
from flax import nnx
from jax.sharding import Mesh

from examples.moonlight.data.batches import plan_spans, train_batches
from examples.moonlight.data.sources import parse_mixes, parse_sources
from examples.moonlight.data.tokenized import load_sources, token_byte_lengths
from examples.moonlight.data.tokenizer import TOKENIZER
from examples.moonlight.data.validation import make_validation
from examples.moonlight.files import read_json, write_atomically
from examples.moonlight.generation.decoding import Generator
from examples.moonlight.generation.model_folder import copy_companions, stop_tokens
from examples.moonlight.generation.sampling import Sampling
from examples.moonlight.generation.texts import continue_texts, encode_prompt
from examples.moonlight.huggingface.hf_config import ModelConfig
from examples.moonlight.huggingface.hf_import import (
    abstract_model,
    check_pretrained,
    load_pretrained,
    make_model,
)
from examples.moonlight.model.config import Execution, MoonlightConfig
from examples.moonlight.model.dense import Dense
from examples.moonlight.model.experts import RouterBias
from examples.moonlight.model.language_model import count_parameters
from examples.moonlight.model.moonlight import Moonlight
from examples.moonlight.model.sharding import ModelSharding, bytes_per_device, make_mesh
from examples.moonlight.program import run_program
from examples.moonlight.stages import make_plan, plan_table
from examples.moonlight.terminal import make_sturdy
from examples.moonlight.training import metrics
from examples.moonlight.training.args import Args, resolve, settings_of
from examples.moonlight.training.branching import copy_branch, find_branch, go_back
from examples.moonlight.training.checkpoint import CHECKPOINTS, Checkpoints
from examples.moonlight.training.loop import Clock, History, Run, compile_programs, token_buffer
from examples.moonlight.training.muonclip import attention_heads
from examples.moonlight.training.nonfinite import guard, wrap
from examples.moonlight.training.placement import state_shardings
from examples.moonlight.training.plots import draw_plan
from examples.moonlight.training.results import RESULTS, SCHEDULE, SHARDING, present, write_results
from examples.moonlight.training.retention import EveryTokens, Retention
from examples.moonlight.training.routing import read_roles
from examples.moonlight.training.run_folder import open_run_folder
from examples.moonlight.training.steps import TrainState, make_train_steps, make_validate
from examples.moonlight.training.stopping import Stopped, StopRequest, quieten_signals
from muon_jax import UseRoles, muon, qk_clip, sharding_report


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    weight_decay: float,
    mesh: Mesh | None = None,
    param_specs: Any = None,
    clip: Sequence[optax.GradientTransformation] = (),
    roles: UseRoles | None = None,
) -> optax.GradientTransformation:
    """Clipping, then the optimizer. Clipping after Muon would divide the update by its own norm.

    QK-Clip, the `clip` of "muonclip", comes last: it scales the weights after the update. `roles`
    are what the model's own loss shows of its parameters; None leaves it to their names.
    """
    if name == "adamw":
        optimizer = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=weight_decay)
    else:
        optimizer = muon(
            schedule,
            weight_decay=weight_decay,
            mesh=mesh,
            param_specs=param_specs,
            muon_weight_dimension_numbers=roles,
        )
    return optax.chain(optax.clip_by_global_norm(1.0), optimizer, *clip)


def train(args: Args, config: ModelConfig | None = None) -> dict[str, Any]:
    """Trains, or finishes a training, and returns what `results.json` holds.

    Args:
        args: The command line's arguments.
        config: An architecture in the place of the preset's. Its vocabulary is the largest that the
            tokenizer may learn; a small corpus fills less, and the model has that size then.

    Raises:
        FileExistsError: The output folder is in use and `resume` is off.
        FileNotFoundError: A text, the checkpoint to go back to or to branch from, or the model to
            begin with, is not there.
        ValueError: An argument is out of range, or differs from the run that is to be resumed; or
            the model to begin with cannot be read.
        FloatingPointError: A loss, a gradient, or what an update left behind is not finite.
        FolderInUse: Another process works in the output folder.
        Damaged: No checkpoint of the run, or of the one to branch from, is as it was saved.
        OSError: A file cannot be written, for want of space, say.
        Stopped: A signal came. The run is saved, and goes on from there with `resume`.
    """
    with StopRequest() as stop:
        return _train(args, config, stop)


def _train(args: Args, config: ModelConfig | None, stop: StopRequest) -> dict[str, Any]:
    clock, console = Clock(), rich.get_console()
    recipe = resolve(args)
    sources = parse_sources(args.data)
    mixes = parse_mixes(args.mix, sources)
    plan = make_plan(recipe, bias_rate=args.bias_rate, mixes=mixes)

    # Mesh
    pretrained = None if args.init_from is None else Path(args.init_from)
    if pretrained is not None:
        config = check_pretrained(pretrained)
    config = config or MoonlightConfig.preset(args.preset)
    sharding = ModelSharding(None if args.mesh is None else make_mesh(args.mesh))
    sharding.check_divides(("batch", "--batch-size", recipe.batch_size))
    on_cpu = jax.default_backend() == "cpu"
    execution = Execution(
        dtype=jnp.dtype(args.compute_dtype),
        sharding=sharding,
        experts=args.experts or ("dense" if on_cpu else "ragged"),
        expert_capacity=args.expert_capacity,
        remat=args.remat,
        unroll=on_cpu if args.unroll is None else args.unroll,
        attention_block=args.attention_block,
        loss_block=args.loss_block,
        monitor=args.monitor_every > 0,
    )

    dropless = dataclasses.replace(execution, expert_capacity=None)

    # Data
    corpus = load_sources(
        sources, vocab_size=config.vocab_size, cache_dir=args.cache_dir, pretrained=pretrained
    )
    sizes = {name: len(tokens) for name, tokens in corpus.train.items()}
    console.print(
        f"corpus {corpus.corpus_hash}: {sum(sizes.values()):,} training tokens, "
        f"{sum(map(len, corpus.validation.values())):,} held out, vocabulary "
        f"{corpus.tokenizer.get_vocab_size()}"
    )
    if pretrained is not None and corpus.tokenizer.get_vocab_size() > config.vocab_size:
        raise ValueError(
            f"--init-from {pretrained}: its tokenizer has {corpus.tokenizer.get_vocab_size()} "
            f"tokens, and its model a vocab_size of {config.vocab_size}: they do not belong "
            "together"
        )
    spans = plan_spans(plan, sizes)
    batches = train_batches(
        corpus.train,
        spans,
        sequence_length=recipe.sequence_length,
        batch_size=recipe.batch_size,
        seed=args.data_seed,
    )
    validation = make_validation(
        corpus,
        token_byte_lengths(corpus.tokenizer),
        sequence_length=recipe.sequence_length,
        batch_size=recipe.batch_size,
        count=args.eval_windows,
    )
    prompt = encode_prompt(corpus.tokenizer, args.prompt, recipe.sequence_length)
    if (windows := validation.windows_kbt.shape[1]) % sharding.batch_shards:
        raise ValueError(
            f"--mesh {args.mesh}: the validation batch of {windows} windows cannot be divided by "
            f"{sharding.batch_shards}; give more data or more --eval-windows"
        )

    # Settings
    folder = args.output_dir
    if pretrained is None:
        config = dataclasses.replace(config, vocab_size=corpus.tokenizer.get_vocab_size())
    config = dataclasses.replace(
        config,
        max_position_embeddings=max(config.max_position_embeddings, recipe.sequence_length),
    )
    settings = settings_of(args, recipe, plan.steps)
    settings |= {"config": dataclasses.asdict(config), "corpus": corpus.corpus_hash}
    branch = find_branch(args.branch_from, folder, settings, spans)
    goes_back = args.resume_step is not None
    every = args.keep_every_tokens
    retention = Retention(
        latest=args.max_to_keep,
        steps=[*plan.stage_ends().values()],
        every_tokens=None if every is None else EveryTokens(every, plan.tokens),
    )
    stop.check("stopped before the first step: nothing was written")
    with contextlib.ExitStack() as held:
        lock = held.enter_context(
            open_run_folder(folder, settings, resume=args.resume or goes_back, must_exist=goes_back)
        )
        write_atomically(folder / TOKENIZER, corpus.tokenizer.to_str(pretty=True).encode())
        if pretrained is not None:
            copy_companions(pretrained, folder)
        if branch is not None:
            copy_branch(branch, folder, console)
        checkpoints = held.enter_context(
            contextlib.closing(Checkpoints(folder / CHECKPOINTS, retention, console))
        )
        if args.resume_step is not None:
            go_back(folder, checkpoints, args.resume_step, console)
        if (folder / RESULTS).exists():
            console.print(f"{folder} holds a finished run: nothing left to train")
            return present(folder, read_json(folder / RESULTS))
        console.print(plan_table(plan, recipe))
        title = f"{args.init_from or f'Moonlight {args.preset}'}, {recipe.schedule} schedule"
        draw_plan(folder / SCHEDULE, plan, title=title)

        # Model
        def build(execution: Execution) -> Moonlight | Dense:
            return make_model(config, rngs=nnx.Rngs(args.seed), execution=execution)

        model = nnx.eval_shape(lambda: build(execution))
        graphdef, params, _ = nnx.split(model, nnx.Param, RouterBias)
        counts = count_parameters(model)
        console.print(
            f"{args.init_from or args.preset}: {counts.total:,} parameters, {counts.body:,} "
            f"without embedding and head, {counts.active:,} of those active per token; "
            f"{args.optimizer}, peak rate {recipe.learning_rate:g}, {args.compute_dtype} on "
            f"{jax.devices()[0].device_kind}"
        )

        # Optimizer
        mesh = sharding.mesh
        specs = None if mesh is None else sharding.param_shardings(params)
        clip = []
        if args.optimizer == "muonclip":
            clip = [qk_clip(attention_heads(config), settings["qk_clip_threshold"])]
        roles = read_roles(config)
        optimizer = make_optimizer(
            args.optimizer, plan.learning_rate, args.weight_decay, mesh, specs, clip, roles
        )

        def start() -> TrainState:
            _, params, bias = nnx.split(build(execution), nnx.Param, RouterBias)
            return TrainState(params, bias, optimizer.init(params))

        abstract = jax.eval_shape(start)
        shardings = state_shardings(abstract, optimizer, args.optimizer, sharding)
        state_bytes = bytes_per_device(abstract.opt_state, shardings.opt_state)
        if mesh is not None:
            console.print(
                f"mesh {sharding}: "
                f"{bytes_per_device(abstract.params, shardings.params) / 1e6:.2f} MB of "
                f"parameters and {state_bytes / 1e6:.2f} MB of optimizer state on each device"
            )
            if args.optimizer != "adamw":
                report = sharding_report(
                    params, mesh=mesh, param_specs=specs, muon_weight_dimension_numbers=roles
                )
                write_atomically(folder / SHARDING, f"{report}\n".encode())

        # State
        step, history = 0, History()
        if checkpoints.latest_step() is not None:
            target = jax.tree.map(lambda x, s: x.update(sharding=s), abstract, shardings)
            restored = checkpoints.restore(
                model={"params": target.params, "router_bias": target.bias},
                optimizer=target.opt_state,
            )
            step, saved = restored.step, restored.progress
            params, bias = (restored.model[name] for name in ("params", "router_bias"))
            state = TrainState(params, bias, restored.optimizer)
            clock.add(saved["clock"])
            history = History.read(saved["history"])
            batches.set_state(saved["data"])
            console.print(f"continuing after step {step}, in the stage {plan.segment(step).stage}")
        elif pretrained is not None:
            _, params, bias = load_pretrained(pretrained, execution, console=console)
            init = jax.jit(optimizer.init, out_shardings=shardings.opt_state)
            state = TrainState(params, bias, init(params))
        elif mesh is None:
            state = start()  # eagerly: one compilation per shape, not one of all draws
        else:
            state = jax.jit(start, out_shardings=shardings)()
        if step < plan.steps and [*history.meshes.values()][-1:] != [str(sharding)]:
            history.meshes[str(step + 1)] = str(sharding)
        guarded = guard(optimizer, args.on_nonfinite)
        state = state._replace(opt_state=wrap(state.opt_state, args.on_nonfinite, history.skipped))

        # Loop
        log = held.enter_context(
            contextlib.closing(metrics.MetricsLog(folder, after_step=step, console=console))
        )
        stop.check(f"stopped after step {step}")
        if step < plan.steps:
            started = clock.wall_seconds
            programs = compile_programs(
                make_train_steps(
                    graphdef,
                    guarded,
                    plan.learning_rate,
                    bias_rate=plan.bias_rate,
                    on_nonfinite=args.on_nonfinite,
                    roles=roles,
                    monitor=execution.monitor,
                ),
                make_validate(abstract_model(config, dropless)[0]),
                state=state,
                shardings=shardings._replace(
                    opt_state=wrap(
                        shardings.opt_state, args.on_nonfinite, history.skipped, sharding.place()
                    )
                ),
                sharding=sharding,
                buffer_sabt=token_buffer(args, recipe, plan),
                windows_kbt=validation.windows_kbt,
            )
            console.print(f"compiled in {clock.wall_seconds - started:.1f} s")
            stop.check(f"stopped after step {step}")
            run = Run(
                args=args,
                recipe=recipe,
                plan=plan,
                programs=programs,
                batches=batches,
                spans=spans,
                validation=validation,
                checkpoints=checkpoints,
                lock=lock,
                stop=stop,
                log=log,
                history=history,
                clock=clock,
                console=console,
            )
            state = run.to_the_end(state, step)

        # Results
        generator = Generator(
            abstract_model(config, dropless)[0],
            state.params,
            state.bias,
            batch=1,
            length=recipe.sequence_length,
            chunk=1,  # one program to compile: the prompt is short
            sampling=Sampling(seed=args.seed),
            sharding=sharding,
        )
        [continuation] = continue_texts(
            generator,
            corpus.tokenizer,
            [prompt],
            max_new_tokens=recipe.sequence_length,
            stop_ids=stop_tokens(folder, corpus.tokenizer),
        )
        results = {
            "steps": plan.steps,
            "stages": plan.stage_ends(),
            "tokens": plan.tokens(plan.steps),
            "tokens_per_second": plan.tokens(plan.steps) / clock.step_seconds,
            "wall_seconds": clock.wall_seconds,
            "bytes_per_token": validation.bytes_per_token,
            "parameters": counts._asdict(),
            "settings": settings,
            "meshes": history.meshes,
            "skipped_updates": history.skipped.total,
            "optimizer_state_bytes_per_device": state_bytes,
            "sample": args.prompt + continuation,
        }
        stop.check(f"stopped after step {plan.steps}, before the results were written")
        lock.check()
        last, best = history.validation, history.best
        assert last is not None and best is not None  # the last step is validated
        return present(folder, write_results(folder, last, best, results))


def main(args: Args | None = None, config: ModelConfig | None = None) -> None:
    """The program: `train` on a terminal that may fail; stopped, it says how to go on.

    What its user can mend ends it with one sentence, and the exit code 1.

    Args:
        args: Left out, the command line's.
        config: As for `train`.
    """
    make_sturdy()
    quieten_signals()
    try:
        run_program(lambda: train(args or tyro.cli(Args), config))
    except Stopped as stopped:
        rich.print(f"{stopped}; the same command with --resume goes on")
        sys.exit(128 + stopped.signum)


if __name__ == "__main__":
    main()
