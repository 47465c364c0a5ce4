"""Selections: which of a token's ids serve it, where tokens choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from orchestrator.registry import Registry


@dataclass(frozen=True, slots=True)
class SelectionKind:
    """A selection by name.

    `code` is a function "package.module:name" of (values [T,N] in fp32, k) -> distinct ids [T,k], best first. Values
    are the scores, with the balancing bias where there is one, and -inf for ids that are not to be had; a slot that
    stays empty is -1. It depends on each token's own values alone, since results must not depend on the batch.
    `fixed`: no slot stays empty. `sampled`: it draws from torch's random numbers, and is asked in training alone; an
    evaluation takes the k largest. `parameters` is a frozen dataclass of scalars, the code's last argument
    (`MoESpec.selection_parameters`), None for none.
    """

    name: str
    code: str
    fixed: bool = True
    description: str = ""
    version: int = 1
    parameters: type | None = None
    sampled: bool = False


_OURS = (
    SelectionKind("top_k", "jobs.moe.selection:top_k", description="the k largest, ties to the lower index"),
    SelectionKind(
        "sampled_others",
        "jobs.moe.sampling:sampled_others",
        sampled=True,
        description="the largest, the others drawn in proportion to their scores (GShard's second expert, `sampling`)",
    ),
    SelectionKind(
        "random_others",
        "jobs.moe.sampling:random_others",
        fixed=False,
        sampled=True,
        description="the k largest, of which those after the first stay with probability 2 score (GShard, `random`)",
    ),
)
BUILTINS: Mapping[str, SelectionKind] = MappingProxyType({kind.name: kind for kind in _OURS})
SELECTIONS = Registry("selections", "selection", SelectionKind, BUILTINS)
