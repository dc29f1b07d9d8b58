"""How an attention module's kernels hold its heads, and what QK-Clip multiplies them by.

Muon splits kernels into heads by the same structures (`split_heads`).

A head's logits are ``q . k``: bilinear in the two projections, so that factors on their columns
whose product is gamma scale the logits by exactly gamma, through biases and rotary embeddings too
(both are linear, head by head). Each structure splits gamma over its columns such that no other
head is touched:

    multi-head      q: sqrt(gamma_h)                k: sqrt(gamma_h)
    grouped-query   q: gamma_h / sqrt(gamma_g)      k: sqrt(gamma_g), gamma_g the group's largest
    latent (MLA)    q_nope: sqrt(gamma_h)           k_nope: sqrt(gamma_h)
                    q_rope: gamma_h                 k_rope, which all heads share: 1

Kimi Team 2025, "Kimi K2" (arXiv 2507.20534), Section 2.1. Grouped queries are not in the paper:
with groups of one they are multi-head, and a group's keys follow the head that is clipped least,
so that a head below the threshold keeps its queries and keys, and its logits, bit for bit.
"""

import abc
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from muon_jax._common.checks import check_bool, check_pattern, is_positive_integer

Factors = dict[str, jax.Array]
"""From a projection's name to the factors of its columns, `[*stack, heads, width]`."""


class KernelHeads(NamedTuple):
    """How one projection's kernel holds heads.

    Attributes:
      heads: the number of heads.
      width: the width of one.
      per_group: how many consecutive heads form one matrix.
      on_output: whether the heads lie along the output; along the input in an output projection.
    """

    heads: int
    width: int
    per_group: int
    on_output: bool = True

    @property
    def groups(self) -> int:
        """The number of matrices."""
        return self.heads // self.per_group

    def __str__(self) -> str:
        if self.per_group == 1:
            return f"{self.heads} head{'s' * (self.heads > 1)}"
        return f"{self.groups} group{'s' * (self.groups > 1)} of {self.per_group} heads"


@dataclasses.dataclass(frozen=True)
class AttentionHeads(abc.ABC):
    """What all structures of heads have in common; not to be made itself."""

    heads: int
    check_qk_norm: bool = dataclasses.field(default=True, kw_only=True)

    @property
    @abc.abstractmethod
    def projections(self) -> dict[str, tuple[int, int]]:
        """The clipped projections, the query's first: name -> number and width of its heads."""

    @property
    def normed(self) -> set[tuple[int, int]]:
        """Number and width of the heads that a norm of queries or keys would have a gain for."""
        return {*self.projections.values()}

    @abc.abstractmethod
    def kernels(self, heads_per_group: int) -> dict[str, KernelHeads]:
        """How Muon splits each projection's kernel, where so many query heads form a matrix."""

    @abc.abstractmethod
    def factors(self, gamma: Float[Array, "*stack heads"]) -> Factors:
        """The factors of each projection's columns, where head h's logits shall scale by gamma."""

    def __post_init__(self) -> None:
        kind = type(self).__name__
        for name, value in vars(self).items():
            if name.endswith(("heads", "_dim")) and not is_positive_integer(value):
                raise ValueError(f"{kind}.{name} must be a positive whole number; got {value!r}.")
        fields: dict[str, str] = {}
        for field in ("query", "key", "key_value", "value", "output"):
            name = vars(self).get(field)
            if field not in vars(self) or (name is None and field in ("value", "output")):
                continue
            if not isinstance(name, str) or not name:
                raise TypeError(f"{kind}.{field} must be the name of a projection; got {name!r}.")
            if name in fields:
                raise ValueError(f"{kind}: {fields[name]} and {field} are both {name!r}; name two.")
            fields[name] = field
        check_bool(f"{kind}.check_qk_norm", self.check_qk_norm)


