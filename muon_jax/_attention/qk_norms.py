"""Refuse attention modules whose queries or keys are normalised: no factor sets their logits.

What tells is a gain among the module's leaves, by its name, as in ``q_norm``, or by its length:
Linen calls any norm ``RMSNorm_0``. Norms of a latent vector come before the projections that are
clipped, and are harmless.
"""

import re

from muon_jax._attention.structures import AttentionHeads, MultiHeadLatent
from muon_jax._common.paths import Path, show

Leaves = list[tuple[Path, tuple[int, ...]]]
"""Paths and shapes."""

QK_NORM = (
    "queries or keys are normalised after their projections, so that scaling these changes no "
    "logit. Such logits are bounded by the norms' gains; leave qk_clip out for this module."
)
_QK_NORM = re.compile(
    r"_*(q|k|qk|query|key)_?(layer_?|rms_?)?(norm|ln)\w*|(layer_?|rms_?)?(norm|ln)_?(q|k|query|key)"
)
_LATENT_NORM = re.compile(
    r"(q_(a|lora|down|latent)|(?P<kv>kv(_(a|lora|down|latent))?|latent))_?(layer_?|rms_?)?(norm|ln)"
)
_ANY_BIAS = re.compile(r"\w*bias\w*|b(_\w+|[qkvo])?|\w+_b")
_GAIN = re.compile(r"scale|gain|gamma|g|\w+_(scale|gain)")
_SINKS = re.compile(r"sinks?")  # a logit for each head, as gpt-oss has them


def check_no_norm(
    node: Path, heads: AttentionHeads, leaves: Leaves, stack: tuple[int, ...], fan_ins: list[int]
) -> None:
    """Raise where a gain in the module may be that of a norm of its queries or keys.

    Two things tell: a name such as ``q_norm``, and, unless the user says ``check_qk_norm=False``,
    a length: Linen calls any norm ``RMSNorm_0``.
    """
    below = [(path[len(node) :], shape) for path, shape in leaves if path[: len(node)] == node]
    with_matrix = {path[:-1] for path, shape in below if len(shape) >= len(stack) + 2}
    for path, shape in below:
        # A stack's gains have its axes or are shared; an axis of length 1 is for broadcasting.
        rest = shape[len(stack) :] if shape[: len(stack)] == stack else shape
        length = tuple(n for n in rest[:-1] if n != 1) + rest[-1:]
        if isinstance(heads, MultiHeadLatent) and _is_of_latent(path, length, heads, fan_ins):
            continue
        if _QK_NORM.fullmatch(path[0].lower()):
            raise ValueError(f"qk_clip: {show(node)} has a {path[0]!r}: {QK_NORM}")
        if not heads.check_qk_norm or _SINKS.fullmatch(path[-1].lower()):
            continue
        is_bias = _ANY_BIAS.fullmatch(path[-1].lower()) and path[:-1] in with_matrix
        is_gain = any(length in ((width,), (n * width,)) for n, width in heads.normed)
        is_gain |= length in heads.normed and bool(_GAIN.fullmatch(path[-1].lower()))
        named = any(_QK_NORM.fullmatch(name.lower()) for name in path[:-1])
        if named or (is_gain and not is_bias):
            kind = type(heads).__name__
            told_by = "name" if named else f"length, that of a head or of all heads of {kind}"
            raise ValueError(
                f"qk_clip: {show((*node, *path))}, shape {shape}, may be the gain of a norm by its "
                f"{told_by}: {QK_NORM} Where it belongs to neither queries nor keys, say so: "
                f"{kind}(..., check_qk_norm=False)."
            )


def _is_of_latent(
    path: Path, length: tuple[int, ...], heads: MultiHeadLatent, fan_ins: list[int]
) -> bool:
    """Whether a gain is that of a latent vector, before the second projection, which is harmless.

    Its name and its length say so: that of what the projection takes. DeepSeek's own code calls
    both norms q_norm and kv_norm; the former is believed only where no head is as long.
    """
    if len(length) != 1:
        return False
    of_query, of_key_value = fan_ins
    for name in map(str.lower, path):
        known = _LATENT_NORM.fullmatch(name)
        if known and length[0] == (of_key_value if known["kv"] else of_query):
            return True
    count, width = heads.projections[heads.query]
    is_named_q = bool(_QK_NORM.fullmatch(path[0].lower()))
    return is_named_q and length[0] == of_query and of_query not in (width, count * width)
