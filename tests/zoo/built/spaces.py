"""State spaces and other recurrent models, most with PyTorch's weights of [out, in]."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.zoo.built.blocks import Built, along_last, attend, cross_entropy, linear, norm, split
from tests.zoo.built.decoders import through, tied


def depthwise(part, x):
    """A causal convolution of each channel by itself; PyTorch's weight is [channels, 1, window]."""
    kernel = part["kernel"] if "kernel" in part else part["weight"].transpose(2, 1, 0)
    window, _, channels = kernel.shape
    y = lax.conv_general_dilated(
        x, kernel, (1,), [(window - 1, 0)], dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=channels,
    )  # fmt: skip
    return along_last(y, part["bias"])


def scan_time(step, state, xs):
    """A recurrence over axis 1 of all `xs`."""
    _, y = lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), xs))
    return jnp.moveaxis(y, 0, 1)


def mamba(p, ids):
    def mixer(part, x):
        x, gate = jnp.split(linear(part / "in_proj", x), 2, axis=-1)
        x = jax.nn.silu(depthwise(part / "conv1d", x))
        rank = part["dt_proj/weight"].shape[1]
        dt, b, c = jnp.split(linear(part / "x_proj", x), [rank, rank + 16], axis=-1)
        dt, a = jax.nn.softplus(linear(part / "dt_proj", dt)), -jnp.exp(part["A_log"])

        def step(state, inputs):
            x, dt, b, c = inputs
            state = jnp.exp(dt[..., None] * a[None]) * state + (dt * x)[..., None] * b[:, None]
            return state, jnp.einsum("bdn,bn->bd", state, c)

        y = scan_time(step, jnp.zeros((2, *a.shape)), (x, dt, b, c))
        return linear(part / "out_proj", (y + x * part["D"][None, None]) * jax.nn.silu(gate))

    def block(part, x):
        return x + mixer(part / "mixer", norm(part / "norm", x))

    p = p / "backbone"
    x = through((p / "layers").many(), block, p["embeddings/weight"][ids])
    return tied(norm(p / "norm_f", x), p["embeddings/weight"], ids)


