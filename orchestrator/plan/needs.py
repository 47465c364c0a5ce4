"""What a plan needs from outside, and what a grid leaves out because nothing says where it lies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import MoegridError
from orchestrator.spec.grid import Grid
from orchestrator.spec.hub_sets import hub_name, is_gated
from orchestrator.spec.suites import MODERATION_KEY, LeftOut, left_out
from orchestrator.spec.work import DataWork, InitWork, JudgeWork, TokenizerWork, Work

if TYPE_CHECKING:
    from orchestrator.plan.plan import Plan


def missing_benchmarks(grid: Grid) -> list[LeftOut]:
    """Return the tasks of the grid's suites that no cell can evaluate, each once."""
    sections = {id(item.cell.evaluate): item.cell.evaluate for item in grid.cells}
    return list(dict.fromkeys(found for evaluate in sections.values() for found in left_out(evaluate)))


def missing_keys(plan: Plan) -> MoegridError | None:
    """Return what is wrong when pending judges need a key that this environment does not have, else None."""
    judges = [plan.graph.stages[key].work for key in plan.pending]
    asking = sum(isinstance(work, JudgeWork) and work.judge.name == "openai_moderation" for work in judges)
    if not asking or os.environ.get(MODERATION_KEY, "").strip():
        return None
    return MoegridError(
        f"{MODERATION_KEY} is not set",
        cause=f"judge 'openai_moderation' is asked by {asking} stage{'' if asking == 1 else 's'} of this plan",
        hint=f"export {MODERATION_KEY} here and where jobs run, or leave the judge out (evaluate.judges)",
    )


@dataclass(frozen=True, slots=True)
class Gate:
    """A repository of the hub that only accounts which have accepted its terms may read; how many stages read it."""

    name: str
    stages: int

    @property
    def hint(self) -> str:
        """What to do so that jobs may read it."""
        return "accept the terms on its page, and set HF_TOKEN to a token of that account where jobs run"


def gates(plan: Plan) -> list[Gate]:
    """Return the gated repositories, of those known, that pending stages read."""
    found: dict[str, int] = {}
    for key in plan.pending:
        for source in {*_sources(plan.graph.stages[key].work)}:
            if is_gated(source):
                name = hub_name(source).name
                found[name] = found.get(name, 0) + 1
    return [Gate(name, stages) for name, stages in found.items()]


def has_hub_token() -> bool:
    """Return whether this machine has a token for the hub, where huggingface_hub looks for one."""
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    file = Path(os.environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()
    named = (os.environ.get(name, "").strip() for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
    return any(named) or file.is_file()


def _sources(work: Work) -> Iterator[str]:
    if isinstance(work, DataWork):
        yield from (work.data.source, work.data.mix.source, *(source.data.source for source in work.sources))
    elif isinstance(work, TokenizerWork):
        yield work.tokenizer.source
    elif isinstance(work, InitWork):
        yield work.model.checkpoint
    elif isinstance(work, JudgeWork):
        yield work.judge.source
