"""lm-eval's own tasks on local items: which requests an item makes, and what its scores mean.

`tasks/<name>.yaml` includes the harness's shipped file (`include: lm_eval:arc/arc_easy.yaml`) and says what differs
here; its data come from `<task>/<split>.jsonl`.

`group_by` names the column of sub-tasks (MMLU's subjects): shots come from
the item's own group, and a limit takes the groups in turn.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from jinja2 import TemplateError
from lm_eval import tasks as shipped_tasks
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.samplers import ContextSampler
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import _import_func_in_yml, load_yaml

from jobs.evaluate.encoding import Encode, Encodings, Request
from jobs.evaluate.results import Outcome
from orchestrator.catalog.benchmarks import TEMPLATES
from orchestrator.catalog.tasks import task_kind
from orchestrator.errors import MoegridError, SourceError
from orchestrator.files.problems import Problems
from orchestrator.files.yaml_positions import read_mapping
from orchestrator.registry import file_of
from orchestrator.resources import show
from orchestrator.spec.cell import TaskSpec

# The harness compiles a template again for every field of every shot: nine tenths of the time to render a task.
_COMPILED = cache(utils.env.from_string)
_LOG = logging.getLogger("lm_eval")
FOLDER = Path(__file__).parent / "tasks"
_SHIPPED = Path(shipped_tasks.__file__).parent
# Tasks whose `process_docs` makes a document of each row by itself.
_BY_ROW = frozenset({"hellaswag"})
# When this share of items fits the window with so many shots, the task is said to have so many.
_FITTING = 0.9

Row = dict[str, Any]


@contextmanager
def _compiled() -> Iterator[None]:
    """Let the harness keep compiled templates inside the block."""
    genuine, utils.env.from_string = utils.env.from_string, _COMPILED
    try:
        yield
    finally:
        utils.env.from_string = genuine


@contextmanager
def _quiet() -> Iterator[None]:
    """Show no bars, and no warning of each default that lm-eval's own task files rely on, inside the block."""
    level, bars = _LOG.level, not datasets.are_progress_bars_disabled()
    _LOG.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        _LOG.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


@dataclass(frozen=True, slots=True)
class Item:
    """One evaluated item: its requests (context, continuation), one per choice, and the index of the right one."""

    id: str
    requests: tuple[Request, ...]
    gold: int
    doc: Mapping[str, Any]
    shots: int


class LocalTask(ConfigurableTask):  # type: ignore[misc]  # lm-eval is read without types
    """A harness task whose data are given rows by split."""

    def __init__(self, config: dict[str, Any], rows: Mapping[str, list[Row]]) -> None:
        self._rows = rows
        super().__init__(config=config)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: object) -> None:
        self.dataset = {split: datasets.Dataset.from_list(rows) for split, rows in self._rows.items()}


class _Drawing(LocalTask):
    """A task that draws its shots from rows as they lie: of a large split, only what is drawn is made into documents.

    For tasks that make a document of each row by itself, so that row and document have one place in the pool.
    """

    def __init__(self, config: dict[str, Any], rows: Mapping[str, list[Row]], pool: str) -> None:
        self._pool = pool
        super().__init__(config, rows)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: object) -> None:
        evaluated = {split: rows for split, rows in self._rows.items() if split != self._pool}
        self.dataset = {split: datasets.Dataset.from_list(rows) for split, rows in evaluated.items()}

    def fewshot_docs(self) -> list[Row]:
        return self._rows[self._pool]

    def documents(self, draws: Sequence[Sequence[Row]]) -> list[list[Row]]:
        """Return the documents of drawn rows."""
        drawn = {id(row): row for rows in draws for row in rows}
        made = datasets.Dataset.from_list(list(drawn.values()))
        process = self.config.process_docs
        documents = dict(zip(drawn, process(made) if process else made, strict=True))
        return [[documents[id(row)] for row in rows] for rows in draws]


class _Fixed(ContextSampler):  # type: ignore[misc]
    """Hands out the shots that were chosen for the item at hand."""

    def __init__(self, shots: Sequence[Row]) -> None:
        self.shots = shots

    def sample(self, n: int, *args: object, **kwargs: object) -> Sequence[Row]:
        return self.shots[:n]


def load_config(name: str) -> dict[str, Any]:
    """Return the harness configuration of a task of `tasks/` or of a package; MoegridError when there is none."""
    kind = task_kind(name)
    if kind is not None and (kind.config or kind.template):
        own = dict(deepcopy(kind.config)) if kind.config else read_task(file_of(kind.template, f"task {name!r}"))
        return _with_included(name, own)
    path = FOLDER / f"{TEMPLATES.get(name, name)}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in FOLDER.glob("*.yaml"))
        raise MoegridError(
            f"there is no evaluation task {name!r}",
            cause=f"the tasks are {', '.join(known)}",
            hint="a new one is declared by a package (docs: extend)",
        )
    return _with_included(name, read_task(path))


