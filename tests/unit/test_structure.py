"""The shape of the code: no circles of imports, no long files, no growing number of `Any`."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter
from collections.abc import Collection, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from orchestrator import resources
from orchestrator.catalog.backbones import BACKBONES
from orchestrator.catalog.routers import ROUTERS
from orchestrator.catalog.suites import SUITES
from orchestrator.spec.model import DEFAULTS

ROOT = resources.ROOT
PACKAGES = ("orchestrator", "jobs")
MOST_LINES = 400
# Lines of the product with `Any`, imports aside. Lower it when some go; a new one needs another to go.
MOST_ANY = 441


def sources() -> list[Path]:
    """Return every Python file of the project, also one that is not committed yet."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [path for name in listed.stdout.split() if (path := ROOT / name).is_file()]


def modules(root: Path) -> dict[str, Path]:
    """Return the modules below `root` by their dotted name."""
    found = {}
    for package in PACKAGES:
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield what a module imports when it is imported or run, wherever the statement stands; not for types alone."""
    if isinstance(tree, ast.If) and ast.unparse(tree.test).endswith("TYPE_CHECKING"):
        for node in tree.orelse:
            yield from imported(node)
        return
    if isinstance(tree, ast.Import):
        yield from (alias.name for alias in tree.names)
    if isinstance(tree, ast.ImportFrom):
        assert not tree.level, "imports are absolute"
        yield str(tree.module)
        yield from (f"{tree.module}.{alias.name}" for alias in tree.names)
    for child in ast.iter_child_nodes(tree):
        yield from imported(child)


def circle(root: Path) -> list[str]:
    """Return the modules of one circle of imports, none when there is no circle."""
    files = modules(root)
    graph = {}
    for name, path in files.items():
        targets = [target for target in imported(ast.parse(path.read_text("utf-8"))) if target in files]
        # `from a import b` names the package and the module: where the module is meant, the package is not.
        packages = {target.rpartition(".")[0] for target in targets}
        graph[name] = {target for target in targets if target not in packages} - {name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_module_imports_itself_through_others() -> None:
    assert not circle(ROOT)


def test_a_circle_is_found_also_inside_functions_and_not_where_it_is_of_types(tmp_path: Path) -> None:
    package = tmp_path / "orchestrator"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("from orchestrator import b\n")
    lazy = "def f():\n    from orchestrator.a import x\n"
    for_types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from orchestrator import a\n"
    (package / "b.py").write_text(lazy)
    assert set(circle(tmp_path)) == {"orchestrator.a", "orchestrator.b"}
    (package / "b.py").write_text(for_types)
    assert not circle(tmp_path)


def test_no_file_is_longer_than_one_reads_at_once() -> None:
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in sources()}
    assert {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > MOST_LINES} == {}


def test_untyped_places_do_not_become_more() -> None:
    lines = [line for path in modules(ROOT).values() for line in path.read_text("utf-8").splitlines()]
    assert sum(bool(re.search(r"\bAny\b", line)) and "import" not in line for line in lines) <= MOST_ANY


# Where a preset may be known by its name: its declaration and its own code.
OF_PRESETS = ("orchestrator.catalog.routers", "jobs.moe.routers")
# Presets whose name is also another word: what tokens are routed by, an architecture and transformers' name of it.
HOMONYMS = {"word", "sentence", *BACKBONES}


def compared_presets(source: str, names: frozenset[str]) -> list[int]:
    """Return the lines with a preset's own name, that compare a preset or variant, or a router with our classes."""
    found = named(source, ROUTERS.builtins.keys() - HOMONYMS)
    for node in ast.walk(ast.parse(source)):
        inner = list(ast.walk(node))
        asked = any(isinstance(one, ast.Attribute) and one.attr in ("preset", "variant") for one in inner)
        texts = {one.value for one in inner if isinstance(one, ast.Constant) and isinstance(one.value, str)}
        words = {one.id for one in inner if isinstance(one, ast.Name)}
        compared = isinstance(node, ast.Compare) and bool(texts & names)
        begins = isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".preset.startswith")
        isinstance_of = isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"
        if (asked and (compared or begins)) or (isinstance_of and words & {"XMoE", "MoEPlusPlus", "TCMoE"}):
            found.append(node.lineno)  # type: ignore[attr-defined]
    return sorted(set(found))


