"""The rules of DESIGN.md, section 3: who may import whom, what stays out of a plan's way, and how files look."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

import s2v_flow

PACKAGE = Path(s2v_flow.__file__).parent
RECIPES = PACKAGE.parent / "recipes"

# A layer may import itself and these; single modules at the top of the package are layers of their own.
ALLOWED: dict[str, set[str]] = {
    # the ground floor
    "version": set(),
    "errors": set(),
    "wording": {"errors"},
    "machine": {"errors"},
    "files": {"errors"},
    "plugins": {"errors"},
    # what knows no recipe
    "cache": {"files", "wording", "errors"},
    "weights": {"files", "wording", "errors"},
    "models": {"files", "weights", "machine", "errors"},
    "sampling": {"plugins", "errors"},
    "media": {"files", "errors"},
    "quality": {"media", "errors"},
    "demo": {"files", "models", "weights", "errors"},
    "convert": {"files", "models", "weights", "version", "wording", "errors"},
    # graph and recipe
    "graph": {"cache", "files", "machine", "wording", "errors"},
    "recipe": {"graph", "quality", "wording", "errors"},
    "nodes": {
        *("graph", "models", "weights", "sampling", "media", "quality", "files", "machine", "plugins", "wording"),
        "errors",
    },
    "library": {"convert", "demo", "files", "models", "weights", "recipe", "graph", "wording", "errors"},
    "comfy": {"nodes", "recipe", "graph", "sampling", "media", "wording", "errors"},
    "start": {"files", "library", "recipe", "graph", "media", "errors"},
    # runs and the Python face
    "runs": {
        *("recipe", "graph", "cache", "files", "media", "quality", "machine", "plugins", "version", "wording", "errors")
    },
    "parallel": {"nodes", "models", "graph", "files", "machine", "wording", "errors"},
    "options": {"recipe", "nodes", "graph", "cache", "demo", "library", "wording", "errors"},
    "api": {
        *("options", "recipe", "nodes", "graph", "cache", "files", "media", "models", "demo", "machine", "library"),
        "parallel",
        *("runs", "quality", "comfy", "version", "wording", "errors"),
    },
    "": {"api", "version"},  # the package itself
    "batch": {"api", "options", "recipe", "graph", "cache", "files", "machine", "version", "wording", "errors"},
    "history": {
        *(
            "",
            "api",
            "runs",
            "quality",
            "recipe",
            "graph",
            "cache",
            "files",
            "media",
            "demo",
            "machine",
            "wording",
            "errors",
        ),
    },
    # what people look at, and the terminal
    "views": {
        *("", "api", "batch", "history", "runs", "options", "nodes", "recipe", "graph", "cache", "models", "media"),
        *("quality", "start", "files", "machine", "version", "wording", "errors"),
    },
    "cli": {
        *(
            "",
            "api",
            "batch",
            "history",
            "views",
            "runs",
            "start",
            "comfy",
            "convert",
            "library",
            "nodes",
            "recipe",
            "graph",
            "cache",
        ),
        *("files", "media", "machine", "wording", "errors"),
    },
    "__main__": {"cli"},
}
HEAVY = {"torch", "transformers", "safetensors", "numpy", "av", "imageio", "soundfile", "soxr", "PIL", "sentencepiece"}
# the rest is light: heavy packages, and the modules that import them, are imported inside functions there
HEAVY_LAYERS = {"models", "weights", "sampling", "media", "quality", "demo", "convert"}
HEAVY_MODULES = {"nodes.tensors", "nodes.denoising"} | {f"parallel.{name}" for name in ("rank", "team")}
MAX_LINES = 450


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package: "graph.node" -> its syntax tree."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


def layer(module: str) -> str:
    return module.split(".")[0]


def imports(tree: ast.AST, *, at_import: bool = False) -> Iterator[str]:
    """Yield what is imported, by full name; `at_import`: only what importing the module imports.

    Names taken from a package are given with it where they are modules of ours.
    """
    for node in ast.iter_child_nodes(tree):
        if at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            if not at_import:
                yield from imports(node)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (full for alias in node.names if _our(full := f"{node.module}.{alias.name}") in modules())
        else:
            yield from imports(node, at_import=at_import)


def _our(full_name: str) -> str | None:
    """Return a module of the package by its name within it, None for other packages' modules."""
    package, _, rest = full_name.partition(".")
    return rest if package == "s2v_flow" else None


def ours(names: Iterator[str]) -> set[str]:
    return {name for full in names if (name := _our(full)) is not None}


def test_there_are_modules_to_look_at() -> None:
    """The rules below are not kept by an empty list."""
    assert {"", "cli.main", "graph.node", "cache.store", "models.dit", "nodes.table"} <= modules().keys()


def test_imports_point_one_way() -> None:
    """Each layer imports only what stands below it, also in functions and for types."""
    assert {layer(module) for module in modules()} <= ALLOWED.keys(), "a new layer needs a rule"
    wrong = {}
    for module, tree in modules().items():
        allowed = ALLOWED[layer(module)] | {layer(module)}
        above = sorted(name for name in ours(imports(tree)) if layer(name) not in allowed)
        if above:
            wrong[module] = above
    assert wrong == {}


