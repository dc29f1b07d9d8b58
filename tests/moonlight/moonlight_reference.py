"""Moonlight in float64 NumPy, one token, head and expert at a time, written from the equations.

It shares no code with the model, not even its order of operations: attention is a loop over
positions, rope a product of complex numbers, experts a loop over the chosen ones. `Conventions`
turns single rules wrong, so that a test can show that its comparison would notice.
"""

import dataclasses

import jax
import numpy as np

from examples.moonlight.model.config import MoonlightConfig


@dataclasses.dataclass(frozen=True)
class Conventions:
    """The published rules; every other value is a known mistake."""

    interleaved_rope: bool = True
    rotated_key: bool = True
    latent_eps: float = 1e-6
    logits_scaled_by_v: bool = False
    bias_in_choice: bool = True
    bias_in_weights: bool = False
    normalised_weights: bool = True
    gate_scale: bool = True
    shared_scaled: bool = False
    value_first: bool = False
    swapped_gate_and_up: bool = False


PUBLISHED = Conventions()
KNOWN_MISTAKES = {
    "rope in halves": Conventions(interleaved_rope=False),
    "key without rope": Conventions(rotated_key=False),
    "latent norm with the model's eps": Conventions(latent_eps=1e-5),
    "logits scaled by the value width": Conventions(logits_scaled_by_v=True),
    "bias left out of the choice": Conventions(bias_in_choice=False),
    "bias in the weights": Conventions(bias_in_weights=True),
    "weights not normalised": Conventions(normalised_weights=False),
    "no gate scale": Conventions(gate_scale=False),
    "gate scale on the shared experts too": Conventions(shared_scaled=True),
    "kv_b split as [v | k]": Conventions(value_first=True),
    "gate and up exchanged": Conventions(swapped_gate_and_up=True),
}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms_norm(x, scale, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rope(x, position, theta, interleaved):
    """Rotates one vector: pair i is a complex number, turned by position * theta^(-2i/width)."""
    width = len(x)
    real, imag = (x[0::2], x[1::2]) if interleaved else (x[: width // 2], x[width // 2 :])
    turned = (real + 1j * imag) * np.exp(1j * position * theta ** (-np.arange(0, width, 2) / width))
    out = np.empty(width)
    if interleaved:
        out[0::2], out[1::2] = turned.real, turned.imag
    else:
        out[: width // 2], out[width // 2 :] = turned.real, turned.imag
    return out


def mlp(x, gate, up, down, rules):
    if rules.swapped_gate_and_up:
        gate, up = up, gate
    hidden = x @ gate
    return (hidden * sigmoid(hidden) * (x @ up)) @ down


def attention(x_td, p, c: MoonlightConfig, rules: Conventions):
    """One sequence. Returns its output and each head's largest causal logit."""
    nope, width = c.qk_nope_head_dim, c.qk_nope_head_dim + c.qk_rope_head_dim
    out_td, largest = np.zeros_like(x_td), np.full(c.num_attention_heads, -np.inf)
    latent = x_td @ p["kv_a_proj"]["kernel"]
    k_rope = [
        rope(key, t, c.rope_theta, rules.interleaved_rope) if rules.rotated_key else key
        for t, key in enumerate(latent[:, c.kv_lora_rank :])
    ]
    latent = rms_norm(latent[:, : c.kv_lora_rank], p["kv_a_layernorm"]["scale"], rules.latent_eps)
    for h in range(c.num_attention_heads):
        w_q = p["q_proj"]["kernel"][:, h * width : (h + 1) * width]
        w_kv = np.split(p["kv_b_proj"]["kernel"], c.num_attention_heads, axis=1)[h]
        w_o = p["o_proj"]["kernel"][h * c.v_head_dim : (h + 1) * c.v_head_dim]
        w_k, w_v = w_kv[:, :nope], w_kv[:, nope:]
        if rules.value_first:
            w_v, w_k = w_kv[:, : c.v_head_dim], w_kv[:, c.v_head_dim :]
        scale = (c.v_head_dim if rules.logits_scaled_by_v else width) ** -0.5
        for t in range(len(x_td)):
            q = x_td[t] @ w_q
            q_rope = rope(q[nope:], t, c.rope_theta, rules.interleaved_rope)
            logits = np.array(
                [scale * (q[:nope] @ (latent[s] @ w_k) + q_rope @ k_rope[s]) for s in range(t + 1)]
            )
            largest[h] = max(largest[h], logits.max())
            probs = np.exp(logits - logits.max())
            out_td[t] += (probs / probs.sum()) @ (latent[: t + 1] @ w_v) @ w_o
    return out_td, largest


def moe(x_nd, p, c: MoonlightConfig, rules: Conventions = PUBLISHED):
    """A slow loop over tokens. Returns the output and each expert's load."""
    out, load = np.zeros_like(x_nd), np.zeros(c.n_routed_experts)
    router, experts, shared = p["router"], p["experts"], p["shared_experts"]
    for n, x in enumerate(x_nd):
        score = sigmoid(x @ router["kernel"])
        rank = score + router["bias"] if rules.bias_in_choice else score
        chosen = np.argsort(-rank, kind="stable")[: c.num_experts_per_tok]
        weight = (score + router["bias"] if rules.bias_in_weights else score)[chosen]
        if rules.normalised_weights:
            weight = weight / (weight.sum() + 1e-20)
        if rules.gate_scale:
            weight = weight * c.routed_scaling_factor
        for e, w in zip(chosen, weight, strict=True):
            matrices = (experts[name][e] for name in ("gate_proj", "up_proj", "down_proj"))
            out[n] += w * mlp(x, *matrices, rules)
            load[e] += 1
        matrices = (shared[name]["kernel"] for name in ("gate_proj", "up_proj", "down_proj"))
        factor = c.routed_scaling_factor if rules.shared_scaled else 1
        out[n] += factor * mlp(x, *matrices, rules)
    return out, load


def layer(params, i, c: MoonlightConfig):
    """The parameters of one layer: of the first ones, or cut out of the stack of the others."""
    if i < c.first_k_dense_replace:
        return params["first_layers"][i]
    return jax.tree.map(lambda x: x[i - c.first_k_dense_replace], params["layers"])


def forward(params, c: MoonlightConfig, tokens_bt, rules: Conventions = PUBLISHED):
    """Returns logits, loads per layer and largest logits per layer, for float64 nested `params`."""
    act = params["embed"]["embedding"][tokens_bt]
    loads, largest = [], []
    for i in range(c.num_hidden_layers):
        p = layer(params, i, c)
        normed = rms_norm(act, p["input_layernorm"]["scale"], c.rms_norm_eps)
        per_sequence = [attention(x_td, p["self_attn"], c, rules) for x_td in normed]
        act = act + np.stack([out for out, _ in per_sequence])
        largest.append(np.max([seen for _, seen in per_sequence], axis=0))
        normed = rms_norm(act, p["post_attention_layernorm"]["scale"], c.rms_norm_eps)
        if i < c.first_k_dense_replace:
            names = ("gate_proj", "up_proj", "down_proj")
            act = act + mlp(normed, *(p["mlp"][name]["kernel"] for name in names), rules)
        else:
            out, load = moe(normed.reshape(-1, c.hidden_size), p["mlp"], c, rules)
            act = act + out.reshape(act.shape)
            loads.append(load)
    act = rms_norm(act, params["norm"]["scale"], c.rms_norm_eps)
    return act @ params["lm_head"]["kernel"], np.stack(loads), np.stack(largest)


def next_token_loss(params, c: MoonlightConfig, tokens_bt, rules: Conventions = PUBLISHED):
    """Mean negative log-probability of each token but the first."""
    logits, _, _ = forward(params, c, tokens_bt[:, :-1], rules)
    total = 0.0
    for row, target in zip(
        logits.reshape(-1, c.vocab_size), tokens_bt[:, 1:].reshape(-1), strict=True
    ):
        total += np.log(np.exp(row - row.max()).sum()) + row.max() - row[target]
    return total / tokens_bt[:, 1:].size
