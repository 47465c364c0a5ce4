"""The plugin files that a grid names: registered when it is read, told with their place when they cannot be."""

from __future__ import annotations

from pathlib import Path

from orchestrator import plugins
from orchestrator.errors import MoegridError
from orchestrator.files.problems import Problems, brief
from orchestrator.files.yaml_positions import Document
from orchestrator.resources import show


class PluginReader:
    """Registers the plugins of a grid and of the grids that it includes; `broken` once one of them cannot be."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems
        self.broken = False
        self._named: dict[str, Path] = {}

    def read(self, document: Document, path: Path) -> None:
        """Register what the document of the file `path` names under `plugins`, by paths from that file."""
        named = document.data.get("plugins", [])
        for i, name in enumerate(named if isinstance(named, list) else [named]):
            before = len(self.problems.found)
            self._one(name, document.place(("plugins", i)), path)
            self.broken = self.broken or len(self.problems.found) > before

    def _one(self, name: object, where: str, path: Path) -> None:
        if not isinstance(name, str) or not name:
            self.problems.add(f"plugins must name files, not {brief(name)}", where, "plugins", "write [./my_router.py]")
            return
        target = (path.parent / name).resolve()
        other = self._named.setdefault(target.name, target)
        if other != target:
            hint = f"rename one of them; the other is {show(other)}"
            self.problems.add(f"two plugins are called {target.name!r}", where, "plugins", hint)
            return
        try:
            plugins.register(plugins.read_plugin(target))
        except MoegridError as error:
            message = f"{error.error}: {error.cause}" if error.cause else error.error
            self.problems.add(message, where, "plugins", error.hint)
