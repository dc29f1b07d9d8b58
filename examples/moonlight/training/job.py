"""What a run is to do, from the command line: sizes, schedule, model and devices."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from examples.moonlight.data.sources import parse_mixes, parse_sources
from examples.moonlight.huggingface.config import ModelConfig
from examples.moonlight.huggingface.pretrained import check_pretrained
from examples.moonlight.model.config import MoonlightConfig
from examples.moonlight.model.execution.dtype import compute_dtype
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.execution.sharding import ModelSharding, make_sharding
from examples.moonlight.run_folder.retention import EveryTokens, Retention
from examples.moonlight.schedule.plan import Plan
from examples.moonlight.schedule.recipe import Recipe
from examples.moonlight.schedule.stages import make_plan
from examples.moonlight.training.args import Args, resolve, settings_of
from examples.moonlight.training.attention import muon_heads


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run is to do; nothing of it is read from its folder or its data.

    Attributes:
        args: The command line's arguments.
        recipe: The preset's numbers, where the command line is silent.
        plan: What each step trains with.
        sources: The paths of the texts, by name.
        pretrained: The Hugging Face directory to begin with; None draws new weights.
        config: The model's architecture. `with_vocabulary` makes it as wide as the tokenizer.
        execution: How the model is computed, and on which devices.
        heads: What Muon takes for a matrix in attention's projections, see `muon_heads`.
    """

    args: Args
    recipe: Recipe
    plan: Plan
    sources: Mapping[str, Path | None]
    pretrained: Path | None
    config: ModelConfig
    execution: Execution
    heads: Any

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.args.output_dir

    @property
    def sharding(self) -> ModelSharding:
        """The devices."""
        return self.execution.sharding

    @property
    def name(self) -> str:
        """What the model is called: its preset, or the directory that it came from."""
        return self.args.init_from or self.args.preset

    @property
    def dropless(self) -> Execution:
        """The execution of validation and generation, in which no expert is ever full."""
        return dataclasses.replace(self.execution, expert_capacity=None)

    @property
    def retention(self) -> Retention:
        """Which checkpoints are kept."""
        every = self.args.keep_every_tokens
        return Retention(
            latest=self.args.max_to_keep,
            steps=[*self.plan.stage_ends().values()],
            every_tokens=None if every is None else EveryTokens(every, self.plan.tokens),
        )

    def with_vocabulary(self, size: int) -> "Job":
        """The same with a model for a tokenizer of this size, and for windows of the recipe's.

        A model that was trained before keeps its vocabulary.

        Raises:
            ValueError: A model that was trained before has fewer tokens than the tokenizer.
        """
        config = self.config
        if self.pretrained is None:
            config = dataclasses.replace(config, vocab_size=size)
        elif size > config.vocab_size:
            raise ValueError(
                f"--init-from {self.pretrained}: its tokenizer has {size} tokens, and its model a "
                f"vocab_size of {config.vocab_size}: they do not belong together"
            )
        window = max(config.max_position_embeddings, self.recipe.sequence_length)
        config = dataclasses.replace(config, max_position_embeddings=window)
        return dataclasses.replace(self, config=config)

    def settings(self, corpus_hash: str) -> dict[str, Any]:
        """What a run has to have in common with the one that it resumes."""
        settings = settings_of(self.args, self.recipe, self.plan.steps)
        settings["compute_dtype"] = jnp.dtype(self.execution.dtype).name
        return settings | {"config": dataclasses.asdict(self.config), "corpus": corpus_hash}


def make_job(args: Args, config: ModelConfig | None = None) -> Job:
    """Reads the arguments, and rejects what no run can do, before anything else is read.

    Args:
        args: The command line's arguments.
        config: An architecture in the place of the preset's.

    Raises:
        FileNotFoundError: The model to begin with is not there.
        ValueError: An argument is out of range, or the model to begin with cannot be read.
    """
    recipe = resolve(args)
    sources = parse_sources(args.data)
    plan = make_plan(recipe, bias_rate=args.bias_rate, mixes=parse_mixes(args.mix, sources))
    pretrained = None if args.init_from is None else Path(args.init_from)
    if pretrained is not None:
        config = check_pretrained(pretrained)
    config = config or MoonlightConfig.preset(args.preset)
    sharding = make_sharding(args.mesh)
    sharding.check_divides(("batch", "--batch-size", recipe.batch_size))
    on_cpu = jax.default_backend() == "cpu"
    experts = args.experts or ("dense" if on_cpu else "ragged")
    if args.expert_capacity is not None and experts == "dense":
        raise ValueError(
            f"--expert-capacity {args.expert_capacity} limits the tokens that are sent to experts, "
            "and --experts dense sends none: add --experts ragged, or leave the capacity out"
        )
    execution = Execution(
        dtype=jnp.dtype(compute_dtype(args.compute_dtype)[0]),
        sharding=sharding,
        experts=experts,
        expert_capacity=args.expert_capacity,
        expert_block=args.expert_block,
        remat=args.remat,
        unroll=on_cpu if args.unroll is None else args.unroll,
        attention_block=args.attention_block,
        loss_block=args.loss_block,
        monitor=args.monitor_every > 0,
    )
    heads = muon_heads(config, args.muon_heads, args.muon_heads_per_group)
    return Job(args, recipe, plan, sources, pretrained, config, execution, heads)
