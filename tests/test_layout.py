"""How large the parts of the code are, and that they import each other as docs/architecture.md says."""

import ast
import re
from pathlib import Path

import protoleak
import pytest

from . import ROOT

IGNORED = {"build", "dist", "runs", "venv"}
APART = ("tests", "benchmarks", "leakzoo", "wild")  # they use the package, and nothing in it uses them
MODULES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not any(part in IGNORED or part.startswith(".") for part in path.relative_to(ROOT).parts)
)
ROW = re.compile(r"^\| `([\w/]+)` \| .+ \|(.*)\|$", flags=re.MULTILINE)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


PACKAGE = [
    path for path in MODULES if path.relative_to(ROOT).parts[0] not in APART and path.stem != "__init__"
]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_and_no_function_is_long(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    functions = [
        n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def imports_of(path: Path) -> set[str]:
    """The package's modules that a module imports, anywhere in it but for type checking."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names if alias.name.startswith("protoleak.")}
        elif isinstance(node, ast.ImportFrom):
            package = ["protoleak", *path.relative_to(ROOT).parts[:-1]]
            start = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*start, *filter(None, [node.module])])
            if module == "protoleak":
                owners = (getattr(getattr(protoleak, a.name, None), "__module__", a.name) for a in node.names)
                modules |= {f"protoleak.{owner.removeprefix('protoleak.')}" for owner in owners}
            elif module.startswith("protoleak."):
                modules.add(module)
    return {module.removeprefix("protoleak.").replace(".", "/") for module in modules}


def documented_imports() -> dict[str, set[str]]:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    return {name: set(re.findall(r"`([\w/]+)`", imports)) for name, imports in ROW.findall(page)}


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_the_architecture_page_tells_what_a_module_imports(path):
    assert documented_imports().get(name_of(path)) == imports_of(path)


def test_the_architecture_page_goes_from_top_to_bottom():
    """A module stands below all that it imports, so nothing is imported in a circle."""
    above = set()
    for name, imports in documented_imports().items():
        assert imports <= above, f"{name} imports what stands below it"
        above.add(name)
    assert above == {name_of(path) for path in PACKAGE}


def test_what_the_hub_copies_imports_nothing_else():
    for path in ROOT.glob("*_protoleak.py"):
        assert all(re.fullmatch(r"\w+_protoleak", name) for name in imports_of(path)), path.name
