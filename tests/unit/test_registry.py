"""One registry: ours first, installed packages when a name is not ours, plugin files, and whose fault an error is."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator import registry
from orchestrator.errors import MoegridError
from orchestrator.registry import Origin, Registry


@dataclass(frozen=True)
class Colour:
    name: str
    version: int = 1


@pytest.fixture
def colours() -> Iterator[Registry[Colour]]:
    """A registry of its own, gone after the test."""
    made = Registry("colours", "colour", Colour, {"red": Colour("red")})
    yield made
    del registry.REGISTRIES["colours"], registry._BY_WORD["colour"]


def install(folder: Path, name: str, module: str, entries: dict[str, str]) -> None:
    """Lay an installed package of one module into `folder`, as pip would."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(module)
    information = folder / f"{name}-1.2.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    lines = "\n".join(f"{key} = {value}" for key, value in entries.items())
    (information / "entry_points.txt").write_text(f"[moegrid.colours]\n{lines}\n")


MODULE = "from test_registry import Colour\nBLUE = Colour('blue')\nFALSE = 'blue'\n"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages on the path."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    registry._names_of_packages.cache_clear()
    yield tmp_path / "site"
    registry._names_of_packages.cache_clear()
    for name in ("paints", "other_paints"):
        sys.modules.pop(name, None)


def test_a_name_of_ours_scans_nothing(colours: Registry[Colour], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: pytest.fail("it scanned"))
    registry._names_of_packages.cache_clear()
    assert colours.get("red") == Colour("red")
    assert registry.identity("colour red") is None
    assert "red" in colours


def test_a_package_provides_a_name_and_its_identity(colours: Registry[Colour], site: Path) -> None:
    install(site, "paints", MODULE, {"blue": "paints:BLUE"})
    assert colours.get("blue") == Colour("blue")
    assert str(colours.origin("blue")) == "paints 1.2"
    assert registry.identity("colour blue") == "paints:1"
    assert colours.names() == ("red", "blue")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("paints:FALSE", "is not declared as one"),
        ("paints:NONE", "cannot be loaded"),
        ("no_such:X", "cannot be loaded"),
    ],
)
def test_a_broken_name_says_which_distribution(colours: Registry[Colour], site: Path, entry: str, said: str) -> None:
    install(site, "paints", MODULE, {"blue": entry})
    with pytest.raises(MoegridError, match=said) as raised:
        colours.get("blue")
    assert "paints 1.2" in str(raised.value)
    assert colours.get("red")


def test_a_doubled_name_says_both(colours: Registry[Colour], site: Path) -> None:
    install(site, "paints", MODULE, {"blue": "paints:BLUE"})
    install(site, "other_paints", MODULE, {"blue": "other_paints:BLUE"})
    with pytest.raises(MoegridError, match=r"provided twice: .*paints 1.2, .*paints 1.2"):
        colours.get("blue")


def test_a_name_that_nobody_has_hints_at_those_of_packages(colours: Registry[Colour], site: Path) -> None:
    install(site, "paints", MODULE, {"blue": "paints:BLUE"})
    with pytest.raises(MoegridError) as raised:
        colours.get("blu")
    assert raised.value.error == "colour 'blu' is unknown"
    assert raised.value.hint == "did you mean 'blue'?"
    assert "blu" not in colours


def test_a_file_is_known_by_its_content(colours: Registry[Colour]) -> None:
    colours.register(Colour("pink"), Origin("mine.py", "ab" * 32, file=True))
    assert registry.identity("colour pink") == "sha256:" + "ab" * 32
    colours.register(Colour("pink", 2), Origin("mine.py", "cd" * 32, file=True))
    assert colours.get("pink").version == 2
    with pytest.raises(MoegridError, match=r"provided twice: yours.py .*, mine.py"):
        colours.register(Colour("pink"), Origin("yours.py", "ef" * 32, file=True))
    with pytest.raises(MoegridError, match="is taken"):
        colours.register(Colour("red"), Origin("mine.py", "ab" * 32, file=True))


def test_code_that_is_not_there_says_whose_it_is() -> None:
    with pytest.raises(MoegridError, match=r"the code of paints 1.2 cannot be imported: no_such.module:X"):
        registry.load("no_such.module:X", "paints 1.2")
    assert registry.load("collections:OrderedDict.fromkeys", "x")


@dataclass(frozen=True)
class Paint:
    name: str
    parameters: type | None = None


@dataclass(frozen=True)
class Sound:
    coats: int = 1


@dataclass(frozen=True)
class Lacking:
    coats: int


@dataclass
class Open:
    coats: int = 1


class Bare:
    coats = 1


@pytest.mark.parametrize(
    ("owner", "said"),
    [(Lacking, "have no default for 'coats'"), (Open, "can be changed"), (Bare, "are no dataclass")],
)
def test_parameters_that_no_grid_could_fill_in_are_refused_where_they_are_declared(owner: type, said: str) -> None:
    paints = Registry("paints", "paint", Paint, {})
    try:
        with pytest.raises(MoegridError, match=f"the parameters of paint 'blue' of mine.py .*{said}"):
            paints.register(Paint("blue", owner), Origin("mine.py", "ab" * 32, file=True))
        paints.register(Paint("blue", Sound), Origin("mine.py", "ab" * 32, file=True))
    finally:
        del registry.REGISTRIES["paints"], registry._BY_WORD["paint"]


def test_the_remedy_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brushes.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    hints = {}
    for path in ("brushes:X", "no_such_package.brushes:X", "collections:Brush"):
        with pytest.raises(MoegridError) as raised:
            registry.load(path, "paints 1.2")
        hints[path] = raised.value.hint
    assert hints == {
        "brushes:X": "brushes imports no_such_library: install it on this machine as well",
        "no_such_package.brushes:X": "install the package that holds it on this machine as well",
        "collections:Brush": "correct the path in the declaration, or what it names",
    }