def _with_included(name: str, own: dict[str, Any]) -> dict[str, Any]:
    include = str(own.pop("include", ""))
    shipped = load_yaml(_SHIPPED / include.removeprefix("lm_eval:")) if include else {}
    return {**shipped, **own, "task": name}


def read_task(path: Path) -> dict[str, Any]:
    """Return a task file of this project, its `!function` tags resolved. Raises GridError with what is wrong."""
    problems = Problems()
    functions = {"!function": partial(_import_func_in_yml, base_dir=path.parent)}
    document = read_mapping(path, show(path), problems, functions)
    problems.raise_if_any()
    return dict(document.data)


def splits_in(directory: Path, name: str, evaluated: str) -> set[str]:
    """Return the splits of a task in `directory`; SourceError when the evaluated one is not among them."""
    splits = {path.stem for path in (directory / name).glob("*.jsonl")}
    if evaluated not in splits:
        raise SourceError(
            f"the items of task {name!r} have no split {evaluated!r}",
            cause=f"they have {', '.join(sorted(splits)) or 'none'}",
            hint=f"provide {name}/{evaluated}.jsonl in evaluate.source",
        )
    return splits


def read_rows(directory: Path, name: str, split: str, limit: int = 0, group_by: str = "") -> list[Row]:
    """Return the rows of one split of a task, cut to `limit` (0 = all), groups in turn."""
    lines = (directory / name / f"{split}.jsonl").read_bytes().splitlines()
    if limit and not group_by:
        lines = lines[:limit]
    rows = [json.loads(line) for line in lines]
    rows = _in_turn(rows, group_by) if group_by else rows
    return rows[:limit] if limit else rows


def _in_turn(rows: list[Row], column: str) -> list[Row]:
    groups: dict[object, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.get(column)].append(row)
    longest = max(map(len, groups.values()))
    return [group[i] for i in range(longest) for group in groups.values() if i < len(group)]


