"""Tables as data: the headline table, differences to the baseline, grid against grid, one row a cell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.catalog.benchmarks import BENCHMARK_OF
from orchestrator.catalog.metrics import BLIND
from orchestrator.report import outside
from orchestrator.report.collect import BLOCKED, FAILED, CellResult, Results
from orchestrator.report.differences import LANGUAGE_MODEL_METRICS, best, between, direction, says_nothing, to_baseline
from orchestrator.report.statistics import Comparison, Summary, summary

DIGITS = 4
UNRESOLVED = "n.r."
MISSING = "-"
MARKS = {"?": "uninformative: chance lies inside its interval", "~": "leaky router: not ranked"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One cell of a table: what is shown, the numbers behind it, and how to mark it."""

    text: str
    value: float | None = None
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    bold: bool = False
    mark: str = ""  # "?" uninformative, "~" leaky router, "" none
    reason: str = ""


TableRow = tuple[tuple[str, ...], tuple[Entry, ...]]


@dataclass(frozen=True, slots=True)
class Table:
    """Label columns first, then one column a metric; `notes` explain the marks."""

    title: str
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...] = ()


def headline(results: Results, metrics: Sequence[str] | None = None) -> Table:
    """Return rows = settings, columns = metrics with mean and 95 % interval over seeds, primary columns first."""
    chosen = tuple(metrics) if metrics is not None else headline_metrics(results)
    bests = {metric: best(results, metric) for metric in chosen}
    rows = []
    for setting in results.settings:
        labels = (*(str(setting.factors.get(name, "")) for name in results.factors), str(len(setting.cells)))
        entries = []
        for metric in chosen:
            values = list(setting.values(metric).values())
            if not values:
                entries.append(Entry(MISSING, reason=setting.reason() or "not measured"))
                continue
            mark = "?" if says_nothing(setting, metric) else ""
            if metric in LANGUAGE_MODEL_METRICS and not setting.causal:
                mark = "~"
            incomplete = setting.reason() if len(values) < len(setting.cells) else ""
            found = summary(values, results.most_seeds)
            entry = _entry(found, bold=bests[metric] == setting.name, mark=mark, reason=incomplete)
            entries.append(replace(entry, text=f"{entry.text} (n={found.n})") if incomplete else entry)
        rows.append((labels, tuple(entries)))
    title = (
        f"{results.name} ({results.document['scale']}): mean ± 95 % interval over seeds ({results.document['seed']})"
    )
    return Table(title, (*results.factors, "seeds"), chosen, tuple(rows), tuple(_notes(results, chosen, rows)))


def headline_metrics(results: Results) -> tuple[str, ...]:
    """Return the columns of the headline table: all but the per-task scores that no paper's table shows."""
    kept = []
    for metric in results.metrics:
        task, _, name = metric.rpartition("/")
        # A benchmark's tasks have columns for all of them together.
        # A baseline stands beside what it is of.
        shown = name in (results.task_metrics.get(task, "acc"), BLIND)
        if not task or (task not in BENCHMARK_OF and shown):
            kept.append(metric)
    return tuple(kept)


def differences(results: Results, metrics: Sequence[str]) -> Table:
    """Return the differences to the baseline with their intervals and verdicts, corrected over the whole table."""
    found = to_baseline(results, metrics)
    baseline = ", ".join(f"{k}={v}" for k, v in (results.document.get("baseline") or {}).items())
    labels = {s.name: tuple(str(s.factors.get(name, "")) for name in results.factors) for s in results.settings}
    rows = [
        (labels[setting.name], tuple(difference(found.get((setting.name, metric))) for metric in metrics))
        for setting in results.settings
        if any((setting.name, metric) in found for metric in metrics)
    ]
    notes = [
        "setting minus baseline, paired by seed (and by item where items were scored), 95 % intervals;"
        f" bold: resolved after Holm's correction over this table; {UNRESOLVED}: not resolved, and about how many seeds"
        " would do"
    ]
    for setting in results.settings:
        reason = results.comparable(setting)[1]
        if reason and reason != "this is the baseline":
            notes.append(f"{setting.name}: not compared, {reason}")
    return Table(f"differences to {baseline}", results.factors, tuple(metrics), tuple(rows), tuple(notes))


def grids(first: Results, second: Results) -> Table:
    """Return first grid minus second grid for the settings and metrics that both have."""
    metrics = [metric for metric in headline_metrics(first) if metric in second.metrics]
    found = between(first, second, metrics)
    names = [s.name for s in first.settings if any((s.name, metric) in found for metric in metrics)]
    rows = [((name,), tuple(difference(found.get((name, metric))) for metric in metrics)) for name in names]
    only = sorted({s.name for s in first.settings} ^ {s.name for s in second.settings})
    notes = [
        f"{first.name} minus {second.name}, paired by seed and item; bold: resolved after Holm's correction;"
        f" {UNRESOLVED}: not resolved, and about how many seeds would do"
    ]
    if only:
        notes.append(f"in one grid alone: {', '.join(only)}")
    return Table(f"{first.name} against {second.name}", ("setting",), tuple(metrics), tuple(rows), tuple(notes))


