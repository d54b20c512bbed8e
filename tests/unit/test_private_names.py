"""Which private names of libraries the package uses, and where: they move without notice, so they
are kept in few files.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "promoe_ds"
TREES = {
    file.relative_to(PACKAGE).as_posix(): ast.parse(file.read_text(encoding="utf-8"))
    for file in sorted(PACKAGE.rglob("*.py"))
}
LIBRARIES = {"torch", "deepspeed", "megatron", "transformer_engine", "diffusers"}
#: Files that are there to hold such names.
CORNERS = "*_private.py"
#: The other files, each with the names that it uses and no more, and why they are there.
ALLOWED = {
    # Diffusers' protocol for pipelines: where to compute, whatever its offloading hooks do.
    "pipeline/pipeline.py": {"_execution_device", "_hf_hook"},
}
_PRIVATE = re.compile(r"_[A-Za-z]\w*")


def own_names(tree: ast.AST) -> Iterator[str]:
    """Yield what a file defines: functions, classes, variables, arguments, attributes of `self`."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.arg():
                yield node.arg
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(
                ast.Name("self" | "cls"), name, ast.Store()
            ):
                yield name


def roots(tree: ast.AST) -> dict[str, bool]:
    """Return the names that imports bind, and whether they come from one of the libraries."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            for alias in node.names:
                bound = alias.asname or alias.name.split(".")[0]
                found[bound] = (module or alias.name).split(".")[0] in LIBRARIES
    return found


def private_names(tree: ast.AST, own: set[str]) -> set[str]:
    """Return the private names of libraries that a file uses; `own` are the names that the package
    defines.
    """
    imported, found = roots(tree), set()
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                used = [
                    part
                    for alias in names
                    for part in alias.name.split(".")
                    if alias.name.split(".")[0] in LIBRARIES
                ]
            case ast.ImportFrom(str(module), names) if module.split(".")[0] in LIBRARIES:
                used = [*module.split("."), *(alias.name for alias in names)]
            case ast.Attribute(base, name, context):
                while isinstance(base, ast.Attribute):
                    base = base.value
                root = base.id if isinstance(base, ast.Name) else ""
                is_own = name in own and (root in ("self", "cls") or isinstance(context, ast.Load))
                is_super = isinstance(base, ast.Call) and ast.unparse(base.func) == "super"
                used = [name] if imported.get(root, not is_own or is_super) else []
            case ast.Call(
                ast.Name("getattr" | "setattr" | "hasattr" | "delattr"),
                [_, ast.Constant(str(name)), *_],
            ):
                used = [] if name in own else [name]
            case _:
                continue
        found |= {name for name in used if _PRIVATE.fullmatch(name)}
    return found


def test_private_names_of_libraries_are_those_allowed() -> None:
    own = {name for tree in TREES.values() for name in own_names(tree)}
    found = {
        path: names
        for path, tree in TREES.items()
        if not fnmatch(path, CORNERS) and (names := private_names(tree, own))
    }
    assert found == ALLOWED, (
        f"keep private names of libraries in {CORNERS}, with a check of each at start-up"
    )


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch._dynamo", {"_dynamo"}),
        ("from torch._subclasses.fake_tensor import FakeTensorMode", {"_subclasses"}),
        ("from deepspeed.utils import _mine", {"_mine"}),
        ("from deepspeed.utils import groups\ngroups._mine", {"_mine"}),
        ("import torch\ntorch.ops.aten._thing", {"_thing"}),
        ("engine._thing()", {"_thing"}),
        ("engine._mine = None", {"_mine"}),
        ("self._thing", {"_thing"}),
        ("super()._mine(1)", {"_mine"}),
        ("getattr(engine, '_thing')", {"_thing"}),
        (
            (
                "import os\nos._exit(1)\nself._mine\nother._mine\nx.__dict__\ngetattr(x,"
                " '_mine')\nfor _ in (): ..."
            ),
            set(),
        ),
    ],
)
def test_private_names_are_found(source, names) -> None:
    assert private_names(ast.parse(source), {"_mine"}) == names
