"""The plugin files that a grid names: registered when it is read, told with their place when they cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from orchestrator import plugins
from orchestrator.catalog.tasks import TASKS
from orchestrator.data.task_files import SUFFIXES
from orchestrator.errors import GridError, MoegridError
from orchestrator.files.problems import Problems, brief
from orchestrator.files.yaml_positions import Document
from orchestrator.resources import show


class PluginReader:
    """Registers the plugins of a grid and of the grids that it includes; `broken` once one of them cannot be.

    `by` is "grid", or "site" for those of a site file.
    """

    def __init__(self, problems: Problems, by: str = "grid") -> None:
        self.problems = problems
        self.by = by
        self.broken = False
        self._named: dict[str, Path] = {}
        self._registered: dict[Path, str] = {}

    def read(self, document: Document, path: Path) -> None:
        """Register what the document of the file `path` names under `plugins`, by paths from that file."""
        named = document.data.get("plugins", [])
        for i, name in enumerate(named if isinstance(named, list) else [named]):
            before = len(self.problems.found)
            self._one(name, document.place(("plugins", i)), path)
            self.broken = self.broken or len(self.problems.found) > before
        for tasks, at in _tasks_in(document.data, ()):
            for name in [name for name in tasks if isinstance(name, str)]:
                before = len(self.problems.found)
                self._task(tasks, name, document.place((*at, name)), path)
                self.broken = self.broken or len(self.problems.found) > before

    def _task(self, tasks: dict[object, object], name: str, where: str, path: Path) -> None:
        """Register the task file that a task of `evaluate.tasks` is named by, or that has its name beside the grid."""
        if name.endswith(SUFFIXES):
            target = (path.parent / name).resolve()
            self._one(name, where, path)
            if target in self._registered:
                own = self._registered[target].partition(" ")[2]
                items = [(own if key == name else key, value) for key, value in tasks.items()]
                tasks.clear()
                tasks.update(items)
        elif name not in TASKS.builtins and name not in TASKS.outside and tasks[name] is not False:
            beside = [path.parent / f"{name}{suffix}" for suffix in SUFFIXES]
            found = next((file for file in beside if file.is_file() and file != path), None)
            if found is not None and TASKS.find(name) is None:
                self._one(found.name, where, path)

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
            self._registered[target] = plugins.register(plugins.read_plugin(target), self.by)[0]
        except GridError as error:
            self.problems.found.update(dict.fromkeys(error.problems))
        except MoegridError as error:
            message = f"{error.error}: {error.cause}" if error.cause else error.error
            self.problems.add(message, where, "plugins", error.hint)


def _tasks_in(data: object, at: tuple[str | int, ...]) -> Iterator[tuple[dict[object, object], tuple[str | int, ...]]]:
    """Yield (tasks, path) of every mapping that a grid file gives to `evaluate.tasks`, nested or dotted."""
    for key, value in data.items() if isinstance(data, dict) else ():
        path = [part for name in (*at, key) for part in str(name).split(".")]
        if path[-2:] == ["evaluate", "tasks"] and isinstance(value, dict):
            yield value, (*at, key)
        elif path[0] in ("set", "scales"):
            yield from _tasks_in(value, (*at, key))
