"""Task accuracies with the router disturbed: best experts dropped, logits divided by a temperature (LibMoE)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np

from jobs.evaluate.chunks import chunks, outcomes
from jobs.moe.interventions import dropped, temperature
from jobs.probe.metrics import drop_top, in_range

if TYPE_CHECKING:
    from torch import nn

    from jobs.evaluate.harness import Prepared
    from jobs.evaluate.prefix_lm import PrefixLM
    from jobs.models.backbones import CausalLM
    from jobs.moe.block import MoEBlock

TEMPERATURES = (0.1, 10.0)  # 1 is the model as it is
DROPS = {"drop_top1": 1, "drop_top12": 2}


def disturbed(model: CausalLM, lm: PrefixLM, tasks: Sequence[Prepared], primary: dict[str, str]) -> dict[str, float]:
    """Return the accuracy changes `drop_top1`, `drop_top12` and accuracies `temperature_<tau>`, by task and averaged.

    `primary`: task -> the accuracy it reports. Dropping is left out where too few experts would remain (k + n > N) and
    for expert choice, which ranks tokens.
    """
    schedules = {task.name: list(chunks(task)) for task in tasks}
    scores: dict[str, dict[str, float]] = {}
    for name, switched in interventions(model, model.moe_blocks):
        with switched:
            scores[name] = {
                task: float(
                    np.mean(
                        [
                            getattr(row.outcome, primary[task])
                            for chunk in parts
                            for row in outcomes(chunk, chunk.answers(lm), name)
                        ]
                    )
                )
                for task, parts in schedules.items()
            }
    base = scores.pop("base")
    found: dict[str, float] = {}
    for name, by_task in {"temperature_1": base, **scores}.items():
        values = {
            task: drop_top(base[task], value) if name in DROPS else in_range("accuracy", value, 0.0, 1.0)
            for task, value in by_task.items()
        }
        found |= {f"{task}/{name}": value for task, value in values.items()}
        found[name] = float(np.mean(list(values.values())))
    return found


def interventions(model: nn.Module, blocks: Sequence[MoEBlock]) -> Iterator[tuple[str, AbstractContextManager[None]]]:
    """Yield (name, what disturbs the routers of `model`, a model or one of its parts, whose blocks these are)."""
    yield "base", nullcontext()
    for name, n in DROPS.items():
        if all(block.moe.choice != "expert" and block.moe.top_k + n <= block.router.choices for block in blocks):
            yield name, dropped(model, n)
    for tau in TEMPERATURES:
        yield f"temperature_{tau:g}", temperature(model, tau)
