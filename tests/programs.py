"""Programs that need a Python interpreter of their own."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"


def output_of(code: str) -> str:
    """What `code` prints in an interpreter of its own, where a UserWarning is an error."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def figures_of(example: str, output: Path, pictures: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """What an example finds in its quick mode, and what it prints; its pictures, one of its own name, must be there."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{example}.py", "--quick", "--output", output],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for picture in pictures or [example]:
        assert (output / f"{picture}.png").read_bytes().startswith(b"\x89PNG"), picture
    return json.loads((output / f"{example}.json").read_text(encoding="utf-8")), done.stdout
