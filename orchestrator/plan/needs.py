"""What a plan needs from outside, and what a grid leaves out because nothing says where it lies."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.catalog.judges import JUDGES
from orchestrator.catalog.pins import package_of
from orchestrator.data.hub_sets import hub_name, is_gated
from orchestrator.errors import MoegridError
from orchestrator.grid.load import Grid
from orchestrator.spec.suites import LeftOut, left_out
from orchestrator.spec.work import DataWork, FeaturesWork, InitWork, JudgeWork, TokenizerWork, Work

if TYPE_CHECKING:
    from orchestrator.plan.plan import Plan


def missing_benchmarks(grid: Grid) -> list[LeftOut]:
    """Return the tasks of the grid's suites that no cell can evaluate, each once."""
    sections = {id(item.cell.evaluate): item.cell.evaluate for item in grid.cells}
    return list(dict.fromkeys(found for evaluate in sections.values() for found in left_out(evaluate)))


def missing_keys(plan: Plan) -> MoegridError | None:
    """Return what is wrong when pending judges need a key that this environment does not have, else None."""
    works = [plan.graph.stages[key].form for key in plan.pending]
    asking = Counter(work.judge.name for work in works if isinstance(work, JudgeWork))
    for name, count in sorted(asking.items()):
        key = JUDGES.get(name).key
        if key and not os.environ.get(key, "").strip():
            return MoegridError(
                f"{key} is not set",
                cause=f"judge {name!r} is asked by {count} stage{'' if count == 1 else 's'} of this plan",
                hint=f"export {key} here and where jobs run, or leave the judge out (evaluate.judges)",
            )
    return None


@dataclass(frozen=True, slots=True)
class Gate:
    """A repository of the hub that only accounts which have accepted its terms may read; how many stages read it."""

    name: str
    stages: int

    @property
    def hint(self) -> str:
        """What to do so that jobs may read it."""
        return "accept the terms on its page, and set HF_TOKEN to a token of that account where jobs run"


def missing_devices(plan: Plan, gpus: int | None) -> MoegridError | None:
    """Return what is wrong when pending stages need more GPUs than the `gpus` here give them, else None.

    None: a scheduler finds the GPUs, and knows what it has.
    """
    if gpus is None:
        return None
    graph, pending = plan.graph, plan.pending
    # Data and tokenizers are made without a GPU, whatever the device.
    on_gpu = [key for key in pending if graph.stages[key].phase != "prepare" and graph.execution(key).device == "cuda"]
    asked = {key: graph.resources(key).gpus for key in pending}
    most = max(asked.values(), default=0)
    if most > gpus:
        phases = dict.fromkeys(plan.graph.stages[key].phase for key in pending if asked[key] > gpus)
        where = ", ".join(f"execution.resources.{phase}.gpus" for phase in phases)
        error, cause = f"this machine has {gpus} GPUs, and the grid asks for {most}", f"{where} of this plan"
    elif on_gpu and not gpus:
        error = "execution.device is 'cuda', and this machine has no GPU"
        cause = f"{len(on_gpu)} stages of this plan would need one"
    else:
        # A job sees the GPUs that it asks for.
        bare = dict.fromkeys(plan.graph.stages[key].phase for key in on_gpu if not asked[key])
        if not bare:
            return None
        error = f"execution.device is 'cuda', and {', '.join(bare)} asks for no GPU"
        cause = ", ".join(f"execution.resources.{phase}.gpus is 0" for phase in bare)
        return MoegridError(error, cause=cause, hint=f"set.execution.resources.{next(iter(bare))}.gpus=1")
    hint = "set.execution.device=cpu and resources without gpus, or another --site; MOEGRID_GPUS=N if there are N here"
    return MoegridError(error, cause=cause, hint=hint)


def gates(plan: Plan) -> list[Gate]:
    """Return the gated repositories, of those known, that pending stages read."""
    found: dict[str, int] = {}
    for key in plan.pending:
        for source in {*_sources(plan.graph.stages[key].form)}:
            if is_gated(source):
                name = hub_name(source).name
                found[name] = found.get(name, 0) + 1
    return [Gate(name, stages) for name, stages in found.items()]


@dataclass(frozen=True, slots=True)
class Fetched:
    """A pinned package of one licence that pending stages read: its makers', not ours."""

    url: str
    licence: str
    megabytes: int


def packages(plan: Plan) -> list[Fetched]:
    """Return the packages that pending stages read, those apart whose sets have licences of their own."""
    read = {package for key in plan.pending for package in map(package_of, _sources(plan.graph.stages[key].form))}
    named = sorted((package for package in read if package and package.licence), key=lambda package: package.url)
    return [Fetched(package.url, package.licence, package.megabytes) for package in named]


def has_hub_token() -> bool:
    """Return whether this machine has a token for the hub, where huggingface_hub looks for one."""
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    file = Path(os.environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()
    named = (os.environ.get(name, "").strip() for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
    return any(named) or file.is_file()


def _sources(work: Work) -> Iterator[str]:
    if isinstance(work, DataWork):
        apart = (source.data.source for source in work.sources)
        yield from (work.data.source, work.data.mix.source, *(one.source for one in work.data.corpora), *apart)
    elif isinstance(work, TokenizerWork):
        yield work.tokenizer.source
    elif isinstance(work, InitWork):
        yield from (work.model.checkpoint, work.model.vision.checkpoint if work.model.vision else "")
    elif isinstance(work, FeaturesWork):
        yield work.encoder.checkpoint
    elif isinstance(work, JudgeWork):
        yield work.judge.source
