"""The plan of the package: its rooms, the direction of imports between them, and the private parts of the hosts."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import torchdiffeq_lmm

PACKAGE = torchdiffeq_lmm.__name__
FOLDER = Path(torchdiffeq_lmm.__file__).parent

# What a room may import besides itself.
ROOMS: dict[str, set[str]] = {
    "schemes": set(),
    "forward": {"schemes"},
    "filters": {"schemes"},
    "autodiff": {"schemes", "forward", "filters"},
    "hosts": {"schemes", "forward", "filters", "autodiff", "parameters"},
    "parameters": set(),
}
PRIVATE = ("torchdiffeq._impl", "torchsde._core", "torchsde.settings")
MAY_TOUCH_PRIVATE = {f"{PACKAGE}.hosts.torchdiffeq_host", f"{PACKAGE}.hosts.torchsde_host"}
MAX_ENTRIES = 8
MAX_LINES = 400


def _name_of(path: Path) -> str:
    parts = path.relative_to(FOLDER.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {_name_of(path): path for path in sorted(FOLDER.rglob("*.py"))}


def imports_in(source: str, package: str) -> Iterator[tuple[str, str]]:
    """Every import in a module that lies in `package`: as it is written, and the dotted name of what it brings in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield ast.unparse(node), alias.name
        elif isinstance(node, ast.ImportFrom):
            within = package.split(".")
            start = within[: len(within) + 1 - node.level] if node.level else []
            for alias in node.names:
                yield ast.unparse(node), ".".join([*start, *filter(None, [node.module]), alias.name])


def attributes_in(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def imports_of(module: str) -> Iterator[tuple[str, str]]:
    path = SOURCES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return imports_in(path.read_text(encoding="utf-8"), package)


def room_of(name: str) -> str:
    """The room that a dotted name within the package leads to; nothing for what lies at its top."""
    room = f"{name}.".split(".")[1]
    return room if room in ROOMS else ""


def is_within(name: str, place: str) -> bool:
    return f"{name}.".startswith(f"{place}.")


def module_of(name: str) -> str:
    """The module that a dotted name within the package is, or is found in."""
    return name if name in SOURCES else name.rpartition(".")[0]


@pytest.mark.parametrize(
    ("source", "package", "found"),
    [
        ("import torchsde._core.methods", "p.forward", ["torchsde._core.methods"]),
        ("from torchdiffeq._impl.odeint import SOLVERS", "p", ["torchdiffeq._impl.odeint.SOLVERS"]),
        ("from . import grid", "p.forward", ["p.forward.grid"]),
        ("from .grid import Grid, Jumps", "p.forward", ["p.forward.grid.Grid", "p.forward.grid.Jumps"]),
        ("from ..hosts import solver", "p.forward", ["p.hosts.solver"]),
        ("def f():\n    from .. import hosts", "p.forward", ["p.hosts"]),
        ("if TYPE_CHECKING:\n    import p.hosts as h", "p.forward", ["p.hosts"]),
    ],
)
def test_imports_are_found_wherever_and_however_they_are_written(source: str, package: str, found: list[str]) -> None:
    assert [name for _, name in imports_in(source, package)] == found


def test_the_package_has_the_rooms_of_the_table_and_few_entries() -> None:
    entries = {path.name for path in FOLDER.iterdir() if path.name != "__pycache__"}
    assert entries == {"__init__.py", "py.typed", *ROOMS}
    assert len(entries) <= MAX_ENTRIES


@pytest.mark.parametrize("module", [module for module in SOURCES if module != PACKAGE])
def test_imports_go_one_way(module: str) -> None:
    room = room_of(module)
    for written, name in imports_of(module):
        if is_within(name, PACKAGE):
            allowed = ROOMS[room] | {room}
            assert room_of(name) in allowed, f"{module} must not have `{written}`: {room} imports {sorted(allowed)}"


@pytest.mark.parametrize("module", [module for module in SOURCES if module not in MAY_TOUCH_PRIVATE])
def test_only_the_two_hosts_touch_private_parts(module: str) -> None:
    named = [*imports_of(module), *((name, name) for name in attributes_in(SOURCES[module].read_text("utf-8")))]
    for written, name in named:
        assert not any(is_within(name, private) for private in PRIVATE), f"{module} must not have `{written}`"


def test_the_two_hosts_are_what_touches_private_parts() -> None:
    for module in MAY_TOUCH_PRIVATE:
        assert any(is_within(name, private) for _, name in imports_of(module) for private in PRIVATE), module


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {
        module: {module_of(name) for _, name in imports_of(module) if is_within(name, PACKAGE)} for module in SOURCES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a cycle of imports: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("module", SOURCES)
def test_no_module_is_longer_than_is_read_in_one_go(module: str) -> None:
    lines = len(SOURCES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{module} has {lines} lines"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_imports_and_where_to_begin(room: str) -> None:
    said = ast.get_docstring(ast.parse((FOLDER / room / "__init__.py").read_text(encoding="utf-8"))) or ""
    allowed = ROOMS[room]
    if not allowed:
        imports = "nothing of the package"
    elif allowed == set(ROOMS) - {room}:
        imports = "all other rooms"
    else:
        imports = ", ".join(f"`{other}`" for other in ROOMS if other in allowed)
    assert f"Imports: {imports}." in said
    begin = said.partition("Begin with `")[2].partition("`")[0]
    assert f"{PACKAGE}.{room}.{begin}" in SOURCES, f"{room} says to begin with '{begin}'"
