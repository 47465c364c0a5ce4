"""Tasks of lmms-eval: their YAML and the functions that it names, out of the pinned wheel.

The wheel is not installed, and the packages' own start-up code, which needs much else, is not run: the modules of the
tasks are imported alone. A grid asks for it with `protocol: lmms_eval`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import io
import logging
import random
import re
import statistics
import string
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import yaml

from jobs.data.fetching import cache_directory, fetch
from orchestrator.catalog.lmms import LMMS_TASKS, LMMS_WHEEL, LmmsTask
from orchestrator.data.rows import Row
from orchestrator.errors import MoegridError, SourceError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

log = logging.getLogger(__name__)

WHEEL = LMMS_WHEEL.name
PACKAGE = WHEEL.replace("-", "_")
# Packages whose modules are imported without the packages' own code.
_BARE = ("", ".tasks", ".api", ".filters", ".models", ".models.model_utils")
_PARTS = ("api", "filters", "llm_judge", "models/model_utils", "tasks/_task_utils", "verifiers")
Function = Callable[..., object]


class _Loader(yaml.SafeLoader):
    """YAML in which `!function module.name` is that text behind a mark."""


_FUNCTION = "function:"
_Loader.add_constructor("!function", lambda _, node: _FUNCTION + str(node.value))


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One task as its YAML says it: the functions that it names, and its settings."""

    task: LmmsTask
    settings: Row
    split: str

    def text(self, doc: Row) -> str:
        """Return the question of a row."""
        given = (self.settings.get("lmms_eval_specific_kwargs") or {}).get("default")
        return str(self._call("doc_to_text", doc, *([given] if given is not None else [])))

    def pictures(self, doc: Row) -> list[Picture]:
        """Return the pictures of a row, decoded, in RGB."""
        found = self._call("doc_to_visual", doc)
        assert isinstance(found, list)
        return found

    @property
    def generation(self) -> Row:
        """How its answers are generated."""
        return self.settings.get("generation_kwargs") or {}

    def scored(self, docs: Sequence[Row], answers: Sequence[str]) -> dict[str, float]:
        """Return the scores of the answers to all rows, by its own functions; none where these ask a model."""
        if not self.task.scores:
            return {}
        found: dict[str, list[object]] = {}
        with _seeded():
            for doc, answer in zip(docs, self._filtered(docs, answers), strict=True):
                for name, value in self._results(doc, answer).items():
                    found.setdefault(name, []).append(value)
        asked = {one["metric"]: one.get("aggregation", "mean") for one in self.settings["metric_list"]}
        return {name: self._aggregated(asked[name], found[name]) for name in self.task.scores if name in found}

    def _results(self, doc: Row, answer: str) -> Row:
        if "process_results" in self.settings:
            made = self._call("process_results", doc, [answer])
            assert isinstance(made, dict)
            return made
        (metric,) = (one for one in self.settings["metric_list"] if one["metric"] == "exact_match")
        target = self.settings["doc_to_target"]
        if isinstance(target, str) and not target.startswith(_FUNCTION):
            wanted = doc[target]
        else:
            given = (self.settings.get("model_specific_target_kwargs") or {}).get("default")
            wanted = self._call("doc_to_target", doc, *([given] if given is not None else []))
        return {"exact_match": float(_plain(answer, metric) == _plain(str(wanted), metric))}

    def _filtered(self, docs: Sequence[Row], answers: Sequence[str]) -> list[str]:
        kept = [answer.strip() for answer in answers]
        for pipeline in self.settings.get("filter_list") or ():
            for one in pipeline["filter"]:
                given = {name: value for name, value in one.items() if name != "function"}
                made = self._function(one["function"])(**given)
                kept = [_first(one) for one in getattr(made, "apply")([[text] for text in kept], docs)]  # noqa: B009
        return kept

    def _aggregated(self, by: str, values: list[object]) -> float:
        if by == "mean":
            return statistics.fmean(float(str(value)) for value in values)
        function = self._function(by, fresh=True)
        with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()) as said:
            beside = [SimpleNamespace(output_path=directory)] if len(inspect.signature(function).parameters) > 1 else []
            value = self._guarded(function, values, *beside)
        log.info("%s: %s", self.task.name, said.getvalue())
        return float(str(value))

    def _call(self, name: str, *arguments: object) -> object:
        return self._guarded(self._function(self.settings[name]), *arguments)

    def _guarded(self, function: Function, *arguments: object) -> object:
        try:
            return function(*arguments)
        except KeyError as error:
            raise SourceError(
                f"a row of {self.task.name!r} has no column {error.args[0]!r}",
                cause=f"lmms-eval's {function.__name__} reads it",
                hint="rows have the columns of lmms-eval's own data set, each with its picture",
            ) from None
        except (AssertionError, TypeError, ValueError, AttributeError) as error:
            raise SourceError(
                f"lmms-eval's {function.__name__} does not take the rows of {self.task.name!r}",
                cause=f"{type(error).__name__}: {error}",
                hint="of MME every picture has two questions; values have the types of lmms-eval's own data set",
            ) from error

    def _function(self, mark: str, *, fresh: bool = False) -> Function:
        """Return a function by its mark; `fresh`: without what its module keeps of other calls (OCRBench's counts)."""
        module, _, name = mark.removeprefix(_FUNCTION).rpartition(".")
        folder = PurePosixPath(self.task.yaml).parent.name
        loaded = _module(folder, module)
        found: Function = getattr(importlib.reload(loaded) if fresh else loaded, name)
        return found


