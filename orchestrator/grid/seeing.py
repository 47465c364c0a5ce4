"""What is wrong between a model that sees and the phases, data, engine and suites of its cell."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.catalog.engines import ENGINES, that_see
from orchestrator.catalog.lmms import LMMS_EVAL, LMMS_TASKS
from orchestrator.catalog.pictures import VISION_TASKS
from orchestrator.catalog.pins import package_of
from orchestrator.catalog.routers import kind_of
from orchestrator.catalog.suites import SUITES, kinds, read
from orchestrator.errors import did_you_mean
from orchestrator.grid.phase_rules import Finding
from orchestrator.spec.cell import Cell
from orchestrator.spec.rules import SEEING, UPCYCLED


def seeing_findings(cell: Cell) -> Iterator[Finding]:
    """Yield what does not go together in a cell with a vision side, or with a phase that needs one."""
    phases = [name for name in cell.phases if name in SEEING]
    if read(cell.evaluate.suites, "pictures"):
        yield from _of_questions(cell)
    for name, train in cell.phases.items():
        if (train.data.format == "vision") != (name in SEEING):
            wanted = "data with pictures (format: vision)" if name in SEEING else "text, instructions or conversations"
            yield (name, "data", "format"), f"the phase {name} needs {wanted}", "choose other data, or another phase"
    vision = cell.model.vision
    if vision is None:
        if read(cell.evaluate.suites, "shown"):
            message = "the suite seeing_probe measures what sees, and this model reads text alone"
            yield ("evaluate", "suites"), message, "leave it out, or take base: vision_language"
        for name in phases:
            yield ("model", "vision"), f"the phase {name} needs a model that sees", f"set model.vision, or {name}: null"
        return
    if not phases:
        message = "the model sees, and no phase shows it pictures"
        yield ("model", "vision"), message, f"set {' or '.join(SEEING)}, or model.vision: null"
        return
    yield from _of_phases(cell, phases, vision.tokens)
    if vision.upcycle and kind_of(cell.model.moe).routes and UPCYCLED not in phases:
        message = f"vision.upcycle {vision.upcycle!r} has no effect: experts begin with the phase {UPCYCLED}"
        yield ("model", "vision", "upcycle"), message, f'set {UPCYCLED}, or vision.upcycle: ""'
    engine = ENGINES.get(cell.execution.engine)
    if not engine.sees:
        message = f"engine {engine.name!r} does not train models that see"
        yield ("execution", "engine"), message, f"set engine: {' or '.join(that_see())}"
    for kind in kinds(cell.evaluate.suites):
        if (kind.final or kind.routed) and "shown" not in kind.reads:
            message = f"the suite {kind.name} measures the routing of text, and this model's experts may see"
            yield ("evaluate", "suites"), message, "leave it out"
        elif "text" in kind.reads and next(iter(cell.phases)) in SEEING:
            message = f"the suite {kind.name} reads held-out text, and the cell trains on none"
            yield ("evaluate", "suites"), message, "leave it out"


def _of_questions(cell: Cell) -> Iterator[Finding]:
    """Yield what of the sets of questions about pictures cannot be asked."""
    path = ("evaluate", "pictures")
    if cell.model.vision is None:
        yield ("evaluate", "suites"), "questions about pictures are for models that see", "set model.vision"
    asked = {kind.protocol for kind in kinds(cell.evaluate.suites) if "pictures" in kind.reads}
    suite_of = {kind.protocol: kind.name for kind in SUITES.builtins.values() if "pictures" in kind.reads}
    for protocol in asked - {one.protocol for one in cell.evaluate.pictures}:
        message = f"there are no questions about pictures for the suite {suite_of[protocol]} to ask"
        what = f", tasks and protocol: {protocol}" if protocol else " and tasks"
        yield path, message, f"name sets, each with source{what}"
    for one in cell.evaluate.pictures:
        if one.protocol not in asked:
            message = f"set {one.name!r} has protocol {one.protocol!r}, whose suite is not asked"
            yield (*path, one.name, "protocol"), message, f"add {suite_of[one.protocol]} to evaluate, or remove the set"
        if not one.source or not one.tasks:
            yield (*path, one.name), f"set {one.name!r} has no {'tasks' if one.source else 'source'}", "name them"
        elif one.protocol == LMMS_EVAL and package_of(one.source):
            message = f"{one.source} holds questions of ours, none of lmms-eval's"
            yield (*path, one.name, "source"), message, "name a folder or a hub set with its rows"
        known = LMMS_TASKS if one.protocol == LMMS_EVAL else VISION_TASKS if package_of(one.source) else one.tasks
        for task in one.tasks:
            if task not in known:
                message = f"task {task!r} is no question about pictures"
                yield (*path, one.name, "tasks"), message, did_you_mean(task, known, "tasks")


def _of_phases(cell: Cell, phases: list[str], tokens: int) -> Iterator[Finding]:
    for name in phases:
        train = cell.phases[name]
        if train.sequence_length + tokens > cell.model.context:
            message = (
                f"{name}.sequence_length {train.sequence_length} and {tokens} tokens of a picture exceed the context"
            )
            yield (name, "sequence_length"), message, f"model.context is {cell.model.context}"
        if train.adapter.rank:
            yield (name, "adapter", "rank"), f"adapters in {name} are not offered", "set adapter.rank: 0"
