"""What a stage costs: parameters, FLOPs, bytes, and time estimated from finished stages of the same shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from orchestrator.catalog.experts import EXPERTS
from orchestrator.catalog.frames import FRAMES, LATENT, PLACES
from orchestrator.catalog.routers import kind_of
from orchestrator.catalog.suites import SUITES
from orchestrator.catalog.tasks import task_kind
from orchestrator.plan.sight import active_connector, active_encoder, of_sight
from orchestrator.plan.stage import Stage
from orchestrator.spec.cell import Resources, TaskSpec, TrainSpec
from orchestrator.spec.identity import canonical_text
from orchestrator.spec.model import Model, Moe
from orchestrator.spec.work import DataWork, EvaluateWork, GenerateWork, InitWork, TokensWork, TrainWork

# Sustained FLOP/s assumed before anything of the same shape has finished.
CPU_FLOPS_PER_CORE = 4e10
GPU_FLOPS = 1.2e14
PROCESS_START_SECONDS = 1.0
DATA_SECONDS = 10.0
# Of the window, for examples: a micro-batch is as wide as its longest one (0.6 at scale tiny, less of a longer window).
EXAMPLE_SHARE = 0.5
# Of tasks whose numbers are not known: items, and tokens of a solved one.
UNKNOWN_ITEMS = 1000
UNKNOWN_TOKENS = 100
TOKENS_PER_PROMPT = 30
# How often `seeing_probe` reads a question: as it is, twice to look at the routing, and under four disturbances.
PROBE_PASSES = 7


@dataclass(frozen=True, slots=True)
class Parameters:
    """Parameter counts of a model, by the roles that freeze rules name; `active` = what one token's products use.

    Those of a vision side are counted by role, and not among the active ones, which are those of a token of text.
    """

    roles: Mapping[str, int]
    active: int
    expert: int

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.roles.values())

    @property
    def flops_per_token(self) -> int:
        """Forward FLOPs per token of the matrix products, 2 a parameter (attention scores aside)."""
        return 2 * self.active


@lru_cache(maxsize=4096)
def parameters(model: Model, vocab_size: int) -> Parameters:
    """Count the parameters of `model` from its shape, to the last one; each router counts its own.

    `vocab_size` is used where the model leaves it to the tokenizer. `active` takes every chosen id for an expert of
    full cost.
    """
    moe, kind = model.moe, kind_of(model.moe)
    d = model.hidden_size
    vocab = model.vocab_size or vocab_size
    attention = _attention(model)
    norms = 2 * d
    moe_layers = model.num_layers - model.dense_layers
    expert = _feed_forward(moe, moe.latent_size or d, moe.expert_width)
    around = _frames(moe, d)
    shared_form = EXPERTS.get(moe.shared_expert or moe.expert)
    shared_width = (moe.shared_width or moe.expert_width) * moe.shared_experts
    shared = shared_form.parameter_count(d, shared_width) if moe.shared_experts else 0
    shared += d if moe.shared_gate else 0
    head = vocab * d
    roles = {
        "attention": model.num_layers * attention,
        "embedding": head if model.tie_embeddings else 2 * head,
        "other": model.num_layers * norms + d + model.dense_layers * _feed_forward(moe, d, model.dense_width),
    }
    if kind.routes:
        roles["routed_expert"] = moe_layers * (moe.num_experts * expert + around["routed_expert"])
        roles["shared_expert"] = moe_layers * (shared + around["shared_expert"])
        roles["other"] += moe_layers * around["other"]
        roles["router"] = sum(kind.count(moe, d, first=layer == 0) for layer in range(moe_layers))
    else:
        width = moe.expert_width * moe.top_k + shared_width
        roles["other"] += moe_layers * _feed_forward(moe, d, width)
    active = sum(roles.values())
    # Of the embedding the head alone is multiplied with, of the routed experts those that a token takes.
    idle = roles["embedding"] - head + (moe_layers * (moe.num_experts - moe.top_k) * expert if kind.routes else 0)
    if model.vision is not None:
        for role, count in of_sight(model).items():
            roles[role] = roles.get(role, 0) + count
    return Parameters(roles=roles, active=active - idle, expert=expert)


def _attention(model: Model) -> int:
    """Return the parameters of one layer's attention."""
    d, latent, wide = model.hidden_size, model.latent, model.head_width * model.num_heads
    if latent.kv_rank:
        queries = latent.q_rank * (d + 1 + wide) if latent.q_rank else d * wide
        made = model.num_heads * (latent.plain_dim + latent.value_dim)
        keys_values = d * (latent.kv_rank + latent.rotary_dim) + latent.kv_rank * (1 + made)
        return queries + keys_values + model.num_heads * latent.value_dim * d
    narrow = model.head_width * model.num_kv_heads
    biases = {"": 0, "qkv": wide + 2 * narrow, "all": wide + 2 * narrow + d}[model.attention_bias]
    norms = {"": 0, "full": wide + narrow, "head": 2 * model.head_width}[model.normed]
    return 2 * d * wide + 2 * d * narrow + biases + norms + (model.num_heads if model.attention_sinks else 0)


