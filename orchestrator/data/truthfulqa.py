"""The layouts in which TruthfulQA is published, as the one that lm-eval's tasks read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from orchestrator.errors import SourceError

if TYPE_CHECKING:
    from orchestrator.data.benchmark_files import Row

COLUMNS = ("question", "mc1_targets", "mc2_targets")
BIG_BENCH = ("Question", "Best answer", "True answers", "False answers")


def listed(where: str, row: Row) -> Row:
    """Return a row with lists of choices and labels, as the hub has it; other columns are left as they are.

    The published mc_task.json has each choice with its label. BIG-bench has answers by what they are: MC1 asks for the
    best one among the false ones, MC2 weighs all true ones against them (Lin et al. 2022). `where` names the row in the
    SourceError of one whose best answer is not among the true ones.
    """
    if all(name in row for name in BIG_BENCH):
        question, best, true, false = (row[name] for name in BIG_BENCH)
        texts = all(isinstance(side, list) and all(isinstance(text, str) for text in side) for side in (true, false))
        if not texts or best not in true:
            raise SourceError(f"{where}: answers are lists of texts, the best one of them among the true ones")
        return {"question": question, "mc1_targets": _targets([best], false), "mc2_targets": _targets(true, false)}
    found = dict(row)
    for name in COLUMNS[1:]:
        targets = found.get(name)
        if isinstance(targets, Mapping) and targets and not targets.keys() & {"choices", "labels"}:
            found[name] = {"choices": list(targets), "labels": list(targets.values())}
    return found


def _targets(true: list[str], false: list[str]) -> Row:
    return {"choices": [*true, *false], "labels": [1] * len(true) + [0] * len(false)}
