"""What stands behind the numbers: failures, training stability, provenance, device-hours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from orchestrator.report.collect import DONE, Results
from orchestrator.report.statistics import spikes
from orchestrator.report.tables import numerics


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
    logs = {failure.log: failure for failure in results.failures.values() if failure.log}
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
        ("numerics", "; ".join(f"{phase}: {' | '.join(found)}" for phase, found in numerics(results).items())),
        ("data", "; ".join(_data(results))),
        ("artifacts", f"{len(made)} of {len(results.document['keys'])}"),
        (f"{device}-hours", f"{used:.2f} used, {unshared - used:.2f} saved by sharing" if used else ""),
        ("store", results.store.objects.url),
    ]
    rows = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts if text)
    return f"<dl>{rows}</dl>"


def device_hours(results: Results) -> tuple[float, float]:
    """Return device-hours of training and evaluation as they ran, and as they would have been without sharing."""
    hours = {}
    for key, manifest in results.manifests.items():
        seconds = manifest.info.get("train_seconds", manifest.info.get("seconds", 0.0))
        hours[key] = float(seconds) * float(manifest.numerics.get("world_size", 1)) / 3600
    unshared = sum(hours.get(key, 0.0) for cell in results.document["cells"] for key in cell["stages"])
    return sum(hours.values()), unshared


def _data(results: Results) -> list[str]:
    found: dict[str, None] = {}
    for cell in results.document["cells"]:
        resolved = cell.get("resolved", {})
        for part in ("pretrain", "finetune"):
            data = (resolved.get(part) or {}).get("data")
            if data:
                found[f"{part}: {data['source']} {str(data.get('digest', ''))[:12]}"] = None
        items = resolved.get("evaluate") or {}
        if items.get("source"):
            found[f"evaluation: {items['source']} {str(items.get('digest', ''))[:12]}"] = None
    return list(found)


def stability(results: Results, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the counts and sizes of loss and gradient-norm spikes per setting; `rows` is the series of each cell."""
    lines = []
    for setting in results.settings:
        cells = []
        for metric in ("train/loss", "train/grad_norm"):
            found = [spikes([float(r[metric]) for r in rows.get(c.id, ()) if metric in r]) for c in setting.cells]
            cells.append(f"<td>{sum(n for n, _ in found)}</td><td>{max((h for _, h in found), default=0):.3g}</td>")
        lines.append(f"<tr><th scope='row'>{escape(setting.name)}</th>{''.join(cells)}</tr>")
    if not any(rows.values()):
        return ""
    names = ("setting", "loss spikes", "largest", "gradient-norm spikes", "largest")
    head = "".join(f"<th>{name}</th>" for name in names)
    return (
        "<details><summary>Training stability</summary><div class='scroll'><table><thead><tr>"
        f"{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div><p class='quiet'>A spike exceeds the running"
        " median of the 50 values before it by more than 6 robust standard deviations.</p></details>"
    )
