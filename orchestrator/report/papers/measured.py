"""Our values for the papers' columns, and whether they were measured in the same way: tasks, shots, items, size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from orchestrator.catalog.routers import PRINTED
from orchestrator.report.collect import CellResult, Results, Setting
from orchestrator.report.papers.declared import Column, Entry, Exhibit
from orchestrator.report.statistics import summary

# The published learning rate that the router_lr rows of the fine-tuning tables relate to.
PUBLISHED_LR = 2e-5
DESCRIBED = ("setting", "granularity", "shared_expert", "router", "regularisation", "method")
# LibMoE's names of the losses: load-balance loss, z-loss.
LOSSES = {
    (True, False): "SMoE (0.01 lb)",
    (False, False): "SMoE (no-lb)",
    (True, True): "SMoE (0.01 lb + 0.001 z-loss)",
}
# A model is of the published size when its parameters are no further from it than this share.
SIZE_TOLERANCE = 0.05
_METHODS = {name.casefold(): preset for name, preset in PRINTED.items()}
_SCALED: Mapping[str, Callable[[float], float]] = {"percent": lambda v: 100.0 * v, "perplexity": math.exp}


def text(results: Results, exhibit: Exhibit, row: Mapping[str, str], column: Column) -> str:
    """Return our mean ± 95 % interval for a row and column of a table in the paper's unit, "" where we have none."""
    found = values(results, exhibit, row, column)
    if not found:
        return ""
    digits = 2 if _asked(results, exhibit, row, column)[1].unit in ("percent", "perplexity") else 4
    middle = summary(found, results.most_seeds)
    told = f"{middle.mean:.{digits}f}"
    return told if middle.high is None else f"{told} ± {middle.high - middle.mean:.{digits}f}"


def values(results: Results, exhibit: Exhibit, row: Mapping[str, str], column: Column) -> list[float]:
    """Return our values, one a seed, in the paper's unit."""
    setting, column = _asked(results, exhibit, row, column)
    if setting is None:
        return []
    found = [_value(cell, exhibit, column) for cell in setting.cells]
    return [value for value in found if value is not None]


def otherwise(results: Results, exhibit: Exhibit, row: Mapping[str, str], column: Column) -> str:
    """Return how ours was measured in another way than the printed value (size, task, shots, items), "" if it was not.

    A value that was measured otherwise never stands beside the printed one.
    """
    setting, column = _asked(results, exhibit, row, column)
    if setting is None:
        return "no setting of ours is this row"
    reasons = [_other_size(results, exhibit, row, setting), _other_data(exhibit, row, setting)]
    columns = tasks_of(exhibit) if column.mean else (column,)
    reasons += [_other_protocol(setting.cells[0], one) for one in columns]
    return "; ".join(dict.fromkeys(filter(None, reasons)))


def tasks_of(exhibit: Exhibit) -> tuple[Column, ...]:
    """Return the columns that the printed average is of."""
    return tuple(column for column in exhibit.columns if column.shots is not None)


def match(results: Results, exhibit: Exhibit, row: Mapping[str, str]) -> Setting | None:
    """Return our setting that a printed row describes, None if there is none."""
    for setting in results.settings:
        factors = {name: str(value) for name, value in setting.factors.items()}
        model = setting.cells[0].document.get("resolved", {}).get("model", {})
        backbone = factors.get("backbone") or str(model.get("backbone", exhibit.backbone))
        if backbone != (row.get("backbone") or exhibit.backbone or backbone):
            continue
        ours = described(factors)
        wanted = {name: row[name] for name in DESCRIBED if name in row}
        if "method" in wanted:
            name = wanted["method"]
            wanted["method"] = name if name in LOSSES.values() else _METHODS.get(name.split(" (")[0].casefold(), "")
        if wanted and all(ours.get(name) == value for name, value in wanted.items()):
            return setting
    return None


