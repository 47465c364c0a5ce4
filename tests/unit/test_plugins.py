"""Plugin files: registered when a grid is read, known by their content, broken ones told with their place."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator import plugins, registry
from orchestrator.errors import GridError, MoegridError
from orchestrator.grid.load import load_grid
from orchestrator.registry import Registry
from orchestrator.spec.versions import raised


@dataclass(frozen=True)
class Colour:
    name: str
    code: str = ""
    more: tuple[str, ...] = ()


MINE = """
from {module} import Colour, RED
BLUE = Colour("blue", code="./mine.py:paint", more=("mine:paint", "mine", "other.mine:paint"))
SAME = BLUE
def paint():
    return {word!r}
"""
GRID = "base: finetune\nplugins: [{name}]\nfactors: {{seed: [0]}}\nevaluate: [lm]\n"
RED = Colour("red")


@pytest.fixture
def colours() -> Iterator[Registry[Colour]]:
    made = Registry("colours", "colour", Colour, {"red": RED})
    yield made
    del registry.REGISTRIES["colours"], registry._BY_WORD["colour"]


def write(path: Path, word: str = "one", text: str = MINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace("{module}", __name__).replace("{word!r}", repr(word)))
    return path


def test_a_file_declares_what_its_module_holds_and_its_code_is_its_own(
    tmp_path: Path, colours: Registry[Colour]
) -> None:
    plugin = plugins.read_plugin(write(tmp_path / "mine.py"))
    assert plugins.register(plugin) == ("colour blue",)
    blue = colours.get("blue")
    assert registry.load(blue.code, "mine.py")() == "one"
    assert blue.more == (f"{plugin.module}:paint", "mine", "other.mine:paint"), "other paths stay as they are"
    assert raised(["colour blue", "colour red"]) == {"colour blue": f"sha256:{plugin.digest}"}


def test_two_versions_of_a_file_never_mix(tmp_path: Path, colours: Registry[Colour]) -> None:
    path = write(tmp_path / "mine.py", "one")
    plugins.register(plugins.read_plugin(path))
    first = colours.get("blue").code
    path.write_text(
        path.read_text().replace("'one'", "'two'") + f"from {__name__} import Colour\nGREEN=Colour('green')"
    )
    plugins.register(plugins.read_plugin(path))
    assert registry.load(colours.get("blue").code, "")() == "two"
    assert registry.load(first, "")() == "one"
    write(path, "one")
    plugins.register(plugins.read_plugin(path))
    assert colours.get("blue").code == first
    assert "green" not in colours, "what a version declared goes with it"


def test_a_folder_is_a_plugin_and_loads_its_code_when_it_is_asked_for(
    tmp_path: Path, colours: Registry[Colour]
) -> None:
    folder = tmp_path / "mine"
    write(folder / "__init__.py", text="from {module} import Colour\nBLUE = Colour('blue', 'mine.inner.code:paint')\n")
    write(folder / "inner" / "__init__.py", text="")
    write(folder / "inner" / "code.py", text="from .. import BLUE\ndef paint():\n    return BLUE.name\n")
    write(folder / "test_mine.py", text="1 / 0")
    plugin = plugins.read_plugin(folder)
    assert sorted(plugin.files) == ["__init__.py", "inner/__init__.py", "inner/code.py"]
    plugins.register(plugin)
    assert f"{plugin.module}.inner.code" not in sys.modules
    assert registry.load(colours.get("blue").code, "")() == "blue"
    before = plugin.digest
    write(folder / "inner" / "code.py", text="def paint():\n    return 'other'\n")
    assert plugins.read_plugin(folder).digest != before


def test_what_a_node_receives_is_the_same_plugin(tmp_path: Path, colours: Registry[Colour]) -> None:
    reading = MINE + "from pathlib import Path\nBESIDE = Path(__file__).name\n"
    plugin = plugins.read_plugin(write(tmp_path / "mine.py", text=reading))
    plugins.receive([plugin.to_json()], {plugin.digest}, tmp_path / "node")
    assert colours.origin("blue") == plugin.origin
    module = sys.modules[plugin.module]
    assert Path(str(module.__file__)).read_text() == plugin.files["mine.py"]
    assert tmp_path / "node" in Path(str(module.__file__)).parents
    with pytest.raises(MoegridError, match="not the one that was planned with"):
        plugins.receive([plugin.to_json()], {"ab" * 32}, tmp_path / "node")
    evil = plugins.Plugin("mine", {"__init__.py": "", "../../x.py": ""}, "")
    with pytest.raises(MoegridError, match="outside itself"):
        plugins.receive([evil.to_json()], {evil.digest}, tmp_path / "node")
    assert not (tmp_path / "x.py").exists()


@pytest.mark.parametrize(
    ("name", "text", "said", "hint"),
    [
        ("absent.py", None, "plugin 'absent.py' does not exist", "did you mean 'absent_.py'?"),
        ("mine.txt", "", "plugin 'mine.txt' is no Python file", "name a .py file"),
        ("my-router.py", "", "has no name that Python can import", "rename it to my_router.py"),
        ("empty.py", "x = 1", "plugin 'empty.py' declares nothing", "put a declaration"),
        ("bad.py", "x = (", "cannot be imported: SyntaxError", "mend it"),
        ("raises.py", "\n1 / 0", "ZeroDivisionError: division by zero (raises.py:2)", "mend it"),
        ("needs.py", "import no_such_thing", "No module named 'no_such_thing' (needs.py:1)", "install no_such_thing"),
        ("taken.py", "from {module} import Colour\nX = Colour('red')", "colour 'red' of taken.py is taken", "another"),
        ("twice.py", "from {module} import Colour\nX, Y = Colour('x'), Colour('x')", "'colour x' twice", "another"),
        (
            "away.py",
            "from {module} import Colour\nX = Colour('x', 'away:paint')",
            "away has no paint",
            'code="away:NAME"',
        ),
        ("deep.py", "from {module} import Colour\nX = Colour('x', './deep.py:X.a')", "deep has no X.a", "code="),
        ("ends.py", "raise SystemExit(0)", "cannot be imported: SystemExit: 0", "mend it"),
    ],
)
def test_a_broken_plugin_is_told_with_its_place_and_a_remedy(
    tmp_path: Path, colours: Registry[Colour], name: str, text: str | None, said: str, hint: str
) -> None:
    write(tmp_path / "absent_.py", text="")
    if text is not None:
        write(tmp_path / name, text=text)
    (tmp_path / "grid.yaml").write_text(GRID.format(name=f"./{name}"))
    with pytest.raises(GridError) as raised:
        load_grid(str(tmp_path / "grid.yaml"))
    (problem,) = raised.value.problems
    assert said in problem.message
    assert hint in problem.hint
    assert problem.where.endswith("grid.yaml:2")


def test_paths_are_relative_to_the_file_that_names_them(tmp_path: Path, colours: Registry[Colour]) -> None:
    write(tmp_path / "deep" / "mine.py")
    (tmp_path / "deep" / "base.yaml").write_text(GRID.format(name="mine.py"))
    (tmp_path / "grid.yaml").write_text("include: deep/base.yaml\nplugins: deep/mine.py\n")
    load_grid(str(tmp_path / "grid.yaml"))
    assert "blue" in colours
    write(tmp_path / "mine.py", "other")
    (tmp_path / "grid.yaml").write_text("include: deep/base.yaml\nplugins: ./mine.py\n")
    with pytest.raises(GridError, match=r"two plugins are called 'mine.py'") as raised:
        load_grid(str(tmp_path / "grid.yaml"))
    assert "deep/mine.py" in raised.value.problems[0].hint


@pytest.mark.parametrize("value", ["3", "[3]", "{a: b}", '[""]'])
def test_plugins_are_paths(tmp_path: Path, value: str) -> None:
    (tmp_path / "grid.yaml").write_text(f"base: finetune\nplugins: {value}\n")
    with pytest.raises(GridError, match="plugins must name files"):
        load_grid(str(tmp_path / "grid.yaml"))


def test_a_plugin_that_cannot_travel_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.py"
    path.write_text("#" * (plugins.MOST_BYTES + 1))
    with pytest.raises(MoegridError, match="too large to travel"):
        plugins.read_plugin(path)
    path.write_bytes(b"\xff")
    with pytest.raises(MoegridError, match="cannot be read"):
        plugins.read_plugin(path)


@pytest.mark.parametrize(
    ("code", "module", "said"),
    [
        ("tints.brush:paint", "def paint(): ...\n", ""),
        ("tints.brush:paint.deep", "from somewhere import *\n", ""),
        ("tints.brush:paint", "if True:\n    paint = 1\n", ""),
        ("tints.brush:pant", "def paint(): ...\n", "tints.brush has no pant"),
        ("tints.brash:paint", "def paint(): ...\n", "there is no module tints.brash"),
        ("colours.brush:paint", "def paint(): ...\n", "there is no module colours.brush"),
        ("tints.brush:paint", "def paint(: ...\n", "SyntaxError: .*brush.py, line 1"),
    ],
)
def test_a_folders_other_modules_are_looked_at_without_being_imported(
    tmp_path: Path, colours: Registry[Colour], code: str, module: str, said: str
) -> None:
    folder = tmp_path / "tints"
    write(folder / "__init__.py", text=f"from {{module}} import Colour\nBLUE = Colour('blue', code={code!r})\n")
    (folder / "brush.py").write_text("import a_library_that_is_not_here\n" + module if not said else module)
    if not said:
        assert plugins.register(plugins.read_plugin(folder)) == ("colour blue",)
        return
    with pytest.raises(MoegridError) as raised:
        plugins.register(plugins.read_plugin(folder))
    assert re.search(said, raised.value.cause)
