"""What ended a job: a failure kind from the scheduler's state, the node's own report, its exit code and its log.

The scheduler's word comes first (it sees what the process cannot), then the node's `failure.json`, then the same record
as a line of the log (the store could not take it), then an exit code of its own, and only then signatures in the log.
A bare SIGKILL is no evidence of anything but of being killed.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.backends.base import JobState
from orchestrator.errors import EXIT_AWAY, EXIT_DONE, EXIT_NOT_MINE, EXIT_PREEMPTED, SPOKEN_FAILURE
from orchestrator.store.trouble import AWAY_TEXT, FULL_TEXT, STORE_TEXT

TAIL_LINES = 12
# Kinds of an exit EXIT_AWAY that the log may tell better than the code.
_OUTSIDE = ("disk_full", "oom", "node_lost", "hung", "parent_missing", "corrupt")
NOT_COMMITTED = "it ended without committing its artifact"
_SPOKEN = re.compile(rf"{SPOKEN_FAILURE} (\{{.*\}})\s*$")

_SCHEDULER = {
    "PREEMPTED": "preempted",
    "REQUEUED": "preempted",
    "CANCELLED": "preempted",
    "NODE_FAIL": "node_lost",
    "BOOT_FAIL": "node_lost",
    "LAUNCH_FAILED": "node_lost",
    "OUT_OF_MEMORY": "oom",
    "TIMEOUT": "timeout",
    "DEADLINE": "timeout",
    "REFUSED": "refused",
}

# (pattern, kind), first match wins: what a library prints when the machine, not the science, is the reason.
SIGNATURES: tuple[tuple[re.Pattern[str], str], ...] = (
    (FULL_TEXT, "disk_full"),
    *(
        (re.compile(pattern, re.IGNORECASE), kind)
        for pattern, kind in (
            (r"cuda out of memory|cuda error: out of memory|outofmemoryerror|cublas_status_alloc_failed", "oom"),
            (r"defaultcpuallocator: (can't|not enough)|cannot allocate memory|std::bad_alloc|^memoryerror", "oom"),
            (r"oom-kill|out of memory: killed process|exceeded (job|step) memory limit|oom[_ ]killed", "oom"),
            (r"due to time limit|due to deadline", "timeout"),
            (r"due to preemption|preempted by|spot (instance|node).*(reclaim|terminat)", "preempted"),
            (r"uncorrectable ecc|fallen off the bus|\bxid\b.*\b(48|63|64|74|79)\b|nvlink error", "node_lost"),
            (r"due to node failure|node.*unexpectedly rebooted|nodediederror|raylet.*(died|crashed)", "node_lost"),
            (r"hangs: it has not ended within|collective operation timeout|watchdog caught collective", "hung"),
            (r"timed out waiting \d+ms for (recv|send) operation", "hung"),
            (r"nccl(system|remote|internal|unhandled\w*)error|nccl error|nccl watchdog", "node_lost"),
            (r"socket timeout.*rendezvous", "node_lost"),
            (r"gloo.*(connection (closed|reset|refused)|timed out|connect failure)", "node_lost"),
            (r"(rendezvous|c10d|tcpstore).*(timed? ?out|connection (closed|reset|refused))", "node_lost"),
            (r"was started before its parent was committed", "parent_missing"),
            (r"router(s)? (has |have )?collapsed", "router_collapsed"),
            (r"(loss|gradient|grad_norm)\b.{0,40}\b(is |are )?(nan|inf|not finite|non-finite)\b", "nan"),
            (r"\bdiverged\b", "diverged"),
            (r"^\S*assertionerror\b|^assert ", "assertion"),
        )
    ),
    (AWAY_TEXT, "unreachable"),
    (re.compile(r"^error: artifact \S+ is damaged", re.IGNORECASE), "corrupt"),
    (STORE_TEXT, "unreachable"),
    *(
        (re.compile(pattern, re.IGNORECASE), kind)
        for pattern, kind in (
            (
                r"modulenotfounderror|importerror|no module named|undefined symbol|glibc(xx)?_[\d.]+' not found",
                "import",
            ),
            (r"assertionerror", "assertion"),
        )
    ),
)

HINTS = {
    "oom": "raise execution.resources.<phase>.memory_gb, or lower the tokens held at a time",
    "disk_full": "free space on the disk of the store and the scratch directory, then run: moegrid resume",
    "timeout": "raise execution.resources.<phase>.minutes or checkpoint more often",
    "import": "install the project with its pinned constraints where the jobs run, then: moegrid resume --retry all",
    "refused": "change execution.resources or the site file, then run: moegrid resume",
    "unreachable": "check store and network with: moegrid doctor",
    "nan": "the last good state is kept; lower the learning rate or check the data of this cell",
    "diverged": "the last good state is kept; lower the learning rate or check the data of this cell",
    "router_collapsed": "the last good state is kept; raise the balance coefficient or lower the router's LR",
    "hung": "moegrid logs --rank N says where it was; moegrid resume goes on from the last state",
    "killed": "moegrid resume goes on from the last state",
    "node_lost": "moegrid resume goes on from the last state",
    "preempted": "moegrid resume goes on from the last state",
    "source": "correct the data, then run: moegrid resume --retry all",
    "source_away": "check the network and the data source with: moegrid doctor",
    "parent_missing": "moegrid resume makes the missing artifact again",
    "corrupt": "moegrid resume makes the damaged artifact again",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The kind of an end, in words."""

    kind: str
    message: str
    hint: str = ""


