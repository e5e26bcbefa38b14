"""What documents say of files holds: every link leads to one, and the table of rooms has all of the package.

Nothing is left where no reader comes: some document links to every other, but for the README, and shows every picture.

The repository's address is `url` in setup.cfg. README.md, which package indexes show as well, has absolute links alone,
to pictures as they are (``raw``), to all else as a page (``blob``). Other documents may have relative links. Links to
other places are not followed. CONTRIBUTING.md has a table with a row for every room, which ends with its modules.
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


def path_of(target: str, document: str, url: str) -> str:
    """The path in the repository of what a link of a document leads to; empty where it leads out of it."""
    address = target.partition("#")[0]
    if address.startswith(url + "/"):
        return re.sub(rf"^{re.escape(url)}/(raw|blob)/{BRANCH}/", "", address)
    if re.match(r"https?://", address):
        return ""
    return posixpath.normpath(posixpath.join(posixpath.dirname(document), address)) if address else document


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
    elif re.match(r"https?://", address):
        name = url.rpartition("/")[2]
        return f"must begin with {url}/" if re.search(rf"^https?://[^/]+/[^/]+/{name}(/|$)", address) else None
    elif address and document == "README.md":
        return f"must be absolute, beginning with {url}/"
    path = path_of(target, document, url)
    if path not in files:
        return "leads to no file of the repository"
    if anchor and anchor not in anchors_of((ROOT / path).read_text(encoding="utf-8")):
        return f"leads to no heading of {path}"
    return None


def rooms_of(files: set[str]) -> dict[str, set[str]]:
    """The modules of every room of the package."""
    found: dict[str, set[str]] = {}
    for path in files:
        match = re.fullmatch(r"torchdiffeq_lmm/(\w+)/(\w+)\.py", path)
        if match and match[2] != "__init__":
            found.setdefault(match[1], set()).add(match[2])
    return found


def table_of(text: str) -> dict[str, set[str]]:
    """The modules of every room, as the rows of a table name them."""
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", text, flags=re.MULTILINE)
    return {room: set(re.findall(r"`(\w+)`", modules)) for room, modules in rows}


def main() -> None:
    """Check all documents."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    url, files = config["metadata"]["url"], tracked()
    count, problems = 0, []
    linked = {"README.md"}
    for document in sorted(path for path in files if path.endswith(".md")):
        for target in links_of((ROOT / document).read_text(encoding="utf-8")):
            problem = problem_of(target, document, url, files)
            count += 1
            if path_of(target, document, url) != document:
                linked.add(path_of(target, document, url))
            if problem:
                problems.append(f"{document}: {target} {problem}")
    readable = {path for path in files if path.endswith(".md") or Path(path).suffix in PICTURES}
    problems += [f"{path}: no document links to it" for path in sorted(readable - linked)]
    rooms, table = rooms_of(files), table_of((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    for room in sorted(rooms.keys() | table.keys()):
        differ = sorted(rooms.get(room, set()) ^ table.get(room, set()))
        problems += [
            f"CONTRIBUTING.md: the table of rooms and the package differ in {room}/{name}.py" for name in differ
        ]
    if problems:
        raise SystemExit("\n".join(problems))
    print(f"{count} links and {len(table)} rooms are as they should be")


main()
