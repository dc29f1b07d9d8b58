"""The sizes and rates of a run, and those of each preset."""

from typing import Literal, NamedTuple


class Recipe(NamedTuple):
    """What a preset trains with where the command line is silent; the names are those of `Args`."""

    schedule: Literal["cosine", "moonlight"]
    learning_rate: float
    total_tokens: int
    batch_size: int
    sequence_length: int
    gradient_accumulation: int
    warmup_steps: int | None = None
    cooldown_at: int | None = None

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the largest optimizer step."""
        return self.gradient_accumulation * self.batch_size * self.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps, if all are the largest."""
        return self.total_tokens // self.tokens_per_step


RECIPES = {
    # About three minutes on two CPU cores: 1,200 steps. The rate was AdamW's best of 2e-3, 4e-3,
    # 8e-3 and 16e-3.
    "tiny": Recipe("cosine", 4e-3, 1_228_800, 8, 128, 1),
    # For the GPU of a free Colab, a T4: 1,120 steps, of 1,114 TFLOPs together, which it does in 20
    # minutes at 11% of its peak (`python -m benchmarks.preset`). The rate is not tuned.
    "mini": Recipe("cosine", 2e-3, 9_175_040, 16, 512, 1),
    # A starting point for one accelerator: 10,000 steps.
    "small": Recipe("cosine", 1e-3, 163_840_000, 16, 1024, 1),
    # As published; without sharding it fits no single device.
    "moonlight-16b-a3b": Recipe("moonlight", 4.2e-4, 5_700_000_000_000, 4, 8192, 1024),
}
