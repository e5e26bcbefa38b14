"""The notebook for new users runs, and prints what is committed as its outputs."""

from pathlib import Path
from typing import Any

import notebooks
import pytest
from programs import EXAMPLES

nbformat = pytest.importorskip("nbformat", reason="the notebook is read by nbformat, of the extra 'test'")

NOTEBOOK = EXAMPLES / "demo.ipynb"
LARGEST = 400_000
"""Bytes of the file, with its pictures."""


def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(document: Any) -> list[Any]:
    return [cell for cell in document.cells if cell.cell_type == "code"]


def printed(cell: Any) -> str:
    """What a cell prints; not its progress bars, which tell the time, nor its pictures."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def pictures(cell: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def test_the_notebook_is_committed_as_it_ran_and_is_small() -> None:
    document = notebook()
    nbformat.validate(document)
    assert NOTEBOOK.stat().st_size < LARGEST
    cells = code_cells(document)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(map(pictures, cells)) == 6
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type in ("stream", "display_data", "execute_result")
            said = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
            assert "Warning" not in said
            assert not any(mark in said for mark in ("site-packages", str(EXAMPLES.parent), "/home/", "/tmp/", ":\\"))


@pytest.mark.slow
def test_the_notebook_prints_what_is_committed(tmp_path: Path) -> None:
    reason = "the notebook is run by nbclient and ipykernel, of the extra 'test'"
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package, reason=reason)
    document = notebook()
    expected = [(printed(cell), pictures(cell)) for cell in code_cells(document)]
    notebooks.run(document, tmp_path)
    for cell, (text, count) in zip(code_cells(document), expected, strict=True):
        assert printed(cell) == text, cell.source
        assert pictures(cell) == count, cell.source
