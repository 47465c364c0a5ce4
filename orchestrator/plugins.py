"""Plugin files: declarations that a grid brings along, without a package.

`plugins: [./my_router.py]` names a Python file, or a folder with an `__init__.py`, by its path from the grid. Its
text is read once and its module imported from that text, here and on nodes alike, under a name made of its stem and
the digest of its content: two versions never mix, and what is edited during a run reaches none of its jobs. Every
declaration at the top of the module is registered with the digest as its origin.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from orchestrator.errors import MoegridError, did_you_mean
from orchestrator.registry import PREFIX as ENTRY
from orchestrator.registry import REGISTRIES, Declaration, Origin, Registry, missing, registry_of

PREFIX = "moegrid_plugin_"
INIT = "__init__.py"
# A plugin travels with every submission that uses it.
MOST_BYTES = 2**20
EXAMPLE = "docs/extend.md shows one; moegrid new router NAME writes one"


@dataclass(frozen=True, slots=True)
class Plugin:
    """The files of a plugin by their path in it, and the folder in which they lie on this machine.

    `name` is that of the file (`my_router.py`) or folder (`my_router`).
    """

    name: str
    files: Mapping[str, str]
    folder: str

    @property
    def stem(self) -> str:
        return self.name.removesuffix(_suffix(self.name))

    @property
    def digest(self) -> str:
        """The sha256 of a file's content, of a folder that of all its paths and contents."""
        if list(self.files) == [self.name]:
            return _sha256(self.files[self.name])
        return _sha256("\n".join(f"{path} {_sha256(text)}" for path, text in sorted(self.files.items())))

    @property
    def module(self) -> str:
        """The name under which its module is imported."""
        return f"{PREFIX}{self.stem}_{self.digest[:16]}"

    @property
    def origin(self) -> Origin:
        return Origin(self.name, self.digest, file=True)

    def to_json(self) -> dict[str, Any]:
        """Return what a node needs of it."""
        return {"name": self.name, "files": dict(self.files)}


# What reads a plugin that is no Python, by the end of its name: (plugin) -> its declarations.
READERS: dict[str, Callable[[Plugin], Sequence[Declaration]]] = {}
# What was registered in this process, by digest: a submission takes the text from here.
LOADED: dict[str, Plugin] = {}


def read_plugin(path: Path) -> Plugin:
    """Read a plugin's files; MoegridError when it is none."""
    stem = path.name.removesuffix(_suffix(path.name))
    if not path.exists():
        raise MoegridError(f"plugin {path.name!r} does not exist", hint=_package(path.name) or _beside(path))
    if path.is_file() and not _suffix(path.name):
        hint = "name a .py file, a folder of them, or an lm-eval task (.yaml)"
        raise MoegridError(f"plugin {path.name!r} is no Python file", hint=hint)
    if not stem.isidentifier():
        better = re.sub(r"\W", "_", stem) + path.name[len(stem) :]
        raise MoegridError(f"plugin {path.name!r} has no name that Python can import", hint=f"rename it to {better}")
    if path.is_dir() and not (path / INIT).is_file():
        raise MoegridError(f"plugin folder {path.name!r} has no {INIT}", hint=f"put the declarations into {INIT}")
    found = sorted(_files_of(path)) if path.is_dir() else [path]
    files: dict[str, str] = {}
    for file in found:
        try:
            files[file.relative_to(path).as_posix() if path.is_dir() else path.name] = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            hint = "a plugin is made of text files in UTF-8"
            raise MoegridError(f"plugin file {file.name!r} cannot be read", cause=str(error), hint=hint) from error
    if (size := sum(map(len, files.values()))) > MOST_BYTES:
        cause = f"it holds {size / 2**20:.1f} MiB in {len(files)} files, more than {MOST_BYTES / 2**20:g}"
        hint = "keep data elsewhere; what is large or shared is better an installed package"
        raise MoegridError(f"plugin {path.name!r} is too large to travel with jobs", cause=cause, hint=hint)
    for name, text in files.items():
        _compiled(path.name, name, text)
    return Plugin(path.name, files, str(path if path.is_dir() else path.parent))


def _suffix(name: str) -> str:
    return next((end for end in (".py", *READERS) if name.endswith(end)), "")


def _compiled(plugin: str, name: str, text: str) -> None:
    """Raise MoegridError when a file is no Python: the module is imported here, the others on the nodes alone."""
    try:
        if name.endswith(".py"):
            ast.parse(text)
    except SyntaxError as error:
        raise MoegridError(
            f"plugin {plugin!r} cannot be imported",
            cause=f"SyntaxError: {error.msg} ({name}, line {error.lineno})",
            hint="mend it",
        ) from error


