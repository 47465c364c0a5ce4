"""What ended a job is told by the strongest witness: scheduler, node, log, exit code."""

from __future__ import annotations

import json
import signal

import pytest

from orchestrator.backends.base import ENDED, JobState
from orchestrator.engine.failures import HINTS, classify, signature, spoken, tail
from orchestrator.engine.retry import RULES, decide, pardoned
from orchestrator.store.attempts import Failure

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
    ("OSError: [Errno 116] Stale file handle: '/nfs/store/artifacts'", "unreachable"),
    ("OSError: [Errno 5] Input/output error", "unreachable"),
    ("ImportError: /nfs/env/lib/libx.so: cannot read file data: Input/output error", "unreachable"),
    ("safetensors_rust.SafetensorError: I/O error: Connection timed out (os error 110)", "unreachable"),
    ("OSError: [Errno 30] Read-only file system: '/scratch/x'", "unreachable"),
    ("bash: /nfs/env/bin/python: Transport endpoint is not connected", "unreachable"),
    ("error: cannot write artifacts/a.json in s3://b/p", "unreachable"),
    ("error: store.json in s3://b is damaged", "unreachable"),
    ("error: there is no submission submissions/x.json in s3://b", "unreachable"),
    ("PermissionError: [Errno 13] Permission denied: '/data/mine.jsonl'", ""),
    ("FileNotFoundError: [Errno 2] No such file or directory: '/data/mine.jsonl'", ""),
    ("loss 2.3100 and 12 lines of information", ""),
    ("hint: check that the connection was not refused: connection refused", ""),
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
        (JobState(ENDED, 69), "unreachable"),
        (JobState(ENDED, None), "killed"),
        (JobState(ENDED, None, signal.SIGTERM), "killed"),
        (JobState(ENDED, None, signal.SIGSEGV), "crash"),
        (JobState(ENDED, 1), "error"),
        (JobState(ENDED, 0), "error"),
    ],
)
def test_exit_codes_and_signals(state: JobState, kind: str) -> None:
    assert classify(state, None).kind == kind


SERVER = "http://10.0.0.1:9000"
# What a store says in an error's cause while it is away.
CAUSES = (
    f"{SERVER} could not be reached: operation timed out",
    f"{SERVER} could not be reached: client error (Connect)",
    f"{SERVER} could not be reached: connection closed before message completed",
    f"{SERVER} answered 500 InternalError",
    f"{SERVER} answered 503 SlowDown",
    f"{SERVER} answered 400 ExpiredToken",
    f"{SERVER} refused the credentials",
    f"{SERVER} refused the credentials (ExpiredToken)",
    f"no credentials were found for {SERVER}",
    "the bucket does not exist",
    "the file system is read-only: [Errno 30] Read-only file system",
    "no permission: [Errno 13] Permission denied: '/store/claims'",
    "[Errno 116] Stale file handle",
    "[Errno 5] Input/output error",
    "Expecting value: line 1 column 1 (char 0)",
    "it has no store.json",
)


@pytest.mark.parametrize("cause", CAUSES)
def test_a_store_that_is_away_is_a_reason_to_try_again_and_is_told_by_its_error(cause: str) -> None:
    log = f"starting\nerror: cannot read store.json in s3://b\ncause: {cause}\nhint: look at it; then: moegrid resume\n"
    for code in (1, 69):
        verdict = classify(JobState(ENDED, code), None, log)
        assert verdict.kind == "unreachable"
        assert RULES[verdict.kind].outside
        assert verdict.message == f"exit code {code}: cannot read store.json in s3://b ({cause})"
        assert verdict.hint == "look at it; then: moegrid resume"


def test_the_record_in_the_log_comes_before_what_the_log_says() -> None:
    record = {"attempt": "a-0", "kind": "nan", "message": "the loss is not finite", "hint": "lower the rate"}
    log = f"3: moegrid-failure {json.dumps(record)}\nfailure not recorded: http://x could not be reached: timed out\n"
    verdict = classify(JobState(ENDED, 1), None, log)
    assert (verdict.kind, verdict.message, verdict.hint) == ("nan", "the loss is not finite", "lower the rate")
    assert spoken(log, "a-0") == record
    assert spoken(log, "another-0") is None
    assert spoken("moegrid-failure {broken}\n") is None


def test_what_the_work_raised_is_not_refined_by_what_it_quotes() -> None:
    report = {"kind": "error", "own": True, "message": "ValueError: row 3: 'connection refused' is no number"}
    assert classify(JobState(ENDED, 1), report).kind == "error"
    trace = 'Traceback (most recent call last):\n    raise ValueError("connection refused")\nValueError: bad\n'
    assert (
        classify(JobState(ENDED, 1), {"kind": "error", "message": "ValueError: bad", "traceback": trace}).kind
        == "error"
    )


def test_an_artifact_that_was_committed_and_is_gone_is_no_fault_of_its_stage() -> None:
    verdict = classify(JobState(ENDED, 0), None, committed=True)
    assert verdict.kind == "corrupt"
    assert RULES[verdict.kind].outside
    assert "without committing" not in verdict.message


@pytest.mark.parametrize(
    "kind", ["assertion", "import", "bad_spec", "nan", "diverged", "router_collapsed", "source", "error"]
)
def test_resume_leaves_the_works_own_faults_alone(kind: str) -> None:
    assert not pardoned(failure(kind), retry="outside", code="c")
    assert pardoned(failure(kind), retry="all", code="c")


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
