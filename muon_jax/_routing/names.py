r"""The table of names: what a leaf's path proposes about its role.

A leaf is read by its own name, or, where that is generic (``kernel``, ``weight``, ``w``, ...), by
the name of the module that owns it; indices are skipped and case does not matter.

| role             | names                                             | matrices                |
|------------------|---------------------------------------------------|-------------------------|
| unembedding head | head, \*_head, unemb\*, \*logit\*, \*classifier,  | none: AdamW             |
|                  | predictions, score; fc and output at the top      |                         |
| embedding        | \*emb, \*embed, \*embedding, embed_tokens, wte,   | none: AdamW             |
|                  | wpe, pos_enc\*, vocab\*, tok                      |                         |
| table of rows    | \*_tokens, \*prompt, rel_pos\*, codebook, latents,| none: AdamW             |
|                  | queries, A_log, RWKV's time_decay, time_faaaa     |                         |
| norm             | \*norm, \*norms, \*norm_0, rms, ln\*, bn\*        | none: AdamW             |
| bias             | \*bias\*, b1, bq, b_q, bo; b beside w or kernel   | none: AdamW             |
| gain             | scale, gain, gamma, beta, g, offset, \*_scale,    | none: AdamW             |
|                  | \*_gain, layer_scale, sinks                       |                         |
| convolution      | conv, conv1, conv2d, Conv_0, \*_conv, conv_in     | [window and in] x [out] |
| attention input  | query, key, value, q, q_proj, wq, to_q, query_w   | [d] x [heads, head_dim] |
| LoRA factor      | lora_a, lora_A, \*_lora_a; lora_b, ...            | [in] x [r]; [r] x [out] |
| attention output | out, o, o_proj, out_proj, wo, to_out, output_w    | [heads, head_dim] x [d] |

Names propose and shapes decide (`evidence`, `stacks`): but for a convolution's, no name alone
folds axes into a matrix. A ``kernel`` is no embedding and no table, whatever its module is called.
"""

import re

from muon_jax._common.paths import Path

GENERIC = re.compile(r"kernel|weights?|weight_[vg]|w|matrix|table|param")
# Layers of a module whose own name says no more than that it is one of its matrices.
_PLAIN = re.compile(
    r"(linear|dense|proj|fc|proj_in|proj_out|out_proj|output|out|decoder|logits?|final|projection|"
    r"layers?|last(_layer)?|fc_cls|fc_reg|cls_score|bbox_pred)(_?\d+)?"
)
_LAST = re.compile(
    r"out_proj|proj_out|output|out|decoder|logits?|final\w*|projection|last(_layer)?|"
    r"fc_cls|fc_reg|cls_score|bbox_pred"
)
LONGEST_WINDOW = 16  # rows of a convolution's window
_WRAPPERS = {"params", "model", "module", "net", "network", "~"}