def long_rows(results: Results) -> list[dict[str, Any]]:
    """Return one row a setting and seed: the factors, then state and metrics, unrounded.

    Where something came from outside, `plugins` says from which package or plugin file, and its version.
    """
    factors = [name for name in results.document["factors"] if name != "seed"]
    plugins = bool(outside.uses(results))
    rows = []
    for cell in results.cells:
        row: dict[str, object] = {name: cell.factors.get(name, "") for name in factors}
        row |= {"seed": cell.seed, "state": cell.state, "reason": cell.reason}
        if plugins:
            row["plugins"] = ", ".join(str(use.origin) for use in outside.cell_uses(results, cell))
        row |= {metric: cell.metrics.get(metric) for metric in results.metrics}
        rows.append(row)
    return rows


def listed(results: Results) -> Table:
    """Return one row a setting and seed for a terminal: the factors, the state, and the metrics in few digits."""
    factors = [name for name in results.document["factors"] if name != "seed"]
    rows = []
    for cell in results.cells:
        found = [cell.metrics.get(metric) for metric in results.metrics]
        entries = tuple(Entry(MISSING if value is None else number(value), value) for value in found)
        rows.append(((*(str(cell.factors.get(name, "")) for name in factors), str(cell.seed), cell.state), entries))
    reasons = Counter(cell.reason for cell in results.cells if cell.reason)
    notes = tuple(f"{count} of {len(results.cells)} cells: {reason}" for reason, count in reasons.items())
    title = f"{results.name} ({results.document['scale']}): one row per setting and seed"
    return Table(title, (*factors, "seed", "state"), tuple(results.metrics), tuple(rows), notes)


def _entry(found: Summary, *, bold: bool, mark: str, reason: str) -> Entry:
    text = number(found.mean)
    if found.high is not None:
        text += f" ± {number(found.high - found.mean)}"
    return Entry(text, found.mean, found.stderr, found.low, found.high, found.n, bold, mark, reason)


def difference(found: Comparison | None) -> Entry:
    """Return a difference as a table shows it: its size and interval, bold where it is resolved."""
    if found is None:
        return Entry(MISSING, reason="not compared")
    text = f"{found.difference:+.{DIGITS}f}"
    if found.low is not None and found.high is not None:
        text += f" [{found.low:+.{DIGITS}f}, {found.high:+.{DIGITS}f}]"
    if not found.resolved:
        text += f" {UNRESOLVED}" + (f" ({found.needed} seeds)" if found.needed else "")
    return Entry(
        text,
        found.difference,
        found.stderr,
        found.low,
        found.high,
        found.seeds,
        bold=found.resolved,
        reason="" if found.resolved else found.verdict(),
    )


def _notes(
    results: Results, metrics: Sequence[str], rows: Sequence[tuple[tuple[str, ...], tuple[Entry, ...]]]
) -> list[str]:
    entries = [entry for _, row in rows for entry in row]
    notes = []
    primary = [metric for metric in results.primary if metric in metrics]
    if primary:
        notes.append(f"primary at this scale: {', '.join(primary)}")
    directed = [f"{m} {'lower' if direction(m) < 0 else 'higher'}" for m in primary if direction(m)]
    if directed:
        notes.append(f"better: {', '.join(directed)}; bold (*) only where it is resolved from every other setting")
    notes += [f"{mark} {text}" for mark, text in MARKS.items() if any(entry.mark == mark for entry in entries)]
    if "adaptive" in results.document:
        notes.append(_adaptive(results, results.document["adaptive"]))
    missing: dict[str, list[str]] = {}
    for setting in results.settings:
        if setting.reason():
            missing.setdefault(setting.reason(), []).append(setting.name)
    notes += [f"missing in {', '.join(names)}: {reason}" for reason, names in missing.items()]
    for phase, found in numerics(results).items():
        if len(found) > 1 or any("from a state of other" in text for text in found):
            notes.append(f"this table mixes numerics in {phase}: " + " | ".join(found))
    notes += stopped(results)
    notes += [f"plugins: {use}" for use in outside.uses(results)]
    notes += outside.mixed(results)
    return notes + _protocol(results)


