"""What to compile, and the FLOPs that it takes by formula."""

import dataclasses

from benchmarks.scale.cases import SCALES, Scale
from benchmarks.step import newton_schulz_flops
from examples.moonlight.model.config import MoonlightConfig
from examples.moonlight.model.language_model import ParameterCounts


@dataclasses.dataclass(frozen=True)
class Job:
    """What to compile.

    Attributes:
      target: a name of `SCALES`.
      preset: of the architecture.
      layers: how many; None is the preset's.
      context: tokens of a sequence.
      batch: sequences of a step, over all devices and micro-batches.
    """

    target: str
    preset: str
    layers: int | None
    context: int
    batch: int

    @property
    def scale(self) -> Scale:
        """The machine."""
        return SCALES[self.target]

    @property
    def config(self) -> MoonlightConfig:
        """The architecture."""
        config = MoonlightConfig.preset(self.preset)
        layers = self.layers or config.num_hidden_layers
        longest = max(self.context, config.max_position_embeddings)
        return dataclasses.replace(
            config, num_hidden_layers=layers, max_position_embeddings=longest
        )

    @property
    def micro_batches(self) -> int:
        """How many pass one after the other, each of the scale's sequences per device.

        Raises:
          ValueError: the devices do not divide the batch.
        """
        sequences = self.scale.devices * self.scale.sequences
        micro, left = divmod(self.batch, sequences)
        if left or not micro:
            raise ValueError(
                f"--batch {self.batch}: the {self.scale.devices} devices of {self.target} take "
                f"{sequences} sequences at a time; give a multiple of them"
            )
        return micro

    @property
    def rounds(self) -> int:
        """The rounds in which tokens go to experts, where routing is balanced."""
        return -(-self.scale.sequences * self.context // self.scale.expert_block)


def expected(
    job: Job, counts: ParameterCounts, matrices: dict[str, tuple[int, ...]]
) -> dict[str, float]:
    """FLOPs per device by formula, nothing computed twice: what the compiled ones are held against.

    "model" is 6 per active parameter and token, the head included, and three times attention's
    forward pass over the lower triangle. "newton_schulz" is an even share of five steps.
    """
    config = job.config
    tokens = job.batch * job.context
    head = config.vocab_size * config.hidden_size
    width = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    pairs = tokens * (job.context + 1) / 2
    attention = 3 * 2 * pairs * width * config.num_hidden_layers
    model = 6 * (counts.active + head) * tokens + attention
    return {
        "model": model / job.scale.devices,
        "newton_schulz": newton_schulz_flops(matrices, "muon_jax") / job.scale.devices,
        "parameters": counts.total,
        "active": counts.active,
    }