def _files_of(folder: Path) -> Iterator[Path]:
    """Yield the files of a plugin folder: not what is hidden, compiled or a test."""
    for path in folder.rglob("*"):
        inside = path.relative_to(folder).parts
        apart = any(part.startswith(".") or part in ("__pycache__", "tests") for part in inside)
        if path.is_file() and not apart and not path.name.startswith("test_"):
            yield path


def _package(name: str) -> str:
    """Return what to do where a plugin's name is that of an installed package, "" where it is none."""
    try:
        version = importlib.metadata.version(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return ""
    return f"{name} {version} is installed: a package needs no plugins:, what it provides is found by its names"


def _beside(path: Path) -> str:
    names = sorted(file.name for file in path.parent.glob("*.py")) if path.parent.is_dir() else []
    return did_you_mean(path.name, names, "files") or "paths are relative to the grid's file"


def register(plugin: Plugin, by: str = "grid") -> tuple[str, ...]:
    """Import a plugin and register what it declares; return "WORD NAME" of each. `by` is what names it: grid or site.

    Raises MoegridError when it cannot be imported, declares nothing or what others declare, or a name of it is taken.
    """
    if (reader := READERS.get(_suffix(plugin.name))) is not None:
        return _register_read(plugin, reader(plugin), by)
    _INSTALLED[plugin.module] = plugin
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
    try:
        module = importlib.import_module(plugin.module)
    except (Exception, SystemExit) as error:  # whatever a foreign file raises when it is imported
        raise MoegridError(
            f"plugin {plugin.name!r} cannot be imported",
            cause=f"{type(error).__name__}: {error}{_line_in(plugin, error)}",
            hint=_remedy(error),
        ) from error
    declarations = list(_declarations(module, plugin.origin))
    if not declarations:
        hint = f"put a declaration (RouterKind(...), LossKind(...), ...) at the top of the module: {EXAMPLE}"
        raise MoegridError(f"plugin {plugin.name!r} declares nothing", hint=hint)
    for registry, declaration in declarations:
        _refuse_others(plugin, registry, declaration.name, by)
    for registry in REGISTRIES.values():
        registry.forget(plugin.origin)
    own_path = re.compile(rf"(?:\./)?{plugin.stem}(?:\.py)?((?:\.\w+)*:[\w./-]+)")
    registered: dict[str, None] = {}
    for registry, declaration in declarations:
        named = f"{registry.word} {declaration.name}"
        if named in registered:
            raise MoegridError(f"plugin {plugin.name!r} declares {named!r} twice", hint="give one another name")
        moved = _moved(declaration, own_path, plugin.module)
        code = str(getattr(moved, "code", ""))
        if lacking := _missing(plugin, code):
            lacking = lacking.replace(plugin.module, plugin.stem)
            hint = f'write code="{plugin.stem}:NAME" of a name in it'
            raise MoegridError(f"the code of {named!r} is not in plugin {plugin.name!r}", cause=lacking, hint=hint)
        registry.register(moved, plugin.origin)
        registered[named] = None
    LOADED[plugin.digest] = plugin
    return tuple(registered)


def _refuse_others(plugin: Plugin, registry: Registry[Any], name: str, by: str) -> None:
    """Raise MoegridError when a plugin that a grid or a site names declares what is not that one's to bring."""
    if registry.brought_by == by:
        return
    package = f"install it as a package, entry point {ENTRY}{registry.group}: docs/extend.md"
    file = f"name the file under plugins: of the {registry.brought_by} instead"
    raise MoegridError(
        f"plugin {plugin.name!r} declares {registry.word} {name!r}, which no {by} brings along",
        cause=registry.why or "it is the grid's own",
        hint=f"{file}, or {package}" if registry.brought_by else package,
    )


def _register_read(plugin: Plugin, declarations: Sequence[Declaration], by: str) -> tuple[str, ...]:
    """Register what a reader found in a plugin that is no Python."""
    names = []
    for registry in REGISTRIES.values():
        registry.forget(plugin.origin)
    for declaration in declarations:
        own = registry_of(declaration)
        assert own is not None
        _refuse_others(plugin, own, declaration.name, by)
        own.register(declaration, plugin.origin)
        names.append(f"{own.word} {declaration.name}")
    LOADED[plugin.digest] = plugin
    return tuple(names)


def _missing(plugin: Plugin, code: str) -> str:
    """Return what is not there of the code of a declaration, as far as can be told without importing it."""
    module, _, attribute = code.partition(":")
    inside = "/".join(module.split(".")[1:])
    text = next((plugin.files[name] for name in (f"{inside}.py", f"{inside}/{INIT}") if name in plugin.files), None)
    if not module.startswith(plugin.module):
        # A folder that was renamed: the path names a module of it under the old name.
        return f"there is no module {module}" if text is not None and missing(code) else ""
    if not inside or module in sys.modules:
        return missing(code)
    if text is None:
        return f"there is no module {module}"
    names = set(_bound(ast.parse(text)))
    return "" if attribute.split(".")[0] in names or "*" in names else f"{module} has no {attribute}"


def _bound(tree: ast.Module) -> Iterator[str]:
    """Yield the names that a module's statements may bind at its top, in branches as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).split(".")[0]


def receive(sent: Sequence[Mapping[str, Any]], planned: Collection[str], folder: Path) -> None:
    """Register plugins that came with a submission and have one of the `planned` digests.

    Their files are laid below `folder`, for code that reads them.
    """
    for one in sent:
        plugin = Plugin(one["name"], one["files"], "")
        if plugin.digest not in planned:
            raise MoegridError(f"plugin {plugin.name!r} is not the one that was planned with", hint="submit it again")
        home = folder / plugin.module
        inside = home / plugin.stem if INIT in plugin.files else home
        for path, text in plugin.files.items():
            target = inside / path
            if not target.resolve().is_relative_to(home.resolve()):
                raise MoegridError(f"plugin {plugin.name!r} has a file outside itself: {path}")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, "utf-8")
        register(dataclasses.replace(plugin, folder=str(inside)))


def _declarations(module: ModuleType, own: Origin) -> Iterator[tuple[Registry[Any], Any]]:
    """Yield the declarations that a module makes, with their registries: those of others that it imports are theirs."""
    seen: set[int] = set()
    for value in vars(module).values():
        registry = None if isinstance(value, type) else registry_of(value)
        if registry is None or id(value) in seen:
            continue
        seen.add(id(value))
        others = (provided.declaration for provided in registry.outside.values() if provided.origin != own)
        if not any(value is other for other in (*registry.builtins.values(), *others)):
            yield registry, value


def _moved(value: object, path: re.Pattern[str], module: str) -> Any:
    """Return a declaration whose paths into its file, "my_router:Noisy" or "./my_router.py:Noisy", are importable."""
    if isinstance(value, str):
        found = path.fullmatch(value)
        return f"{module}{found[1]}" if found else value
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(_moved(item, path, module) for item in value)
    if isinstance(value, dict):
        return {key: _moved(item, path, module) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        changed = {
            name: moved for name in fields if (moved := _moved(old := getattr(value, name), path, module)) != old
        }
        return dataclasses.replace(value, **changed) if changed else value
    return value


def _line_in(plugin: Plugin, error: BaseException) -> str:
    """Return " (FILE:LINE)" of the last line of the plugin that an error went through."""
    if isinstance(error, SyntaxError):
        return ""  # it says where
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(str(Path(plugin.folder)))
    ]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def _remedy(error: BaseException) -> str:
    if isinstance(error, ImportError) and error.name:
        return (
            f"install {error.name.partition('.')[0]} here, or import it where it is used: plan only reads declarations"
        )
    return "mend it; a plan reads it as `python FILE` would"


class _Loader(importlib.abc.SourceLoader):
    """Loads a module of a plugin from its text."""

    def __init__(self, plugin: Plugin, path: str) -> None:
        self.plugin, self.path = plugin, path

    def get_filename(self, fullname: str) -> str:
        return str(Path(self.plugin.folder) / self.path)

    def get_data(self, path: str) -> bytes:
        if path == self.get_filename(""):
            return self.plugin.files[self.path].encode()
        raise OSError(path)  # no bytecode


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of plugins."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        top, _, inside = fullname.partition(".")
        plugin = _INSTALLED.get(top)
        if plugin is None:
            return None
        below = inside.replace(".", "/")
        for file in (f"{below}.py", f"{below}/{INIT}") if below else (plugin.name, INIT):
            if file in plugin.files:
                return importlib.util.spec_from_loader(
                    fullname, _Loader(plugin, file), is_package=file.rpartition("/")[2] == INIT
                )
        return None


_INSTALLED: dict[str, Plugin] = {}  # by the name of its module


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
