"""The papers' own figures, with what is known to be wrong in them, to be shown beside ours and never as targets."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from orchestrator import resources
from orchestrator.report.collect import Results, Setting
from orchestrator.report.statistics import summary

FOLDER = resources.project("grids/reference")
# The published learning rate that the router_lr rows of the fine-tuning tables relate to.
PUBLISHED_LR = 2e-5
LABELS = ("setting", "backbone", "granularity", "shared_expert", "router", "regularisation", "scale", "method", "task")
DESCRIBED = ("setting", "granularity", "shared_expert", "router", "regularisation", "method")
METHODS = {
    "Dense": "dense",
    "SMoE": "smoe",
    "XMoE": "xmoe",
    "σ -MoE": "sigma_moe",
    "SharedE-V2": "sharede_v2",
    "SharedE-V3": "sharede_v3",
    "TC-MoE": "tc_moe",
    "MoE++": "moepp",
}
# LibMoE's names of the losses: load-balance loss, z-loss.
LOSSES = {
    (True, False): "SMoE (0.01 lb)",
    (False, False): "SMoE (no-lb)",
    (True, True): "SMoE (0.01 lb + 0.001 z-loss)",
}
SAME = {"avg": "reasoning_avg", "ppl": "perplexity"}


@dataclass(frozen=True, slots=True)
class Published:
    """One published table: its columns (values in the paper's unit), rows and errata, and the grid it belongs to."""

    name: str
    paper: str
    table: str
    grid: str
    backbone: str
    percent: bool
    title: str
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[Mapping[str, str], ...]
    errata: tuple[str, ...]


@lru_cache(maxsize=1)
def published() -> tuple[Published, ...]:
    """Return all published tables in the order of `tables.csv`."""
    errata = _errata()
    found = []
    for entry in _rows(FOLDER / "tables.csv"):
        rows = _rows(FOLDER / f"{entry['file']}.csv")
        names = tuple(rows[0])
        labels = tuple(name for name in names if name in LABELS or name in ("data", "temperature"))
        found.append(
            Published(
                name=entry["file"],
                paper=entry["paper"],
                table=entry["table"],
                grid=entry["grid"],
                backbone=entry["backbone"],
                percent=entry["percent"] == "yes",
                title=entry["title"],
                labels=labels,
                columns=tuple(name for name in names if name not in labels),
                rows=tuple(rows),
                errata=errata.get(entry["file"], ()),
            )
        )
    return tuple(found)


def ours(results: Results, table: Published, row: Mapping[str, str], column: str) -> str:
    """Return our mean ± 95 % interval for one published value in the paper's unit, "" where we have none."""
    if "temperature" in row:  # here the columns are methods, and a row is a task at a temperature
        setting = next((s for s in results.settings if s.factors.get("preset") == column), None)
        metric = _metric(results, f"{row['task']}/temperature_{float(row['temperature']):g}")
    else:
        setting, metric = match(results, table, row), _metric(results, column)
    if setting is None or metric is None:
        return ""
    values = list(setting.values(metric).values())
    if not values:
        return ""
    found, factor = summary(values), 100.0 if table.percent else 1.0
    digits = 2 if table.percent else 4
    text = f"{found.mean * factor:.{digits}f}"
    return text if found.high is None else f"{text} ± {(found.high - found.mean) * factor:.{digits}f}"


def covered(results: Results, table: Published) -> bool:
    """Return whether we have a value of our own for any of the published ones."""
    return any(ours(results, table, row, column) for row in table.rows for column in table.columns)


def match(results: Results, table: Published, row: Mapping[str, str]) -> Setting | None:
    """Return our setting that a published row describes, None if there is none."""
    for setting in results.settings:
        factors = {name: str(value) for name, value in setting.factors.items()}
        if factors.get("backbone", table.backbone) != row.get("backbone", table.backbone):
            continue
        ours = _described(factors)
        wanted = {name: row[name] for name in DESCRIBED if name in row}
        if "method" in wanted:
            name = wanted["method"]
            wanted["method"] = name if name in LOSSES.values() else METHODS.get(name.split(" (")[0], "")
        if wanted and all(ours.get(name) == value for name, value in wanted.items()):
            return setting
    return None


def _described(factors: Mapping[str, str]) -> dict[str, str]:
    """Return our factors in the words of the published tables."""
    described = {"method": factors.get("preset", "")}
    if "router_lr_ratio" in factors:
        rate = f"{PUBLISHED_LR * float(factors['router_lr_ratio']):.0e}".replace("e-0", "e-")
        described["setting"] = f"router_lr={rate}"
    else:
        described["setting"] = "baseline" if factors.get("freeze") == "none" else factors.get("freeze", "")
    if "aux_coef" in factors:
        losses = float(factors["aux_coef"]) > 0, float(factors.get("z_coef", 0)) > 0
        named = {(True, True): "aux_and_z", (False, True): "no_aux", (True, False): "no_z"}.get(losses, "")
        if "preset" not in factors:
            losses = float(factors["aux_coef"]) > 0, float(factors.get("z_coef", 0)) > 0
            described["method"] = LOSSES.get(losses, "")
        described["regularisation"] = "" if "balance_bias" in factors else named
    if "choice" in factors and "train_select" not in factors:
        described["router"] = "expert" if factors["choice"] == "expert" else factors.get("unit", "token")
        # The tables that name routers write 2/8 with a shared expert where we write 1/7+1.
        routed, _, shared = factors.get("granularity", "").partition("+")
        top, _, total = routed.partition("/")
        extra = int(shared or 0)
        described["granularity"] = f"{int(top or 0) + extra}/{int(total or 0) + extra}"
        described["shared_expert"] = "yes" if extra else "no"
    else:
        described["granularity"] = factors.get("granularity", "")
    return described


def _metric(results: Results, column: str) -> str | None:
    task = results.task_metrics.get(column, "acc_norm" if column == "hellaswag" else "acc")
    candidates = (SAME.get(column, column), f"{column}/{task}", column)
    return next((name for name in candidates if name in results.metrics), None)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _errata() -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    section = ""
    for line in (FOLDER / "ERRATA.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line[3:].strip()
        elif line.startswith("- ") and section:
            found.setdefault(section, []).append(line[2:].strip())
    return {name: tuple(lines) for name, lines in found.items()}
