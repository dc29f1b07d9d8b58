"""What the models written on the zoo's leaves share: a place in their tree, and common layers."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

IDS = (jax.ShapeDtypeStruct((2, 8), jnp.int32),)
IMAGES = (
    jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32),
    jax.ShapeDtypeStruct((2,), jnp.int32),
)


class Built(NamedTuple):
    """A model of the zoo as a program.

    Attributes:
      loss: a function of the parameters and the batch.
      batch: the batch's shapes.
      params: the parameters' shapes, as the loss takes them; None for a `Part` of the zoo's leaves.
      otherwise: verdicts that differ from the zoo's, by patterns: what names can't tell, or tell by
        convention, as of a loss whose last matrix is no head by name.
      depth: of layers in a numbered list, how many are built, as all are alike; None for all.
    """

    loss: Callable[..., Any]
    batch: tuple[Any, ...] = IDS
    params: Any = None
    otherwise: Mapping[str, str] = {}
    depth: int | None = 4


class Part:
    """The leaves of a flat tree whose paths go on from one place.

    ``part / "attn" / "query"`` is a place further down, and ``part["kernel"]`` a leaf there.
    """

    def __init__(self, leaves, path=""):
        self.leaves, self.path = leaves, path

    def __truediv__(self, name):
        path = self.path
        if name.startswith("../"):
            path, name = path.rpartition("/")[0], name[3:]
        return Part(self.leaves, f"{path}/{name}" if path else name)

    def __getitem__(self, name):
        return self.leaves[(self / name).path]

    def __contains__(self, name):
        return (self / name).path in self.leaves

    def below(self, axis=0):
        """The leaves below by the rest of their paths, with their axis `axis` in front."""
        start = self.path + "/"
        return {
            path.removeprefix(start): jnp.moveaxis(leaf, axis, 0)
            for path, leaf in self.leaves.items()
            if path.startswith(start)
        }

    def many(self, name="{}"):
        """The places numbered from 0 on, as far as there are leaves below."""
        found = []
        while any(
            path.startswith((self / name.format(len(found))).path + "/") for path in self.leaves
        ):
            found.append(self / name.format(len(found)))
        return found


def linear(part, x):
    """``x @ kernel + bias``, or with PyTorch's ``weight`` of [out, in]."""
    y = x @ (part["kernel"] if "kernel" in part else part["weight"].T)
    return along_last(y, part["bias"]) if "bias" in part else y


def along_last(x, vector):
    """``x`` plus a vector along its last axis."""
    return x + vector.reshape((1,) * (x.ndim - 1) + (-1,))


def norm(part, x):
    """LayerNorm, or RMSNorm where there is no bias."""
    center = "bias" in part
    gain = next(part[name] for name in ("scale", "weight", "kernel") if name in part)
    x = x - x.mean(-1, keepdims=True) * center
    x = x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    x = x * gain.reshape((1,) * (x.ndim - 1) + (-1,))
    return along_last(x, part["bias"]) if center else x


def split(x, heads):
    """[batch, time, width] with the width cut into heads."""
    return x.reshape(*x.shape[:-1], heads, -1)


def rotate(x):
    """Rotary positions of [batch, time, heads, dims]."""
    angles = jnp.arange(x.shape[1])[:, None] * jnp.arange(x.shape[-1] // 2)[None] * 0.01
    sin, cos = (f(angles)[None, :, None] for f in (jnp.sin, jnp.cos))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def attend(q, k, v, bias=0.0, causal=False):
    """Attention of [batch, time, heads, dims], keys and values of as many heads or fewer."""
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) if groups > 1 else x for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5 + bias
    if causal:
        mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
        scores = jnp.where(mask, scores, -1e9)
    y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    return y.reshape(*y.shape[:2], -1)


def attention(part, x, names, heads, memory=None, kv_heads=None, turn=lambda x: x, **options):
    """Attention whose four projections are called ``names``: query, key, value and output."""
    query, key, value, out = (part / name for name in names.split())
    memory = x if memory is None else memory
    q = turn(split(linear(query, x), heads))
    k = turn(split(linear(key, memory), kv_heads or heads))
    v = split(linear(value, memory), kv_heads or heads)
    return linear(out, attend(q, k, v, **options))


def convolve(part, x, stride=1, padding="SAME", groups=1):
    """A convolution in Flax's layout, [*window, in, out]."""
    kernel = part["kernel"]
    letters = "HW"[: kernel.ndim - 2]
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    y = lax.conv_general_dilated(
        x, kernel, (stride,) * len(letters), padding, dimension_numbers=numbers,
        feature_group_count=groups,
    )  # fmt: skip
    return along_last(y, part["bias"]) if "bias" in part else y


def cross_entropy(logits, labels):
    """The mean loss of [..., classes] against labels [...]."""
    logits = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(logits, labels[..., None], axis=-1).mean()
