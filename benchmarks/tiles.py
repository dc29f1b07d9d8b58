"""Which cuts a TPU's reduce-scatter takes as they are: `python -m benchmarks.tiles`.

A gradient of rows by columns, a product that is summed over the eight chips of a v5e, is cut along
its rows or its columns and kept with that dimension along the sublanes of its tiles, or along the
lanes. The bytes that the compiled program sends are shown relative to those that the elements need,
beside the rule that `muon_jax._mesh.tiles` made of such tables. Nothing is run: see
`benchmarks.targets` for the compiler.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.table import Table

from benchmarks import hlo, targets
from benchmarks.harness import environment, make_console, write_json
from examples.moonlight.common.command_line import CommandLine
from muon_jax._mesh.tiles import scatter_waste

TARGET = targets.TARGETS["v5e-8"]
SHAPES = (
    *((768, 768), (768, 3072), (896, 4864), (2048, 1408), (640, 640), (640, 1728), (672, 672)),
    *((672, 1792), (704, 704), (704, 1864), (2048, 2048), (2048, 2816), (2048, 5632)),
)
TOLERANCE = 0.002


@dataclasses.dataclass(frozen=True)
class Args:
    """What a reduce-scatter sends on eight TPU chips, by the shape that is cut.

    Attributes:
      shapes: rows and columns of the gradients.
      output: where the JSON goes.
    """

    shapes: tuple[tuple[int, int], ...] = SHAPES
    output: Path = Path("runs/benchmarks/tiles.json")


def sent(shape: tuple[int, int], dim: int, minor: int, mesh: Mesh) -> float:
    """Bytes sent for a gradient that is cut along `dim`, relative to those of its elements."""
    sides = [
        jax.ShapeDtypeStruct((8 * mesh.size, n), jnp.float32, sharding=NamedSharding(mesh, P("x")))
        for n in shape
    ]
    spec = P("x") if dim == 0 else P(None, "x")

    def on_device(shard: jax.Array) -> jax.Array:
        return 2 * with_layout_constraint(shard, Layout((1 - minor, minor)))

    def gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec)(x.T @ dy)

    text = jax.jit(gradient).lower(*sides).compile().as_text() or ""
    needed = 4 * shape[0] * shape[1] * (mesh.size - 1) / mesh.size
    return sum(collective.wire_bytes for collective in hlo.collectives(text)) / needed


def main(args: Args) -> list[dict[str, Any]]:
    """Compile, print the table, write the JSON."""
    console, rows = make_console(), []
    mesh = targets.make_mesh(TARGET, TARGET.mesh, ("x",))
    title = f"Bytes of a reduce-scatter, to its elements',\n{targets.compiler(TARGET)}"
    table = Table(title=title, title_justify="left")
    for column in ("gradient", "cut", "a shard", "sublanes", "lanes", "the rule", ""):
        table.add_column(column, justify="right")
    for shape in args.shapes:
        for dim in range(2):
            if shape[dim] % mesh.size:
                continue
            shard, name = shape[dim] // mesh.size, ("rows", "columns")[dim]
            with console.status(f"{shape[0]}x{shape[1]} cut along its {name}"):
                sublanes, lanes = (sent(shape, dim, minor, mesh) for minor in (1 - dim, dim))
            rule = scatter_waste(shard, shape[1 - dim])
            holds = abs(min(sublanes, lanes) - rule) < TOLERANCE
            figures = [f"{x:.3f}" for x in (sublanes, lanes, rule)]
            mark = "[green]✓[/green]" if holds else "[red]✗[/red]"
            table.add_row(f"{shape[0]}x{shape[1]}", name, str(shard), *figures, mark)
            fields = {"shape": shape, "cut": name, "shard": shard, "holds": holds}
            rows.append(fields | {"sublanes": sublanes, "lanes": lanes, "rule": rule})
    console.print(table)
    record = {"environment": environment("jax", "jaxlib") | targets.compiler_versions()}
    write_json(args.output, record | {"rows": rows})
    console.print(f"written to {args.output}")
    return rows


def start(arguments: Args) -> None:
    """Runs `main` in a process whose JAX compiles for the target."""
    if reason := targets.missing(TARGET):
        raise SystemExit(f"{TARGET.name} {reason}")
    variables = targets.environment(TARGET)
    if variables.items() - os.environ.items():  # the compiler reads them when JAX starts
        command = [sys.executable, "-m", "benchmarks.tiles", *sys.argv[1:]]
        os.execve(sys.executable, command, variables)
    main(arguments)


if __name__ == "__main__":
    CommandLine("benchmarks.tiles", Args, __doc__).run(start)