@dataclasses.dataclass(frozen=True)
class MultiHead(AttentionHeads):
    """Multi-head attention: as many key heads as query heads.

    Kernels are `[..., in, heads * head_dim]` or `[..., in, heads, head_dim]`, with biases to match;
    leading axes are stacks, such as layers.

    Attributes:
      heads: the number of heads.
      head_dim: the width of a head of queries and keys.
      query: the name of the query projection in the module; Flax's own attention has "query".
      key: the name of the key projection; Flax's own attention has "key".
      value: the name of the value projection, which Muon splits too; None leaves it whole.
      output: the name of the output projection `[..., heads * head_dim, out]`, likewise.
      check_qk_norm: whether `qk_clip` refuses a gain in the module that is as long as a head or as
        all heads: it may normalise queries or keys. False is your word that it does not.

    Examples:
      >>> llama_2 = MultiHead(heads=32, head_dim=128)
      >>> flax = MultiHead(8, 64, query="query", key="key", value="value", output="out")
    """

    head_dim: int
    query: str = "q_proj"
    key: str = "k_proj"
    value: str | None = "v_proj"
    output: str | None = "o_proj"

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """See `AttentionHeads`."""
        return dict.fromkeys((self.query, self.key), (self.heads, self.head_dim))

    def kernels(self, heads_per_group: int) -> dict[str, KernelHeads]:
        """See `AttentionHeads`."""
        held = KernelHeads(self.heads, self.head_dim, heads_per_group)
        return _named(
            {self.query: held, self.key: held, self.value: held},
            {self.output: held._replace(on_output=False)},
        )

    def factors(self, gamma: Float[Array, "*stack heads"]) -> Factors:
        """See `AttentionHeads`."""
        return dict.fromkeys((self.query, self.key), _columns(jnp.sqrt(gamma), self.head_dim))


@dataclasses.dataclass(frozen=True)
class GroupedQuery(AttentionHeads):
    """Grouped-query attention: query heads ``g * n .. (g + 1) * n - 1`` share key head g.

    Multi-query attention is ``kv_heads=1``. Kernels are as in `MultiHead`.

    Attributes:
      heads: the number of query heads.
      kv_heads: the number of key heads, a divisor of `heads`.
      head_dim: see `MultiHead`.
      query: see `MultiHead`.
      key: see `MultiHead`.
      value: see `MultiHead`.
      output: see `MultiHead`.
      check_qk_norm: see `MultiHead`.

    Examples:
      >>> qwen2_7b = GroupedQuery(heads=28, kv_heads=4, head_dim=128)
    """

    kv_heads: int
    head_dim: int
    query: str = "q_proj"
    key: str = "k_proj"
    value: str | None = "v_proj"
    output: str | None = "o_proj"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads % self.kv_heads:
            raise ValueError(
                f"GroupedQuery: {self.heads} query heads do not divide into {self.kv_heads} "
                "groups; heads must be a multiple of kv_heads."
            )

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """See `AttentionHeads`."""
        return {self.query: (self.heads, self.head_dim), self.key: (self.kv_heads, self.head_dim)}

    def kernels(self, heads_per_group: int) -> dict[str, KernelHeads]:
        """See `AttentionHeads`."""
        shared, left = divmod(heads_per_group * self.kv_heads, self.heads)
        if shared and (left or self.kv_heads % shared):
            raise ValueError(
                f"split_heads: {heads_per_group} of {self.heads} query heads share "
                f"{heads_per_group * self.kv_heads / self.heads:g} of {self.kv_heads} key heads, "
                "which is no whole part of them; take a multiple or a divisor of "
                f"{self.heads // self.kv_heads}, the query heads of one key head."
            )
        queries = KernelHeads(self.heads, self.head_dim, heads_per_group)
        keys = KernelHeads(self.kv_heads, self.head_dim, max(1, shared))
        return _named(
            {self.query: queries, self.key: keys, self.value: keys},
            {self.output: queries._replace(on_output=False)},
        )

    def factors(self, gamma: Float[Array, "*stack heads"]) -> Factors:
        """See `AttentionHeads`."""
        of_group = gamma.reshape(*gamma.shape[:-1], self.kv_heads, -1)
        keys = jnp.sqrt(jnp.max(of_group, axis=-1))
        queries = (of_group / keys[..., None]).reshape(gamma.shape)
        return {
            self.query: _columns(queries, self.head_dim),
            self.key: _columns(keys, self.head_dim),
        }


