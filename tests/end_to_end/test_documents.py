"""What documents show runs as it stands, and prints what they say; their links lead somewhere.

Every ``python`` block of a document is run by itself, in a namespace and a folder of its own. What it prints is the
``text`` block that follows it at once; without one, it prints nothing. Where it imports a package that this one
does not need, it runs in an interpreter of its own, and only where that is installed.
"""

import contextlib
import io
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from methods import slow_but
from programs import run_here

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "DOCUMENTATION.md")
OTHER_PACKAGES = ("lightning", "torchdyn")
"""Blocks with these run where they are installed."""
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


def others_of(block: Block) -> set[str]:
    """The packages that a block imports and this one does not need."""
    return set(re.findall(rf"^(?:import|from) ({'|'.join(OTHER_PACKAGES)})\b", block.code, flags=re.MULTILINE))


ALL_BLOCKS = {place: block for document in DOCUMENTS for place, block in blocks_of(document).items()}
BLOCKS = {place: block for place, block in ALL_BLOCKS.items() if not others_of(block)}


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


@pytest.mark.slow
@pytest.mark.parametrize("place", sorted(ALL_BLOCKS.keys() - BLOCKS.keys()))
def test_a_block_with_another_package_prints_what_is_said_where_that_is_installed(place: str, tmp_path: Path) -> None:
    block = ALL_BLOCKS[place]
    for package in others_of(block):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed, and nothing else needs it")
    done = subprocess.run(
        [sys.executable, "-c", block.code], cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == block.printed


def test_the_readme_is_read_in_ten_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.skipif(not (ROOT / ".ci").exists(), reason="a source distribution has neither .ci nor a list of its files")
def test_links_and_pictures_are_files_of_the_repository() -> None:
    assert "are as they should be" in run_here(ROOT / ".ci" / "documents.py")
