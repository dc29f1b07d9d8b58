"""Is the planner's search worth it? `python -m benchmarks.plan_search`.

Plans every case of `benchmarks.wire`, and Moonlights on many meshes, by shapes alone, and compares
what is found with less: one greedy pass over the groups, heaviest first, each with those before it
fixed; each group by itself; one of the two descents alone.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from optax.contrib import MuonDimensionNumbers
from rich.table import Table

from benchmarks.harness import environment, make_console, write_json
from benchmarks.scale.cases import SCALES
from benchmarks.targets import TARGETS
from benchmarks.wire.cases import CASES
from benchmarks.wire.steps import MESH_AXES
from examples.moonlight.common.command_line import CommandLine
from examples.moonlight.model.config import MoonlightConfig
from examples.moonlight.model.execution.sharding import MESH_AXES as MODEL_AXES
from examples.moonlight.model.execution.sharding import ModelSharding
from examples.moonlight.model.moonlight import Moonlight
from muon_jax import MeshCosts
from muon_jax._mesh.choices import Choices
from muon_jax._mesh.grouping import group_matrices
from muon_jax._mesh.layout import zero1_layout
from muon_jax._mesh.plan import PlannedLeaf
from muon_jax._mesh.planner import Search
from muon_jax._mesh.pricing import Pricing
from muon_jax._mesh.specs import resolve_param_specs
from muon_jax._polynomials import resolve_schedule
from muon_jax._routing.route_leaves import route_leaves

PRESETS = ("moonlight-16b-a3b", "small", "tiny")
MESHES = {
    **{f"{n} of data": (n, 1, 1, 1) for n in (3, 6, 8, 12, 24, 256)},
    "data, fsdp 2x4": (2, 4, 1, 1),
    "data, expert, tensor 2x2x2": (2, 1, 2, 2),
    "fsdp, expert 64x4": (1, 64, 4, 1),
    **{name: scale.mesh for name, scale in SCALES.items()},
}


def search_of(params: Any, specs: Any, mesh: AbstractMesh, numbers: Any = None) -> Search:
    """The search for the plan of a model's matrices."""
    sizes = dict(mesh.shape)
    routes, _ = route_leaves(params, numbers)
    leaves = [
        PlannedLeaf(
            route.views,
            zero1_layout(route.shape, spec, mesh.axis_names, sizes, route.views),
            jnp.dtype(jnp.bfloat16),
            jnp.dtype(jnp.float32),
        )
        for route, spec in zip(routes, resolve_param_specs(params, specs, mesh), strict=True)
        if route.views is not None
    ]
    members = group_matrices(leaves, sizes, mesh.axis_names)
    counts = {key: sum(m.matrices for m in group) for key, group in members.items()}
    return Search(
        Choices(
            Pricing(sizes, resolve_schedule("standard"), MeshCosts()), 2**30, whole_result=False
        ),
        counts,
    )


def searches() -> Iterator[tuple[str, Search]]:
    """Each case by its name."""
    auto = lambda names: (AxisType.Auto,) * len(names)  # noqa: E731
    for case in CASES.values():
        for target in TARGETS.values():
            axes = MESH_AXES[len(target.mesh)]
            if case.parameters == "local" and target.devices > 8:
                continue  # there are fewer experts than devices
            mesh = AbstractMesh(target.mesh, axes, axis_types=auto(axes))
            params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in case.shapes.items()}
            specs = {n: case.param_spec(s, axes) for n, s in case.shapes.items()}
            numbers = dict.fromkeys(params, MuonDimensionNumbers(-2, -1))
            yield f"{case.title}, {target.name}", search_of(params, specs, mesh, numbers)
    for preset in PRESETS:
        config = MoonlightConfig.preset(preset)
        model = nnx.eval_shape(lambda config=config: Moonlight(config, rngs=nnx.Rngs(0)))
        _, params, _ = nnx.split(model, nnx.Param, ...)
        for name, shape in MESHES.items():
            mesh = AbstractMesh(shape, MODEL_AXES, axis_types=auto(MODEL_AXES))
            try:
                specs = ModelSharding(mesh).param_shardings(params)  # pyright: ignore
            except ValueError:
                continue  # the mesh does not divide this model
            yield f"Moonlight {preset}, {name}", search_of(params, specs, mesh)


def less(search: Search) -> dict[str, float]:
    """The costs of what is found with less, relative to that of the search."""
    best = search.best().total
    greedy: dict[Any, Any] = {}
    for key in search.order:
        greedy[key] = min(
            search.options[key], key=lambda option: search.price({**greedy, key: option}).total
        )
    first, alone = search.starts()
    costs = {
        "greedy pass": search.price(greedy).total,
        "each group alone": search.price(alone).total,
        "first descent": search.descend(first).total,
        "second descent": search.descend(alone).total,
    }
    return {name: cost / best for name, cost in costs.items()}


@dataclasses.dataclass(frozen=True)
class Args:
    """Is the planner's search worth it?

    Attributes:
      output: the file that the figures are written to.
    """

    output: Path = Path("runs/benchmarks/plan_search.json")


def main(args: Args) -> dict[str, dict[str, float]]:
    """Print and write the costs."""
    console = make_console()
    rows = {
        name: less(search)
        for name, search in searches()
        if sum(len(options) > 1 for options in search.options.values()) > 1
    }
    table = Table(title=f"{len(rows)} plans of two groups or more", title_justify="left")
    for column in ("instead of both descents", "costs more in", "at most", "where"):
        table.add_column(column)
    for way in next(iter(rows.values())):
        more = {name: row[way] for name, row in rows.items() if row[way] > 1 + 1e-9}
        worst = max(more, key=lambda name: more[name], default="")
        table.add_row(way, f"{len(more)}", f"{more.get(worst, 1):.4f}x", worst)
    console.print(table)
    write_json(args.output, {"environment": environment("jax"), "costs": rows})
    console.print(f"written to {args.output}")
    return rows


if __name__ == "__main__":
    CommandLine("benchmarks.plan_search", Args, __doc__).run(main)