class Prepared:
    """A task with its items: requests rendered by the harness and tokenised, as many shots as the window takes."""

    @_quiet()
    @_compiled()
    def __init__(
        self, spec: TaskSpec, directory: Path, *, limit: int, seed: int, shared: bool, max_length: int, encode: Encode
    ) -> None:
        config = load_config(spec.name)
        group_by = config.pop("group_by", "")
        evaluated = config.get("test_split") or config.get("validation_split") or ""
        present = splits_in(directory, spec.name, evaluated)
        if spec.shots and not present - {evaluated}:
            raise SourceError(f"the items of task {spec.name!r} have no split to draw shots from", hint="set shots: 0")
        named = [config.get(key) for key in ("fewshot_split", "training_split", "validation_split")]
        pool = next((split for split in named if split in present), evaluated) if spec.shots else evaluated
        read = partial(read_rows, directory, spec.name)
        splits = {pool: partial(read, pool), evaluated: partial(read, evaluated, limit, group_by)}
        rows = {split: read_split() for split, read_split in splits.items()}
        # A split that is not read is none: the harness looks for shots elsewhere.
        for key in ("training_split", "validation_split", "fewshot_split"):
            if config.get(key) and config[key] not in rows:
                config[key] = None
        self._stock = (deepcopy(config), splits)
        self.name, self._evaluated = spec.name, evaluated
        self.version = str((config.get("metadata") or {}).get("version", ""))
        self.encodings = Encodings(encode)
        self._max_length = max_length
        apart = pool != evaluated and (config.get("process_docs") is None or spec.name in _BY_ROW)
        try:
            self._task = _Drawing(config, rows, pool) if apart else LocalTask(config, rows)
            self._docs = list(self._task.task_docs)
            shots = self._draw(spec.shots, seed, shared, group_by, rows[evaluated] if apart else self._docs)
            if isinstance(self._task, _Drawing):
                shots = self._task.documents(shots)
            self.shots, self.items = self._fit(shots, spec.shots)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError, AssertionError, TemplateError) as error:
            raise SourceError(
                f"the items of task {spec.name!r}, split {evaluated!r}, do not fit its template",
                cause=f"{type(error).__name__}: {error}",
                hint="all splits need the columns that the task's file uses",
            ) from error
        self.encodings.keep([request for item in self.items for request in item.requests])
        self.reduced = sum(item.shots < self.shots for item in self.items)
        self.metrics = frozenset(self._task._metric_fn_list)
        self._group_by = group_by

    @property
    def chance(self) -> float:
        """The accuracy of guessing: mean of 1 / choices; 0 where one continuation is judged alone."""
        return float(np.mean([1 / len(item.requests) if len(item.requests) > 1 else 0.0 for item in self.items]))

    def harness_task(self) -> ConfigurableTask:
        """Return the task as lm-eval's own `simple_evaluate` takes it, drawing its own shots."""
        config, splits = self._stock
        return LocalTask(deepcopy(config), {split: read() for split, read in splits.items()})

    @property
    def generation(self) -> dict[str, Any] | None:
        """The harness's settings of a task whose answers are generated, None where choices are scored."""
        return dict(self._task.config.generation_kwargs) if self._task.OUTPUT_TYPE == "generate_until" else None

    @_compiled()
    def match(self, item: Item, text: str) -> float:
        """Return 1 when a generated answer is one of the right ones, as the harness filters and compares it."""
        request = Instance(
            request_type="generate_until", doc=dict(item.doc), arguments=(item.requests[0][0], {}), idx=0
        )
        request.resps = [text]
        for filters in self._task._filters:
            filters.apply([request])
        answer = next(iter(request.filtered_resps.values()))
        return float(self._task.process_results(item.doc, [answer])["exact_match"])

    def group(self, item: Item) -> str:
        """Return the name of the item's sub-task, "" when the task has none."""
        return str(item.doc[self._group_by]) if self._group_by else ""

    def _draw(self, count: int, seed: int, shared: bool, group_by: str, docs: Sequence[Row]) -> list[list[Row]]:
        """Return the shots of each item, as the harness draws them with this seed; `shared`: the first draw for all."""
        if not count:
            return [[] for _ in docs]
        sampler = self._task.sampler
        sampler.set_rnd(seed)
        if not group_by:
            # The harness's own condition: it also holds when neither split is named.
            own = self._task.fewshot_cfg.split == self._task.config.test_split
            draws: list[list[Row]] = []
            for doc in docs:
                fresh = not (shared and draws)
                draws.append(list(sampler.sample(n=count, eval_doc=doc if own else None)) if fresh else draws[0])
            return draws
        pools: dict[object, list[Row]] = defaultdict(list)
        for row in sampler.df:
            pools[row[group_by]].append(row)
        for name, pool in pools.items():
            if type(sampler) is ContextSampler:
                random.Random(f"{seed}/{name}").shuffle(pool)
        return [pools[doc[group_by]][:count] for doc in docs]

    def _render(self, doc: Row, number: int, shots: Sequence[Row]) -> Item:
        task = self._task
        task.sampler = _Fixed(shots)
        context = task.fewshot_context(doc, num_fewshot=len(shots))
        made = task.construct_requests(doc=doc, ctx=context, metadata=(self.name, number, 1))
        if task.OUTPUT_TYPE == "generate_until":
            return Item(str(number), ((made.args[0], ""),), 0, doc, len(shots))
        instances = made if isinstance(made, list) else [made]
        return Item(str(number), tuple(tuple(i.args) for i in instances), self._gold(doc, number), doc, len(shots))

    def _gold(self, doc: Row, number: int) -> int:
        """Return the index of the right choice; SourceError when there is none: the harness would count it as wrong."""
        task = self._task
        if task.OUTPUT_TYPE == "loglikelihood":
            return 0
        choices = task.doc_to_choice(doc)
        gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        if isinstance(gold, str) and gold in choices:
            gold = choices.index(gold)
        if not isinstance(gold, int) or not 0 <= gold < len(choices) or not all(map(str.strip, choices)):
            raise SourceError(
                f"row {number + 1} of task {self.name!r}, split {self._evaluated!r}, cannot be scored",
                cause=f"its right answer is {gold!r} of the choices {choices!r}"[:300],
                hint="label the row or leave it out",
            )
        return int(gold)

    def _longest(self, items: Sequence[Item]) -> list[int]:
        """Return each item's longest request in tokens fed."""
        flat = self.encodings.lengths([request for item in items for request in item.requests])
        longest, at = [], 0
        for item in items:
            longest.append(max(flat[at : at + len(item.requests)]))
            at += len(item.requests)
        return longest

    def _fit(self, shots: list[list[Row]], count: int) -> tuple[int, list[Item]]:
        """Return (shots used, items): equally many shots for all, fewer for items that would not fit otherwise."""
        items = [self._render(doc, i, shots[i]) for i, doc in enumerate(self._docs)]
        lengths = self._longest(items)
        if not count or max(lengths) <= self._max_length:
            return count, items
        bare = self._longest([self._render(doc, i, []) for i, doc in enumerate(self._docs)])
        room = [
            math.floor(count * (self._max_length - b) / max(full - b, 1)) for b, full in zip(bare, lengths, strict=True)
        ]
        used = int(np.clip(np.quantile(room, 1 - _FITTING, method="lower"), 0, count))
        items = [self._render(doc, i, shots[i][:used]) for i, doc in enumerate(self._docs)]
        while True:
            lengths = self._longest(items)
            long = [i for i, n in enumerate(lengths) if n > self._max_length and items[i].shots]
            if not long:
                return used, items
            for i in long:
                items[i] = self._render(self._docs[i], i, shots[i][: items[i].shots - 1])

    @_compiled()
    def outcome(self, item: Item, answers: Sequence[tuple[float, bool]]) -> Outcome:
        """Return what the (log-likelihood, is greedy) pairs of an item's requests mean."""
        results = self._task.process_results(item.doc, list(answers))
        acc = float(results["acc"])
        bits = -answers[item.gold][0] / math.log(2)
        size = len(item.requests[item.gold][1].encode())
        scores = tuple(float(value) for value, _ in answers)
        return Outcome(scores, acc, float(results.get("acc_norm", acc)), bits / size)
