"""Takes from the notebook what running it has left there.

    python -m examples.colab.clean

Outputs, execution counts and the metadata of whoever opened it last do not belong into git. What
stays is the text, the code, and what Jupyter and Colab need to know.
"""

from pathlib import Path

import nbformat

NOTEBOOK = Path(__file__).parent / "train_moonlight.ipynb"

METADATA = {
    # Colab opens it on a machine with a GPU, and shows the name in its tab.
    "accelerator": "GPU",
    "colab": {"gpuType": "T4", "name": "train_moonlight.ipynb", "provenance": []},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def clean(text: str) -> str:
    """A notebook without its results, in one canonical form.

    Args:
        text: The notebook as JSON, from Jupyter or from Colab.

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
    notebook.metadata = METADATA
    return nbformat.writes(notebook) + "\n"


def main() -> None:
    """Cleans the notebook in its place."""
    NOTEBOOK.write_text(clean(NOTEBOOK.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