def test_the_rules_themselves_have_no_cycles() -> None:
    """A layer never allows what stands on it."""
    graph = nx.DiGraph([(upper, lower) for upper, below in ALLOWED.items() for lower in below])
    assert nx.is_directed_acyclic_graph(graph)


def test_no_module_needs_itself() -> None:
    """Imports make no circles, those in functions and for types included."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    for module, tree in modules().items():
        graph.add_edges_from((module, name) for name in ours(imports(tree)) if name != module)
    assert list(nx.simple_cycles(graph)) == []


def test_light_modules_import_nothing_heavy() -> None:
    """Neither torch nor what comes with it or decodes media, however indirectly, except inside functions."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    for module, tree in modules().items():
        for name in imports(tree, at_import=True):
            own = _our(name)
            graph.add_edge(module, name.split(".")[0] if own is None else own)
    light = [module for module in modules() if module in graph and not _is_heavy(module)]
    assert {module: found for module in light if (found := nx.descendants(graph, module) & HEAVY)} == {}
    assert nx.has_path(graph, "models.load", "torch"), "the graph above would show it"


def _is_heavy(module: str) -> bool:
    return module in HEAVY_MODULES or ("." in module and layer(module) in HEAVY_LAYERS)


def test_only_the_report_prints() -> None:
    """Everything else returns, raises, or emits events."""
    writers = {"print", "pprint", "sys.stdout.write", "sys.stderr.write", "click.echo", "breakpoint"}
    found = {
        (module, ast.unparse(node.func))
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in writers
    }
    assert found == {("cli.report", "print"), ("cli.main", "click.echo")}


def test_everything_is_caught_in_one_place_only() -> None:
    """`except Exception` stands in cli/main.py, and where other packages may raise anything; a bare except nowhere."""
    broad = []
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                caught = "" if node.type is None else ast.unparse(node.type)
                if caught == "" or "Exception" in caught.strip("()").split(", ") or "BaseException" in caught:
                    broad.append((module, caught))
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
                assert "Exception" not in [ast.unparse(each) for each in node.args], module
    assert broad == [(name, "Exception") for name in ("cache.remote", "cli.main", "models.attention", "plugins")]


def test_files_can_be_read_in_one_go() -> None:
    """Not too long, documented, and none of them a bag for everything."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= MAX_LINES, path
        assert ast.get_docstring(ast.parse(text)), path
        assert path.stem not in {"utils", "util", "helpers", "common", "misc", "manager", "base"}, path


def test_the_table_of_kinds_is_written_out() -> None:
    """A literal tuple of names: nothing registers itself, nothing is computed."""
    (table,) = (
        node
        for node in modules()["nodes.table"].body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "NODE_KINDS"
    )
    assert isinstance(table.value, ast.Tuple)
    assert all(isinstance(item, ast.Name) for item in table.value.elts)


def test_nothing_is_done_at_import() -> None:
    """Modules define; statements that call something stand in functions. Only `python -m s2v_flow` runs."""
    working = [
        (module, ast.unparse(node))
        for module, tree in modules().items()
        for node in tree.body
        if isinstance(node, (ast.For, ast.While, ast.With, ast.Try))
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and module != "__main__")
    ]
    assert working == []


def run_python(code: str, folder: Path) -> str:
    environment = {
        "S2VFLOW_CACHE_DIR": str(folder / "cache"),
        "HOME": str(folder),
        "PATH": "",
        "PYTHONWARNINGS": "error",
    }
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(
        command, env=environment, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def command(arguments: list[str], forbidden: tuple[str, ...]) -> str:
    """Return a program that runs a command and leaves with an error if it imported what is forbidden."""
    return f"""
import sys
from s2v_flow.cli.main import cli
try:
    cli.main({arguments!r}, prog_name="s2vflow", standalone_mode=False)
except SystemExit as left:
    assert not left.code, left.code
loaded = sorted(set({forbidden!r}) & sys.modules.keys())
assert not loaded, loaded
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "recipes/demo.yaml"],
        *(
            pytest.param(words, marks=pytest.mark.slow)
            for words in (["check", "recipes/demo.yaml"], ["nodes"], ["nodes", "sample"], ["schema"])
        ),
    ],
    ids=" ".join,
)
def test_looking_at_a_recipe_imports_no_torch_and_makes_no_file_but_its_memory_of_digests(
    tmp_path: Path, arguments: list[str]
) -> None:
    """It takes a moment, and works where torch is broken; it neither makes models nor stores results."""
    assert run_python(command(arguments, ("torch", "transformers")), tmp_path)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {"digests.json", "facts.json"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["plan", "--help"]], ids=" ".join)
def test_help_imports_next_to_nothing(tmp_path: Path, arguments: list[str]) -> None:
    """Not even what reads recipes."""
    forbidden = ("torch", "transformers", "pydantic", "networkx", "numpy", "yaml", "rich", "s2v_flow.api")
    assert "s2vflow" in run_python(command(arguments, forbidden), tmp_path)
