"""What is written about an attempt: its names, its failure, and the documents of its batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

FORMAT = 1
Fields = Mapping[str, Any]  # of a JSON object
_NOTHING: Fields = {}


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one attempt did not finish one stage. `state` is the last state the attempt committed, `step` where it was.

    `artifact` names the damaged artifact of a `corrupt` failure; `code` is the digest of the code that ran.
    """

    stage: str
    attempt: str
    kind: str
    message: str
    hint: str = ""
    exit_code: int | None = None
    artifact: str = ""
    state: str = ""
    step: int = 0
    code: str = ""
    time: float = 0.0
    tail: str = ""

    def to_json(self) -> Fields:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Fields) -> Failure:
        return cls(**{one.name: data[one.name] for one in fields(cls) if one.name in data})

    @classmethod
    def parse(cls, data: Mapping[str, object]) -> Failure | None:
        """Return the failure, None when `data` is no record of one (damaged)."""
        texts = ("stage", "attempt", "kind", "message", "hint", "artifact", "state", "code", "tail")
        numbers = ("step", "time", "exit_code")
        if not all(isinstance(data.get(name, ""), str) for name in texts) or not {"kind", "message"} <= data.keys():
            return None
        if not all(isinstance(data.get(name), (int, float, type(None))) for name in numbers):
            return None
        return cls.from_json(data)


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a node last said of itself: where it is, how fast, and how it ended (`exit_code`, None until then)."""

    time: float = 0.0
    stage: str = ""
    step: int = 0
    total: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    exit_code: int | None = None
    state: str = ""
    host: str = ""

    @classmethod
    def parse(cls, data: Mapping[str, object]) -> Heartbeat:
        """Return the heartbeat; what is no number or no text where one belongs counts as not said."""
        text = {name: str(data.get(name) or "") for name in ("stage", "state", "host")}
        speed = _number(data, "tokens_per_second") or _number(data, "train/tokens_per_second")
        code = _number(data, "exit_code")
        return cls(
            time=_number(data, "time") or 0.0,
            step=int(_number(data, "step") or 0),
            total=int(_number(data, "total") or 0),
            loss=_number(data, "loss"),
            tokens_per_second=speed,
            exit_code=None if code is None else int(code),
            **text,
        )


def _number(data: Mapping[str, object], name: str) -> float | None:
    value = data.get(name)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """One stage of a job: its key, its label for people, its cells, and its work as JSON.

    `moments`: something goes on from the training state that it makes, so the optimizer's state is kept. `parents` are
    the artifacts that it reads, and whose files it may name as its own.
    """

    key: str
    label: str = ""
    phase: str = ""
    cells: tuple[str, ...] = ()
    work: Fields = field(default_factory=dict)
    moments: bool = True
    parents: tuple[str, ...] = ()

    def to_json(self) -> Fields:
        named = {"key": self.key, "label": self.label, "phase": self.phase, "moments": self.moments}
        return {**named, "cells": list(self.cells), "parents": list(self.parents), "work": self.work}

    @classmethod
    def parse(cls, data: object) -> PlannedStage:
        """Return the stage; ValueError when `data` describes none."""
        read = _mapping(data, "a stage")
        cells, parents = (_sequence(read.get(name, ()), f"its {name}") for name in ("cells", "parents"))
        key, label, phase = _text(read, "key", required=True), _text(read, "label"), _text(read, "phase")
        work = _mapping(read.get("work", _NOTHING), "its work")
        moments = read.get("moments", True) is not False
        return cls(key, label, phase, tuple(map(str, cells)), work, moments, tuple(map(str, parents)))


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """One job of a batch: everything that a node needs to run its stages.

    `resources` and `execution` are fields of the dataclasses of these names, `plugins` the uses of what is not ours
    (orchestrator.spec.providers).
    """

    attempt: str
    label: str
    resources: Fields
    execution: Fields
    stages: tuple[PlannedStage, ...]
    plugins: tuple[Fields, ...] = ()

    @property
    def keys(self) -> list[str]:
        return [stage.key for stage in self.stages]

    @property
    def ranks(self) -> int:
        """How many processes work on it."""
        return int(self.resources.get("nodes", 1)) * int(self.resources.get("processes", 1))

    @property
    def files(self) -> Iterator[str]:
        """The digests of the plugin files that it uses."""
        return (use["version"] for use in self.plugins if use["file"])

    def to_json(self) -> Fields:
        return {
            "attempt": self.attempt,
            "label": self.label,
            "resources": self.resources,
            "execution": self.execution,
            **({"plugins": list(self.plugins)} if self.plugins else {}),
            "stages": [stage.to_json() for stage in self.stages],
        }

    @classmethod
    def parse(cls, data: object) -> PlannedJob:
        """Return the job; ValueError when `data` describes none."""
        read = _mapping(data, "a job")
        stages = tuple(PlannedStage.parse(stage) for stage in _sequence(read.get("stages"), "its stages"))
        uses = tuple(_mapping(use, "a plugin") for use in _sequence(read.get("plugins", ()), "its plugins"))
        if any(not {"provider", "version", "file", "names"} <= use.keys() for use in uses):
            raise ValueError("a plugin without its provider, version or names")
        attempt, label = _text(read, "attempt", required=True), _text(read, "label")
        resources, execution = (_mapping(read.get(name, _NOTHING), name) for name in ("resources", "execution"))
        return cls(attempt, label, resources, execution, stages, uses)


@dataclass(frozen=True, slots=True)
class Submission:
    """What a batch was asked to run, written before its scheduler hears of it.

    `plugin_files` is the content of the plugin files that its jobs use, by digest.
    """

    batch: str
    jobs: tuple[PlannedJob, ...]
    grid: str = ""
    grid_digest: str = ""
    scale: str = ""
    site: str = ""
    site_file: str = ""
    backend: str = ""
    tracking_uri: str = ""
    plugin_files: Fields = field(default_factory=dict)

    def to_json(self) -> Fields:
        return {
            "format": FORMAT,
            "batch": self.batch,
            "grid": self.grid,
            "grid_digest": self.grid_digest,
            "scale": self.scale,
            "site": self.site,
            "site_file": self.site_file,
            "backend": self.backend,
            "tracking_uri": self.tracking_uri,
            **({"plugin_files": dict(self.plugin_files)} if self.plugin_files else {}),
            "jobs": [job.to_json() for job in self.jobs],
        }

    @classmethod
    def parse(cls, data: Mapping[str, object]) -> Submission:
        """Return the submission; ValueError when `data` is damaged."""
        jobs = tuple(PlannedJob.parse(job) for job in _sequence(data.get("jobs"), "jobs"))
        head = {name: _text(data, name) for name in ("batch", *_HEAD)}
        return cls(jobs=jobs, plugin_files=_mapping(data.get("plugin_files", _NOTHING), "plugin_files"), **head)

    def job(self, attempt: str) -> PlannedJob | None:
        """Return the job that is an attempt."""
        return next((job for job in self.jobs if job.attempt == attempt), None)


_HEAD = ("grid", "grid_digest", "scale", "site", "site_file", "backend", "tracking_uri")


def _mapping(value: object, what: str) -> Fields:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what}: {value!r} has no fields")
    return value


def _sequence(value: object, what: str) -> Sequence[object]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{what}: {value!r} is no list")
    return value


def _text(data: Mapping[str, object], name: str, *, required: bool = False) -> str:
    value = data.get(name, "")
    if not isinstance(value, str) or (required and not value):
        raise ValueError(f"{name}: {value!r} is no text")
    return value


def submission_path(batch: str) -> str:
    """Return where a batch's submission lies."""
    return f"submissions/{batch}.json"


