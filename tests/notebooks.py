"""Notebooks: run in a kernel of this interpreter, for tests; and to bring the outputs of a notebook up to date.

python tests/notebooks.py examples/demo.ipynb
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

KINDS = ("image/png", "text/plain")
"""What is kept of what a cell shows."""


def run(notebook: Any, folder: Path) -> None:
    """Run all cells, and keep their outputs.

    Args:
        notebook: as nbformat reads it.
        folder: an empty one, for what Jupyter writes; the cells run there.
    """
    from nbclient import NotebookClient

    # A kernel of this interpreter, whatever others are installed, without the user's own settings.
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel = folder / "kernels" / "here" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps({"argv": argv, "display_name": "here", "language": "python"}), encoding="utf-8")
    folders = {"JUPYTER_PATH": folder, "JUPYTER_RUNTIME_DIR": folder / "runtime", "IPYTHONDIR": folder / "settings"}
    with mock.patch.dict(os.environ, {name: str(path) for name, path in folders.items()} | {"OMP_NUM_THREADS": "1"}):
        resources = {"metadata": {"path": str(folder)}}
        client = NotebookClient(notebook, kernel_name="here", timeout=400, record_timing=False, resources=resources)
        client.execute()


def tidied(outputs: list[Any]) -> list[Any]:
    """The outputs of a cell, each stream in one piece, of progress bars the last state, of objects no HTML."""
    found: list[Any] = []
    for output in outputs:
        if "data" in output:
            output.data = {kind: shown for kind, shown in output.data.items() if kind in KINDS}
        if output.output_type == "stream" and found and found[-1].get("name") == output.name:
            found[-1].text += output.text
        else:
            found.append(output)
    for output in found:
        if output.output_type == "stream":
            output.text = "\n".join(line.rpartition("\r")[2] for line in output.text.split("\n"))
    return found


def main() -> None:
    """Run a notebook, and write it with its new outputs."""
    import nbformat

    path = Path(sys.argv[1])
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        run(notebook, Path(folder))
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = tidied(cell.outputs)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
