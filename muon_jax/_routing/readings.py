"""Read all leaves of a tree together: stacks, what lies beside each, roles, and what is asked."""

import dataclasses
from collections.abc import Mapping, Sequence

from optax.contrib import MuonDimensionNumbers

from muon_jax._common.paths import Path
from muon_jax._routing import names
from muon_jax._routing.evidence import look_beside
from muon_jax._routing.guesses import guess, is_window_of_a_layer
from muon_jax._routing.maybe_tables import maybe_tables
from muon_jax._routing.roles import Question, Role, role_of
from muon_jax._routing.stacks import (
    Stacked,
    by_module,
    find_stacks,
    is_stack_of_vectors,
    rejected_stacks,
    shared_axes,
)

Leaves = Sequence[tuple[Path, tuple[int, ...]]]


def read_leaves(
    leaves: Leaves, per_head: bool, batches: Mapping[int, set[int]] | None = None
) -> list[Role | Question]:
    """The role of every leaf, or the question that it raises.

    Args:
      leaves: lower-case names on the path, indices included, and the shape, of every leaf.
      per_head: whether each attention head is a matrix of its own.
      batches: the batch axes of each leaf that the user declared: a matrix declared to
        be one of a stack is evidence for its neighbours.

    Returns:
      One `Role` or `Question` for each leaf; of declared ones it says nothing.
    """
    batches = dict(batches or {})
    leaves = _with_biases(leaves)
    stacks = find_stacks(leaves)
    beside = look_beside(leaves, stacks)
    read = [
        role_of(path, shape, stack, per_head, other)
        for (path, shape), stack, other in zip(leaves, stacks, beside, strict=True)
    ]
    doubted = _unnamed_stacks(leaves, stacks, read) - {
        i for i, other in enumerate(beside) if other.attention or other.factor
    }
    asked = {i for i, role in enumerate(read) if isinstance(role, Question)}
    # Windows and einsum layouts have axes of their own that leaves may share.
    own = {i for i in asked if _has_a_layout(read[i], leaves[i][0])}
    unknown = (asked | doubted) - batches.keys()
    shared = {
        i: stacked
        for i, stacked in shared_axes(leaves, unknown - own, batches).items()
        if stacked.axis >= len(stacks[i])
        and i not in batches
        and i not in own
        and not (stacked.axis == 1 and _looks_like_heads(*leaves[i]))
    }
    # Without vectors beside it, [3, 3, in, out] is a window that layers share.
    vectors = {stacked.where for i, stacked in shared.items() if len(leaves[i][1]) == 2}
    shared = {
        i: stacked
        for i, stacked in shared.items()
        if stacked.where in vectors or not _looks_like_a_window(*leaves[i])
    }
    cores = [
        (path, _without(shape, shared[i].axis) if i in shared else shape)
        for i, (path, shape) in enumerate(leaves)
    ]
    beside = look_beside(cores, stacks) if shared else beside
    widths = [
        min(shape)
        for path, shape in leaves
        if len(shape) == 2 and names.is_token_embedding(names.names_of(path)[-1])
    ]
    for i in range(len(leaves)):
        role, stacked, path = read[i], shared.get(i), leaves[i][0]
        if stacked and _is_vector(role, path, leaves[i][1], stacks[i]):
            read[i] = Role("stacked vector")
        elif i in unknown:
            core = role_of(*cores[i], stacks[i], per_head, beside[i])
            if isinstance(core, Question):
                core = guess(*cores[i], core, len(stacks[i]), widths, per_head)
            read[i] = _question(role, core, stacked, len(cores[i][1]))
    tables = maybe_tables(leaves, read)
    return [
        dataclasses.replace(role, reason=f"{role.reason}, maybe a table", maybe_table=True)
        if isinstance(role, Role) and i in tables
        else role
        for i, role in enumerate(read)
    ]