@dataclasses.dataclass(frozen=True)
class MultiHeadLatent(AttentionHeads):
    """Multi-head latent attention (DeepSeek-V2): keys and values unfold from a latent vector.

    A query head is ``[nope | rope]``; a head of the key-value projection is ``[k_nope | v]``, of
    which the values keep their scale; the rotary key, shared by all heads, comes from another
    projection, which is not touched. Kernels are as in `MultiHead`.

    Attributes:
      heads: the number of heads.
      nope_dim: the width of a head's part without rotary embedding, in queries and keys.
      rope_dim: the width of its part with it.
      v_dim: the width of a head of values.
      query: the name of the query projection in the module; with a low-rank query it is the second
        one, "q_b_proj".
      key_value: the name of the projection from the latent vector to keys and values.
      output: the name of the output projection `[..., heads * v_dim, out]`; see `MultiHead`.
      check_qk_norm: see `MultiHead`. Norms of latent vectors, before the projections, are none.

    Examples:
      >>> moonlight = MultiHeadLatent(heads=16, nope_dim=128, rope_dim=64, v_dim=128)
    """

    nope_dim: int
    rope_dim: int
    v_dim: int
    query: str = "q_proj"
    key_value: str = "kv_b_proj"
    output: str | None = "o_proj"

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """See `AttentionHeads`."""
        return {
            self.query: (self.heads, self.nope_dim + self.rope_dim),
            self.key_value: (self.heads, self.nope_dim + self.v_dim),
        }

    def kernels(self, heads_per_group: int) -> dict[str, KernelHeads]:
        """See `AttentionHeads`; a head's keys and values are one matrix."""
        inputs = {
            name: KernelHeads(count, width, heads_per_group)
            for name, (count, width) in self.projections.items()
        }
        output = KernelHeads(self.heads, self.v_dim, heads_per_group, on_output=False)
        return _named(inputs, {self.output: output})

    @property
    def normed(self) -> set[tuple[int, int]]:
        """See `AttentionHeads`: the parts of a head too, which can be normalised by themselves."""
        parts = {(self.heads, self.nope_dim), (self.heads, self.rope_dim)}
        return parts | {*self.projections.values()}

    def factors(self, gamma: Float[Array, "*stack heads"]) -> Factors:
        """See `AttentionHeads`."""
        nope = _columns(jnp.sqrt(gamma), self.nope_dim)
        values = _columns(jnp.ones_like(gamma), self.v_dim)
        return {
            self.query: jnp.concatenate([nope, _columns(gamma, self.rope_dim)], axis=-1),
            self.key_value: jnp.concatenate([nope, values], axis=-1),
        }


def check_rule(argument: str, pattern: Any, heads: Any, remedy: str) -> None:
    """Raise where a pattern is no regular expression, or `heads` no structure of attention."""
    check_pattern(argument, pattern)
    if not isinstance(heads, AttentionHeads):
        raise TypeError(
            f"{argument}: {pattern!r} maps to {heads!r}; use MultiHead, GroupedQuery or "
            f"MultiHeadLatent. {remedy}"
        )


def _named(*kernels: dict[Any, KernelHeads]) -> dict[str, KernelHeads]:
    """Those of them that have a name."""
    return {name: held for some in kernels for name, held in some.items() if name is not None}


def _columns(of_head: Float[Array, "*stack heads"], width: int) -> Float[Array, "*stack heads w"]:
    """A head's factor for each of its columns."""
    return jnp.broadcast_to(of_head[..., None], (*of_head.shape, width))