def _frames(moe: Moe, hidden_size: int) -> Counter[str]:
    """Return the parameters by role of what stands around one block's experts."""
    space = moe.latent_size or hidden_size
    found = Counter(routed_expert=2 * moe.latent_size * hidden_size)
    for place, role in PLACES.items():
        found[role] += FRAMES.get(getattr(moe, place)).parameter_count(space if place in LATENT else hidden_size)
    return found


def _feed_forward(moe: Moe, hidden_size: int, width: int) -> int:
    """Return the parameters of one feed-forward of the experts' form."""
    return EXPERTS.get(moe.expert).parameter_count(hidden_size, width)


@dataclass(frozen=True, slots=True)
class _Cost:
    """What one kind of work costs: what decides its speed, and the tokens that it feeds to the model.

    `passes` is the work of a token in forward passes. A kind that feeds none takes `seconds`.
    """

    shape: Callable[[Any], tuple[object, ...]] = lambda work: ()
    tokens: Callable[[Any, Stage], float] = lambda work, stage: 0.0
    passes: float = 1.0
    seconds: float = PROCESS_START_SECONDS


def _of_training(work: TrainWork) -> tuple[object, ...]:
    train = work.conditions.train
    return canonical_text(work.model), train.micro_batch, train.accumulation, train.sequence_length, train.precision


def _of_evaluation(work: EvaluateWork) -> tuple[object, ...]:
    size = (work.suite, work.limit, work.routing_seeds, work.max_length, work.val_tokens, work.dola)
    return canonical_text(work.model), canonical_text(work.tasks), *size


def _of_generation(work: GenerateWork) -> tuple[object, ...]:
    facts = (canonical_text(work.tasks), canonical_text(work.generation), work.max_length, work.dola)
    return canonical_text(work.model), *facts


def _trained(work: TrainWork, stage: Stage) -> float:
    train = work.conditions.train
    share = EXAMPLE_SHARE if train.data.format in ("instruction", "vision") else 1.0
    return tokens_of(train) * share * stage.steps / train.steps


def _scored(work: EvaluateWork, stage: Stage) -> float:
    if stage.shown:
        return float(stage.shown * PROBE_PASSES * TOKENS_PER_PROMPT)
    passes = 2 + work.routing_seeds if work.routing_seeds else 1
    return passes * sum(_task_tokens(task, work) for task in (*work.tasks, *work.clean)) + work.val_tokens


def _generated(work: GenerateWork, stage: Stage) -> float:
    return sum(task.limit or 200 for task in work.tasks) * (work.generation.new_tokens + TOKENS_PER_PROMPT)


_COSTS: Mapping[str, _Cost] = {
    TrainWork.kind: _Cost(_of_training, _trained, passes=3.0),
    EvaluateWork.kind: _Cost(_of_evaluation, _scored),
    GenerateWork.kind: _Cost(_of_generation, _generated),
    InitWork.kind: _Cost(lambda work: (canonical_text(work.model),)),
    DataWork.kind: _Cost(lambda work: (canonical_text(work.data),), seconds=DATA_SECONDS),
    TokensWork.kind: _Cost(seconds=DATA_SECONDS),
}
_OTHER = _Cost()


def cost_of(stage: Stage) -> _Cost:
    """Return what the stage's kind of work costs."""
    return _COSTS.get(stage.kind, _OTHER)


def shape_of(stage: Stage, resources: Resources) -> tuple[Any, ...]:
    """Return what decides a stage's speed, so that finished stages calibrate unfinished ones."""
    return (stage.kind, stage.phase, canonical_text(resources), *cost_of(stage).shape(stage.form))


def units(stage: Stage) -> float:
    """Return by how much a stage's time grows inside its shape: steps of training, else 1."""
    return float(max(stage.steps, 1))


def tokens_of(train: TrainSpec) -> int:
    """Return the most tokens of a training phase: steps x micro-batches x sequences x length, padding included."""
    return train.steps * train.micro_batch * train.accumulation * train.sequence_length


def flops(stage: Stage, vocab_size: int) -> float:
    """Return the FLOPs of a stage's matrix products: forward and backward for training, forward for evaluation."""
    cost, work = cost_of(stage), stage.form
    tokens = cost.tokens(work, stage)
    if not tokens or not isinstance(work, (TrainWork, EvaluateWork, GenerateWork)):
        return 0.0
    of_text = cost.passes * parameters(work.model, vocab_size).flops_per_token * tokens
    return of_text + cost.passes * _pictures(work, stage) * picture_flops(
        work.model, vocab_size, encoded=_encoded(work)
    )


def _pictures(work: TrainWork | EvaluateWork | GenerateWork, stage: Stage) -> int:
    """Return the pictures that a stage shows the model."""
    if stage.shown:
        return stage.shown * PROBE_PASSES
    if isinstance(work, EvaluateWork) and "pictures" in SUITES.get(work.suite).reads:
        return sum(items_of(task, work) for task in work.tasks)
    if not isinstance(work, TrainWork) or work.conditions.train.data.format != "vision":
        return 0
    return stage.steps * work.conditions.train.micro_batch * work.conditions.train.accumulation


