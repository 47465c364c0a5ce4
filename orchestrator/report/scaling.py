"""How a loss falls with the size of the model, where a grid varies it: log-linear fits with intervals and residuals.

log loss = a + b log(active FLOPs a token) + c log(active experts), the seed at random (`mixed`). Over a short range of
sizes a power law is straight on these axes (Kaplan et al., arXiv:2001.08361; for granularity Krajewski et al.,
arXiv:2402.07871, whose irreducible loss a few sizes cannot tell).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from orchestrator.report import mixed, plots
from orchestrator.report.collect import Results, Setting
from orchestrator.report.differences import LANGUAGE_MODEL_METRICS, direction
from orchestrator.report.statistics import LEVEL, t_quantile

FEWEST_SIZES = 3
FLOPS, EXPERTS = "active FLOPs a token", "active experts"


@dataclass(frozen=True, slots=True)
class Exponent:
    """The power of one size, with its 95 % interval."""

    size: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Scaling:
    """A fit: exponents, and per setting its size, mean loss and fitted loss."""

    metric: str
    exponents: tuple[Exponent, ...]
    points: Mapping[str, tuple[float, float, float]]
    groups: Mapping[str, str]  # setting -> the number of its active experts, "" where it is in no exponent


def scaling(results: Results, metric: str) -> Scaling | None:
    """Return the fit of a loss over the sizes of a grid; None with fewer than three sizes or no freedom left."""
    settings = [s for s in results.settings if s.values(metric) and _flops(s)]
    if metric in LANGUAGE_MODEL_METRICS:
        settings = [s for s in settings if s.causal]
    rows = [(s, seed, value) for s in settings for seed, value in s.values(metric).items()]
    if direction(metric) != -1 or len({_flops(s) for s in settings}) < FEWEST_SIZES or min(v for *_, v in rows) <= 0:
        return None
    sizes = {FLOPS: [math.log(_flops(s)) for s, *_ in rows], EXPERTS: [math.log(_experts(s)) for s, *_ in rows]}
    # Around their means the columns are nearly free of the intercept: the fit is well conditioned.
    centred = {name: np.array(column) - np.mean(column) for name, column in sizes.items()}
    columns = [np.ones(len(rows)), *centred.values()]
    kept = mixed.independent(columns)
    x = np.stack([columns[i] for i in kept], 1)
    fitted = mixed.fit(np.log([v for *_, v in rows]), x, [seed for _, seed, _ in rows])
    if fitted is None or kept[:2] != [0, 1]:
        return None
    quantile = t_quantile(0.5 + LEVEL / 2, fitted.freedom)
    exponents = []
    for place, i in enumerate(kept[1:], 1):
        value, half = float(fitted.coefficients[place]), quantile * math.sqrt(fitted.covariance[place, place])
        exponents.append(Exponent(list(sizes)[i - 1], value, value - half, value + half))
    predicted = np.exp(x @ fitted.coefficients)
    points = {}
    for setting in settings:
        own = [i for i, (s, *_) in enumerate(rows) if s is setting]
        points[setting.name] = (_flops(setting), sum(rows[i][2] for i in own) / len(own), float(predicted[own[0]]))
    groups = {s.name: f"{_experts(s):g}" if len(exponents) > 1 else "" for s in settings}
    return Scaling(metric, tuple(exponents), points, groups)


def scaling_fits(results: Results) -> str:
    """Return the fits of the primary losses as HTML: a sentence, the curve, and the residuals."""
    parts = []
    for metric in [name for name in results.primary if name in results.metrics] or results.metrics[:1]:
        found = scaling(results, metric)
        if found is not None:
            parts.append(f"<p>{_sentence(found)}</p>{_figure(found)}{_residuals(found)}")
    return "".join(parts)


def _sentence(found: Scaling) -> str:
    powers = " and ".join(
        f"({escape(one.size)})<sup>{one.value:+.4f}</sup> [{one.low:+.4f}, {one.high:+.4f}]" for one in found.exponents
    )
    flat = [one.size for one in found.exponents if one.low <= 0 <= one.high]
    told = f"; the exponent of {' and of '.join(map(escape, flat))} is not resolved from 0" if flat else ""
    return f"<b>{escape(found.metric)}</b> goes as {powers}{told}."


def _figure(found: Scaling) -> str:
    lines = []
    for group in dict.fromkeys(found.groups.values()):
        own = sorted(found.points[name] for name, of in found.groups.items() if of == group)
        xs, values, fits = (list(column) for column in zip(*own, strict=True))
        suffix = f", {group} active experts" if group else ""
        lines += [
            plots.Line(f"measured{suffix}", xs, values, values, values),
            plots.Line(f"fitted{suffix}", xs, fits, fits, fits),
        ]
    return plots.curves(lines, found.metric, axis_x=FLOPS)


def _residuals(found: Scaling) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{escape(name)}</th><td>{flops:.4g}</td><td>{value:.4f}</td><td>{fitted:.4f}</td>"
        f"<td>{100 * (value / fitted - 1):+.2f} %</td></tr>"
        for name, (flops, value, fitted) in found.points.items()
    )
    head = "".join(f"<th scope='col'>{name}</th>" for name in (FLOPS, "measured", "fitted", "residual"))
    return (
        "<details><summary>Residuals of the fit</summary><div class='scroll'><table><thead><tr>"
        f"<th scope='col' class='label'>setting</th>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>"
    )


def _flops(setting: Setting) -> float:
    return float(setting.cells[0].document.get("flops_per_token") or 0.0)


def _experts(setting: Setting) -> float:
    moe: Mapping[str, object] = (setting.cells[0].document.get("resolved", {}).get("model") or {}).get("moe") or {}
    numbers: Sequence[object] = (moe.get("top_k", 1), moe.get("shared_experts", 0))
    return float(sum(n for n in numbers if isinstance(n, int))) or 1.0
