"""Who imports whom, read from the sources: nothing in a circle, and no arrow up."""

import ast
import functools
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("muon_jax", "examples", "benchmarks")

# The library's story begins with one matrix after the other, and knows of no mesh there.
KERNEL = (
    *("_polynomials", "_products", "_processor", "_transposition", "_symmetric"),
    *("_arithmetic", "_preconditioning"),
    "_newton_schulz",
    *("_matrices", "_orthogonalize", "_scaling", "_momentum", "_update_rule", "_batching"),
    "_routes",
)

# Lowest first: a module imports from its own layer and those before it. A name stands for itself
# and for what is below it; the longest that fits counts.
LAYERS = (
    ("muon_jax._common",),
    tuple(f"muon_jax.{name}" for name in KERNEL),
    ("muon_jax._mesh.specs",),
    ("muon_jax._attention",),
    ("muon_jax._routing",),
    ("muon_jax._mesh",),
    ("muon_jax",),
    ("examples", "examples.xla_flags", "examples.one_thread", "examples.colours"),
    ("examples.moonlight", "examples.moonlight.common"),
    ("examples.moonlight.schedule", "examples.moonlight.model.execution"),
    ("examples.moonlight.model", "examples.moonlight.data"),
    ("examples.moonlight.huggingface", "examples.moonlight.run_folder"),
    ("examples.moonlight.generation",),
    ("examples.moonlight.training",),
    tuple(
        f"examples.moonlight.{program}"
        for program in ("train", "stages", "generate", "hf_check", "hf_export")
    ),
    ("examples.scaling_law", "examples.colab", "examples.minimal", "examples.finetune"),
    ("benchmarks",),
)
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}


@functools.cache
def imports() -> dict[str, set[str]]:
    """Each module, with those of ours that it names anywhere, for types alone as well."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
    }
    return {
        module: {name for name in _named(path, set(paths)) if name in paths} - {module}
        for module, path in paths.items()
    }


def _named(path: Path, modules: set[str]) -> set[str]:
    named = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            named |= (inner & modules) or {node.module}
    return named


def layer(module: str) -> int:
    """The layer of a module: that of its longest parent that has one."""
    while module not in LAYER_OF:
        module = module.rpartition(".")[0]
    return LAYER_OF[module]


def test_nothing_imports_itself_by_a_detour():
    # Raises CycleError, which shows the circle.
    assert len(list(graphlib.TopologicalSorter(imports()).static_order())) == len(imports())


def test_no_arrow_goes_up():
    up = {f"{a} -> {b}" for a, bs in imports().items() for b in bs if layer(b) > layer(a)}
    assert not up


def test_every_layer_is_there():
    assert LAYER_OF.keys() <= imports().keys()


@pytest.mark.parametrize("room", ["_common", "_attention", "_routing", "_mesh", "_planning"])
def test_a_room_has_a_map_of_its_modules(room):
    folder = ROOT / "muon_jax" / room
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    inside = {path.stem for path in folder.iterdir() if path.suffix == ".py"} - {"__init__"}
    missing = {name for name in inside if not re.search(rf"\b{name}\b", text)}
    assert not missing


def test_examples_use_what_the_library_exports():
    inside = {
        f"{module} -> {name}"
        for module, names in imports().items()
        for name in names
        if module.startswith("examples.") and name.startswith("muon_jax.")
    }
    assert not inside


def test_programs_start_without_what_they_need_later_or_never():
    heavy = ("matplotlib", "tensorboardX", "torch", "transformers", "scipy.optimize", "pandas")
    programs = ("moonlight.train", "moonlight.generate", "moonlight.hf_export", "finetune.sft")
    program = "import sys, " + ", ".join(f"examples.{name}" for name in programs)
    program += f"\nprint(*(name for name in {heavy} if name in sys.modules))"
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ended.stdout.split() == []
