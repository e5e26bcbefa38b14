"""Every link from a document to a file of this repository leads to one, also where a package index shows the README.

The repository's address is `url` in setup.cfg. README.md has absolute links alone, to pictures as they are (``raw``),
to all else as a page (``blob``). Other documents may have relative links. Links to other places are not followed.
"""

import posixpath
import re
import subprocess
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BRANCH = "main"
PICTURES = {".png"}


def tracked() -> set[str]:
    """The files of the repository."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.splitlines())


def links_of(text: str) -> list[str]:
    """The targets of all links and pictures outside of code."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\]\(([^()\s]+)\)", prose)


def anchors_of(text: str) -> set[str]:
    """The anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def problem_of(target: str, document: str, url: str, files: set[str]) -> str | None:
    """What is wrong with a link of a document; None if nothing is.

    Args:
        target: where the link leads, as it is written.
        document: the path of the document in the repository.
        url: the address of the repository.
        files: the paths of its files.
    """
    address, _, anchor = target.partition("#")
    if address.startswith(url + "/"):
        kind = "raw" if Path(address).suffix in PICTURES else "blob"
        start = f"{url}/{kind}/{BRANCH}/"
        if not address.startswith(start):
            return f"must begin with {start}"
        path = address.removeprefix(start)
    elif re.match(r"https?://", address):
        name = url.rpartition("/")[2]
        return f"must begin with {url}/" if re.search(rf"^https?://[^/]+/[^/]+/{name}(/|$)", address) else None
    elif not address:
        path = document
    elif document == "README.md":
        return f"must be absolute, beginning with {url}/"
    else:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(document), address))
    if path not in files:
        return "leads to no file of the repository"
    if anchor and anchor not in anchors_of((ROOT / path).read_text(encoding="utf-8")):
        return f"leads to no heading of {path}"
    return None


def main() -> None:
    """Check all documents."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    url, files = config["metadata"]["url"], tracked()
    count, problems = 0, []
    for document in sorted(path for path in files if path.endswith(".md")):
        for target in links_of((ROOT / document).read_text(encoding="utf-8")):
            problem = problem_of(target, document, url, files)
            count += 1
            if problem:
                problems.append(f"{document}: {target} {problem}")
    if problems:
        raise SystemExit("\n".join(problems))
    print(f"{count} links are as they should be")


main()