def mamba2(p, ids, states=128, dims=64):
    """Mamba-2, of Hugging Face's names and of bonsai's."""

    def mixer(part, x):
        heads, inner = part["A_log"].shape[0], part["norm/weight"].shape[0]
        x = linear(part / "in_proj", x)
        gate, x, dt = jnp.split(x, [inner, x.shape[-1] - heads], axis=-1)
        is_torch = "conv1d/weight" in part
        x = jax.nn.silu(depthwise(part / ("conv1d" if is_torch else "conv1d/conv"), x))
        x, b, c = jnp.split(x, [inner, (inner + x.shape[-1]) // 2], axis=-1)
        x, b, c = split(x, heads), split(b, b.shape[-1] // states), split(c, b.shape[-1] // states)
        b, c = (jnp.repeat(z, heads // z.shape[2], axis=2) for z in (b, c))
        dt = jax.nn.softplus(along_last(dt, part["dt_bias"]))
        a = -jnp.exp(part["A_log"])

        def step(state, inputs):
            x, dt, b, c = inputs
            state = state * jnp.exp(dt * a[None])[..., None, None]
            state = state + jnp.einsum("bhp,bhn->bhpn", x * dt[..., None], b)
            return state, jnp.einsum("bhpn,bhn->bhp", state, c)

        y = scan_time(step, jnp.zeros((2, heads, dims, states)), (x, dt, b, c))
        y = (y + x * part["D"][None, None, :, None]).reshape(*gate.shape)
        return linear(part / "out_proj", norm(part / "norm", y * jax.nn.silu(gate)))

    def block(part, x):
        return x + mixer(part / "mixer", norm(part / "norm", x))

    if "embedder/embedding" in p:
        x = through((p / "layers").many(), block, p["embedder/embedding"][ids])
        return tied(norm(p / "final_norm", x), p["embedder/embedding"], ids)
    b = p / "backbone"
    x = through((b / "layers").many(), block, b["embeddings/weight"][ids])
    return cross_entropy(linear(p / "lm_head", norm(b / "norm_f", x)), ids)


def rwkv4(p, ids):
    def mixed(part, x, name):
        before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        return x * part[f"time_mix_{name}"] + before * (1 - part[f"time_mix_{name}"])

    def time_mix(part, x):
        k, v, r = (linear(part / n, mixed(part, x, n)) for n in ("key", "value", "receptance"))
        decay, first = -jnp.exp(part["time_decay"])[None], part["time_first"][None]

        def step(state, inputs):
            (above, below), (k, v) = state, inputs
            now = jnp.exp(first + k)
            y = (above + now * v) / (below + now)
            keep, k = jnp.exp(decay), jnp.exp(k)
            return (keep * above + k * v, keep * below + k), y

        zero = jnp.zeros((2, x.shape[-1]))
        y = scan_time(step, (zero, zero), (k, v))
        return linear(part / "output", jax.nn.sigmoid(r) * y)

    def channel_mix(part, x):
        k = jnp.square(jax.nn.relu(linear(part / "key", mixed(part, x, "key"))))
        r = jax.nn.sigmoid(linear(part / "receptance", mixed(part, x, "receptance")))
        return r * linear(part / "value", k)

    def block(part, x):
        x = norm(part / "pre_ln", x) if "pre_ln/weight" in part else x
        x = x + time_mix(part / "attention", norm(part / "ln1", x))
        return x + channel_mix(part / "feed_forward", norm(part / "ln2", x))

    m = p / "rwkv"
    x = through((m / "blocks").many(), block, m["embeddings/weight"][ids])
    return cross_entropy(linear(p / "head", norm(m / "ln_out", x)), ids)


def recurrentgemma(p, ids, heads=10):
    """Two recurrent blocks, whose gates are block-diagonal, for each one of local attention."""

    def recurrent(part, x):
        y = jax.nn.gelu(linear(part / "linear_y", x))
        x = depthwise(part / "conv_1d", linear(part / "linear_x", x))
        r = part / "rg_lru"

        def gate(name):
            z = jnp.einsum("bthi,hij->bthj", split(x, heads), r[f"{name}_gate_weight"])
            return jax.nn.sigmoid(z + r[f"{name}_gate_bias"][None, None]).reshape(x.shape)

        keep = jnp.exp(-8 * gate("recurrent") * jax.nn.softplus(r["recurrent_param"])[None, None])
        x = x * gate("input") * jnp.sqrt(1 - keep**2)

        def step(state, inputs):
            keep, x = inputs
            state = keep * state + x
            return state, state

        return linear(part / "linear_out", scan_time(step, x[:, 0] * 0, (keep, x)) * y)

    def local(part, x):
        q, k, v = (split(linear(part / f"{name}_proj", x), heads) for name in "qkv")
        return linear(part / "o_proj", attend(q, k, v, causal=True))

    def block(part, x):
        t, y = part / "temporal_block", norm(part / "temporal_pre_norm", x)
        x = x + (local(t, y) if "q_proj/weight" in t else recurrent(t, y))
        m, y = part / "mlp_block", norm(part / "channel_pre_norm", x)
        h = jax.nn.gelu(linear(m / "gate_proj", y)) * linear(m / "up_proj", y)
        return x + linear(m / "down_proj", h)

    m = p / "model"
    x = through((m / "layers").many(), block, m["embed_tokens/weight"][ids])
    return tied(norm(m / "final_norm", x), m["embed_tokens/weight"], ids)


BUILT = {
    "mamba": Built(mamba),
    "mamba2": Built(mamba2),
    "bonsai_mamba2": Built(mamba2),
    "rwkv4": Built(rwkv4),
    "recurrentgemma": Built(recurrentgemma),
}
