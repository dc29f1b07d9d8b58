"""A notebook's cells, run from top to bottom by a kernel of their own."""

import base64
import io
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.image
import nbformat
import numpy as np
from nbclient import NotebookClient

from examples.colab.clean import FOLDER


class Executed(NamedTuple):
    """The outputs of each cell by the cell's id, and the variables that the test asked for."""

    outputs: dict[str, list]
    told: dict[str, Any]

    def said(self, cell: str) -> str:
        """What a cell printed, and the value of its last line."""
        return "".join(
            output.get("text", "") or output.get("data", {}).get("text/plain", "")
            for output in self.outputs[cell]
        )

    def errors(self) -> list[str]:
        """What all cells wrote to the standard error."""
        written = [output for outputs in self.outputs.values() for output in outputs]
        return [output.text for output in written if output.get("name") == "stderr"]

    def colours(self, cell: str) -> set[int]:
        """The colours of the picture that a cell drew, as 0xRRGGBB."""
        (picture,) = (o for o in self.outputs[cell] if o.output_type == "display_data")
        png = base64.b64decode(picture.data["image/png"])
        pixels = matplotlib.image.imread(io.BytesIO(png))
        assert pixels.shape[0] > 300 and pixels.shape[1] > 600
        colours = (pixels[..., :3] * 255).round().astype(int) @ np.array([1 << 16, 1 << 8, 1])
        return set(colours.ravel().tolist())


def execute(name: str, folder: Path, *, settings: str, tell: str, devices: int) -> Executed:
    """Runs a notebook with other settings, compiled quickly and not well.

    Args:
        name: Its file in `examples/colab`.
        folder: For what IPython writes.
        settings: Lines that change what its first cell has set.
        tell: A dict in Python that JSON can carry, of the notebook's variables at its end.
        devices: The number of virtual devices.
    """
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "IPYTHONDIR": str(folder / "ipython"),
    }
    notebook = nbformat.read(FOLDER / name, as_version=4)
    after = [cell.id for cell in notebook.cells].index("parameters") + 1
    notebook.cells.insert(after, nbformat.v4.new_code_cell(settings, id="settings"))
    tell = f"import json\nprint(json.dumps({tell}))"
    notebook.cells.append(nbformat.v4.new_code_cell(tell, id="tell"))
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=300, resources=resources).execute(env=environment)
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    return Executed(outputs, json.loads(outputs["tell"][0].text))
