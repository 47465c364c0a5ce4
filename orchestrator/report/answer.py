"""What a grid found, in sentences made from its statistics: the first thing that its report says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from html import escape, unescape

from orchestrator.report.collect import DONE, FAILED, RUNNING, Results
from orchestrator.report.differences import direction, to_baseline
from orchestrator.report.statistics import Comparison
from orchestrator.report.tables import DIGITS
from orchestrator.report.words import named, words_of

# More differences than this are counted, and only the largest of each kind are spelt out.
MOST_SENTENCES = 4
# More seeds than this are no advice that one can follow.
MOST_ADVISED = 100


def answer(results: Results, command: str = "") -> str:
    """Return the opening of the report: what was compared, what differs and how surely, what to do next."""
    again = command or f"moegrid run {results.name} --scale {results.document['scale']}"
    sentences = [compared(results), *found(results)]
    told = "".join(f"<p>{sentence}</p>" for sentence in sentences)
    todo = "".join(f"<li>{line}</li>" for line in next_steps(results, again))
    return (
        f'<div class="answer">{told}'
        + (f"<p>Next:</p><ul>{todo}</ul>" if todo else "")
        + f"<p class='quiet'>{escape(_when(results))}Made again by <code>{escape(again)}</code></p></div>"
    )


def as_markdown(results: Results, command: str = "") -> str:
    """Return the opening of the report as Markdown, for where no page is shown."""
    text = re.sub(r"<li[^>]*>", "\n- ", answer(results, command))
    text = re.sub(r"</?code>", "`", re.sub(r"</?b>", "**", re.sub(r"</?(p|ul)[^>]*>", "\n\n", text)))
    lines = unescape(re.sub(r"<[^>]*>", "", text)).splitlines()
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines)).strip() + "\n"


def compared(results: Results) -> str:
    """Return the sentence about what was run."""
    states = Counter(cell.state for cell in results.cells)
    seeds = Counter(len(setting.cells) for setting in results.settings)
    each = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    factors = ", ".join(f"<b>{escape(name)}</b>" for name in results.factors)
    number = len(results.settings)
    done = f"{states[DONE]} of {len(results.cells)} cells are done" if states[DONE] < len(results.cells) else ""
    parts = f"{number} setting{'s' * (number != 1)} of {factors or 'one setting'} at scale "
    parts += f"<b>{escape(str(results.document['scale']))}</b>, {each} seed{'s' * (each != '1')} each"
    return f"{parts}; {done}." if done else f"{parts}; all {len(results.cells)} cells are done."


def found(results: Results) -> list[str]:
    """Return what the primary metrics say of the differences to the baseline."""
    metrics = [metric for metric in results.primary if metric in results.metrics] or list(results.metrics[:1])
    comparisons = to_baseline(results, metrics)
    if not comparisons:
        said = dict.fromkeys(results.comparable(setting)[1] for setting in results.settings)
        reasons = [reason for reason in said if reason and reason != "this is the baseline"]
        return [f"Nothing is compared: {escape('; '.join(reasons) or 'no two settings have the same metric yet')}."]
    baseline = ", ".join(str(value) for value in (results.document.get("baseline") or {}).values())
    sentences: list[str] = []
    for metric in metrics:
        of = {name: one for (name, measured), one in comparisons.items() if measured == metric}
        if of:
            sentences.append((_shortly if sentences else _of_metric)(results, metric, of, baseline))
    return sentences


def next_steps(results: Results, again: str) -> list[str]:
    """Return what would answer more: cells to run, seeds to add."""
    states = Counter(cell.state for cell in results.cells)
    steps = []
    if states[FAILED]:
        resume = again.replace("moegrid run", "moegrid resume", 1)
        steps.append(f"{states[FAILED]} cells failed (see below): <code>{escape(resume)}</code>")
    elif states[DONE] < len(results.cells) and not states[RUNNING]:
        steps.append(f"{len(results.cells) - states[DONE]} cells are not there: <code>{escape(again)}</code>")
    metrics = [metric for metric in results.primary if metric in results.metrics]
    open_ones = [one for one in to_baseline(results, metrics).values() if not one.resolved]
    if any(one.seeds < 2 for one in open_ones):
        steps.append(f"one seed tells no difference: <code>{escape(again)} --seeds 0,1,2</code>")
    needed = sorted(one.needed for one in open_ones if one.needed)
    within = [seeds for seeds in needed if seeds <= MOST_ADVISED]
    if results.most_seeds:
        # More seeds after a look would make the intervals too narrow: their number is part of the question.
        if open_ones and states[DONE] == len(results.cells):
            asked, most = results.document["adaptive"], results.most_seeds
            told = f"what is open would hardly be resolved within adaptive.max_seeds {most}; a larger one asks anew"
            if not asked.get("race"):
                told = f"seeds were added for means within ±{asked['halfwidth']:g}: race adds them for differences"
            steps.append(told)
    elif within:
        steps.append(
            f"about {within[0]} seeds would resolve the nearest of the open differences"
            + (f", {within[-1]} the {len(within)} nearest" if len(within) > 1 else "")
            + f": <code>{escape(again)} --seeds {seeds_word(within[0])}</code>"
        )
    elif open_ones and not any(one.seeds < 2 for one in open_ones):
        steps.append("no practical number of seeds would resolve the open differences: they are small, if any")
    return steps


def seeds_word(number: int) -> str:
    """Return the seeds 0 .. number - 1 as `--seeds` takes them."""
    return ",".join(map(str, range(number)))


def sentence(name: str, baseline: str, metric: str, one: Comparison) -> str:
    """Return one comparison as a sentence."""
    sign = direction(metric)
    size = f"{one.difference:+.{DIGITS}f}"
    if one.low is not None and one.high is not None:
        size += f" ± {(one.high - one.low) / 2:.{DIGITS}f}"
    seeds = f"{one.seeds} seed{'s' * (one.seeds != 1)}"
    if not one.resolved:
        return f"{name} is not resolved from {baseline} on {metric}: {size}, {seeds}; {_rest(one)}"
    how = "differs from" if sign == 0 else ("is better than" if sign * one.difference > 0 else "is worse than")
    return f"{name} {how} {baseline} on {metric}: {size}, {seeds}"


def _of_metric(results: Results, metric: str, of: Mapping[str, Comparison], baseline: str) -> str:
    title = words_of(metric)
    kind = {-1: "lower is better", 1: "higher is better", 0: "neither way is better"}[direction(metric)]
    names = {setting.name: _short(results, setting.factors) for setting in results.settings}
    ordered = sorted(of.items(), key=lambda pair: -abs(pair[1].difference))
    resolved = [(name, one) for name, one in ordered if one.resolved]
    rest = [(name, one) for name, one in ordered if not one.resolved]
    shown = [*resolved[:MOST_SENTENCES], *rest[: max(1, MOST_SENTENCES - len(resolved))]]
    lines = "".join(f"<li>{escape(sentence(names[name], baseline, metric, one))}.</li>" for name, one in shown)
    more = len(ordered) - len(shown)
    tail = f"<li class='quiet'>{more} more are in the table of differences.</li>" if more else ""
    head = f"On <b>{escape(title)}</b> ({kind}) {len(resolved)} of {len(ordered)} differences are resolved:"
    return f"{head}</p><ul>{lines}{tail}</ul><p>"


def _shortly(results: Results, metric: str, of: Mapping[str, Comparison], baseline: str) -> str:
    """Return one line on a further metric: which settings are resolved, and which way."""
    sign = direction(metric)
    ways: dict[str, list[str]] = {}
    for setting in results.settings:
        one = of.get(setting.name)
        if one is not None and one.resolved:
            way = "different" if not sign else ("better" if sign * one.difference > 0 else "worse")
            ways.setdefault(way, []).append(_short(results, setting.factors))
    told = "; ".join(f"{way}: {', '.join(names[:MOST_SENTENCES])}" for way, names in ways.items())
    resolved = sum(one.resolved for one in of.values())
    head = f"On <b>{escape(words_of(metric))}</b> {resolved} of {len(of)} are resolved from {escape(baseline)}"
    return f"{head}{': ' + escape(told) if told else ''}."


def _short(results: Results, factors: Mapping[str, object]) -> str:
    return named({name: factors.get(name, "") for name in results.factors})


def _rest(one: Comparison) -> str:
    told = one.verdict()
    return told.removeprefix("not resolved").lstrip(":; ") or "unknown"


def _when(results: Results) -> str:
    times = [manifest.created for manifest in results.manifests.values() if manifest.created]
    if not times:
        return ""
    last = datetime.fromtimestamp(max(times), UTC)
    return f"Results of {last:%Y-%m-%d %H:%M} UTC. "
