"""The one-way street, read from the sources: who imports whom, and the limits that keep files readable."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = {
    "lowrank_ops": ROOT / "lowrank_ops",
    "lowrank_ops.kernels": ROOT / "kernels",
}
FOLDERS = ["lowrank_ops", "kernels", "benchmarks", "examples", "tests"]
EVERY_FILE = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
# the left end of the street: what a user chooses and holds
LEFT = [f"lowrank_ops.{name}" for name in ("config", "layers", "methods", "inject")]
BROAD = ("everything", "Exception", "BaseException")


def shipped_modules() -> dict[str, Path]:
    """Map the import name of every shipped module to its file."""
    modules = {}
    for package, folder in SHIPPED.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            modules[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return modules


MODULES = shipped_modules()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(module: str) -> set[str]:
    """Return the absolute name of everything that a module imports, inside functions too."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            # a submodule if there is one of that name, else a name inside the module
            found |= {name if (name := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
    return found


def own(module: str) -> set[str]:
    return {name for name in imports(module) if name.split(".")[0] == "lowrank_ops"}


def foreign(module: str) -> set[str]:
    return {name.split(".")[0] for name in imports(module) - own(module)} - set(sys.stdlib_module_names)


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


KERNELS = sorted(name for name in MODULES if is_in(name, "lowrank_ops.kernels"))
OTHERS = sorted(set(MODULES) - set(KERNELS))


@pytest.mark.parametrize("stop", ["functional", "ops", "kernels", "reference"])
def test_the_street_has_its_stops(stop):
    assert f"lowrank_ops.{stop}" in MODULES


@pytest.mark.parametrize("module", KERNELS)
def test_kernels_import_torch_triton_and_each_other(module):
    assert foreign(module) <= {"torch", "triton"}
    assert all(is_in(name, "lowrank_ops.kernels") for name in own(module))


@pytest.mark.parametrize("module", [name for name in OTHERS if is_in(name, "lowrank_ops.reference")])
def test_reference_imports_torch_only(module):
    assert foreign(module) <= {"torch"}
    assert all(is_in(name, "lowrank_ops.reference") for name in own(module))


@pytest.mark.parametrize("module", [name for name in OTHERS if name != "lowrank_ops.functional"])
def test_only_functional_imports_kernels(module):
    assert not [name for name in own(module) if is_in(name, "lowrank_ops.kernels")]
    assert "triton" not in foreign(module)


def test_functional_imports_kernels_inside_a_function():
    top_level = parse(MODULES["lowrank_ops.functional"]).body
    assert "lowrank_ops.kernels" in own("lowrank_ops.functional")
    assert not any(
        alias.name == "kernels" or getattr(node, "module", None) == "kernels"
        for node in top_level
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    )


@pytest.mark.parametrize("module", [name for name in OTHERS if is_in(name, "lowrank_ops.ops")])
def test_ops_import_nothing_to_their_left(module):
    for name in own(module):
        assert name not in ("lowrank_ops", "lowrank_ops.functional", *LEFT)


def test_functional_imports_nothing_to_its_left():
    for name in own("lowrank_ops.functional"):
        assert name != "lowrank_ops"
        assert not any(is_in(name, left) for left in LEFT)


def test_no_module_imports_itself_in_a_circle():
    graph = {name: own(name) & set(MODULES) - {name, "lowrank_ops"} for name in MODULES}
    while leaves := {name for name, targets in graph.items() if not targets & set(graph)}:
        graph = {name: targets for name, targets in graph.items() if name not in leaves}
    assert not graph, f"imports run in a circle among {sorted(graph)}"


@pytest.mark.parametrize("path", EVERY_FILE, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_imports_the_top_level_name_kernels(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if is_in(alias.name, "kernels")]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert not is_in(node.module, "kernels")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_shipped_code_has_no_assert_and_no_broad_except(module):
    for node in ast.walk(parse(MODULES[module])):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: assert vanishes under python -O"
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in BROAD, f"line {node.lineno}: catches {caught}"


@pytest.mark.parametrize("path", EVERY_FILE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_has_at_most_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def code_lines(function: ast.FunctionDef) -> int:
    """Count the lines of a function from ``def`` to its end, without its docstring."""
    first = function.body[0]
    has_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = first.end_lineno - first.lineno + 1 if has_docstring else 0
    return function.end_lineno - function.lineno + 1 - docstring


@pytest.mark.parametrize("path", EVERY_FILE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_function_has_at_most_40_lines_and_a_kernel_80(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    for node in ast.walk(parse(path)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        is_kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        if "# long: " not in lines[node.lineno - 1]:
            assert code_lines(node) <= (80 if is_kernel else 40), f"line {node.lineno}: {node.name}"
