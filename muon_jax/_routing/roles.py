"""The role of one leaf: what its names propose, decided by its shape and by what lies beside it.

The first that fits decides:

1. an unembedding head: by its name, as the last layer of a module so named, or because it is as
   wide as the embedding's rows;
2. a convolution: four or five axes in a ``kernel``, of which the first are a small, square window,
   whatever its module is called, unless that is a linear layer's; windows of another form and three
   axes by name, or with a bias that has the last axis only;
3. embeddings, tables of rows, norms, biases and gains, by name (`names`);
4. vectors, and stacks of them;
5. a LoRA factor, by name, its axes by the factor beside it (`lora`); those of a head go to AdamW;
6. two axes: a matrix, "assumed matrix" in the report unless a ``kernel`` or in a stack;
7. three axes: attention's, where the other projections or a bias agree (`evidence`).

All else is a `Question`, and raises.

What shapes cannot tell, and you declare: a grouped convolution reads as one matrix of all its
groups; a transposed one with ``transpose_kernel=True`` with input and output exchanged; one of a
single input channel as depthwise; and ``[out, in]`` weights (Equinox) with fan-in and fan-out
exchanged, which matters to scales by `fan_out / fan_in` only.
"""

import dataclasses

from optax.contrib import MuonDimensionNumbers

from muon_jax._common.paths import Path
from muon_jax._routing import names
from muon_jax._routing.evidence import Beside
from muon_jax._routing.lora import factor_of, stack_axes

_IN_OUT = MuonDimensionNumbers(-2, -1)
_NOTHING = Beside()


@dataclasses.dataclass(frozen=True)
class Role:
    """What is read of a leaf.

    Attributes:
      reason: the role's name, as the report prints it.
      spec: the axes of its matrices; None sends it to AdamW.
      assumed: whether nothing but its two axes says that it is a matrix.
      maybe_table: whether it is assumed, and its sides are those of a table.
    """

    reason: str
    spec: MuonDimensionNumbers | None = None
    assumed: bool = False
    maybe_table: bool = False


@dataclasses.dataclass(frozen=True)
class Question:
    """A leaf whose matrices cannot be known.

    Attributes:
      why: the sentence that says so.
      kind: what it looks like, for the remedy.
      window: whether it is known to be a convolution's, in an unknown layout.
      spec: the axes that it then has; None sends it to AdamW.
    """

    why: str
    kind: str = "a stack of [in, out] matrices"
    spec: MuonDimensionNumbers | None = _IN_OUT
    window: bool = False


def role_of(
    path: Path,
    shape: tuple[int, ...],
    stacks: tuple[str, ...],
    per_head: bool,
    beside: Beside = _NOTHING,
) -> Role | Question:
    """The role of a leaf by its names, its shape and what lies beside it.

    Args:
      path: the lower-case names on the leaf's path, indices included.
      shape: the shape of the leaf.
      stacks: the names of its leading stack axes.
      per_head: whether each attention head is a matrix of its own.
      beside: what the other leaves say.

    Returns:
      Its role, or the question.
    """
    parts = names.names_of(path)
    leaf, name = path[-1] if path else "", parts[-1]
    core = shape[len(stacks) :]

    if names.is_bias(leaf):
        return Role("bias")
    head = names.is_head(name) and names.has_heads(path) and not beside.hidden
    if beside.head is not None or head:
        return Role(beside.head or "unembedding head")
    if role := _convolution(leaf, name, shape, len(stacks), beside):
        return role
    if role := _by_name(leaf, name, core, beside):
        return role
    if not shape:
        return Role("scalar")
    if sum(length != 1 for length in shape) <= 1:
        return Role("vector")
    if role := _lora(path, shape, stacks, beside):
        return role
    if len(core) < 2:
        return Role("stacked vector")
    if len(core) == 2:
        return _matrix(leaf, name, shape, stacks, beside)
    return _of_heads(leaf, name, shape, stacks, per_head, beside)


def _is_table_of(leaf: str, name: str) -> bool:
    generic = leaf != name
    return not generic or "codebook" in name or (leaf == "weight" and "token" in name)


