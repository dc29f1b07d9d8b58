"""Split the kernels of declared attention modules into heads: from routes to finer routes.

Routing has said which axes of a kernel are its input and its output; the structure says how many
heads lie along one of them. Whatever does not fit raises: heads cut in the wrong place are matrices
of the right shape, and train, a little worse, without a word.
"""

import dataclasses
import re
from collections.abc import Collection, Sequence

from optax.contrib import MuonDimensionNumbers

from muon_jax._attention.leaves import (
    check_projection,
    is_bias,
    leaves_of,
    match_modules,
)
from muon_jax._attention.split_heads import SplitHeads
from muon_jax._attention.structures import AttentionHeads, KernelHeads
from muon_jax._common.paths import Path, show, unflattened
from muon_jax._matrices import FusedBlocks, MatrixSpec, SplitAxis, leaf_views
from muon_jax._routes import Route

_KERNEL = re.compile(r"kernel|w|weight")


def split_routes(
    routes: Sequence[Route], heads: SplitHeads, sure: Collection[int], hidden: Sequence[Path]
) -> list[Route]:
    """The routes, of which those of declared modules' kernels are split into heads.

    Args:
      routes: the routes of all leaves, heads joint.
      heads: the declaration.
      sure: the places of the leaves whose axes the user or the program gave.
      hidden: the paths of leaves that are masked, which other optimizers have.

    Raises:
      ValueError: for patterns that find no module, and for projections that are missing, do not
        fit, hold fused blocks, or go to AdamW.
    """
    if not routes:
        return []
    split = [*routes]
    paths = [unflattened(route.path) for route in routes]
    masked = [unflattened(path) for path in hidden]
    for node, names, structure in match_modules("heads", paths + masked, dict(heads.rules)):
        for projection, held in structure.kernels(heads.heads_per_group).items():
            check_projection("heads", node, names, projection, structure)
            module = (*node, projection)
            index = _kernel(module, paths, structure)
            if index is None:
                if any(path[: len(module)] == module for path in masked):
                    continue
                raise ValueError(_no_kernel(module, paths, structure))
            split[index] = _in_heads(routes[index], held, structure, index in sure)
    return split


def _kernel(module: Path, paths: Sequence[Path], structure: AttentionHeads) -> int | None:
    """The place of a projection's kernel; None where it has none."""
    own = leaves_of(paths, module)
    kernels = [
        index for index, rest in own if not rest or (len(rest) == 1 and _KERNEL.fullmatch(rest[0]))
    ]
    unknown = [rest for index, rest in own if index not in kernels and not is_bias(rest)]
    if len(kernels) > 1 or (kernels and unknown):
        raise ValueError(_no_kernel(module, paths, structure))
    return kernels[0] if kernels else None


def _no_kernel(module: Path, paths: Sequence[Path], structure: AttentionHeads) -> str:
    listed = ", ".join(show(paths[index]) for index, _ in leaves_of(paths, module))
    return (
        f"heads: {show(module)} must be a kernel, or hold one, called kernel, w or weight, and at "
        f"most a bias; it holds {listed}. Merge adapters (LoRA) into the kernel, or leave the "
        f"module out of the patterns of {type(structure).__name__}."
    )


def _in_heads(route: Route, held: KernelHeads, structure: AttentionHeads, sure: bool) -> Route:
    """One kernel's route, split."""
    where = f"heads: {show(route.path)}, shape {route.shape}"
    by = f"{held.heads} heads of width {held.width}, by {type(structure).__name__}"
    if route.views is None:
        raise ValueError(
            f"{where}, belongs to AdamW ({route.reason}); expected a matrix that holds {by}. "
            "Declare its axes with muon_weight_dimension_numbers, or leave its module out of heads."
        )
    if isinstance(route.spec, FusedBlocks):
        raise ValueError(
            f"{where}, is declared as {route.spec}; expected one matrix that holds {by}. A leaf is "
            "split into fused blocks or into heads: drop one of the two declarations."
        )
    if unflattened(route.path)[-1] == "weight" and not sure:
        raise ValueError(
            f"{where}: a leaf called weight may be [in, out] or [out, in], so that the axis of its "
            f"{by} is not known. Declare it: muon_weight_dimension_numbers=muon_jax.by_path("
            f'{{"{route.path[-1]}$": MuonDimensionNumbers(-1, -2)}}) for [out, in] weights.'
        )
    spec = _split(route, held, f"{where}: its {'output' if held.on_output else 'input'}", by)
    views = leaf_views(route.shape, spec, show(route.path))
    _, fan_in, fan_out = views[0].matrices
    reason = route.reason.replace(", heads joint", "")
    return dataclasses.replace(
        route,
        reason=f"{reason}, {held} [{fan_in}, {fan_out}]",
        spec=spec,
        views=views,
        in_heads=True,
    )


def _split(route: Route, held: KernelHeads, where: str, by: str) -> MatrixSpec:
    """The matrices of single heads or of groups."""
    assert route.views is not None
    (view,) = route.views
    sides = {"reduction": view.reduction, "output": view.output}
    name, other = ("output", "reduction") if held.on_output else ("reduction", "output")
    lengths = _lengths(route, sides[name])
    before = sides[name][0] - 1
    if lengths == (held.width,) and before in view.batch_axes and route.shape[before] == held.heads:
        sides[name] = (before, *sides[name])  # heads that count as a stack already
        lengths = (held.heads, held.width)
    axis = sides[name][0]
    if lengths == (held.heads, held.width) and held.per_group == 1:
        sides[name] = sides[name][1:]
        return MuonDimensionNumbers(sides["reduction"], sides["output"])
    numbers = MuonDimensionNumbers(sides["reduction"], sides["output"])
    if lengths in ((held.heads * held.width,), (held.heads, held.width)):
        return numbers if held.groups == 1 else SplitAxis(axis, held.groups, numbers)
    turned = _lengths(route, sides[other]) == (held.heads * held.width,)
    remedy = (
        "Its other side would hold them: say which axes are its input and its output with "
        "muon_weight_dimension_numbers"
        if turned
        else "Mend the structure, or say which axes are its input and its output with "
        "muon_weight_dimension_numbers"
    )
    raise ValueError(
        f"{where} axes {sides[name]} have the lengths {lengths}; expected "
        f"{held.heads * held.width}, or {held.heads} and {held.width}: {by}. {remedy}."
    )


def _lengths(route: Route, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(route.shape[axis] for axis in axes)
