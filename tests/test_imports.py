"""Who may import whom, and what nobody may do: read from the source, nothing is run.

Every package of shoestring stands on a level and imports only from lower ones (or from itself).
The checks are functions of a file's text, so that each is also shown to catch what it forbids.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "shoestring"
LEVELS = [
    {"errors", "units", "allocator", "cgroups", "effort", "ops", "quiet", "rows"},
    {
        "stack",
        "meter",
        "rss",
        "tape",
        "saved",
        "spill",
        "rules",
        "streams",
        "branches",
        "conversion",
        "mapped",
    },
    {"methods", "precision", "models", "objectives", "optim", "data"},
    {"planner", "checkpoint", "report"},
    {"training", "integrations", "doctor", "convert", "serve", "edit"},
    {"studies"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
NEIGHBOURS = {0, 1}  # levels whose members may import each other
ALLOWED = {
    ("report", "checkpoint"),  # a page is written whole or not at all
    ("convert", "training"),  # healing a converted model trains it
    ("methods", "optim"),  # a method of the optimizer makes one
    ("models", "methods"),  # a model that is reversible by construction
}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"torch.load", "torch.save", "eval", "exec", "np.load", "numpy.load"}
METHOD_FILES = {"__init__", "base"}  # in methods/: not methods themselves

FILES = sorted(SOURCE.rglob("*.py"))


def module_of(path: Path) -> tuple[str, ...]:
    """`("shoestring", "ops", "chunked_loss")` for its file; a package is its own name."""
    parts = ("shoestring", *path.relative_to(SOURCE).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(text: str, module: tuple[str, ...], *, is_package: bool) -> set[tuple[str, ...]]:
    """Dotted names that a file imports anywhere in it, relative ones resolved."""
    found: set[tuple[str, ...]] = set()
    home = module if is_package else module[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            found |= {(*base, alias.name) for alias in node.names}
    return found


def wrong_arrows(text: str, module: tuple[str, ...], *, is_package: bool = False) -> list[str]:
    """Imports of our own that go upwards or sideways."""
    own = module[1] if len(module) > 1 else None
    wrong = []
    for name in imported(text, module, is_package=is_package):
        target = name[1] if name[0] == "shoestring" and len(name) > 1 else None
        if target not in LEVEL or target == own:
            continue
        if own in (None, "__main__"):  # the package's own two files sit on top of all
            fine = target != "cli" or own == "__main__"
        elif LEVEL[target] == LEVEL[own]:
            fine = LEVEL[own] in NEIGHBOURS or (own, target) in ALLOWED
        else:
            fine = LEVEL[target] < LEVEL[own]
        if not fine:
            wrong.append(f"{'.'.join(module)} imports {'.'.join(name)}")
    return wrong


def methods_that_know_methods(text: str, module: tuple[str, ...]) -> list[str]:
    """Imports of one method by another."""
    methods = {p.stem for p in SOURCE.glob("methods/*.py")} - METHOD_FILES
    if module[:2] != ("shoestring", "methods") or module[-1] not in methods:
        return []
    others = {("shoestring", "methods", name) for name in methods - {module[-1]}}
    names = imported(text, module, is_package=False)
    return [f"{module[-1]} imports {name[2]}" for name in names if name[:3] in others]


def forbidden(text: str, *, may_print: bool) -> list[str]:
    """Unpickling, evaluating text, shells, bare excepts, and printing outside the command line."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or node.names[0].name
            if module.split(".")[0] in FORBIDDEN_IMPORTS:
                found.append(f"line {node.lineno}: imports {module}")
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"line {node.lineno}: bare except")
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            pickles = name.endswith(("_object", "_object_list"))  # torch.distributed's pickle
            if name in FORBIDDEN_CALLS or pickles or (name == "print" and not may_print):
                found.append(f"line {node.lineno}: calls {name}")
            if any(k.arg == "shell" and ast.unparse(k.value) == "True" for k in node.keywords):
                found.append(f"line {node.lineno}: shell=True")
    return found


def method_names_in(text: str) -> list[str]:
    """String constants that are a method's name."""
    methods = {p.stem for p in SOURCE.glob("methods/*.py")} - METHOD_FILES
    constants = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant))
    return [f"line {n.lineno}: {n.value!r}" for n in constants if n.value in methods]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_file_keeps_the_rules(path):
    text, module = path.read_text(encoding="utf-8"), module_of(path)
    assert wrong_arrows(text, module, is_package=path.stem == "__init__") == []
    assert methods_that_know_methods(text, module) == []
    assert forbidden(text, may_print=module[1:2] == ("cli",)) == []
    assert text.isascii()
    assert path.stem not in {"utils", "common", "misc", "helpers"}


def test_every_package_has_a_level():
    names = {module_of(path)[1] for path in FILES if len(module_of(path)) > 1} - {"__main__"}
    assert names <= set(LEVEL)


def test_core_knows_no_method_by_name():
    core = [path for path in FILES if LEVEL.get((*module_of(path), "")[1], 9) < LEVEL["methods"]]
    assert len(core) > 5
    assert {str(p): found for p in core if (found := method_names_in(p.read_text()))} == {}


@pytest.mark.parametrize(
    ("text", "module"),
    [
        ("from ..methods import keep", ("shoestring", "ops", "x")),
        ("from .cli import main", ("shoestring", "stack")),
        ("def f():\n    import shoestring.training.loop", ("shoestring", "planner", "x")),
        ("from ..models import gpt", ("shoestring", "methods", "x")),
        ("from ..training import loop", ("shoestring", "serve", "x")),
        ("from . import cli", ("shoestring", "errors")),
    ],
)
def test_wrong_arrows_are_caught(text, module):
    assert len(wrong_arrows(text, module)) == 1


def test_right_arrows_pass():
    assert wrong_arrows("from ..errors import X\nfrom . import y", ("shoestring", "ops", "x")) == []
    assert wrong_arrows("from ..training import loop", ("shoestring", "convert", "x")) == []
    assert wrong_arrows("from .cli.main import entry", ("shoestring", "__main__")) == []


def test_a_method_that_imports_another_is_caught():
    module = ("shoestring", "methods", "keep")
    assert methods_that_know_methods("from .recompute import Config", module)
    assert methods_that_know_methods("from . import recompute", module)
    assert methods_that_know_methods("from .base import Method", module) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "torch.save(x, 'x')",
        "eval('1')",
        "exec('1')",
        "print(1)",
        "dist.broadcast_object_list([1])",
        "subprocess.run('ls', shell=True)",
        "try:\n    pass\nexcept:\n    pass",
    ],
)
def test_forbidden_things_are_caught(text):
    assert len(forbidden(text, may_print=False)) == 1


def test_what_only_looks_forbidden_passes():
    assert forbidden("model.eval()\nconsole.print(1)", may_print=False) == []
    assert forbidden("print(1)", may_print=True) == []


@pytest.mark.parametrize(
    "module",
    ["errors", "units", "allocator", "training.config", "cli.main", "cli.train", "cli.plan",
     "cli.report", "cli.merge", "cli.sample", "cli.generate", "cli.study", "cli.doctor",
     "cli.demo", "report", "studies.catalogue", "training.blockwise.config", "doctor.diagnosis",
     "doctor.script", "doctor.process"],
)  # fmt: skip
def test_module_imports_without_torch(module):
    code = (
        f"import sys, shoestring.{module}; "
        "sys.exit(bool({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)))"
    )
    path = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    assert subprocess.run([sys.executable, "-c", code], env=path, check=False).returncode == 0