def _by_name(leaf: str, name: str, core: tuple[int, ...], beside: Beside) -> Role | None:
    kernel = leaf == "kernel"
    # A bias beside its ``weights`` says that a product reads them.
    linear = len(core) > 1 and (kernel or (leaf != name and beside.bias == core[-1:]))
    if names.is_embedding(name) and not linear:
        return Role("embedding")
    # "queries/w" projects to queries; "codebook/w" is one.
    if names.is_rows(name) and _is_table_of(leaf, name):
        return Role("table of rows")
    if names.is_norm(name) and not kernel:
        return Role("norm")
    if names.is_gain(leaf):
        return Role("gain")
    return None


def _lora(
    path: Path, shape: tuple[int, ...], stacks: tuple[str, ...], beside: Beside
) -> Role | Question | None:
    if (factor := factor_of(path)) is None:
        return None
    if any(names.is_head(name) for name in path[:-1]) and names.has_heads(path):
        return Role("LoRA factor of an unembedding head")
    core = shape[len(stacks) :]
    more = stack_axes(factor, core, beside.factor) if len(core) > 1 else None
    if more is None:
        return Question(
            "it is a factor of an adapter (LoRA), and the shape of the other one beside it does "
            "not say which axes are a stack's"
        )
    first, last = len(stacks) + more, len(shape) - 1
    stack = _under(stacks) + (", a stack as its other factor" if more else "")
    if factor == "a":
        spec = MuonDimensionNumbers(tuple(range(first, last)), last)
        return Role(f"LoRA factor [in, r]{stack}", spec)
    spec = MuonDimensionNumbers(first, tuple(range(first + 1, last + 1)))
    return Role(f"LoRA factor [r, out]{stack}", spec)


def _matrix(
    leaf: str, name: str, shape: tuple[int, ...], stacks: tuple[str, ...], beside: Beside
) -> Role | Question:
    if stacks and len(shape) == 3 and names.is_flax_attention(name) and not beside.plain:
        return Question(
            "it may be one Flax attention kernel of three axes, or a stack of plain matrices "
            f"under {stacks[0]!r}"
        )
    assumed = leaf != "kernel" and not stacks
    kind = "assumed matrix" if assumed else "linear kernel" if leaf == "kernel" else "matrix"
    fused = ", maybe fused blocks" if names.looks_fused(name) else ""
    return Role(kind + fused + _under(stacks), _IN_OUT, assumed)


def _of_heads(
    leaf: str,
    name: str,
    shape: tuple[int, ...],
    stacks: tuple[str, ...],
    per_head: bool,
    beside: Beside,
) -> Role | Question:
    rank = len(shape) - len(stacks)
    heads = "per head" if per_head else "heads joint"
    if rank == 3 and beside.attention:
        fused = ", maybe fused blocks" if names.looks_fused(name) else ""
        if names.is_output(name):
            spec = MuonDimensionNumbers(-2, -1) if per_head else MuonDimensionNumbers((-3, -2), -1)
            return Role(f"attention [heads, head_dim, d], {heads}{_under(stacks)}", spec)
        spec = MuonDimensionNumbers(-3, -1) if per_head else MuonDimensionNumbers(-3, (-2, -1))
        return Role(f"attention [d, heads, head_dim], {heads}{fused}{_under(stacks)}", spec)
    if names.is_input(name) or names.is_output(name) or names.is_latent(name):
        return Question(
            "it has a name of attention's, and no input and output beside it, nor a bias, whose "
            "axes are those of its heads"
        )
    one_bias = beside.bias == shape[-1:] and not beside.shares_first
    if leaf in ("kernel", "w") and one_bias and not names.is_linear(name):
        # A bias of the last axis alone: all other axes are summed over.
        reduction = tuple(range(len(stacks), len(shape) - 1))
        return Role(
            "linear kernel of several input axes" + _under(stacks),
            MuonDimensionNumbers(reduction, -1),
        )
    return Question("its names are not in the table of roles, or the axis of a stack is not plain")


