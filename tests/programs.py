"""Programs that need a Python interpreter of their own."""

import subprocess
import sys


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