_NO_HEAD = (
    r"(?!(multi|attn|attention|self|cross|num|per|each|talking|[kvo]|query|key|value)_|q_heads)"
)
_HEAD = re.compile(
    rf"{_NO_HEAD}(\w+_)?heads?(_?\d+)?|unemb\w*|(?!pre_)(\w+_)?(classifier|predictor)(_?\d+)?|"
    r"embed_out|score|qa_outputs|(\w+_)?predictions?|seq_relationship|"
    r"(?!(pre|post|router|gate|gating|routing|expert|attn|attention)\w*_|(obs|img|prior|post)_?logit)"
    r"\w*logits?(?!_?mlp)\w*"
)
# Inside these modules a head is one of attention's, and logits are weights of a mixture.
_NO_HEADS_WITHIN = re.compile(
    r"(\w*_)?\w*?(attn|attention)(_?\d+)?|(\w*_)?(router|gate|gating)(_?\d+)?"
)
_TOP_HEAD = re.compile(r"fc|output|output_projection")
_TABLE_OF_WHAT = (
    r"tokens?|words?|tables?|weights?|matrix|lookup|in|vocab|pos(itions?|itional)?|types?|"
    r"positions?_\d|params?|codes?"
)
_EMBEDDING = re.compile(
    rf"(\w*_)?\w*?emb(s|eds?|edd?ings?|edders?)?(_({_TABLE_OF_WHAT}))?(_?\d+)?|wte|wpe|"
    r"(\w*_)?pos(ition(al)?)?_?enc(od(ing|er))?s?(_?\d+)?|pos|pe|positions?|w_pos|emb_var|"
    r"vocab(ulary)?(_\w+)?|tok(ens?|_?emb\w*)?(_tables?)?"
)
# Rows that are looked up, learned inputs, and coefficients of one channel each: no linear maps.
_ROWS = re.compile(
    r"(?!(to|w|q|k|v|kv)_)((\w+_)?tokens?(_?\d+)?|(\w+_)?prompts?(_(pool|keys?|tokens?))?|(\w+_)?rel(ative)?_pos\w*|"
    r"codebooks?|(\w+_)?latents?|(\w+_)?queries|(\w+_)?a_log|(\w+_)?probes?|"
    r"time_(mix|decay|first|faaaa|maa)(?!\w*_w\d)\w*|r_k|prototypes?|(\w+_)?slots|null_(kv?|v)|"
    r"(mem|sink)_kv|centroids|anchors|inducing_points|scale_shift_table)"
)
_NORM = re.compile(
    r"\w*norms?(_?\d+|_[a-z]{1,3})?|rms(_?\d+)?|(ln|bn)(_\w+|\d+)?|(layer|batch|group)norm\w*"
)
_NO_NORM = re.compile(r"\w+_(mlp|ffn?|proj|dense|linear|fc)")
# Of the leaf alone: a module may be called "scale" and hold a matrix.
_BIAS = re.compile(
    r"\w*bias\w*|b_?[qkvo]|b\d+|b_(in|out|up|down|gate)|(query|key|value|gating|output)_b"
)
_GAIN = re.compile(r"scale|gain|gamma|beta|g|offset|\w+_(scale|gain)|sinks?")
_CONVOLUTION = re.compile(
    r"(\w*_)?(dw)?conv(olution)?s?(_?\d?_?d)?(_?transpose|local)?(_?\d+)*(_[a-z]\w*)?"
)
# Flax's own attention is always [d, heads, head_dim]; the other names also serve plain matrices.
_FLAX = re.compile(r"query|key|value|out")
_INPUT = re.compile(
    r"query|key|value|[qkv]|[qkv]_?proj|w[qkv]|(query|key|value)_proj|to_[qkv]|"
    r"(query|key|value|gating)_w"
)
_OUTPUT = re.compile(r"out|o|o_?proj|(\w+_)?out_proj|wo|to_out|output_w|attention_output")
_LATENT = re.compile(r"w?(q|kv|k|v)_?b(_proj)?|w(uq|ukv|uk|uv)")
_ROUTER = re.compile(r"\w*(router|gate|gating)\w*")
# Layers that are linear wherever they stand, and so no convolutions, whatever their rank.
_LINEAR = re.compile(
    r"wi(_?\d)?|wo|w[1-3]|w_(in|out|up|down|gate)|(up|down|gate|in|out)(_proj)?|fc(_?\d+)?|dense(_?\d+)?|linear(_?\d+)?|"
    r"\w*experts?\w*|\w*einsum\w*|mlp\w*|"
    r"gate_up\w*|(\w+_)?(qkv|kv)(_proj)?|c_(fc|proj|attn)|expand|contract"
)
_MAP = re.compile(
    r"\w*lora\w*|\w*proj(ection)?(_?\w+)?|\w+_w\d|[qk]_(pe|rope)|w?[qk]v?_a|w?kv_a\w*"
)
_FUSED = re.compile(
    r"\w*qkv\w*|\w*gate_up\w*|c_attn|to_kv|w?kv_(proj|b|b_proj)|in_proj\w*|fused\w*|"
    r"query_key_value|(weight_)?[ih]h(_l\d+)?|weight_[ih]h\w*|ada_?ln\w*|dense_[ih]|wi_fused|w1[23]"
)


def names_of(path: Path) -> list[str]:
    """The names on a path without indices and, where the leaf's own is generic, without that."""
    names = [name for name in path if not name.isdigit() and name != "~"] or [""]
    return names[:-1] if GENERIC.fullmatch(names[-1]) and len(names) > 1 else names


def owner_of(path: Path) -> Path:
    """The path of what a leaf is read by: itself, or the module that owns a ``kernel``."""
    return path[:-1] if len(path) > 1 and GENERIC.fullmatch(path[-1]) else path


def is_head(name: str) -> bool:
    """Whether a name is that of an unembedding head."""
    return bool(_HEAD.fullmatch(name))


def has_heads(path: Path) -> bool:
    """Whether none of a leaf's modules says that what is called a head within it is another."""
    return not any(_NO_HEADS_WITHIN.fullmatch(name) for name in owner_of(path)[:-1])


def is_head_module(name: str) -> bool:
    """Whether a module of this name holds a head as its last layer."""
    return is_head(name) and name not in ("prediction", "predictions")