@cache
def benchmark(name: str) -> Benchmark:
    """Return a task of lmms-eval by its name there. Raises MoegridError; SourceError where its wheel is not there."""
    task = LMMS_TASKS[name]
    settings = _read(folder() / PACKAGE / "tasks" / task.yaml)
    if settings.get("output_type") != "generate_until":
        raise MoegridError(f"{name!r} of {WHEEL} asks for {settings.get('output_type')!r}", hint="use another task")
    return Benchmark(task, settings, str(settings["test_split"]).strip())


@cache
def folder() -> Path:
    """Return the folder with the wheel's task files, taken out once into the cache."""
    wheel = fetch(LMMS_WHEEL)
    folders = [*_PARTS, *(f"tasks/{PurePosixPath(task.yaml).parent}" for task in LMMS_TASKS.values())]
    mark = hashlib.sha256(" ".join(folders).encode()).hexdigest()[:6]
    target = cache_directory() / f"{wheel.stem}-{mark}"
    if not target.is_dir():
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch, zipfile.ZipFile(wheel) as archive:
            made = Path(scratch) / target.name
            for member in archive.namelist():
                path = PurePosixPath(member)
                inside = any(member.startswith(f"{PACKAGE}/{part}/") for part in folders)
                if inside and path.suffix in ("", ".py", ".yaml") and path.name and ".." not in path.parts:
                    archive.extract(member, made)
            with contextlib.suppress(OSError):  # another process was first
                made.rename(target)
    return target


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Give Python's generator a seed: MMMU takes an option at random where an answer names none."""
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


def _read(path: Path) -> Row:
    settings: dict[str, object] = yaml.load(path.read_text(), Loader=_Loader)
    if "include" in settings:
        settings = {**_read(path.parent / str(settings.pop("include"))), **settings}
    return settings


def _module(task: str, name: str) -> ModuleType:
    _prepare()
    package = f"{PACKAGE}.tasks.{task}"
    _bare(package)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its escapes in strings
            return importlib.import_module(f"{package}.{name}")
    except ImportError as error:
        raise MoegridError(
            f"task {task!r} of {WHEEL} needs a module that is not installed here",
            cause=str(error),
            hint="pip install it where jobs run",
        ) from error


def _prepare() -> None:
    for name in _BARE:
        _bare(PACKAGE + name)
    for name, made in {"loguru": _loguru, "Levenshtein": _levenshtein}.items():
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            sys.modules[name] = made()


def _bare(name: str) -> None:
    """Make a package whose modules can be imported, and whose own code is not run."""
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(folder() / name.replace(".", "/"))]
        sys.modules[name] = package


def _loguru() -> ModuleType:
    """Return what the tasks use of loguru, in its absence."""
    module = ModuleType("loguru")
    vars(module)["logger"] = logging.getLogger(PACKAGE)
    return module


def _levenshtein() -> ModuleType:
    """Return what the tasks use of Levenshtein, in its absence."""
    module = ModuleType("Levenshtein")
    vars(module)["distance"] = _distance
    return module


def _distance(one: str, other: str) -> int:
    """Return how many letters must be put in, left out or replaced (Levenshtein 1966)."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        before, row[0] = row[0], number
        for place, theirs in enumerate(other, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (letter != theirs))
    return row[-1]


def _plain(text: str, metric: Row) -> str:
    """Return a text as lmms-eval's exact match compares it."""
    if metric.get("ignore_case"):
        text = text.lower()
    if metric.get("ignore_punctuation"):
        text = re.sub(f"[{re.escape(string.punctuation)}]", "", text)
    return text


def _first(value: object) -> str:
    return str(value[0]) if isinstance(value, list | tuple) else str(value)
