"""What each preset trains with, for the help."""

from rich import box
from rich.table import Table

from examples.moonlight.huggingface.names import extent
from examples.moonlight.model.config import PRESETS
from examples.moonlight.schedule.recipe import RECIPES, Recipe

# Options that the preset decides where they are left out; the others of a recipe are None in all.
LEFT_OUT = {
    name: "by preset, see below"
    for name in Recipe._fields
    if any(getattr(recipe, name) is not None for recipe in RECIPES.values())
}


def preset_table() -> Table:
    """The model of each preset, and its recipe."""
    table = Table(title="what a preset trains with", title_justify="left", box=box.SIMPLE)
    table.add_column()
    for name in RECIPES:
        table.add_column(name, justify="right")
    parameters = (_shown(extent(PRESETS[name]).numbers) for name in RECIPES)
    table.add_row("parameters, at most", *parameters)
    for field in LEFT_OUT:
        values = (getattr(recipe, field) for recipe in RECIPES.values())
        table.add_row(f"--{field.replace('_', '-')}", *map(_shown, values))
    table.add_row("optimizer steps, at least", *(f"{x.steps:,}" for x in RECIPES.values()))
    return table


def _shown(value: object) -> str:
    """A number as short as a column is narrow: 163.8M."""
    if not isinstance(value, int) or value < 10**6:
        return f"{value:,}" if isinstance(value, int) else str(value)
    power, unit = next((p, u) for p, u in ((12, "T"), (9, "B"), (6, "M")) if value >= 10**p)
    return f"{value / 10**power:.4g}{unit}"
