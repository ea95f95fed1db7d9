"""The rules of the house, proved by reading the source (nothing is imported): who may import whom,
what is pure, how large things may get, what must be documented.
"""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "raftfs").rglob("*.py"))
ALL = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "chaos").rglob("*.py"))]

GROUND = {"const", "errors", "units", "env", "log", "daemon"}
# Who may import whom: a package may import itself and what stands before its colon's right side.
MAY_IMPORT = {
    "ground": {"ground"},
    "wire": {"ground", "wire"},
    "conf": {"ground", "conf"},
    "client": {"ground", "wire", "conf", "client"},
    "meta": {"ground", "wire", "conf", "client", "meta"},
    "chunk": {"ground", "wire", "conf", "client", "chunk"},
    "mount": {"ground", "wire", "conf", "client", "mount"},
    "cli": {"ground", "wire", "conf", "client", "meta", "chunk", "mount", "cli"},
}
# Inside meta, from the bottom up; a module may import what stands before or with it.
META_ORDER = [
    "state", "plan", "rowcache", "store", "statefile", "image", "changelogfiles", "restore", "raft",
    "learner", "services", "master",
]
SERVICES = {
    "proposer", "sessions", "chunkhub", "grants", "healer", "goals", "membership", "service",
    "bootstrap", "stories", "explainer", "tickets",
}  # fmt: skip
# Third parties and the only places that may know them.
ROOMS = {
    "pysyncobj": ["raftfs/meta/raft/"],
    "lmdb": ["raftfs/meta/store.py", "raftfs/meta/statefile.py"],
    "pyfuse3": ["raftfs/mount/"],
    "aiohttp": ["raftfs/cli/monitor/"],
    "zstandard": ["raftfs/meta/raft/snapshot.py", "raftfs/meta/changelogfiles.py",
                  "raftfs/meta/learner/files.py"],
}
IMPURE = {
    "asyncio", "time", "random", "os", "socket", "threading", "structlog", "logging", "secrets",
    "datetime", "subprocess", "uuid", "pathlib", "io", "tempfile",
}  # fmt: skip
LINES_MAX, FUNCTION_MAX, METHODS_MAX, WIDTH_MAX = 800, 70, 35, 100


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _package(module: str) -> str:
    parts = module.split(".")
    if len(parts) < 2 or parts[1] == "__version__" or parts[1] in GROUND:
        return "ground"
    return parts[1]


def _own_package(path: Path) -> str:
    parts = path.relative_to(ROOT / "raftfs").with_suffix("").parts
    return "ground" if len(parts) == 1 else parts[0]


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_imports_run_one_way(path: Path) -> None:
    allowed = MAY_IMPORT[_own_package(path)]
    for module in _imports(path):
        if module.split(".")[0] == "raftfs":
            assert _package(module) in allowed, f"{_name(path)} must not import {module}"


def _meta_floor(parts: tuple[str, ...]) -> int:
    part = "services" if parts[0] in SERVICES else parts[0]
    return META_ORDER.index(part)


@pytest.mark.parametrize("path", sorted((ROOT / "raftfs/meta").rglob("*.py")), ids=_name)
def test_meta_is_built_from_the_bottom_up(path: Path) -> None:
    parts = path.relative_to(ROOT / "raftfs/meta").with_suffix("").parts
    if parts == ("__init__",):
        return
    for module in _imports(path):
        if module.startswith("raftfs.meta."):
            other = tuple(module.split(".")[2:])
            assert _meta_floor(other) <= _meta_floor(parts), f"{_name(path)} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_third_parties_stay_in_their_rooms(path: Path) -> None:
    for module in _imports(path):
        rooms = ROOMS.get(module.split(".")[0])
        if rooms is not None:
            assert any(_name(path).startswith(r) for r in rooms), f"{module} in {_name(path)}"


PURE = [*sorted((ROOT / "raftfs/meta/state").rglob("*.py")),
        *sorted((ROOT / "raftfs/meta/plan").rglob("*.py"))]  # fmt: skip


@pytest.mark.parametrize("path", PURE, ids=_name)
def test_state_and_plan_are_pure(path: Path) -> None:
    for module in _imports(path):
        assert module.split(".")[0] not in IMPURE, f"{_name(path)} imports {module}"
    for node in ast.walk(_tree(path)):
        assert not isinstance(node, ast.AsyncFunctionDef | ast.Await), f"{_name(path)} awaits"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("open", "print", "input"), f"{_name(path)} does I/O"


@pytest.mark.parametrize("path", sorted((ROOT / "chaos").rglob("*.py")), ids=_name)
def test_chaos_uses_the_product_from_outside(path: Path) -> None:
    assert not [m for m in _imports(path) if m.split(".")[0] == "raftfs"]


@pytest.mark.parametrize("path", ALL, ids=_name)
def test_sizes(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LINES_MAX, f"{_name(path)} has {len(lines)} lines"
    for number, line in enumerate(lines, 1):
        assert len(line) <= WIDTH_MAX, f"{_name(path)}:{number} has {len(line)} columns"
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            size = node.end_lineno - node.lineno + 1
            assert size <= FUNCTION_MAX, f"{_name(path)}: {node.name} has {size} lines"
        if isinstance(node, ast.ClassDef) and path in SOURCES:
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef)
                       and not n.name.startswith("_")]  # fmt: skip
            assert len(methods) <= METHODS_MAX, f"{_name(path)}: {node.name}"


def _public(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name.startswith("_"):
                continue
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and (
                        not inner.name.startswith("_")
                    ):
                        yield f"{node.name}.{inner.name}", inner


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_what_is_public_is_documented(path: Path) -> None:
    tree = _tree(path)
    assert ast.get_docstring(tree), f"{_name(path)} has no docstring"
    for name, node in _public(tree):
        # type: ignore[arg-type]
        assert ast.get_docstring(node), f"{_name(path)}: {name} has no docstring"


BANNED_WORDS = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_nothing_is_left_for_later_or_swallowed(path: Path) -> None:
    assert path.name not in ("utils.py", "helpers.py", "manager.py", "misc.py")
    found = BANNED_WORDS.search(path.read_text(encoding="utf-8"))
    assert found is None, f"{_name(path)}: {found}"
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{_name(path)}:{node.lineno}: bare except"
            broad = isinstance(node.type, ast.Name) and node.type.id in (
                "Exception", "BaseException",
            )  # fmt: skip
            swallowed = all(isinstance(n, ast.Pass) for n in node.body)
            assert not (broad and swallowed), f"{_name(path)}:{node.lineno}: swallowed"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_cancelling_is_never_lost(path: Path) -> None:
    """`asyncio.wait_for` of Python 3.11 forgets a cancellation that comes in the turn in which the
    wait ends; whoever cancelled then waits for ever. `asyncio.timeout` does not.
    """
    for node in ast.walk(_tree(path)):
        forgets = isinstance(node, ast.Attribute) and node.attr == "wait_for"
        assert not forgets, f"{_name(path)}: use asyncio.timeout"


def test_every_entry_point_exists() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for name, target in scripts.items():
        module, function = target.split(":")
        path = ROOT / (module.replace(".", "/") + ".py")
        assert path.exists(), f"{name}: {path} is missing"
        names = [n.name for n in _tree(path).body if isinstance(n, ast.FunctionDef)]
        assert function in names, f"{name}: {target}"


def test_dependencies_are_pinned_and_no_address_of_a_registry_is_named() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        assert "==" in line, f"{line} is not pinned"
    for path in ("pyproject.toml", "constraints.txt"):
        assert not re.search(r"https?://", (ROOT / path).read_text()), path