def is_plain(name: str) -> bool:
    """Whether a layer's name says only that it is one of its module's layers."""
    return bool(_PLAIN.fullmatch(name))


def is_last(name: str) -> bool:
    """Whether a layer's name says that it is the last of its module."""
    return bool(_LAST.fullmatch(name))


def is_at_the_top(path: Path) -> bool:
    """Whether the module that owns a leaf is one of the model's own."""
    return sum(name not in _WRAPPERS for name in owner_of(path)) == 1


def is_top(path: Path) -> bool:
    """Whether a leaf belongs to the model's own ``fc``, ``out`` or ``output``."""
    return is_top_head(path) or (is_at_the_top(path) and owner_of(path)[-1] == "out")


def is_top_head(path: Path) -> bool:
    """Whether a leaf belongs to the model's own ``fc`` or ``output``."""
    return bool(path) and is_at_the_top(path) and bool(_TOP_HEAD.fullmatch(owner_of(path)[-1]))


def is_embedding(name: str) -> bool:
    """Whether a name is that of an embedding or of positions."""
    return bool(_EMBEDDING.fullmatch(name))


def is_token_embedding(name: str) -> bool:
    """Whether an embedding's rows are tokens: not positions, types, segments or times."""
    return is_embedding(name) and not re.search(r"pos|wpe|pe$|type|seg|time|rel|label|dist", name)


def is_rows(name: str) -> bool:
    """Whether a name is that of a table of rows which no product reads as a linear map."""
    return bool(_ROWS.fullmatch(name))


def is_norm(name: str) -> bool:
    """Whether a name is that of a norm, and not of a layer behind one."""
    return bool(_NORM.fullmatch(name)) and not _NO_NORM.fullmatch(name)


def is_bias(leaf: str) -> bool:
    """Whether a leaf's own name is that of a bias."""
    return bool(_BIAS.fullmatch(leaf))


def is_gain(leaf: str) -> bool:
    """Whether a leaf's own name is that of a gain."""
    return bool(_GAIN.fullmatch(leaf))


def is_convolution(name: str) -> bool:
    """Whether a name is that of a convolution."""
    return bool(_CONVOLUTION.fullmatch(name))


def is_depthwise(name: str) -> bool:
    """Whether a convolution's two axes are a window and channels, and not a linear map."""
    return is_convolution(name) and bool(
        re.fullmatch(r"(?!.*(point|1x1)).*?conv[a-z]*[_\d]*d?(_?\d+)*(_(kernel|weight|w))?", name)
    )


def is_bare_convolution(name: str) -> bool:
    """Whether a convolution's name says no more, as ``conv_proj`` does of a layer around it."""
    return bool(re.fullmatch(r"(\w*_)?(dw)?conv[a-z]*[_\d]*d?[_\d]*(_(in|out|kernel))?", name))


def is_local(name: str) -> bool:
    """Whether a name is that of a convolution with weights of its own at each place."""
    return bool(re.fullmatch(r"\w*conv_?local(_?\d+)?|\w*local_?conv\w*", name))


def is_patches(name: str) -> bool:
    """Whether a name is that of a projection of patches."""
    return "patch" in name


def is_linear(name: str) -> bool:
    """Whether a name is that of a linear layer, or of a stack of them."""
    return bool(_LINEAR.fullmatch(name) or _INPUT.fullmatch(name) or _OUTPUT.fullmatch(name))


def is_input(name: str) -> bool:
    """Whether a name is that of attention's projection to queries, keys or values."""
    return bool(_INPUT.fullmatch(name))


def is_output(name: str) -> bool:
    """Whether a name is that of attention's projection from its heads."""
    return bool(_OUTPUT.fullmatch(name))


def is_latent(name: str) -> bool:
    """Whether a name is that of latent attention's projection from a compressed width to heads."""
    return bool(_LATENT.fullmatch(name))


def is_flax_attention(name: str) -> bool:
    """Whether a name is one of Flax's own attention."""
    return bool(_FLAX.fullmatch(name))


def is_router(name: str) -> bool:
    """Whether a name is that of a router or a gate."""
    return bool(_ROUTER.fullmatch(name))


def is_map(name: str) -> bool:
    """Whether a name is that of a linear map, however narrow, such as an adapter's."""
    return is_linear(name) or is_router(name) or bool(_MAP.fullmatch(name))


def looks_fused(name: str) -> bool:
    """Whether a name says that several matrices lie side by side in one leaf."""
    return bool(_FUSED.fullmatch(name))
