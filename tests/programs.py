"""Programs: examples, which are run in this interpreter, and what needs one of its own."""

import contextlib
import gc
import io
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_alone(*arguments: str | Path) -> str:
    """What Python prints, given these arguments, in an interpreter of its own, where a UserWarning is an error."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", *arguments],
        # As the tests themselves have it: the other core is in use.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


Changes = Callable[[dict[str, Any]], dict[str, Any]]
"""From the names of a program to those that are to mean something else."""


def run_here(program: Path, *arguments: str | Path, changed: Changes | None = None) -> str:
    """What a program prints, run in this interpreter: it saves the imports.

    Args:
        program: its file.
        arguments: of its command line.
        changed: what is to be other than in the program, to have less of what takes long.
    """
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [str(program), *map(str, arguments)]),
        mock.patch.object(sys, "path", [str(program.parent), *sys.path]),
        contextlib.redirect_stdout(printed),
    ):
        if changed is None:
            runpy.run_path(str(program), run_name="__main__")
        else:
            main = runpy.run_path(str(program))["main"]
            names = main.__globals__
            changes = changed(names)
            assert changes.keys() <= names.keys()
            names.update(changes)
            main()
    # What it imported would slow every later collection down.
    gc.collect()
    gc.freeze()
    return printed.getvalue()


def output_of(code: str) -> str:
    """What `code` prints in an interpreter of its own."""
    return run_alone("-c", code)


@contextlib.contextmanager
def coarse_pictures() -> Iterator[None]:
    """Write pictures with few pixels, whose panels nobody lays out, without ticks: it takes a fraction of the time."""
    from matplotlib.figure import Figure

    save = Figure.savefig

    def coarsely(figure: Figure, path: Path, **keywords: Any) -> None:
        figure.set_layout_engine("none")
        for axes in figure.axes:
            axes.set_axis_off()
        save(figure, path, **(keywords | {"dpi": 25, "pil_kwargs": {}}))

    with mock.patch.object(Figure, "savefig", coarsely):
        yield


def figures_of(
    example: str, output: Path, pictures: Sequence[str] = (), run: Callable[..., str] = run_here, **keywords: Any
) -> tuple[dict[str, Any], str]:
    """What an example finds in its quick mode, and what it prints; its pictures, one of its own name, must be there."""
    with coarse_pictures():
        printed = run(EXAMPLES / f"{example}.py", "--quick", "--output", output, **keywords)
    for picture in pictures or [example]:
        assert (output / f"{picture}.png").read_bytes().startswith(b"\x89PNG"), picture
    return json.loads((output / f"{example}.json").read_text(encoding="utf-8")), printed