def _protocol(results: Results) -> list[str]:
    """Return in what the scores were not made as the harness makes them."""
    notes = []
    evaluated = [manifest.info for manifest in results.manifests.values() if manifest.kind == "evaluate"]
    shared = [info for info in evaluated if info.get("shots") == "shared"]
    if shared:
        rest = "" if len(shared) == sum("shots" in info for info in evaluated) else " in some of these cells"
        notes.append(f"another protocol: all items of a task have the same shots (evaluate.shots: shared){rest}")
    if any(m.numerics.get("tf32") for m in results.manifests.values() if m.kind == "evaluate"):
        notes.append("scored with fp32 products in TF32 (execution.tf32)")
    deviations = [float(i["loglikelihood_deviation"]) for i in evaluated if "loglikelihood_deviation" in i]
    if deviations:
        worst = f"{max(deviations):.2g}"
        notes.append(f"not scored in fp32: batching moves a sample of the log-likelihoods by up to {worst} nats")
    return notes


def _adaptive(results: Results, asked: Mapping[str, Any]) -> str:
    """Return how many seeds each setting took, and where they did not suffice."""
    taken = Counter(len(setting.cells) for setting in results.settings)
    counts = ", ".join(f"{seeds} seeds: {count}" for seeds, count in sorted(taken.items()))
    holds = f"intervals and tests hold at every number of seeds up to {asked['max_seeds']}"
    lost = [s.name for s in results.settings if any(_lost(cell, asked["metric"]) for cell in s.cells)]
    gone = (
        f"; {'left the race' if asked.get('race') else 'got no more'}, a seed failed: {', '.join(lost)}" if lost else ""
    )
    if asked.get("race"):
        return (
            f"adaptive: seeds go where they decide {asked['metric']} ({asked['race']}), at most {asked['max_seeds']}; "
            f"{holds}; settings with {counts}{gone}"
        )
    wide: dict[str, list[str]] = {}
    for setting in results.settings:
        values = list(setting.values(asked["metric"]).values())
        if setting.name in lost:
            continue
        found = summary(values, results.most_seeds) if values else None
        half = None if found is None or found.high is None else found.high - found.mean
        if half is None or half > asked["halfwidth"]:
            why = "still wider with the most seeds" if len(setting.cells) >= asked["max_seeds"] else "not there yet"
            wide.setdefault(why, []).append(setting.name if half is None else f"{setting.name} (±{number(half)})")
    text = (
        f"adaptive: seeds are added until the 95 % interval of {asked['metric']} is ±{asked['halfwidth']:g}"
        f" or narrower, at most {asked['max_seeds']}; {holds}; settings with {counts}"
    )
    return text + gone + "".join(f"; {why}: {', '.join(names)}" for why, names in wide.items())


def _lost(cell: CellResult, metric: str) -> bool:
    """Return whether a cell failed before the metric that decides about seeds was measured."""
    return metric not in cell.metrics and cell.state in (FAILED, BLOCKED)


def stopped(results: Results) -> list[str]:
    """Return what of the planned training was not trained, since it stopped early: a line for each such state's run."""
    found: dict[tuple[str, str], str] = {}
    for cell in results.cells:
        for key in cell.document["stages"]:
            manifest = results.manifests.get(key)
            info = {} if manifest is None else manifest.info
            at, total, phase = info.get("stopped_at"), info.get("total"), info.get("phase")
            if at and at != total:
                found[cell.name, str(phase)] = f"{cell.name}: {phase} stopped early, after step {at} of {total}"
    return list(found.values())


def numerics(results: Results) -> dict[str, list[str]]:
    """Return per training phase the distinct numerics (device, threads, world size, engine, torch) of its states."""
    names = (
        "device",
        "engine",
        "mesh",
        "world_size",
        "threads",
        "torch",
        "deterministic",
        "cpu_capability",
        "mkl_branch",
        "products",
        "cpu",
    )
    found: dict[str, dict[str, bool]] = {}
    for key, manifest in results.manifests.items():
        if manifest.kind == "train":
            phase = results.document["stages"].get(key, {}).get("phase", "training")
            text = ", ".join(f"{n} {manifest.numerics[n]}" for n in names if manifest.numerics.get(n, "") != "")
            text += "".join(f", {name}={value}" for name, value in manifest.numerics.get("variables", {}).items())
            text += ", fp32 products in TF32" if manifest.numerics.get("tf32") else ""
            if manifest.info.get("mixed_numerics"):
                text += ", from a state of other numerics"
            if manifest.info.get("mixed_code"):
                text += ", from a state of other training code"
            found.setdefault(phase, {})[text] = True
    return {phase: list(texts) for phase, texts in found.items()}


def number(value: float | None) -> str:
    """Return a value as every form shows it, "" for None."""
    return "" if value is None else f"{value:.{DIGITS}f}"
