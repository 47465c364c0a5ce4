"""What ended a job: a failure kind from the scheduler's state, the node's own report, its log and its exit code.

The scheduler's word comes first (it sees what the process cannot), then the node's `failure.json`, then signatures in
the log, then the exit code. A bare SIGKILL is no evidence of anything but of being killed.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from orchestrator.backends.base import JobState
from orchestrator.errors import EXIT_PREEMPTED

EXIT_NOT_MINE = 76
TAIL_LINES = 12

_SCHEDULER = {
    "PREEMPTED": "preempted",
    "REQUEUED": "preempted",
    "CANCELLED": "preempted",
    "NODE_FAIL": "node_lost",
    "BOOT_FAIL": "node_lost",
    "OUT_OF_MEMORY": "oom",
    "TIMEOUT": "timeout",
    "DEADLINE": "timeout",
}

# (pattern, kind), first match wins: what a library prints when the machine, not the science, is the reason.
SIGNATURES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), kind)
    for pattern, kind in (
        (r"no space left on device|disk quota exceeded|\benospc\b", "disk_full"),
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
        (r"(loss|gradient|grad_norm)\b.{0,40}\b(is |are )?(nan|inf|not finite|non-finite)", "nan"),
        (r"diverged", "diverged"),
        (r"modulenotfounderror|importerror|no module named|undefined symbol|glibc(xx)?_[\d.]+' not found", "import"),
        (r"assertionerror", "assertion"),
        (r"connection refused|name or service not known|temporary failure in name resolution", "unreachable"),
        (r"slow ?down|service ?unavailable|error sending request|connect(ion)? timed out", "unreachable"),
    )
)

HINTS = {
    "oom": "raise execution.resources.<phase>.memory_gb, or lower the tokens held at a time",
    "disk_full": "free space on the disk of the store and the scratch directory, then run: moegrid resume",
    "timeout": "raise execution.resources.<phase>.minutes or checkpoint more often",
    "import": "install the project with its pinned constraints where the jobs run, then run: moegrid resume",
    "unreachable": "check store and network with: moegrid doctor",
    "nan": "the last good state is kept; lower the learning rate or check the data of this cell",
    "diverged": "the last good state is kept; lower the learning rate or check the data of this cell",
    "router_collapsed": "the last good state is kept; raise the balance coefficient or lower the router's LR",
    "hung": "moegrid logs --rank N says where it was; moegrid resume goes on from the last state",
    "killed": "moegrid resume goes on from the last state",
    "node_lost": "moegrid resume goes on from the last state",
    "preempted": "moegrid resume goes on from the last state",
    "source": "check the data source with: moegrid doctor",
    "corrupt": "moegrid resume makes the damaged artifact again",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one attempt did not finish one stage. `state` is the last state the attempt committed, `step` where it was.

    `artifact` names the damaged artifact of a `corrupt` failure; `code` is the digest of the code that ran.
    """

    stage: str
    attempt: str
    kind: str
    message: str
    hint: str = ""
    exit_code: int | None = None
    artifact: str = ""
    state: str = ""
    step: int = 0
    code: str = ""
    time: float = 0.0
    tail: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Failure:
        return cls(**{field.name: data[field.name] for field in fields(cls) if field.name in data})


@dataclass(frozen=True, slots=True)
class Verdict:
    """The kind of an end, in words."""

    kind: str
    message: str
    hint: str = ""


def signature(text: str) -> str:
    """Return the failure kind whose signature appears last in `text`, "" if none does."""
    for line in reversed(text.splitlines()[-200:]):
        for pattern, kind in SIGNATURES:
            if pattern.search(line):
                return kind
    return ""


def classify(state: JobState, report: Mapping[str, Any] | None, log: str = "", memory_gb: float = 0.0) -> Verdict:
    """Say what ended a job that did not finish its stages.

    `report` is the node's `failure.json`, `log` the end of its output, `memory_gb` what the job had asked for.
    """
    told = _SCHEDULER.get(state.reason.split(" ")[0].upper())
    if told:
        return Verdict(told, f"the scheduler says {state.reason}", HINTS.get(told, ""))
    if report:
        kind = str(report.get("kind", "error"))
        if kind == "error":
            kind = signature(f"{report.get('message', '')}\n{report.get('traceback', '')}") or "error"
        return Verdict(kind, str(report.get("message", "")), str(report.get("hint", "")) or HINTS.get(kind, ""))
    if state.exit_code == EXIT_PREEMPTED:
        return Verdict("preempted", "it saved its state when it was asked to stop", HINTS["preempted"])
    if state.exit_code == EXIT_NOT_MINE:
        return Verdict("lease_lost", "another attempt has taken the stage over")
    if state.signal or state.exit_code is None:
        return _killed(state, memory_gb)
    kind = signature(log) or "error"
    last = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "it left no output")
    message = f"exit code {state.exit_code}: {last}" if state.exit_code else "it ended without committing its artifact"
    return Verdict(kind, message[:500], HINTS.get(kind, ""))


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
