"""The rules of the house (CONTRIBUTING.md), read off the syntax tree of every module."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

# Rooms that a room may import; all but the tools leave the top level alone, which imports the backbones itself.
ROOMS = {
    "ops": {"ops"},
    "backbones": {"backbones", "ops"},
    "heads": {"heads", "backbones", "ops"},
    "configs": {"configs", "backbones", "ops"},
    "tools": {"tools", "heads", "configs", "backbones", "ops", "_version", "cli", ""},
}
# Installed with every subquad: by itself, or by torchvision (numpy, PIL) and timm (yaml).
ALWAYS_INSTALLED = {"torch", "torchvision", "timm", "safetensors", "huggingface_hub", "numpy", "PIL", "yaml"}
MAY_ASK_TRITON = (
    "subquad.ops._triton",  # facts about the installed triton
    "subquad.ops._compile",  # its cache, and processes that fill it
    "subquad.tools.benchmarks",  # its timer
)
REGISTERS_WITH_MMENGINE = "subquad.heads.openmmlab"  # names the extra itself, and is imported where it is used
EXEMPT_FROM_ALWAYS_INSTALLED = {
    "subquad._pytest_root": {"pytest"},  # a plugin that only pytest loads
}


@dataclass(frozen=True)
class Import:
    target: str
    line: int
    at_import: bool  # runs when the module is imported: neither in a function nor for type checkers only


@dataclass
class Module:
    name: str
    path: Path
    tree: ast.Module
    imports: list[Import] = field(default_factory=list)

    @property
    def room(self) -> str:
        return self.name.split(".")[1] if "." in self.name else ""


@pytest.fixture(scope="module")
def modules(root: Path, pyproject: dict[str, Any]) -> list[Module]:
    found = []
    for package in pyproject["tool"]["setuptools"]["packages"]:
        folder = root.joinpath(*package.split(".")[1:])
        for path in sorted(folder.glob("*.py")):
            name = package if path.stem == "__init__" else f"{package}.{path.stem}"
            found.append(Module(name, path, ast.parse(path.read_text(), str(path))))
    names = {module.name for module in found}
    for module in found:
        module.imports = list(_imports(module.tree, names, True))
    assert {"subquad", "subquad.cli", "subquad.ops.selective_scan"} <= names
    return found


def _imports(node: ast.AST, names: set[str], at_import: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, at_import) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = "." * child.level + (child.module or "")
            for alias in child.names:
                inner = f"{base}.{alias.name}"
                yield Import(inner if inner in names else base, child.lineno, at_import)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _imports(child, names, False)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from (Import(i.target, i.line, False) for i in _imports(child, names, False))
        else:
            yield from _imports(child, names, at_import)


def _fail_with(offences: list[str]) -> None:
    assert not offences, "\n" + "\n".join(offences)


def _top(target: str) -> str:
    return target.split(".")[0]


def test_imports_point_one_way(modules: list[Module]) -> None:
    offences = []
    for module in modules:
        for found in module.imports:
            if module.room in ROOMS and _top(found.target) == "subquad":
                room = found.target.split(".")[1] if "." in found.target else ""
                if room not in ROOMS[module.room]:
                    offences.append(f"{module.name}:{found.line} imports {found.target}")
    _fail_with(offences)


def test_imports_are_absolute(modules: list[Module]) -> None:
    _fail_with(
        [f"{m.name}:{i.line} imports {i.target}" for m in modules for i in m.imports if i.target.startswith(".")]
    )


def test_ops_import_torch_only(modules: list[Module]) -> None:
    allowed = {"subquad", "torch", "triton"} | sys.stdlib_module_names
    found = [(m, i) for m in modules if m.room == "ops" for i in m.imports]
    _fail_with([f"{m.name}:{i.line} imports {i.target}" for m, i in found if _top(i.target) not in allowed])


def _is_kernel_module(name: str) -> bool:
    """ops/<op>/triton_impl.py, what only it uses, and what several of them share: ops/_triton_<what>.py."""
    parts = name.split(".")
    if len(parts) == 3:
        return parts[1] == "ops" and parts[2].startswith("_triton_")
    return parts[1:2] == ["ops"] and len(parts) == 4 and parts[3].startswith(("triton_", "_"))


def test_only_kernels_import_triton(modules: list[Module]) -> None:
    offences = []
    for module in modules:
        for found in module.imports:
            lazily = not found.at_import and module.name.startswith(MAY_ASK_TRITON)
            if _top(found.target) == "triton" and not _is_kernel_module(module.name) and not lazily:
                offences.append(f"{module.name}:{found.line} imports {found.target}")
    _fail_with(offences)


def test_kernels_are_loaded_on_first_use(modules: list[Module]) -> None:
    kernels = {m.name for m in modules if any(_top(i.target) == "triton" and i.at_import for i in m.imports)}
    offences = [
        f"{module.name}:{found.line} imports {found.target}"
        for module in modules
        for found in module.imports
        if found.at_import and found.target in kernels and not _is_kernel_module(module.name)
    ]
    _fail_with(offences)


def _is_family(module: Module) -> bool:
    """A family states its default cfgs, which timm wants in the module that registers the models."""
    names = {n.id for node in module.tree.body for n in ast.walk(node) if isinstance(n, ast.Name)}
    return module.room == "backbones" and "default_cfgs" in names


def test_no_family_imports_another(modules: list[Module]) -> None:
    families = {module.name for module in modules if _is_family(module)}
    assert "subquad.backbones.vmamba" in families
    offences = [
        f"{module.name}:{found.line} imports {found.target}"
        for module in modules
        for found in module.imports
        if module.room == "backbones"
        and module.name not in ("subquad.backbones", "subquad.backbones.hosts")  # which import all to register them
        and any(found.target == name or found.target.startswith(f"{name}.") for name in families - {module.name})
    ]
    _fail_with(offences)


def test_optional_dependencies_are_imported_where_they_are_used(modules: list[Module]) -> None:
    offences = []
    for module in modules:
        allowed = {"subquad"} | ALWAYS_INSTALLED | sys.stdlib_module_names
        allowed |= EXEMPT_FROM_ALWAYS_INSTALLED.get(module.name, set())
        if _is_kernel_module(module.name):
            allowed |= {"triton"}
        if module.room == "tools":
            allowed |= {"tyro"}  # marks up the options; the command line, which imports these modules, needs it anyway
        inside = module.name.startswith(REGISTERS_WITH_MMENGINE)
        if inside:
            allowed |= {"mmengine"}
        for found in module.imports:
            needs_extra = found.target.startswith(REGISTERS_WITH_MMENGINE) and not inside
            if found.at_import and (_top(found.target) not in allowed or needs_extra):
                offences.append(f"{module.name}:{found.line} imports {found.target} at import")
    _fail_with(offences)


def test_backbones_leave_the_choice_of_an_implementation_to_the_ops(modules: list[Module]) -> None:
    offences = []
    for module in modules:
        if module.room != "backbones" or module.name == "subquad.backbones.weights":
            continue
        for found in module.imports:
            inner = found.target.split(".")[2:] if found.target.startswith("subquad.ops.") else []
            if any(part.startswith("_") or part.endswith("_impl") or part == "reference" for part in inner):
                offences.append(f"{module.name}:{found.line} imports {found.target}")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and node.attr in {"is_cuda", "environ", "getenv", "use_backend"}:
                offences.append(f"{module.name}:{node.lineno} uses .{node.attr}")
    _fail_with(offences)


def test_kernels_keep_to_what_every_supported_triton_has(modules: list[Module]) -> None:
    """triton 3.9 removed block pointers; libdevice does not exist in the interpreter."""
    banned = {"make_block_ptr", "advance", "libdevice"}
    offences = []
    for module in modules:
        if module.room != "ops":
            continue
        used = [(node.lineno, node.attr) for node in ast.walk(module.tree) if isinstance(node, ast.Attribute)]
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                words = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                used += [(node.lineno, part) for word in words for part in word.split(".")]
        offences += [f"{module.name}:{line} uses {name}" for line, name in used if name in banned]
    _fail_with(offences)


def test_public_functions_and_classes_are_documented(modules: list[Module]) -> None:
    """Methods that timm's contract names say what timm says; everything else that is public explains itself."""
    offences = []
    for module in modules:
        if ast.get_docstring(module.tree) is None:
            offences.append(f"{module.name} has no docstring")
        definitions = [node for node in module.tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        for node in definitions:
            if not node.name.startswith(("_", "pytest_")) and ast.get_docstring(node) is None:
                offences.append(f"{module.name}:{node.lineno} {node.name} has no docstring")
    _fail_with(offences)
