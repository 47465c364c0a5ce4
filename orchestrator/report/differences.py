"""Which differences between settings the data resolve: against the baseline, between grids, and best in a column."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from orchestrator.catalog.metrics import METRICS, known
from orchestrator.report.collect import CellResult, Results, Setting
from orchestrator.report.statistics import Comparison, compare, correct, item_bootstrap, uninformative
from orchestrator.spec.suites import directions, item_scores, judged

BENCHMARKS = directions()
# A router that sees later tokens makes these meaningless as a measure of a language model.
LANGUAGE_MODEL_METRICS = tuple(kind.name for kind in METRICS.builtins.values() if kind.leaks)


def direction(metric: str) -> int:
    """Return -1 where lower is better, 1 where higher is, 0 where neither is known."""
    name = metric.rsplit("/", 1)[-1]
    ours = METRICS.builtins.get(name)
    if ours is not None and ours.better:
        return ours.better
    if ours is not None or name in BENCHMARKS:
        return BENCHMARKS.get(name, 0)
    judge = judged(name)[1]
    if judge is not None:
        return 1 if judge.higher_is_safer else -1
    kind = known(name)
    return 0 if kind is None else kind.better


def to_baseline(results: Results, metrics: Sequence[str]) -> dict[tuple[str, str], Comparison]:
    """Return (setting, metric) -> its difference to the baseline, corrected over all of them (one table)."""
    found: dict[tuple[str, str], Comparison] = {}
    for setting in results.settings:
        baseline, _ = results.comparable(setting)
        if baseline is None:
            continue
        for metric in metrics:
            if metric in LANGUAGE_MODEL_METRICS and not (setting.causal and baseline.causal):
                continue
            if says_nothing(setting, metric) and says_nothing(baseline, metric):
                continue
            comparison = pair(results, setting, results, baseline, metric)
            if comparison is not None:
                found[setting.name, metric] = comparison
    return correct(found)


def best(results: Results, metric: str) -> str:
    """Return the setting that is best in a column beyond doubt, "" when the data resolve none."""
    sign = direction(metric)
    means: dict[str, float] = {}
    for setting in results.settings:
        values = setting.values(metric)
        leaky = metric in LANGUAGE_MODEL_METRICS and not setting.causal
        if values and not leaky and not says_nothing(setting, metric):
            means[setting.name] = sum(values.values()) / len(values)
    if sign == 0 or len(means) < 2:
        return ""
    first = max(means, key=lambda name: sign * means[name])
    settings = {setting.name: setting for setting in results.settings}
    pairs = {
        name: comparison
        for name in means
        if name != first and (comparison := pair(results, settings[first], results, settings[name], metric)) is not None
    }
    corrected = correct(pairs)
    return first if len(corrected) == len(means) - 1 and all(c.resolved for c in corrected.values()) else ""


def between(first: Results, second: Results, metrics: Sequence[str]) -> dict[tuple[str, str], Comparison]:
    """Return (setting, metric) -> first grid minus second grid for the settings that both have."""
    others = {setting.name: setting for setting in second.settings}
    found: dict[tuple[str, str], Comparison] = {}
    for setting in first.settings:
        other = others.get(setting.name)
        if other is None:
            continue
        for metric in metrics:
            comparison = pair(first, setting, second, other, metric)
            if comparison is not None:
                found[setting.name, metric] = comparison
    return correct(found)


def pair(results: Results, setting: Setting, other_results: Results, other: Setting, metric: str) -> Comparison | None:
    """Return setting minus other in one metric, paired by seed and, where both scored the same items, by item."""
    name = (setting.name, other_results.document["digest"], other.name, metric)
    if name not in results.memory:
        results.memory[name] = _pair(results, setting, other_results, other, metric)
    found: Comparison | None = results.memory[name]
    return found


def _pair(results: Results, setting: Setting, other_results: Results, other: Setting, metric: str) -> Comparison | None:
    ours, theirs = setting.values(metric), other.values(metric)
    shared = [seed for seed in ours if seed in theirs]
    if not shared:
        return None
    columns = _item_columns(results, metric)
    differences: dict[str, list[float]] = {}
    if columns:
        mine, yours = _by_seed(setting.cells), _by_seed(other.cells)
        pairs = [(results.items(mine[s]), other_results.items(yours[s])) for s in shared]
        for task, column in columns.items():
            differences[task] = _item_differences(pairs, task, column)
        differences = {task: values for task, values in differences.items() if values}
    most = max(results.most_seeds, other_results.most_seeds)
    return compare(ours, theirs, item_bootstrap(differences), sum(map(len, differences.values())), most=most)


def says_nothing(setting: Setting, metric: str) -> bool:
    """Return whether an accuracy of this setting is uninformative: chance lies inside its interval for every seed."""
    cells = [cell for cell in setting.cells if metric in cell.metrics]
    one_task = "/" in metric
    return bool(cells) and all(
        uninformative(
            cell.metrics[metric],
            cell.stderr.get(metric),
            cell.chance.get(metric),
            cell.number.get(metric, 0) if one_task else 0,
        )
        for cell in cells
    )


def _by_seed(cells: Iterable[CellResult]) -> dict[object, CellResult]:
    return {cell.seed: cell for cell in cells}


def _item_columns(results: Results, metric: str) -> dict[str, str]:
    """Return task -> the item column whose mean over items (and tasks) is the metric; {} when there is none."""
    if metric == "answer_bpb":
        return dict.fromkeys(results.task_metrics or _tasks(results), "answer_bpb")
    if metric == "reasoning_avg":
        return results.task_metrics
    return item_scores(metric)


def _tasks(results: Results) -> list[str]:
    return [metric.rpartition("/")[0] for metric in results.metrics if metric.endswith("/answer_bpb")]


def _item_differences(
    pairs: Sequence[tuple[Mapping[str, Mapping[str, Mapping[str, float]]], ...]], task: str, column: str
) -> list[float]:
    """Return per item the difference averaged over the seeds, for items that every seed of both scored."""
    scored = [(ours.get(column, {}).get(task, {}), theirs.get(column, {}).get(task, {})) for ours, theirs in pairs]
    common = set(scored[0][0])
    for ours, theirs in scored:
        common &= ours.keys() & theirs.keys()
    return [sum(ours[i] - theirs[i] for ours, theirs in scored) / len(scored) for i in sorted(common)]