def _encoded(work: TrainWork | EvaluateWork | GenerateWork) -> bool:
    """Return whether a stage computes the features of what it shows."""
    return not (isinstance(work, TrainWork) and work.conditions.features)


def picture_flops(model: Model, vocab_size: int, *, encoded: bool = True) -> int:
    """Return the forward FLOPs of one picture: encoder, unless its features are known, connector, decoder."""
    if model.vision is None:
        return 0
    vision, tokens = model.vision, model.vision.tokens
    in_encoder = 2 * vision.patches * active_encoder(model) if encoded else 0
    in_decoder = tokens * parameters(model, vocab_size).flops_per_token
    return in_encoder + 2 * tokens * active_connector(model) + in_decoder


def evaluated_tokens(stage: Stage) -> int:
    """Return the tokens that an evaluation or generation feeds to the model, shared prefixes once; else 0."""
    return 0 if stage.steps else int(cost_of(stage).tokens(stage.form, stage))


def items_of(task: TaskSpec, work: EvaluateWork) -> int:
    """Return how many items of a task are scored."""
    kind = task_kind(task.name)
    items, asked = kind.items if kind else 0, work.limit or task.limit
    return min(asked, items) if asked and items else asked or items or UNKNOWN_ITEMS


def _task_tokens(task: TaskSpec, work: EvaluateWork) -> int:
    """Return the tokens of a task's items: all that there are, with their shots, up to the window.

    Answers count as one more question; shots that all items of a task share are computed once.
    """
    kind, count = task_kind(task.name), items_of(task, work)
    tokens = kind.tokens if kind else 0
    shots = 0 if work.shots == "shared" or (kind and kind.fixed_shots) else task.shots
    return count * min((tokens or UNKNOWN_TOKENS) * (shots + 2), work.max_length)


def first_guess_seconds(stage: Stage, resources: Resources, vocab_size: int) -> float:
    """Estimate a stage's time from FLOPs alone, before anything of its shape has finished."""
    chips = resources.nodes * resources.processes
    if resources.gpus:
        speed = GPU_FLOPS * resources.nodes * resources.gpus * 0.35
    else:
        speed = CPU_FLOPS_PER_CORE * chips * resources.cores
    return cost_of(stage).seconds + flops(stage, vocab_size) / speed


class Clock:
    """Estimates seconds per stage, calibrated by the manifests of finished stages (`info.seconds`)."""

    def __init__(self, measured: Mapping[tuple[object, ...], float] | None = None) -> None:
        # Seconds and units (steps of training, else stages) measured of each shape.
        self._sums = {shape: (rate, 1.0) for shape, rate in (measured or {}).items()}
        self._samples: dict[tuple[object, ...], int] = {}
        # By what stages of equal cost have in common: the objects, held so that their ids stay theirs.
        self._known: dict[tuple[int, ...], tuple[tuple[object, ...], float]] = {}

    @classmethod
    def from_finished(cls, finished: Iterable[tuple[Stage, Resources, Mapping[str, Any]]]) -> Clock:
        """Build from (stage, resources, manifest info) of finished stages; the mean of a shape counts."""
        clock = cls()
        for stage, resources, info in finished:
            clock.learn(stage, resources, info)
        return clock

    def samples(self, stage: Stage, resources: Resources) -> int:
        """Return how many finished stages of this one's shape it has learnt from."""
        return self._samples.get(shape_of(stage, resources), 0)

    def learn(self, stage: Stage, resources: Resources, info: Mapping[str, Any]) -> bool:
        """Take in what the manifest of a finished stage tells; return whether its shape had been measured by none.

        Training tells `train_seconds` for the `steps_run` since its last resume, all else `seconds`.
        """
        seconds = info.get("train_seconds") or info.get("seconds")
        if not isinstance(seconds, (int, float)) or seconds <= 0:
            return False
        shape = shape_of(stage, resources)
        done = float(info.get("steps_run", units(stage))) if stage.steps else 1.0
        if not done:
            return False
        total, amount = self._sums.get(shape, (0.0, 0.0))
        self._sums[shape] = (total + float(seconds), amount + done)
        self._samples[shape] = self._samples.get(shape, 0) + 1
        self._known.clear()
        return not amount

    def seconds(self, stage: Stage, resources: Resources, vocab_size: int) -> float:
        """Return the expected seconds of `stage`."""
        alike = (*stage.alike, resources)
        identity = (*map(id, alike), vocab_size)
        known = self._known.get(identity)
        if known is None:
            total, amount = self._sums.get(shape_of(stage, resources), (0.0, 0.0)) if self._sums else (0.0, 0.0)
            guess = total / amount * units(stage) if amount else first_guess_seconds(stage, resources, vocab_size)
            known = self._known[identity] = (alike, guess)
        return known[1]