def described(factors: Mapping[str, str]) -> dict[str, str]:
    """Return our factors in the words of the published tables."""
    found = {"method": factors.get("preset", "")}
    if "router_lr_ratio" in factors:
        rate = f"{PUBLISHED_LR * float(factors['router_lr_ratio']):.0e}".replace("e-0", "e-")
        found["setting"] = f"router_lr={rate}"
    else:
        found["setting"] = "baseline" if factors.get("freeze") == "none" else factors.get("freeze", "")
    if "aux_coef" in factors:
        losses = float(factors["aux_coef"]) > 0, float(factors.get("z_coef", 0)) > 0
        named = {(True, True): "aux_and_z", (False, True): "no_aux", (True, False): "no_z"}.get(losses, "")
        if "preset" not in factors:
            found["method"] = LOSSES.get(losses, "")
        found["regularisation"] = "" if "balance_bias" in factors else named
    if "choice" in factors and "train_select" not in factors:
        found["router"] = "expert" if factors["choice"] == "expert" else factors.get("unit", "token")
        # The tables that name routers write 2/8 with a shared expert where we write 1/7+1.
        routed, _, shared = factors.get("granularity", "").partition("+")
        top, _, total = routed.partition("/")
        extra = int(shared or 0)
        found["granularity"] = f"{int(top or 0) + extra}/{int(total or 0) + extra}"
        found["shared_expert"] = "yes" if extra else "no"
    else:
        found["granularity"] = factors.get("granularity", "")
    return found


def _asked(results: Results, exhibit: Exhibit, row: Mapping[str, str], column: Column) -> tuple[Setting | None, Column]:
    """Return our setting of a row, and the column; where columns are methods a row is a task at a temperature."""
    if "temperature" not in row:
        return match(results, exhibit, row), column
    setting = next((s for s in results.settings if s.factors.get("preset") == column.name), None)
    metric = f"{row['task']}/temperature_{float(row['temperature']):g}"
    return setting, Column(column.name, metric, shots=0, unit="percent")


def _value(cell: CellResult, exhibit: Exhibit, column: Column) -> float | None:
    if column.mean:
        parts = [_value(cell, exhibit, task) for task in tasks_of(exhibit)]
        known = [part for part in parts if part is not None]
        return sum(known) / len(known) if known and len(known) == len(parts) else None
    value = cell.metrics.get(column.metric)
    return None if value is None else _SCALED.get(column.unit, float)(value)


def _other_size(results: Results, exhibit: Exhibit, row: Mapping[str, str], setting: Setting) -> str:
    scale = row.get("scale", "")
    sizes = exhibit.dense_size if exhibit.dense_size and row.get("method", "").startswith("Dense") else exhibit.size
    wanted = sizes.get(scale, sizes.get(""))
    if wanted is None:
        ours = str(results.document["scale"])
        return "" if exhibit.scale == ours else f"scale {ours} here, the paper's is {exhibit.scale or 'not printed'}"
    parameters = setting.cells[0].document.get("parameters", {}).get("total", 0) / 1e6
    if abs(parameters - wanted) <= SIZE_TOLERANCE * wanted:
        return ""
    return f"{parameters:,.4g} M parameters here, {wanted:,.5g} M there"


def _other_data(exhibit: Exhibit, row: Mapping[str, str], setting: Setting) -> str:
    """Return in what the last phase was trained on other data than the row's."""
    wanted = exhibit.data.get(row.get("data", ""))
    resolved: Entry = setting.cells[0].document.get("resolved", {})
    ours = str(((resolved.get("instruct") or {}).get("data") or {}).get("source", ""))
    return "" if wanted is None or wanted in ours else f"trained on {ours or 'a mixture'} here, on {wanted} there"


def _other_protocol(cell: CellResult, column: Column) -> str:
    """Return in what a task was scored otherwise than the paper scores it."""
    if column.differs:
        return f"{column.name}: {column.differs}"
    if column.items and (scored := cell.number.get(column.metric, column.items)) != column.items:
        return f"{column.name}: {scored} items here, {column.items} there"
    if column.shots is None:
        return ""
    name = column.metric.partition("/")[0]
    evaluate: Entry = cell.document.get("resolved", {}).get("evaluate") or {}
    tasks: list[Entry] = evaluate.get("tasks", [])
    task = next((task for task in tasks if task["name"] == name), None)
    if task is None:
        return f"{name} is not evaluated here"
    reasons = []
    if int(task.get("shots", 0)) != column.shots:
        reasons.append(f"{task.get('shots', 0)} shots here, {column.shots} there")
    # Under another temperature as many items are scored as under interventions.
    limit = evaluate.get("efficiency_limit", 0) if "/temperature_" in column.metric else task.get("limit")
    if limit:
        reasons.append(f"{limit} of all items")
    return f"{name}: {', '.join(reasons)}" if reasons else ""
