"""What documents show runs as it stands, and prints what they say; their links lead somewhere.

Every ``python`` block of a document is run by itself, in a namespace and a folder of its own. What it prints is the
``text`` block that follows it at once; without one, it prints nothing.
"""

import contextlib
import io
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from methods import slow_but
from programs import run_here

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "DOCUMENTATION.md")
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n+```text\n(.*?)^```$)?", flags=re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A block of code, and what it is said to print."""

    code: str
    printed: str


def blocks_of(document: str) -> dict[str, Block]:
    """The blocks of a document, by the line in which each begins."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found = {}
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 2
        found[f"{document}:{line}"] = Block(match[1], match[2] or "")
    return found


BLOCKS = {place: block for document in DOCUMENTS for place, block in blocks_of(document).items()}


def test_no_block_is_overlooked() -> None:
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        assert set(re.findall(r"^ *```(.+)$", text, flags=re.MULTILINE)) <= {"python", "text", "sh"}, document
        code, printed = text.count("```python"), text.count("```text")
        assert code == len(blocks_of(document)) > 0, document
        assert printed == sum(bool(block.printed) for block in blocks_of(document).values()), document


def is_slow(block: Block) -> bool:
    """The adaptive solves of stiff problems take a second or two, and so does PyTorch to import what optimisers use."""
    return '"bdf"' in block.code or "torch.optim" in block.code


@pytest.mark.usefixtures("_method_tables")
@pytest.mark.parametrize("place", slow_but([place for place, block in BLOCKS.items() if not is_slow(block)], BLOCKS))
def test_a_block_runs_by_itself_and_prints_what_is_said(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    block, printed = BLOCKS[place], io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block.code, place, "exec"), {"__name__": "__main__"})
    assert printed.getvalue() == block.printed


def test_the_readme_is_read_in_ten_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.skipif(not (ROOT / ".ci").exists(), reason="a source distribution has neither .ci nor a list of its files")
def test_links_and_pictures_are_files_of_the_repository() -> None:
    assert "are as they should be" in run_here(ROOT / ".ci" / "documents.py")
