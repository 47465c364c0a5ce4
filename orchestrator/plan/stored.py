"""What a grid leaves in the store, in closed form: bytes by kind, from the shapes of its stages alone.

States that are written on the way by time, adapters' own weights and texts are left out: they are small, or nobody
knows how many there will be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.catalog.suites import with_arrays
from orchestrator.plan.cost import items_of, parameters
from orchestrator.plan.graph import StageGraph
from orchestrator.plan.moments import SINGLE, continuations, frozen_roles, keeps_moments, moments_bytes
from orchestrator.plan.plan import Plan
from orchestrator.plan.stage import Stage
from orchestrator.spec.training import TrainSpec
from orchestrator.spec.work import EvaluateWork, InitWork, TrainWork
from orchestrator.store.manifest import LEAST_KEPT

KINDS = ("weights", "moments", "master weights", "routing arrays", "items")
HALF = 2  # bytes of a number in bf16
# A scored item in `items.parquet`.
ITEM_BYTES = 120

Bytes = Counter[str]


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """What is written of a state: bytes by kind. `owners`: the earlier state in whose files a role's weights lie."""

    bytes: Bytes
    width: int
    owners: Mapping[str, State] = field(default_factory=dict)
    trained: frozenset[str] = frozenset()  # roles that were updated in the phase


def begun(sizes: Mapping[str, int]) -> State:
    """Return what is written of initial weights."""
    return State(Counter(weights=SINGLE * sum(sizes.values())), SINGLE)


def following(parent: State, train: TrainSpec, sizes: Mapping[str, int], *, begins: bool, whole: bool) -> State:
    """Return what is written of the state after a segment that goes on from `parent`.

    `begins`: it is the first of its phase; `whole`: with the optimizer's state.
    """
    half = train.precision == "bf16"
    width, frozen = HALF if half else SINGLE, frozen_roles(train, sizes)
    held: dict[State, set[str]] = {}
    if width == parent.width:
        for role in frozen:
            held.setdefault(parent.owners.get(role, parent), set()).add(role)
    owners = {
        role: owner
        for owner, roles in held.items()
        if width * sum(sizes[role] for role in roles) >= LEAST_KEPT * max(1, owner.bytes["weights"])
        for role in roles
    }
    trained = frozenset(sizes.keys() - frozen) | (frozenset() if begins else parent.trained)
    written = Counter(weights=width * sum(size for role, size in sizes.items() if role not in owners))
    if whole:
        written["moments"] = moments_bytes(train, sizes, trained)
        written["master weights"] = SINGLE * sum(sizes.values()) if half else 0
    return State(written, width, owners, trained)


def stored(plan: Plan) -> dict[str, Bytes]:
    """Return phase -> bytes by kind of everything that the grid's stages commit, whether it is there already or not."""
    graph, found = plan.graph, dict[str, Bytes]()
    states: dict[str, State] = {}
    known: dict[tuple[int, ...], State] = {}  # by what stages of equal bytes have in common
    others: dict[tuple[int, ...], Bytes] = {}
    for key, stage in graph.stages.items():
        vocabulary = plan.vocabulary(stage)
        if stage.kind in ("train", "init"):
            states[key] = _state(graph, stage, vocabulary, states, known)
            written = states[key].bytes
        else:
            alike = tuple(map(id, stage.alike))
            written = others[alike] if alike in others else others.setdefault(alike, _measured(stage))
        found.setdefault(stage.phase, Counter()).update(written)
    return found


def _state(
    graph: StageGraph, stage: Stage, vocabulary: int, states: Mapping[str, State], known: dict[tuple[int, ...], State]
) -> State:
    work = stage.form
    assert isinstance(work, (TrainWork, InitWork))
    if isinstance(work, InitWork):
        return begun(parameters(work.model, vocabulary).roles)
    parent, train = states[stage.parents[0]], work.conditions.train
    going_on = min(2, len(continuations(graph, stage.key)))
    alike = (id(parent), id(work.model), id(train), vocabulary, work.start == 0, going_on)
    if alike not in known:
        sizes, whole = parameters(work.model, vocabulary).roles, keeps_moments(graph, stage.key)
        known[alike] = following(parent, train, sizes, begins=work.start == 0, whole=whole)
    return known[alike]


def _measured(stage: Stage) -> Bytes:
    """Return the bytes of an evaluation's results."""
    work = stage.form
    if not isinstance(work, EvaluateWork):
        return Counter()
    items = sum(items_of(task, work) for task in (*work.tasks, *work.clean))
    found: Bytes = Counter(items=items * ITEM_BYTES)
    if with_arrays(work.suite):
        moe, layers = work.model.moe, work.model.num_layers - work.model.dense_layers
        # Counts, pairs and scores of every set of texts, and two similarities.
        sets = 1 + len(work.tasks)
        numbers = layers * (sets * (2 * moe.num_experts + moe.num_experts**2) + 2 * moe.num_experts**2)
        found["routing arrays"] = 8 * numbers
    return found
