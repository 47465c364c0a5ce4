"""What stands behind the numbers: failures, training stability, provenance, device-hours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from orchestrator.report import outside
from orchestrator.report.collect import DONE, Results
from orchestrator.report.statistics import spikes
from orchestrator.report.tables import numerics, stopped
from orchestrator.spec.rules import PHASES
from orchestrator.store import Manifest

EARLY_STEPS = 1000
_LABEL = " class='label'"


def problems(results: Results) -> str:
    """Return what failed or is missing, each distinct reason once, with the end of its log."""
    reasons: dict[str, list[str]] = {}
    for cell in results.cells:
        if cell.state != DONE:
            reasons.setdefault(f"{cell.state}: {cell.reason}", []).append(cell.name)
    parts = [
        f"<li>{escape(reason)} <span class='quiet'>({len(names)}: {escape(', '.join(names[:6]))}"
        f"{' ...' if len(names) > 6 else ''})</span></li>"
        for reason, names in reasons.items()
    ]
    logs = {failure.tail: failure for failure in results.failures.values() if failure.tail}
    for text, failure in logs.items():
        title = f"{failure.kind}: the end of the log of {failure.attempt}"
        end = "\n".join(text.splitlines()[-15:])
        parts.append(f"<li><details><summary>{escape(title)}</summary><pre>{escape(end)}</pre></details></li>")
    return f"<ul>{''.join(parts)}</ul>" if parts else ""


def provenance(results: Results) -> str:
    """Return where the numbers come from: commits, numerics, data digests, device-hours used and saved."""
    made = list(results.manifests.values())
    commits = Counter(
        str(m.provenance.get("git", ""))[:12] + (" with uncommitted changes" if m.provenance.get("dirty") else "")
        for m in made
        if m.provenance.get("git")
    )
    used, unshared = device_hours(results)
    devices = {str(m.numerics.get("device", "")) for m in made if m.kind in ("train", "evaluate")}
    device = {"cuda": "GPU", "cpu": "CPU"}.get(devices.pop(), "device") if len(devices) == 1 else "device"
    facts = [
        ("grid version", str(results.document["digest"])[:16]),
        ("commits", ", ".join(f"{name} ({count})" for name, count in commits.items())),
        ("not trained", "; ".join(stopped(results))),
        ("numerics", "; ".join(f"{phase}: {' | '.join(found)}" for phase, found in numerics(results).items())),
        ("data", "; ".join(_data(results))),
        ("plugins", "; ".join([*map(str, outside.uses(results)), *outside.mixed(results)])),
        ("artifacts", f"{len(made)} of {len(results.document['keys'])}"),
        (f"{device}-hours", f"{used:.2f} used, {unshared - used:.2f} saved by sharing" if used else ""),
        ("store", results.store.objects.url),
    ]
    rows = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts if text)
    return f"<dl>{rows}</dl>{costs(results)}"


COSTS = ("setting", "parameters", "active", "FLOPs a token", "hours of training", "devices", "tokens/s")


def cost_rows(results: Results) -> list[tuple[str, ...]]:
    """Return per setting what `COSTS` names: size, compute, time and devices of one run, without sharing."""
    rows: list[tuple[str, ...]] = []
    for setting in results.settings:
        cell = setting.cells[0].document
        made = [results.manifests[key] for key in cell["stages"] if key in results.manifests]
        trained = [m for m in made if m.kind == "train"]
        if not trained:
            continue
        hours = sum(_seconds(m) for m in trained) / 3600
        devices = max(int(m.numerics.get("world_size", 1)) for m in trained)
        speed = [float(m.info["tokens_per_second"]) for m in trained if m.info.get("tokens_per_second")]
        counted = cell.get("parameters", {})
        rows.append(
            (
                setting.name,
                f"{counted.get('total', 0) / 1e6:.4g} M",
                f"{counted.get('active', 0) / 1e6:.4g} M",
                f"{float(cell.get('flops_per_token') or 0) / 1e6:.4g} M",
                f"{hours:.3g}",
                str(devices),
                f"{sum(speed) / len(speed):,.0f}" if speed else "",
            )
        )
    return rows


def costs(results: Results) -> str:
    """Return model size, compute, time and devices of one run of each setting, without sharing."""
    rows = cost_rows(results)
    if not rows:
        return ""
    lines = [
        f"<tr><th scope='row'>{escape(name)}</th>{''.join(f'<td>{text}</td>' for text in texts)}</tr>"
        for name, *texts in rows
    ]
    head = "".join(f"<th scope='col'{_LABEL * (name == 'setting')}>{name}</th>" for name in COSTS)
    return (
        "<details><summary>Size, compute and time of one run of each setting</summary><div class='scroll'><table>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></details>"
    )


def _seconds(manifest: Manifest) -> float:
    return float(manifest.info.get("train_seconds", manifest.info.get("seconds", 0.0)))


def device_hours(results: Results) -> tuple[float, float]:
    """Return device-hours of training and evaluation as they ran, and as they would have been without sharing."""
    hours = {}
    for key, manifest in results.manifests.items():
        hours[key] = _seconds(manifest) * float(manifest.numerics.get("world_size", 1)) / 3600
    unshared = sum(hours.get(key, 0.0) for cell in results.document["cells"] for key in cell["stages"])
    return sum(hours.values()), unshared


def _data(results: Results) -> list[str]:
    found: dict[str, None] = {}
    for cell in results.document["cells"]:
        resolved = cell.get("resolved", {})
        for part in PHASES:
            data = (resolved.get(part) or {}).get("data")
            if data:
                found[f"{part}: {data['source']} {str(data.get('digest', ''))[:12]}"] = None
        items = resolved.get("evaluate") or {}
        if items.get("source"):
            found[f"evaluation: {items['source']} {str(items.get('digest', ''))[:12]}"] = None
    return list(found)


def stability(results: Results, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return spikes of loss and gradient norm and the early balance per setting; `rows` is the series of each cell."""
    lines = []
    for setting in results.settings:
        cells = []
        for metric in ("train/loss", "train/grad_norm"):
            found = [spikes([float(r[metric]) for r in rows.get(c.id, ()) if metric in r]) for c in setting.cells]
            cells.append(f"<td>{sum(n for n, _ in found)}</td><td>{max((h for _, h in found), default=0):.3g}</td>")
        early = [
            float(row["train/aux_loss"])
            for cell in setting.cells
            for row in rows.get(cell.id, ())
            if "train/aux_loss" in row and int(row["step"]) <= EARLY_STEPS
        ]
        cells.append(f"<td>{sum(early) / len(early):.4f}</td>" if early else "<td></td>")
        lines.append(f"<tr><th scope='row'>{escape(setting.name)}</th>{''.join(cells)}</tr>")
    if not any(rows.values()):
        return ""
    early_name = f"mean balance loss to step {EARLY_STEPS:,}"
    names = ("setting", "loss spikes", "largest", "gradient-norm spikes", "largest", early_name)
    head = "".join(f"<th scope='col'{_LABEL * (name == 'setting')}>{name}</th>" for name in names)
    return (
        "<details><summary>Training stability</summary><div class='scroll'><table><thead><tr>"
        f"{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div><p class='quiet'>A spike exceeds the running"
        " median of the 50 values before it by more than 6 robust standard deviations.</p></details>"
    )
