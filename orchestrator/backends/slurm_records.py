"""What squeue and sacct say, read into records; and the one way in which SLURM commands are called.

Every command has a time limit: SLURM's clients hang when the controller is away. An answer counts only if it shows that
it is one: squeue and sacct are asked for their heading too, so that nothing is no answer.
"""

from __future__ import annotations

import getpass
import os
import re
import signal
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.backends.base import SchedulerUnreachable
from orchestrator.errors import MoegridError
from orchestrator.spec.launchers import outside

WAITING = frozenset(
    ("CONFIGURING", "PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
)
# A state of another name, which a later SLURM may have, is no end.
OVER = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY")
) | {"PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT"}
# A job that could not be launched is put back and held (22.05): its node is broken, or the controller came back from
# an older state and gave it a number that the node had seen ("Duplicate jobid").
HELD_FOR_GOOD = re.compile(r"launch.failed.requeued.held|JobHoldMaxRequeue", re.IGNORECASE)

_AWAY = re.compile(
    r"unable to contact slurm|connection (refused|reset|timed out)|socket timed out|transport endpoint|zero bytes"
    r"|communication (connection|shutdown)|no route to host|unable to establish|plug-?in initialization failed"
    r"|controller is (down|in standby)|unable to resolve|slurm_persist_conn_open|configuration source",
    re.IGNORECASE,
)
_NO_SUCH_JOB = re.compile(r"invalid job id|job \S+ not found", re.IGNORECASE)
_TOO_LATE = re.compile(r"invalid job id|already complet", re.IGNORECASE)
# What slurmctld and sbatch itself say of a submission that they will never take, and what only sounds like it.
_NEVER = re.compile(
    r"\binvalid\b|not permitted|permission denied|access denied|not available\b|not in this partition|no partition"
    r"|can ?not be satisfied|needs to be provided|more processors|violates accounting|unspecified error"
    r"|unrecognized option|requires an argument|is ambiguous|unable to open|not (supported|allowed)",
    re.IGNORECASE,
)
_LATER = re.compile(r"authentication|credential|protocol|try again|temporarily|unexpected message|now$", re.IGNORECASE)
_SUBMITTED = re.compile(r"^Submitted batch job (\d+)", re.MULTILINE)
_HELD = re.compile(r"\bArrayJobId=(\d+) ArrayTaskId=(\S+).*? JobName=(\S+)")
_NO_ACCOUNTING = re.compile(r"accounting storage is disabled|accounting_storage/none", re.IGNORECASE)
_QUEUE_FIELDS = (
    "ArrayJobID",
    "ArrayTaskID",
    "Name",
    "State",
    "exit_code",
    "Reason",
    "RestartCnt",
    "NumTasks",
    "NodeList",
)
_QUEUE_FORMAT = ",".join(f"{field}:|" for field in _QUEUE_FIELDS)
_ACCOUNT_FIELDS = ("JobID", "JobName", "State", "ExitCode", "NodeList", "MaxRSS")
# One argument may hold 128 KiB; a longer list of ids is not sent, and the user's whole queue is read instead.
_LONGEST_LIST = 100_000
# The task number under which a line speaks for all tasks of an array that have no line of their own.
REST = -1


class Refused(MoegridError):
    """The scheduler answered, and the answer was no."""


@dataclass(frozen=True, slots=True)
class Record:
    """One job (array task) as SLURM describes it. `code` and `signal` as in `ExitCode`; `rss` in GiB.

    `restarts` counts the earlier starts of a requeued job, `processes` its ranks.
    """

    job: str
    task: int
    name: str
    state: str
    code: int = 0
    signal: int = 0
    reason: str = ""
    restarts: int = 0
    processes: int = 1
    nodes: str = ""
    rss: float = 0.0