def signature(text: str) -> str:
    """Return the failure kind whose signature appears last in `text`, "" if none does. A hint is no evidence."""
    for line in reversed(text.splitlines()[-200:]):
        if line.startswith("hint:"):
            continue
        for pattern, kind in SIGNATURES:
            if pattern.search(line):
                return kind
    return ""


def spoken(log: str, attempt: str = "") -> dict[str, Any] | None:
    """Return the failure record that a node left in its log because the store could not take it, the first one.

    Of several ranks the first one that failed is the cause; what another attempt said is passed over.
    """
    for line in log.splitlines():
        if (found := _SPOKEN.search(line)) is None:
            continue
        try:
            record = json.loads(found[1])
        except ValueError:
            continue
        if not attempt or record.get("attempt") == attempt:
            return dict(record)
    return None


def classify(
    state: JobState,
    report: Mapping[str, object] | None,
    log: str = "",
    memory_gb: float = 0.0,
    *,
    committed: bool = False,
) -> Verdict:
    """Say what ended a job that did not finish its stages.

    `report` is the node's `failure.json`, `log` the end of its output, `memory_gb` what the job had asked for.
    `committed`: the node ended well, so what is missing was committed and is damaged or gone since.
    """
    told = _SCHEDULER.get(state.reason.split(" ")[0].upper())
    if told == "refused":
        return Verdict(told, f"the scheduler does not take it: {_last_words(log)[0]}"[:500], HINTS[told])
    if told:
        return Verdict(told, f"the scheduler says {state.reason}", HINTS.get(told, ""))
    if not report and state.exit_code not in (EXIT_DONE, EXIT_PREEMPTED, EXIT_NOT_MINE):
        report = spoken(log)
    if report:
        kind = str(report.get("kind", "error"))
        if kind == "error" and not report.get("own"):
            kind = signature(f"{report.get('message', '')}\n{_raised(str(report.get('traceback', '')))}") or "error"
        return Verdict(kind, str(report.get("message", "")), str(report.get("hint", "")) or HINTS.get(kind, ""))
    if state.exit_code == EXIT_PREEMPTED:
        return Verdict("preempted", "it saved its state when it was asked to stop", HINTS["preempted"])
    if state.exit_code == EXIT_NOT_MINE:
        return Verdict("lease_lost", "another attempt has taken the stage over")
    if state.signal or state.exit_code is None:
        return _killed(state, memory_gb)
    if not state.exit_code:
        kind = "corrupt" if committed else signature(log) or "error"
        message = "its artifact is damaged or gone since it was committed" if committed else NOT_COMMITTED
        return Verdict(kind, message, HINTS.get(kind, ""))
    said, hint = _last_words(log)
    kind = signature(log)
    if state.exit_code == EXIT_AWAY and kind not in _OUTSIDE:
        kind = "unreachable"
    kind = kind or "error"
    return Verdict(kind, f"exit code {state.exit_code}: {said}"[:500], hint or HINTS.get(kind, ""))


def _raised(trace: str) -> str:
    """Return the lines of a traceback that name its exceptions, without the source lines between them."""
    return "\n".join(line for line in trace.splitlines() if line and not line[0].isspace())


def _last_words(log: str) -> tuple[str, str]:
    """Return what a log says last and the hint after it: of an `error / cause / hint` block the error and its cause."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    block: dict[str, str] = {}
    for line in reversed(lines):
        name, colon, text = line.partition(": ")
        if not colon or name not in ("hint", "cause", "error"):
            break
        block[name] = text
        if name == "error":
            cause = f" ({block['cause']})" if "cause" in block else ""
            return text + cause, block.get("hint", "")
    return (lines[-1] if lines else "it left no output"), ""


def _killed(state: JobState, memory_gb: float) -> Verdict:
    if not state.signal:
        return Verdict("killed", "the process is gone and left no report", HINTS["killed"])
    name = signal.Signals(state.signal).name
    if state.signal == signal.SIGKILL and memory_gb and state.max_rss_gb > memory_gb:
        message = f"killed while it held {state.max_rss_gb:.1f} GiB of the {memory_gb:g} GiB it had asked for"
        return Verdict("oom", message, HINTS["oom"])
    if state.signal in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
        return Verdict("killed", f"killed by {name}", HINTS["killed"])
    return Verdict("crash", f"crashed with {name}", "see its log: moegrid logs")


def tail(log: str, lines: int = TAIL_LINES) -> str:
    """Return the last lines of a log that say something."""
    return "\n".join([line.rstrip() for line in log.splitlines() if line.strip()][-lines:])