def _convolution(
    leaf: str, name: str, shape: tuple[int, ...], stacks: int, beside: Beside
) -> Role | Question | None:
    core = shape[stacks:]
    named = names.is_convolution(name)
    if len(core) == 2 and min(core) <= names.LONGEST_WINDOW and names.is_depthwise(name):
        return Role("depthwise convolution")
    if len(core) < 3 or _rank(core) < 2 or (beside.bias is not None and _rank(beside.bias) > 1):
        return None
    if leaf.startswith("weight"):
        return _out_in_window(core, stacks, named, beside)
    window = core[:-2]
    # Patches of 32 or 40 are known by name, and never long and narrow.
    longest = 64 if names.is_patches(name) else names.LONGEST_WINDOW
    by_bias = beside.bias is not None and beside.bias == core[-1:]
    # Without a bias a window has to look like one: [8, 1] may be eight layers or experts.
    by_rank = (
        len(core) in (4, 5)
        and _is_window(window, longest)
        and (by_bias or len({*window[-2:]}) == 1)
        and not names.is_linear(name)
    )
    if leaf not in ("kernel", "w") and not leaf.endswith("_kernel"):
        kind = "a convolution's window [*window, in, out]"
        return _ask_window(core, stacks, kind, (0, -1)) if named and _rank(core) > 2 else None
    if leaf == "w" and not named and _is_window(core[2:]) and len(core) > 3:
        return _ask_window(core, stacks, "a convolution's window [out, in, *window]", (1, 0))
    if names.is_local(name):
        return None
    if named and not (by_bias or by_rank or _is_named_window(window, name)):
        if len(core) == 3 and not names.is_bare_convolution(name):
            return Question("it may be a convolution, or a stack of the layers around one")
        return _ask_window(core, stacks, "a convolution's window [*window, in, out]", (0, -1))
    if named or by_rank:
        if core[-2] == 1:
            return Role("depthwise convolution, or of one input channel")
        reduction = tuple(range(stacks, len(shape) - 1))
        return Role("convolution [*window, in, out]", MuonDimensionNumbers(reduction, -1))
    return None


def _out_in_window(
    core: tuple[int, ...], stacks: int, named: bool, beside: Beside
) -> Role | Question | None:
    """The layout of Equinox and PyTorch, which Equinox's bias [out, 1, 1] gives away."""
    if not named and not (len(core) in (4, 5) and _is_window(core[2:])):
        return None
    by_bias = beside.bias is not None and len(beside.bias) == len(core) - 1
    if core[1] == 1 and max(core[2:]) <= names.LONGEST_WINDOW:
        return Role("depthwise convolution, or of one input channel")
    if by_bias and beside.bias == (core[0], *[1] * (len(core) - 2)):
        reduction = tuple(range(stacks + 1, stacks + len(core)))
        return Role("convolution [out, in, *window]", MuonDimensionNumbers(reduction, stacks))
    if min(core[0], core[1]) > names.LONGEST_WINDOW or _is_window(core[2:]):
        return _ask_window(core, stacks, "a convolution's window [out, in, *window]", (1, 0))
    return _ask_window(core, stacks, "a convolution's window [*window, in, out]", (0, -1))


def _ask_window(core: tuple[int, ...], stacks: int, kind: str, ends: tuple[int, int]) -> Question:
    first, output = ends
    last = len(core) - (1 if output == -1 else 0)
    reduction = tuple(range(stacks + first, stacks + last))
    return Question(
        "only Flax's convolution layout is known, [*window, in, out] in a leaf named kernel",
        kind,
        MuonDimensionNumbers(reduction, -1 if output == -1 else stacks + output),
        window=True,
    )


def _is_window(window: tuple[int, ...], longest: int = names.LONGEST_WINDOW) -> bool:
    """Whether axes are a window's: short, and square, of one row, or square behind the first."""
    if not window or max(window) > longest:
        return False
    return len({*window}) == 1 or 1 in window or (len(window) == 3 and window[1] == window[2])


def _is_named_window(window: tuple[int, ...], name: str) -> bool:
    """Whether axes are the window of a convolution that its name alone says it is."""
    if len(window) == 1:
        return window[0] <= names.LONGEST_WINDOW and names.is_bare_convolution(name)
    return _is_window(window)


def _rank(shape: tuple[int, ...]) -> int:
    return sum(length != 1 for length in shape)


def _under(stacks: tuple[str, ...]) -> str:
    return f", stack under {'/'.join(stacks)}" if stacks else ""