def call(command: Sequence[str], *, timeout: float, environment: Mapping[str, str] | None = None) -> str:
    """Run one SLURM command, outside every job that this process is a part of, and return its output.

    Raises SchedulerUnreachable when SLURM does not answer, Refused when it answers with an error.
    """
    try:
        answer = subprocess.run(
            list(command),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
            # Long lists of tasks are not to be cut in answers.
            env=outside(environment) if environment else {**outside(os.environ), "SLURM_BITSTR_LEN": "0"},
        )
    except FileNotFoundError as error:
        raise SchedulerUnreachable(
            f"{command[0]} is not installed here",
            cause="site slurm calls SLURM's own commands",
            hint="run on a login node, or load the module that provides SLURM",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SchedulerUnreachable(
            f"{command[0]} did not answer within {timeout:g} s",
            cause="the controller is down or overloaded",
            hint="jobs go on without it; try again later, or raise `command_timeout` in the site file",
        ) from error
    except OSError as error:
        raise SchedulerUnreachable(f"{command[0]} cannot be started", cause=str(error)) from error
    if answer.returncode:
        text = " ".join(answer.stderr.split()) or f"exit code {answer.returncode}"
        if _AWAY.search(text):
            raise SchedulerUnreachable(
                f"{command[0]} cannot reach SLURM",
                cause=text[:500],
                hint="jobs go on, try again later; never reached it? use a login node (the lab: infra/slurm/env.sh)",
            )
        raise Refused(f"{command[0]} failed", cause=text[:1000], hint="check the site file, infra/sites/slurm.yaml")
    return answer.stdout


def ask(command: Sequence[str], *, timeout: float, nothing: re.Pattern[str]) -> str | None:
    """Return what a command that only asks answers, None where its error is the answer `nothing`.

    Raises SchedulerUnreachable for every other error: it is asked again later.
    """
    try:
        return call(command, timeout=timeout)
    except Refused as refused:
        if nothing.search(refused.cause):
            return None
        raise _no_answer(command[0], refused.cause) from refused


def submit(path: str, *, timeout: float, environment: Mapping[str, str]) -> str:
    """Return the job id of a submission file that sbatch took.

    Raises Refused when SLURM will never take it, SchedulerUnreachable when nobody knows: it may have been taken.
    """
    try:
        answer = call(["sbatch", path], timeout=timeout, environment=environment)
    except Refused as refused:
        if _NEVER.search(refused.cause) and not _LATER.search(refused.cause):
            raise
        raise _no_answer("sbatch", refused.cause) from refused
    found = _SUBMITTED.search(answer)
    if not found:
        raise _no_answer("sbatch", f"it said {answer[:200]!r}")
    return found[1]


def cancel(command: Sequence[str], *, timeout: float) -> None:
    """Run scancel; what has ended in the meantime needs no cancelling."""
    ask(command, timeout=timeout, nothing=_TOO_LATE)


def held(job: str, *, timeout: float) -> set[tuple[int, str]]:
    """Return (task, name) of what the controller holds of an array job; REST for tasks that are not all told."""
    text = ask(["scontrol", "--oneliner", "show", "job", job], timeout=timeout, nothing=_NO_SUCH_JOB)
    if text is None:
        return set()
    if "JobId=" not in text:
        raise _no_answer("scontrol", f"it said {text[:200]!r}")
    return {(task, name) for array, tasks, name in _HELD.findall(text) if array == job for task in expand(tasks)}


def _no_answer(command: str, cause: str) -> SchedulerUnreachable:
    return SchedulerUnreachable(
        f"{command} gave no answer that can be read",
        cause=cause,
        hint="jobs go on, it is asked again; if it stays so, run it by hand",
    )


def _lines(text: str, command: str, count: int) -> list[list[str]]:
    """Return the fields of each record; raises SchedulerUnreachable when neither heading nor record is there."""
    lines = [fields for line in text.splitlines() if len(fields := line.split("|")) >= count]
    if not lines:
        raise _no_answer(command, f"it said {text[:200]!r}")
    return [fields for fields in lines if fields[0].strip()[:1].isdigit()]


def queue(*, timeout: float, jobs: Iterable[str] = (), names: Iterable[str] = ()) -> list[Record]:
    """Return what the controller knows of `jobs` (array job ids) or of jobs called `names`: live or just ended."""
    command = ["squeue", "--array", "--states=all", f"--Format={_QUEUE_FORMAT}"]
    chosen = ",".join(sorted(jobs))
    if names:
        command += [f"--user={getpass.getuser()}", f"--name={','.join(names)}"]
    elif len(chosen) <= _LONGEST_LIST:
        command.append(f"--jobs={chosen}")
    else:
        command.append(f"--user={getpass.getuser()}")
    text = ask(command, timeout=timeout, nothing=_NO_SUCH_JOB)
    if text is None:
        return []
    records = []
    for fields in _lines(text, "squeue", len(_QUEUE_FIELDS)):
        job, tasks, name, state, status, reason, restarts, processes, nodes = (field.strip() for field in fields[:9])
        code, number = divmod(_integer(status), 256)
        record = Record(
            job, REST, name, state, code, number & 127, reason, _integer(restarts), _integer(processes), nodes
        )
        records += [replace(record, task=task) for task in expand(tasks)]
    return records


def accounts(
    *, timeout: float, jobs: Iterable[str] = (), names: Iterable[str] = (), since: str = ""
) -> dict[tuple[str, int], Record]:
    """Return what the accounting database knows, by (array job id, task), its newest start of each.

    An empty answer where accounting is switched off. `since` (a sacct time) bounds a search by `names`.
    """
    command = ["sacct", "--parsable2", "--duplicates", f"--format={','.join(_ACCOUNT_FIELDS)}"]
    chosen = ",".join(sorted(jobs))
    if names:
        command += [f"--name={','.join(names)}", f"--starttime={since}"]
    elif len(chosen) <= _LONGEST_LIST:
        command.append(f"--jobs={chosen}")
    else:
        command.append(f"--starttime={since}")
    text = ask(command, timeout=timeout, nothing=_NO_ACCOUNTING)
    if text is None:
        return {}
    found: dict[tuple[str, int], Record] = {}
    current: list[tuple[str, int]] = []
    for fields in _lines(text, "sacct", len(_ACCOUNT_FIELDS)):
        identifier, name, state, exit_code, nodes, rss = fields[:6]
        whole, _, step = identifier.partition(".")
        if step:  # a line of the job above it: how much memory its processes held
            for key in current:
                found[key] = replace(found[key], rss=max(found[key].rss, gibibytes(rss)))
                if step == "batch" and found[key].state == "FAILED" and exit_code.endswith(":1"):
                    found[key] = replace(found[key], code=0, signal=1)  # the job's own line has SIGHUP as exit code 1
            continue
        job, _, tasks = whole.partition("_")
        code, number = (_integer(part) for part in (*exit_code.split(":"), "0")[:2])
        if state.startswith("FAILED") and not number:
            code = _restored(code)
        current = [(job, task) for task in expand(tasks)]
        for key in current:
            starts = found[key].restarts + 1 if key in found else 0
            found[key] = Record(job, key[1], name, state.split(" ")[0], code, number, "", starts, nodes=nodes)
    return found


def expand(tasks: str) -> Iterator[int]:
    """Yield the task numbers of `3`, `[0-4,7]` or `[0-9%2]`, and REST where they are not all told.

    SLURM writes no numbers for an array that was cancelled while it waited, and cuts a long list short.
    """
    if "..." in tasks or not any(character.isdigit() for character in tasks):
        yield REST
    for part in tasks.strip("[]").partition("%")[0].split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (last.isdigit() or not last):
            yield from range(int(first), int(last or first) + 1)


def gibibytes(text: str) -> float:
    """Return a SLURM size (`4672K`, `1.5G`, bytes without a unit) in GiB."""
    match = re.fullmatch(r"([\d.]+)([KMGT]?)", text.strip())
    if not match:
        return 0.0
    return float(match[1]) * 1024.0 ** (" KMGT".index(match[2] or " ") - 3)


def ending(record: Record) -> tuple[int | None, int]:
    """Return (exit code or None, signal) of an ended job; a shell's 128 + n is signal n.

    What the scheduler ended without having seen an exit code (PREEMPTED, NODE_FAIL) is written 0:0.
    """
    number = record.signal or max(0, record.code - 128)
    if number and number in set(signal.Signals):
        return None, number
    if not record.code and not record.signal and record.state != "COMPLETED":
        return None, 0
    # SLURM's own signals (53: the output file could not be opened) are no signal of the process.
    return record.code or (1 if record.signal else 0), 0


def _restored(code: int) -> int:
    """Return the exit code of which sacct may have taken 128 off, as SLURM 22.05 does: 137 is 9, 128 is 0.

    1 and 2 are what programs end with; no command of ours ends with what looks like another signal.
    """
    return code + 128 if code == 0 or 3 <= code <= 64 else code


def _integer(text: str) -> int:
    return int(text) if text.isdigit() else 0
