"""How the products of Newton-Schulz are multiplied and rounded: three engines, one arithmetic.

What the precision rests on: in bfloat16 every product is accumulated in float32, its sum with
``a X`` or ``b A`` is formed in float32, and the result is rounded once. Written with bfloat16
sums instead, five steps drift 4-7% away from float32; rounded once, 1.2-1.5%.

Every product is written ``X Y^H``, both factors contracted over their minor axes: XLA:CPU is fast
in bfloat16 in that layout and no other. ``X X^H`` is one as it stands, ``A A`` is one because ``A``
is Hermitian, and ``P X`` is one with ``X^H`` beside ``X``. Of tall matrices, so are ``X^H X`` and
``X P``, as ``P`` is Hermitian.

Accelerators multiply bfloat16 operands, all matrices in one batched product. So do processors that
have instructions for it (`_processor`), some matrices at a time. Others hold the bfloat16-rounded
values in float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from muon_jax import _processor
from muon_jax._matrices import is_tall
from muon_jax._symmetric import Finish, mirrored, panels
from muon_jax._transposition import transpose_in_tiles


class Arithmetic(NamedTuple):
    """How one engine multiplies and rounds.

    Attributes:
      wide: the dtype in which products are accumulated, sums formed and norms taken.
      store: rounds a sum to what the next product reads.
      product: ``X Y^H`` of two stored matrices; the result is wide.
      held: the dtype in which stored matrices are held.
      unroll: how many steps the program's loop over them holds.
      writes_adjoint: whether the ``X^T`` of a real ``X`` is written out. Elsewhere the compiler
        reads ``X`` in the other order, at no cost.
      mirrors: whether a part of symmetric products is mirrored where that is faster.
      picks: whether elements are read one by one. TPUs keep matrices in tiles, and read them whole.
      norm_bits: the bits of mantissa that a norm is rounded to; None leaves it. The order in which
        a program sums shows in a float32's last bits, of which a matrix that is rounded to bfloat16
        has no use.
      batch_bytes: how many bytes of stored matrices go through together; None means all.
    """

    wide: Any
    store: Callable[[jax.Array], jax.Array]
    product: Callable[..., jax.Array]
    held: Any
    unroll: int = 1
    writes_adjoint: bool = False
    mirrors: bool = False
    picks: bool = False
    norm_bits: int | None = None
    batch_bytes: int | None = None

    def widen(self, x: jax.Array) -> jax.Array:
        """A stored matrix, as sums take it."""
        return x.astype(self.wide)

    def adjoint(self, x: jax.Array) -> jax.Array:
        """``X^H`` of a stored ``X``, as the second factor of a product."""
        return transpose_in_tiles(x) if self.writes_adjoint else adjoint(x)

    def symmetric(
        self, x: jax.Array, own: jax.Array, finish: Finish, *beside: jax.Array
    ) -> jax.Array:
        """``finish(X X^H, *beside)``, rounded: some rows of it.

        Args:
          x: stored matrices, whole.
          own: the rows of `x` that are asked for; `x` itself for all.
          finish: entry by entry, and wide. What it makes of Hermitian matrices is Hermitian.
          beside: rows of other Hermitian matrices, as many as `own`; `finish` takes them last.
        """
        if self.mirrors and own.shape == x.shape and panels(*x.shape[-2:]) > 1:
            return mirrored(x, self.product, lambda *args: self.store(finish(*args)), beside)
        return self.store(finish(self.product(own, x), *beside))

    def trace(self, x: jax.Array) -> jax.Array:
        """The trace of stored Hermitian matrices, wide and real."""
        real = jnp.finfo(self.wide).dtype
        if self.picks:
            return jnp.sum(jnp.diagonal(x.real, axis1=-2, axis2=-1).astype(real), axis=-1)
        identity = jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=bool), x.shape)
        return jnp.sum(jnp.where(identity, x.real.astype(real), 0), axis=(-2, -1))


def engines(dtype: jnp.dtype) -> dict[str, Arithmetic]:
    """The engine of each platform, for matrices that lie in `dtype`; "default" is the others'."""
    if dtype != jnp.bfloat16:
        exact = Arithmetic(dtype, lambda x: x, full_precision_product, dtype)
        cpu = exact._replace(picks=True, batch_bytes=ONE_BY_ONE)
        return {"cpu": cpu, "tpu": exact._replace(unroll=TPU_UNROLL), "default": exact}
    mixed = mixed_bfloat16()
    cpu = native_bfloat16() if _processor.multiplies_bfloat16() else rounded_float32()
    return {"cpu": cpu, "tpu": mixed._replace(unroll=TPU_UNROLL), "default": mixed}


def mixed_bfloat16() -> Arithmetic:
    """The engine of accelerators: bfloat16 factors, float32 sums."""
    return Arithmetic(jnp.float32, to_bfloat16, bfloat16_product, jnp.bfloat16, norm_bits=NORM_BITS)


def native_bfloat16() -> Arithmetic:
    """The engine of processors that multiply bfloat16."""
    mixed = mixed_bfloat16()
    return mixed._replace(writes_adjoint=True, mirrors=True, picks=True, batch_bytes=CACHE_BYTES)


def rounded_float32() -> Arithmetic:
    """The engine of processors without bfloat16: its values, held in float32."""
    store, product = _round_to_bfloat16, full_precision_product
    wide = jnp.float32
    return Arithmetic(
        wide, store, product, wide, picks=True, norm_bits=NORM_BITS, batch_bytes=ONE_BY_ONE
    )


TPU_UNROLL = 2
"""XLA:TPU copies X in each round of a loop; in two steps X' takes another place, and X'' its."""

NORM_BITS = 10
"""Of a norm's mantissa: an eighth of a bfloat16's last bit, and 8,192 of a float32's.

With all bits, 2 of 40 random layouts on a mesh had a matrix that was not one device's, since XLA
summed its squares in another order; so none. `torch.optim.Muon` rounds the norm to bfloat16.
"""

ONE_BY_ONE = 0
"""A batch is never less than one matrix, which stays in the CPU's cache as no batch would."""

CACHE_BYTES = 2**20
"""1 MiB: small matrices share what each operation costs, and stay in the cache."""


def _round_to_bfloat16(x: jax.Array) -> jax.Array:
    # reduce_precision, since XLA may drop a pair of casts as excess precision.
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def to_bfloat16(x: jax.Array) -> jax.Array:
    """Round to bfloat16."""
    return x.astype(jnp.bfloat16)


def full_precision_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """``X Y^H`` without rounding the factors: a GPU or TPU would take fewer bits of float32."""
    return jnp.matmul(x, adjoint(y), precision=lax.Precision.HIGHEST)


@jax.custom_jvp
def bfloat16_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """``X Y^T`` of bfloat16 matrices; the sums are float32."""
    return _processor.bfloat16_product(x, y)


@bfloat16_product.defjvp
def _(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    # In float32: transposed for a gradient, these products have layouts in which XLA:CPU fails.
    (x, y), (dx, dy) = primals, tangents
    wide = [array.astype(jnp.float32) for array in (x, y, dx, dy)]
    rate = full_precision_product(wide[2], wide[1]) + full_precision_product(wide[0], wide[3])
    return bfloat16_product(x, y), rate


def adjoint(x: jax.Array) -> jax.Array:
    """``X^H``: the transpose, conjugated where it is complex."""
    return x.mT.conj() if jnp.iscomplexobj(x) else x.mT


def short_side(x: jax.Array) -> jax.Array:
    """``X``, or ``X^H`` of a tall one: its rows are the fewer, of which the Gram matrix is made."""
    return adjoint(x) if is_tall(x.shape) else x
