"""Takes from the notebooks what running them has left there.

    python -m examples.colab.clean

Outputs, execution counts and the metadata of whoever opened one last do not belong into git. What
stays is the text, the code, and what Jupyter and Colab need to know.
"""

from pathlib import Path
from typing import Any

import nbformat

FOLDER = Path(__file__).parent
NOTEBOOKS = tuple(sorted(FOLDER.glob("*.ipynb")))

# Colab opens these on a machine with a GPU; for the others a CPU is enough.
ON_A_GPU = ("train_moonlight.ipynb",)


def metadata(name: str) -> dict[str, Any]:
    """What the notebook in a file of this name tells Jupyter and Colab."""
    on_a_gpu = name in ON_A_GPU
    colab = {"name": name, "provenance": []} | ({"gpuType": "T4"} if on_a_gpu else {})
    return {
        **({"accelerator": "GPU"} if on_a_gpu else {}),
        "colab": colab,
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def clean(text: str, name: str) -> str:
    """A notebook without its results, in one canonical form.

    Args:
        text: The notebook as JSON, from Jupyter or from Colab.
        name: The name of its file.

    Raises:
        ValueError: It is not a notebook of format 4.
    """
    try:
        notebook = nbformat.reads(text, as_version=nbformat.NO_CONVERT)
        cells = notebook.cells
    except (nbformat.reader.NotJSONError, AttributeError, KeyError) as error:
        raise ValueError(f"not a notebook of format 4: {text[:80]!r}") from error
    # Colab writes format 4.0, which has no ids, and its own ones into the metadata.
    notebook.nbformat_minor = 5
    for number, cell in enumerate(cells):
        cell["id"] = cell.get("id") or cell.metadata.get("id") or f"cell-{number}"
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.metadata = metadata(name)
    return nbformat.writes(notebook) + "\n"


def main() -> None:
    """Cleans each notebook in its place."""
    for path in NOTEBOOKS:
        path.write_text(clean(path.read_text(encoding="utf-8"), path.name), encoding="utf-8")


if __name__ == "__main__":
    main()
