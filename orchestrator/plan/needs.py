"""What a plan needs from outside, and what a grid leaves out because nothing says where it lies."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from orchestrator.errors import MoegridError
from orchestrator.spec.grid import Grid
from orchestrator.spec.suites import MODERATION_KEY, LeftOut, left_out
from orchestrator.spec.work import JudgeWork

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
