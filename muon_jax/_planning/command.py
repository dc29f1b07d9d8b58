"""The command line of ``python -m muon_jax``.

It is argparse's and prints plain text: the library depends on jax, optax and jaxtyping alone, and a
report that may go to a file needs no more.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax

from muon_jax._planning.hugging_face import is_hugging_face, read_hugging_face
from muon_jax._planning.model_report import ModelReport, model_report
from muon_jax._planning.orbax import is_orbax, read_orbax
from muon_jax._planning.tensors import Model
from muon_jax._planning.words import (
    in_words,
    read_adam,
    read_mesh,
    read_muon,
    read_pattern,
    read_spec,
)

_EXAMPLES = """\
examples:
  python -m muon_jax report models/Moonlight-16B-A3B --mesh data=8,fsdp=4
  python -m muon_jax report checkpoints/1000 --mesh data=64,expert=4 \\
      --param-spec 'experts=expert,-,-' --adam router
  python -m muon_jax report models/Qwen2.5-7B --mesh fsdp=8 --json > plan.json
"""

_MODEL = """\
Tensors are taken one by one as they lie on disk. A Hugging Face directory keeps
layers and experts apart, and matrices as [out, in]; a program that stacks them has
fewer leaves, and the same matrices. Parameters count in float32, as they should be
trained, whatever they have on disk.
"""


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    root = argparse.ArgumentParser(
        prog="python -m muon_jax",
        description="Muon for JAX. See 'python -m muon_jax report --help'.",
    )
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True)
    report = commands.add_parser(
        "report",
        help="what Muon would do with a model on a mesh: routing, plan, bytes, FLOPs",
        description=(
            "What Muon would do with a model: which parameters go to it and why, which device\n"
            "orthogonalizes what, the state on each device, and what a step sends and computes.\n"
            "Shapes are all that is read, and no accelerator is used."
        ),
        epilog=f"{_MODEL}\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument(
        "model", metavar="PATH", help="a Hugging Face directory, or an Orbax checkpoint"
    )
    report.add_argument("--json", action="store_true", help="print JSON, every parameter by itself")
    report.add_argument(
        "--subtree",
        metavar="PATH",
        help="the parameters in an Orbax tree, such as state/params (default: what is called "
        "params or model in it)",
    )

    mesh = report.add_argument_group("the mesh")
    mesh.add_argument(
        "--mesh",
        default="data=1",
        metavar="AXIS=N,...",
        help="the length of each axis (default: one device). An axis called fsdp shards the "
        "longest dimension of each matrix that it divides; all others hold copies of the "
        "parameters, unless --param-spec says otherwise",
    )
    mesh.add_argument(
        "--param-spec",
        action="append",
        default=[],
        metavar="REGEX=AXIS,...",
        help="where the parameters lie whose names it finds: for each dimension a mesh axis, or -, "
        "or several as data+fsdp; the first that finds a name decides",
    )
    mesh.add_argument(
        "--zero1-axes",
        metavar="AXIS,...",
        help="the mesh axes that shard the optimizer's state (default: all)",
    )

    routing = report.add_argument_group("routing", "the first pattern that finds a name decides")
    routing.add_argument(
        "--muon",
        dest="rules",
        action="append",
        default=[],
        type=lambda text: ("--muon", text),
        metavar="REGEX[=IN>OUT]",
        help="these are Muon's: matrices of the last two axes, or of those that are named, as in "
        "'mixer=0>1,2'",
    )
    routing.add_argument(
        "--adam",
        dest="rules",
        action="append",
        type=lambda text: ("--adam", text),
        metavar="REGEX",
        help="these are AdamW's",
    )
    routing.add_argument("--frozen", metavar="REGEX", help="these are not trained")

    numbers = report.add_argument_group("dtypes")
    numbers.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="the parameters and their gradients in training (default: float32)",
    )
    numbers.add_argument(
        "--mu-dtype",
        choices=("float32", "bfloat16"),
        help="Muon's momentum and AdamW's first moment (default: the parameters')",
    )
    return root


def read_model(path: Path, subtree: str | None) -> Model:
    """A model's shapes, from whatever holds it.

    Raises:
      ValueError, OSError, ModuleNotFoundError: for what is neither kind, or cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if is_hugging_face(path):
        if subtree is not None:
            raise ValueError(f"--subtree is for Orbax checkpoints; {path} is none.")
        return read_hugging_face(path)
    if is_orbax(path):
        return read_orbax(path, subtree)
    raise ValueError(
        f"{path} is neither a Hugging Face directory (it has no config.json and no *.safetensors) "
        "nor an Orbax checkpoint (no _METADATA in it, or a few folders below)."
    )


def report_of(arguments: argparse.Namespace) -> ModelReport:
    """The report that the arguments ask for."""
    mesh = in_words("--mesh", read_mesh, arguments.mesh)
    readers = {"--muon": read_muon, "--adam": read_adam}
    rules = [in_words(flag, readers[flag], text) for flag, text in arguments.rules]
    specs = [in_words("--param-spec", read_spec, text) for text in arguments.param_spec]
    if arguments.frozen is not None:
        in_words("--frozen", read_pattern, arguments.frozen)
    model = read_model(Path(arguments.model), arguments.subtree)
    try:
        return model_report(
            Path(arguments.model).name or arguments.model,
            model,
            mesh,
            rules=rules,
            specs=specs,
            frozen=arguments.frozen,
            dtype=arguments.dtype,
            mu_dtype=arguments.mu_dtype,
            zero1_axes=arguments.zero1_axes and arguments.zero1_axes.split(","),
        )
    except ValueError as error:
        if "cannot be known" not in str(error):
            raise
        raise ValueError(
            f"{error}\nHere the same is written --muon 'REGEX=IN>OUT', with the axes' numbers, or "
            "--adam 'REGEX'."
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0, or 1 behind a mistake in words."""
    given = parser().parse_args(arguments)
    # A report is no reason to take hold of an accelerator, which one process can have at a time.
    jax.config.update("jax_platforms", "cpu")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = report_of(given)
        print(json.dumps(report.as_json(), indent=1) if given.json else report)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for warning in caught:
        if warning.category is UserWarning:
            print(f"warning: {warning.message}", file=sys.stderr)
    return 0
