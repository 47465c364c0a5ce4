"""The plan as people read it: one line per block of the grid, sharing, models, time."""

from __future__ import annotations

from orchestrator.backends.local import Budget
from orchestrator.engine.forecast import Forecast, forecast
from orchestrator.plan.needs import has_hub_token, missing_devices, missing_keys
from orchestrator.plan.plan import Plan
from orchestrator.plan.summary import to_json
from orchestrator.ui.console import Console, columns, duration, plural, quantity

_MARKS = {"run": ("+", "green"), "resume": ("~", "yellow"), "done": ("=", "dim"), "blocked": ("!", "red")}


def show_plan(plan: Plan, console: Console, *, budget: Budget | None = None, adaptive: str = "") -> None:
    """Print the plan.

    `budget` is what the site's machine gives to jobs (None: a scheduler knows), `adaptive` tells of an adaptive number
    of seeds.
    """
    grid = plan.graph.grid
    data = to_json(plan)
    console.tell(
        f"{console.style(grid.name, 'bold')} at scale {grid.scale}: {plural(len(grid.cells), 'cell')}"
        + (f"  {console.style(grid.description, 'dim')}" if grid.description else "")
    )
    for block in data["groups"]:
        segments, factors = block["segments"], ", ".join(block["factors"]) or "one cell"
        actions = "  ".join(_mark(console, name, block["actions"].get(name, 0)) for name in _MARKS)
        shared = segments["unshared"] - segments["shared"]
        console.tell(f"  {actions}  {console.style(f'. shared {shared}', 'cyan')}  {factors}")
        seeds = block["seeds"]
        each = ""
        if seeds > 1 and segments["shared"] % seeds == 0:
            each = f" ({segments['shared'] // seeds} and {segments['unshared'] // seeds} a seed)"
        console.tell(
            f"      {plural(block['cells'], 'cell')} over {plural(seeds, 'seed')}: "
            f"{segments['shared']} training segments instead of {segments['unshared']} without sharing{each}"
        )
        if block["reason"] and block["actions"].get("run", 0) != sum(block["actions"].values()):
            console.tell(f"      {block['reason']}")
    rows = [["phase", "stages", "without sharing", "steps", "without sharing"]]
    for row in data["phases"]:
        stages, steps = row["stages"], row["steps"]
        rows.append(
            [
                row["phase"],
                str(stages["shared"]),
                str(stages["unshared"]),
                str(steps["shared"]) if steps["unshared"] else "",
                str(steps["unshared"]) if steps["unshared"] else "",
            ]
        )
    for line in columns(rows, right=(1, 2, 3, 4), width=max(0, console.width - 2)):
        console.print("  " + line)
    for model in data["models"]:
        console.tell(
            f"  model {model['backbone']} {model['preset']} {model['experts']}: {quantity(model['total'])} parameters, "
            f"{quantity(model['active'])} active, {quantity(model['flops_per_token'])} FLOPs a token forward"
        )
        console.tell(
            "      "
            + " + ".join(f"{phase} {quantity(tokens)}" for phase, tokens in model["tokens"].items())
            + f" tokens a cell ({plural(model['cells'], 'cell')})"
        )
    for mesh in data["meshes"]:
        console.tell(f"  mesh of {mesh['phase']}: {mesh['ranks']} ranks = {mesh['mesh']}")
    kinds = {kind: size for kind, size in data["store_bytes"].items() if size}
    console.tell(
        f"  store: {quantity(sum(kinds.values()))}B ("
        + ", ".join(f"{kind} {quantity(size)}B" for kind, size in kinds.items())
        + "), states on the way not counted"
    )
    for plugin in data["plugins"]:
        console.tell(f"  plugins: {plugin['shown']}")
    if adaptive:
        console.tell(f"  {adaptive}")
    for left in data["left_out"]:
        tasks = ", ".join(left["tasks"])
        console.tell(f"  {console.style('!', 'yellow')} {left['suite']} without {tasks}: no source")
        console.tell(f"      {left['hint']}")
    for idle in data["idle"]:
        console.tell(f"  {console.style('!', 'yellow')} {idle['told']}")
    for package in data["packages"]:
        size = f"{package['megabytes']} MB, fetched once"
        console.tell(f"  package: {package['url']} ({package['licence']}; {size})")
    for gate in data["gated"]:
        mark, token = ("yellow", "") if has_hub_token() else ("red", ", and this machine has no HF_TOKEN")
        console.tell(f"  {console.style('!', mark)} hub://{gate['name']} is gated{token}")
        console.tell(f"      {gate['hint']}")
    for lacking in (missing_keys(plan), missing_devices(plan, budget.gpus if budget else None)):
        if lacking is not None:
            console.tell(f"  {console.style('!', 'red')} {lacking.error}: {lacking.cause}")
            console.tell(f"      {lacking.hint}")
    for blocked in data["blocked"][:5]:
        console.tell(f"  {console.style('!', 'red')} {blocked['label']}: {blocked['reason']}")
    if len(data["blocked"]) > 5:
        console.tell(f"  ... and {len(data['blocked']) - 5} more blocked")
    counts = data["actions"]
    console.tell("  " + "  ".join(_mark(console, name, counts[name]) for name in _MARKS) + "  stages")
    if plan.pending:
        gpu = data["gpu_hours"] > 0
        kind, whole = ("GPU", data["gpu_hours_of_grid"]) if gpu else ("core", _core_hours(plan))
        left = data["gpu_hours"] if gpu else data["core_hours"]
        console.tell(
            f"  estimated: {left:.2f} {kind}-hours left; whole grid {whole['shared']:.2f} with sharing, "
            f"{whole['unshared']:.2f} without"
        )
        if (spec := plan.graph.grid.search) is not None:
            ends = "" if spec.scheduler.name == "fifo" else f", which {spec.scheduler.name} makes less"
            console.tell(
                f"  this is one trial of {spec.trials}: at most {spec.trials * left:.2f} {kind}-hours for the search"
                f"{ends}; what trials share is made once"
            )
        if budget is not None and missing_devices(plan, budget.gpus) is None:
            console.tell(f"  {_times(forecast(plan, budget))}")


def _times(told: Forecast) -> str:
    """Say how long a plan takes, and what no schedule could be faster than."""
    about = "about" if told.simulated else "at most about"
    load, scarce = told.load
    chain = f"{duration(load)} of work a {scarce}, longest chain {duration(told.path)}"
    place = plural(told.cores, "core") + (f" and {plural(told.gpus, 'GPU')}" if told.gpu_work else "")
    return f"on {place}: {about} {duration(told.makespan)}; bound {duration(told.bound)} ({chain})"


def _mark(console: Console, action: str, count: int) -> str:
    mark, colour = _MARKS[action]
    return console.style(f"{mark} {action} {count}", colour if count else "dim")


def _core_hours(plan: Plan) -> dict[str, float]:
    return {
        "shared": plan.hours_of_grid(gpu=False, shared=True),
        "unshared": plan.hours_of_grid(gpu=False, shared=False),
    }