def named(source: str, names: Collection[str]) -> list[int]:
    """Return the lines with one of these names as a text of its own."""
    constants = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return sorted(node.lineno for node in constants if node.value in names)


def test_no_preset_is_known_by_its_name_but_where_it_is_declared() -> None:
    variants = (variant for kind in ROUTERS.builtins.values() for variant in kind.variants)
    names = frozenset([*ROUTERS.builtins, *variants]) - {""}
    apart = {name: path for name, path in modules(ROOT).items() if not name.startswith(OF_PRESETS)}
    found = {name: compared_presets(path.read_text("utf-8"), names) for name, path in apart.items()}
    assert {name: lines for name, lines in found.items() if lines} == {}
    example = "moe.preset == 'tc_moe'\nisinstance(router, MoEPlusPlus)\nmoe.preset.startswith('sharede')\n"
    more = "moe.preset != other\nshown = {'smoe': 'SMoE'}\nunit == 'word'\nmoe.preset == 'word'\n"
    assert compared_presets(example + more, names) == [1, 2, 3, 5, 7]


def compared_backbones(source: str) -> list[int]:
    """Return the lines that compare a backbone with a text, or set it to one."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            of_backbone = any(ast.unparse(side).endswith("backbone") for side in sides)
            if of_backbone and any(one.value in BACKBONES for one in sides if isinstance(one, ast.Constant)):
                found.append(node.lineno)
        if isinstance(node, ast.keyword) and node.arg == "backbone" and isinstance(node.value, ast.Constant):
            found.append(node.value.lineno)
    return found


def test_no_backbone_is_known_by_its_name_but_where_it_is_declared() -> None:
    found = {name: compared_backbones(path.read_text("utf-8")) for name, path in modules(ROOT).items()}
    assert {name: lines for name, lines in found.items() if lines} == {}
    assert compared_backbones("spec.backbone != 'olmoe'\nModelSpec(backbone='llama')\nlayout == 'olmoe'\n") == [1, 2]


# Where a suite may be known by its name: its declaration, its own code, and the readers of the benchmark of that name.
OF_SUITES = (
    "orchestrator.catalog",
    "jobs.evaluate.suites",
    "orchestrator.data.benchmark_files",
    "jobs.data.benchmark_items",
)


def test_no_suite_is_known_by_its_name_but_where_it_is_declared() -> None:
    apart = {name: path for name, path in modules(ROOT).items() if not name.startswith(OF_SUITES)}
    found = {name: named(path.read_text("utf-8"), SUITES.builtins) for name, path in apart.items()}
    assert {name: lines for name, lines in found.items() if lines} == {}
    assert named("if suite == 'lm':\n    pass\nshown = {'probe': 1}\nother = 'lms'", SUITES.builtins) == [1, 3]


# Where jobs meet a model that may have open fields: a caller's spec, a block's mapping, a public checkpoint's config.
RESOLVING = {"jobs.models.building": 1, "jobs.models.upcycle": 1, "jobs.moe.block": 1}


def test_a_model_is_resolved_where_it_enters_and_trusted_after() -> None:
    calls: Counter[str] = Counter()
    defaulted = []
    for name, path in modules(ROOT).items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if name.startswith("jobs.") and isinstance(node, ast.Call):
                calls[name] += ast.unparse(node.func) in ("resolve_moe", "resolve_model")
            if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
                first = node.values[0]
                if (
                    isinstance(first, ast.Attribute)
                    and first.attr in DEFAULTS
                    and isinstance(node.values[1], ast.Constant)
                ):
                    defaulted.append(f"{name}:{node.lineno}")
    assert +calls == RESOLVING
    assert defaulted == []
