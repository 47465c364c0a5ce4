"""What ended a job is told by the strongest witness: scheduler, node, log, exit code."""

from __future__ import annotations

import signal

import pytest

from orchestrator.backends.base import ENDED, JobState
from orchestrator.engine.failures import HINTS, Failure, classify, signature, tail
from orchestrator.engine.retry import RULES, decide, pardoned

LINES = [
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "oom"),
    ("RuntimeError: CUDA error: out of memory", "oom"),
    ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes", "oom"),
    ("terminate called after throwing an instance of 'std::bad_alloc'", "oom"),
    ("MemoryError", "oom"),
    ("slurmstepd: error: Detected 1 oom-kill event(s) in StepId=12.batch", "oom"),
    ("OSError: [Errno 28] No space left on device", "disk_full"),
    ("OSError: [Errno 122] Disk quota exceeded", "disk_full"),
    ("torch.distributed.DistBackendError: NCCL error in: ../ProcessGroupNCCL.cpp:1691", "node_lost"),
    ("[Rank 3] NCCL watchdog thread terminated with exception", "node_lost"),
    ("RuntimeError: [../gloo/transport/tcp/pair.cc:525] Gloo: Connection closed by peer [10.0.0.2]:41122", "node_lost"),
    ("RuntimeError: CUDA error: uncorrectable ECC error encountered", "node_lost"),
    ("slurmstepd: error: *** JOB 77 ON n1 CANCELLED AT 2026 DUE TO NODE FAILURE ***", "node_lost"),
    ("slurmstepd: error: *** JOB 77 ON n1 CANCELLED AT 2026 DUE TO PREEMPTION ***", "preempted"),
    ("slurmstepd: error: *** JOB 77 ON n1 CANCELLED AT 2026 DUE TO TIME LIMIT ***", "timeout"),
    ("the loss is nan at step 40", "nan"),
    ("the router has collapsed: one expert takes 99 % of the tokens", "router_collapsed"),
    ("ModuleNotFoundError: No module named 'einops'", "import"),
    ("ImportError: libcudart.so.12: undefined symbol: foo", "import"),
    ("AssertionError: shapes differ", "assertion"),
    ("urllib3.exceptions: [Errno 111] Connection refused", "unreachable"),
    ("ValueError: nothing known about this", ""),
]


@pytest.mark.parametrize(("line", "kind"), LINES)
def test_a_log_line_gives_its_kind_away(line: str, kind: str) -> None:
    assert signature(f"step 1\nstep 2\n{line}\n") == kind


def test_the_last_signature_counts() -> None:
    assert signature("Connection refused\nretrying\nCUDA out of memory\n") == "oom"


def test_a_bare_sigkill_is_no_evidence_of_memory() -> None:
    assert classify(JobState(ENDED, None, signal.SIGKILL), None).kind == "killed"


def test_sigkill_with_more_memory_than_asked_for_is() -> None:
    assert classify(JobState(ENDED, None, signal.SIGKILL, max_rss_gb=2.5), None, memory_gb=2.0).kind == "oom"


def test_the_scheduler_sees_what_the_process_cannot() -> None:
    state = JobState(ENDED, 1, reason="TIMEOUT")
    assert classify(state, {"kind": "error", "message": "x"}).kind == "timeout"
    assert classify(JobState(ENDED, None, 9, "OUT_OF_MEMORY"), None).kind == "oom"
    assert classify(JobState(ENDED, 1, reason="NODE_FAIL"), None).kind == "node_lost"


def test_the_node_knows_better_than_its_log() -> None:
    verdict = classify(JobState(ENDED, 1), {"kind": "nan", "message": "loss", "hint": "h"}, "CUDA out of memory")
    assert (verdict.kind, verdict.message, verdict.hint) == ("nan", "loss", "h")


def test_an_unspecific_report_is_refined_by_its_traceback() -> None:
    assert classify(JobState(ENDED, 1), {"kind": "error", "message": "NCCL error: remote"}).kind == "node_lost"


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        (JobState(ENDED, 75), "preempted"),
        (JobState(ENDED, 76), "lease_lost"),
        (JobState(ENDED, None), "killed"),
        (JobState(ENDED, None, signal.SIGTERM), "killed"),
        (JobState(ENDED, None, signal.SIGSEGV), "crash"),
        (JobState(ENDED, 1), "error"),
        (JobState(ENDED, 0), "error"),
    ],
)
def test_exit_codes_and_signals(state: JobState, kind: str) -> None:
    assert classify(state, None).kind == kind


def test_every_kind_has_a_rule() -> None:
    kinds = {kind for _, kind in LINES if kind} | set(HINTS)
    assert kinds <= RULES.keys()


def test_tail_keeps_the_last_lines_that_say_something() -> None:
    assert tail("a\n\n b \n\n", lines=1) == " b"


def failure(kind: str, state: str = "", time: float = 0.0, code: str = "c") -> Failure:
    return Failure(stage="s", attempt=f"a{time}", kind=kind, message="m", state=state, time=time, code=code)


def test_being_preempted_is_free_but_not_for_ever() -> None:
    assert decide([failure("preempted", time=t) for t in range(5)]).retry
    assert not decide([failure("preempted", time=t) for t in range(6)]).retry


def test_progress_resets_the_budget() -> None:
    failures = [failure("killed", time=t) for t in range(5)]
    failures.append(failure("killed", state="s100", time=5))
    failures += [failure("killed", state="s100", time=t) for t in range(6, 10)]
    assert decide(failures).retry
    failures += [failure("killed", state="s100", time=t) for t in range(10, 12)]
    assert not decide(failures).retry


@pytest.mark.parametrize("kind", ["nan", "diverged", "router_collapsed", "import", "bad_spec", "assertion", "error"])
def test_what_would_fail_again_is_not_tried_again(kind: str) -> None:
    assert not decide([failure(kind)]).retry
    assert not decide([failure("a kind of the future")]).retry


def test_out_of_memory_is_tried_again_only_with_more_memory() -> None:
    assert decide([failure("oom")]).memory_factor == 2.0
    assert decide([failure("oom", time=0), failure("oom", time=1)]).memory_factor == 4.0
    assert not decide([failure("oom", time=t) for t in range(3)]).retry


def test_a_timeout_is_tried_again_only_after_progress() -> None:
    assert not decide([failure("timeout")]).retry
    assert decide([failure("timeout", state="s50")]).retry


def test_an_unreachable_store_is_left_alone_longer_and_longer() -> None:
    waits = [decide([failure("unreachable", time=0.0)] * n).at for n in (1, 2, 3)]
    assert waits == sorted(set(waits))
    assert waits[0] > 0


def test_resume_pardons_outside_reasons_and_changed_code() -> None:
    assert pardoned(failure("disk_full"), retry="outside", code="c")
    assert not pardoned(failure("nan"), retry="outside", code="c")
    assert pardoned(failure("nan"), retry="all", code="c")
    assert pardoned(failure("nan"), retry="outside", code="other")


def test_a_failure_survives_its_way_through_json() -> None:
    one = failure("nan")
    assert Failure.from_json({**one.to_json(), "a_later_field": 1}) == one