def _with_biases(leaves: Leaves) -> Leaves:
    """The leaves, where a ``b`` beside its ``w`` or ``kernel`` is called a bias, as in Haiku.

    A ``b`` beside an ``a`` is the second matrix of an adapter, and one alone may be anything.
    """
    ranks = {path: len(shape) for path, shape in leaves}

    def is_bias(path: Path, rank: int) -> bool:
        owner = path[:-1]
        beside = [ranks[(*owner, name)] for name in ("w", "kernel") if (*owner, name) in ranks]
        return path[-1:] == ("b",) and (*owner, "a") not in ranks and max(beside, default=0) > rank

    return [
        ((*path[:-1], "bias") if is_bias(path, len(shape)) else path, shape)
        for path, shape in leaves
    ]


def _unnamed_stacks(
    leaves: Leaves, stacks: Sequence[tuple[str, ...]], read: Sequence[Role | Question]
) -> set[int]:
    """Leaves read as one matrix of three or more axes, in a module where even vectors have two.

    A window of [3, 3] and three layers of a window of 3 look alike; gains of [3, 512] beside them
    do not.
    """
    found = {
        i
        for i in rejected_stacks(leaves, stacks)
        if _is_matrix_of_many_axes(read[i], leaves[i][1])
        and not names.is_convolution(names.names_of(leaves[i][0])[-1])
    }
    for members in by_module(leaves).values():
        shapes = [leaves[i][1] for i in members]
        if len(members) < 2 or min(map(len, shapes)) < 2 or any(stacks[i] for i in members):
            continue
        common = [n for n in (0, 1) if len({shape[n] for shape in shapes}) == 1]
        if any(shapes[0][n] > 1 for n in common) and is_stack_of_vectors(leaves, members):
            found |= {i for i in members if _is_matrix_of_many_axes(read[i], leaves[i][1])}
    return found


def _is_matrix_of_many_axes(role: Role | Question, shape: tuple[int, ...]) -> bool:
    return len(shape) >= 3 and isinstance(role, Role) and role.spec is not None


def _looks_like_heads(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether a leaf named as attention's input has [d, heads, head_dim] with d in all heads."""
    name = names.names_of(path)[-1]
    if len(shape) != 3:
        return False
    return names.is_latent(name) or (names.is_input(name) and shape[0] == shape[1] * shape[2])


def _looks_like_a_window(path: Path, shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and is_window_of_a_layer(names.names_of(path)[-1], shape)


def _has_a_layout(role: Role | Question, path: Path) -> bool:
    return (isinstance(role, Question) and role.window) or "einsum" in names.names_of(path)[-1]


def _is_vector(
    role: Role | Question, path: Path, shape: tuple[int, ...], stacks: tuple[str, ...]
) -> bool:
    if len(shape) - len(stacks) != 2 or names.is_router(names.names_of(path)[-1]):
        return False
    return isinstance(role, Role) and role.assumed


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _question(
    read: Role | Question, core: Role | Question, stacked: Stacked | None, rank: int
) -> Question:
    """The question on a leaf, with what it most likely is."""
    why = read.why if isinstance(read, Question) else f"its name says {read.reason}"
    spec = core.spec
    if stacked is None:
        kind = core.kind if isinstance(core, Question) else core.reason
        return Question(why, kind, spec)
    why += f"; axis {stacked.axis} is shared by {stacked.where}, as a stack's is"
    if spec is None:
        return Question(why, "a table of rows", None)
    reduction, output = (
        _shift(axes, rank, stacked.axis) for axes in (spec.reduction_axis, spec.output_axis)
    )
    spec = MuonDimensionNumbers(reduction, output)
    return Question(why, f"a stack along axis {stacked.axis}", spec)


def _shift(axes: int | Sequence[int], rank: int, axis: int) -> int | tuple[int, ...]:
    several = axes if isinstance(axes, Sequence) else (axes,)
    # From the end where the stack's axis is first: the same numbers then serve every rank.
    moved = tuple(
        (a % rank) - rank if axis == 0 else (a % rank) + (a % rank >= axis) for a in several
    )
    return moved if isinstance(axes, Sequence) else moved[0]