def handle_path(attempt: str) -> str:
    """Return where it is written how the scheduler calls an attempt."""
    return f"attempts/{attempt}/handle.json"


def heartbeat_path(attempt: str, rank: int = 0) -> str:
    """Return where a rank's heartbeat lies; the first one's is that of the attempt."""
    return f"attempts/{attempt}/heartbeat{f'.{rank}' if rank else ''}.json"


def report_path(attempt: str) -> str:
    """Return where a node writes why it failed."""
    return f"attempts/{attempt}/failure.json"


def log_folder(attempt: str) -> str:
    """Return the folder of the logs that an attempt's ranks have shipped."""
    return f"attempts/{attempt}/log/"


def log_path(attempt: str, rank: int = 0) -> str:
    """Return where a rank's log lies."""
    return f"{log_folder(attempt)}{rank}.txt"


def series_folder(attempt: str) -> str:
    """Return the folder of the chunks of an attempt's live series."""
    return f"attempts/{attempt}/series/"


def failure_path(stage: str, attempt: str) -> str:
    """Return where a driver writes why an attempt did not finish a stage."""
    return f"failures/{stage}/{attempt}.json"


def pardon_path(stage: str, attempt: str) -> str:
    """Return where it is written that such a failure counts no more."""
    return f"failures/{stage}/{attempt}.pardon"


def driver_of(attempt: str) -> str:
    """Return the id of the driver that made an attempt `<driver>-<batch>-<index>`."""
    return attempt.rsplit("-", 2)[0]


def batch_of(attempt: str) -> str:
    """Return the batch of an attempt."""
    return attempt.rsplit("-", 1)[0]
