"""An own task as an lm-eval task file: `plugins: [./my_task.yaml]`, or a file of the task's name beside the grid.

Its text travels to the nodes and is in the keys of what uses the task, as that of any plugin file; its items are
known by their content.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator import plugins
from orchestrator.catalog.tasks import TaskKind
from orchestrator.errors import MoegridError
from orchestrator.files.problems import Problems
from orchestrator.files.yaml_positions import parse_yaml
from orchestrator.plugins import Plugin

Config = dict[str, Any]
SUFFIXES = (".yaml", ".yml")
_OUTPUTS = ("multiple_choice", "loglikelihood", "generate_until")
# The first name of a template's expression is a column, unless Jinja gives it.
_COLUMN = re.compile(r"\{\{-?\s*([A-Za-z_]\w*)")
_FUNCTIONS = ("range", "dict", "lipsum", "cycler", "joiner", "namespace")
_OF_JINJA = frozenset((*_FUNCTIONS, "loop", "true", "false", "none", "not"))
_TEMPLATES = ("doc_to_text", "doc_to_target", "doc_to_choice")
# Where the data come from: the grid's word, and not the harness's.
_LOADING = ("dataset_path", "dataset_name", "dataset_kwargs")


def read_task(plugin: Plugin) -> Sequence[TaskKind]:
    """Return the declaration of the task in an lm-eval task file; MoegridError with what it cannot be here."""
    problems = Problems()
    # A tag is code of another file; it is refused by its name below.
    document = parse_yaml(plugin.files[plugin.name], plugin.name, problems, {"!function": lambda name: _Code(name)})
    problems.raise_if_any()
    if not isinstance(document.data, dict):
        raise MoegridError(f"task file {plugin.name!r} holds no task", hint="write lm-eval's task: NAME, ...")
    config: Config = dict(document.data)
    name = config.get("task")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise MoegridError(f"task file {plugin.name!r} does not say its task", hint="write task: NAME (a plain name)")
    who = f"task {name!r} of {plugin.name}"
    if code := next((key for key, value in config.items() if isinstance(value, _Code)), ""):
        hint = "declare it in a Python plugin: moegrid new task NAME"
        raise MoegridError(f"{who} needs the code of another file in {code!r}", hint=hint)
    include = config.get("include")
    if include is not None and not str(include).startswith("lm_eval:"):
        raise MoegridError(f"{who} includes {include!r}", hint="include: lm_eval:FOLDER/FILE.yaml of lm-eval's own")
    output = config.get("output_type", "" if include else "generate_until")
    if output and output not in _OUTPUTS:
        raise MoegridError(f"{who} has the output_type {output!r}", hint=f"one of {', '.join(_OUTPUTS)}")
    metrics = [one.get("metric") for one in config.get("metric_list") or () if isinstance(one, Mapping)]
    if output == "generate_until" and "exact_match" not in metrics:
        raise MoegridError(f"{who} generates, and is not compared by exact_match", hint="metric_list: exact_match")
    evaluated = config.get("test_split") or config.get("validation_split") or ""
    if not evaluated and not include:
        raise MoegridError(f"{who} names no test_split", hint="write test_split: train where the data have no splits")
    others = (config.get(f"{split}_split") for split in ("fewshot", "training", "validation"))
    splits = tuple(dict.fromkeys(split for split in (evaluated, *others) if split))
    source, revision = _source(config, plugin, who)
    return [
        TaskKind(
            name,
            int(config.get("num_fewshot") or 0),
            "acc_norm" if "acc_norm" in metrics and "acc" not in metrics else "acc",
            _columns(config),
            splits,
            normalised="acc_norm" in metrics,
            generative=output == "generate_until",
            config={key: value for key, value in config.items() if key not in _LOADING},
            source=source,
            revision=revision,
        )
    ]


class _Code(str):
    """The text behind `!function`."""


def _columns(config: Config) -> tuple[str, ...]:
    """Return the columns that the templates read, as far as they say so without being rendered."""
    found: dict[str, None] = {}
    for key in _TEMPLATES:
        text = config.get(key)
        if isinstance(text, str) and "{%" not in text:
            found.update(dict.fromkeys(name for name in _COLUMN.findall(text) if name not in _OF_JINJA))
    return tuple(found) if not config.get("process_docs") else ()


def _source(config: Config, plugin: Plugin, who: str) -> tuple[str, str]:
    """Return (source, revision) of the items: a local file by its path from the task's, or a data set of the hub."""
    path, kwargs = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    files = kwargs.get("data_files") if isinstance(kwargs, Mapping) else None
    if path in ("json", "parquet") and files:
        given = list(files.values()) if isinstance(files, Mapping) else [files] if isinstance(files, str) else files
        if len(given) != 1 or not isinstance(given[0], str):
            hint = f"lay them in a folder as {config['task']}/SPLIT.jsonl, and set the task's source to file://FOLDER"
            raise MoegridError(f"{who} reads several files", hint=hint)
        return f"file://{(Path(plugin.folder) / given[0]).resolve()}", ""
    if not isinstance(path, str) or path in ("json", "parquet", "csv"):
        return "", ""
    name = config.get("dataset_name")
    return f"hub://{path}" + (f":{name}" if name else ""), str(kwargs.get("revision", "") if kwargs else "")


plugins.READERS.update(dict.fromkeys(SUFFIXES, read_task))
