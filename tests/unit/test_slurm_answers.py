"""What counts as an answer of SLURM's commands, and what nobody may conclude from the lack of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.backends import slurm_records as records
from orchestrator.backends.base import ABSENT, ENDED, QUEUED, RUNNING, JobState, SchedulerUnreachable
from orchestrator.backends.slurm_records import Refused
from orchestrator.engine.failures import classify
from orchestrator.engine.retry import rule
from tests.fake_slurm import Scheduler, backend_in, batch_of, queue_line, scheduler

__all__ = ["scheduler"]


@pytest.mark.parametrize(
    "message",
    [
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "sacct: error: slurm_persist_conn_open_without_init: failed to open persistent connection: Connection refused",
        "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
    ],
)
def test_a_scheduler_that_is_away_is_told_apart_from_one_that_refuses(
    scheduler: Scheduler, tmp_path: Path, message: str
) -> None:
    backend = backend_in(tmp_path)
    handles = list(backend.submit(batch_of(1)).values())
    scheduler.fails(sbatch=message, squeue=message, sacct=message)
    for action in (lambda: backend.poll(handles), lambda: backend.find("d-0"), lambda: backend.submit(batch_of(1))):
        with pytest.raises(SchedulerUnreachable):
            action()
    scheduler.fails(sbatch="sbatch: error: Batch job submission failed: Invalid account or account/partition")
    backend = backend_in(tmp_path)
    with pytest.raises(Refused, match="sbatch failed") as refused:
        backend.submit(batch_of(1))
    assert "Invalid account" in refused.value.cause


NO_ANSWERS = ["", "\n\n", "garbage\n", "\x00\x01|\x02\n", "slurm_load_jobs: one|two\n", "<html>502 Bad Gateway</html>"]


@pytest.mark.parametrize("text", NO_ANSWERS)
@pytest.mark.parametrize("command", ["squeue", "sacct"])
def test_what_is_no_answer_makes_no_job_absent(scheduler: Scheduler, tmp_path: Path, command: str, text: str) -> None:
    backend = backend_in(tmp_path)
    handles = list(backend.submit(batch_of(2)).values())
    scheduler.prints(command, text)
    for action in (lambda: backend.poll(handles), lambda: backend.find("d-0")):
        with pytest.raises(SchedulerUnreachable, match=f"{command} gave no answer"):
            action()
    (scheduler.directory / f"{command}.out").write_bytes(b"\xff\xfe\x00|" * 3)
    with pytest.raises(SchedulerUnreachable):
        backend.poll(handles)


@pytest.mark.parametrize("words", ["flux capacitor exhausted", "Unexpected message received", ""])
def test_an_error_in_unknown_words_is_asked_again(scheduler: Scheduler, tmp_path: Path, words: str) -> None:
    backend = backend_in(tmp_path)
    handles = list(backend.submit(batch_of(1)).values())
    for command in ("squeue", "sacct", "scontrol"):
        scheduler.says(squeue="", sacct="")
        scheduler.fails(**{command: words})
        with pytest.raises(SchedulerUnreachable, match=f"{command} gave no answer"):
            backend.poll(handles)
        scheduler.fails(scontrol="Invalid job id specified")
    scheduler.says(squeue="", sacct="")
    scheduler.fails(scancel=words)
    with pytest.raises(SchedulerUnreachable):
        backend.cancel(handles, now=True)
    for refusal in ("Invalid job id specified", "Job/step already completing or completed"):
        scheduler.fails(scancel=f"scancel: error: Kill job error on job id 7: {refusal}")
        backend.cancel(handles, now=True)


def test_the_controllers_record_of_an_end_does_not_wait_for_accounting(scheduler: Scheduler, tmp_path: Path) -> None:
    backend = backend_in(tmp_path)
    handles = list(backend.submit(batch_of(2)).values())
    scheduler.says(squeue=queue_line(0, "COMPLETED") + queue_line(1, "RUNNING"))
    scheduler.fails(sacct="sacct: error: something is odd today")
    assert backend.poll(handles) == {"d-0-0": JobState(ENDED, 0, host="n1"), "d-0-1": JobState(RUNNING, host="n1")}


def test_a_job_that_the_controller_holds_is_not_absent(scheduler: Scheduler, tmp_path: Path) -> None:
    """squeue answers, but leaves a job out (a filter, a cut answer): that is no reason to submit it again."""
    backend = backend_in(tmp_path)
    one, two = backend.submit(batch_of(2)).values()
    line = "JobId=%d ArrayJobId=7 ArrayTaskId=%s JobName=%s UserId=me(1) JobState=PENDING\n"
    for held in ("0", "0-4%2", "0,3,5,...", "N/A"):
        scheduler.says(scontrol=line % (7, held, "d-0"))
        with pytest.raises(SchedulerUnreachable, match="squeue does not tell of job 7_0, which the controller holds"):
            backend.poll([one])
    scheduler.says(scontrol=line % (8, "0", "d-0") + line % (7, "1-4", "d-0"))
    with pytest.raises(SchedulerUnreachable, match="job 7_1"):
        backend.poll([two])
    scheduler.says(scontrol=line % (7, "0", "other") + line % (9, "3", "d-0"))
    assert {state.phase for state in backend.poll([one, two]).values()} == {ABSENT}
    scheduler.prints("scontrol", "")
    with pytest.raises(SchedulerUnreachable, match="scontrol gave no answer"):
        backend.poll([one])


@pytest.mark.parametrize("reason", ["launch failed requeued held", "launch_failed_requeued_held", "JobHoldMaxRequeue"])
def test_a_job_that_is_held_because_it_could_not_start_is_tried_elsewhere(
    scheduler: Scheduler, tmp_path: Path, reason: str
) -> None:
    backend = backend_in(tmp_path)
    handles = list(backend.submit(batch_of(2)).values())
    scheduler.says(squeue=queue_line(0, "PENDING", reason=reason) + queue_line(1, "PENDING", reason="JobHeldUser"))
    assert scheduler.calls
    states = backend.poll(handles)
    assert states["d-0-1"].phase == QUEUED, "a person may release what a person held"
    assert states["d-0-0"] == JobState(ENDED, reason="LAUNCH_FAILED", host="n1")
    assert not [call for call in scheduler.calls if call.startswith("scancel")], "looking changes nothing"
    backend.forget(handles)
    assert [call for call in scheduler.calls if call.startswith("scancel")] == ["scancel --quiet 7_[0]"]
    backend.forget(handles)
    assert not scheduler.calls
    verdict = classify(states["d-0-0"], None, "")
    assert verdict.kind == "node_lost"
    assert rule(verdict.kind).outside
    assert rule(verdict.kind).retries


def test_a_state_of_an_unknown_name_is_no_end(scheduler: Scheduler, tmp_path: Path) -> None:
    backend = backend_in(tmp_path)
    handles = list(backend.submit(batch_of(1)).values())
    scheduler.says(squeue=queue_line(0, "EXPEDITED"))
    assert backend.poll(handles)["d-0-0"].phase == RUNNING


@pytest.mark.parametrize(
    "words", ["", "flux capacitor exhausted", "Batch job submission failed: Resource temporarily unavailable"]
)
def test_a_submission_of_which_nobody_knows_is_no_refusal(scheduler: Scheduler, tmp_path: Path, words: str) -> None:
    """It may have been taken: whoever submitted looks it up by its name, and fails no cell."""
    backend = backend_in(tmp_path)
    backend.submit(batch_of(1))
    scheduler.fails(sbatch=words)
    with pytest.raises(SchedulerUnreachable, match="sbatch gave no answer"):
        backend.submit(batch_of(1, name="d-1"))
    for text in ("", "Submitted batch job\n", "job 99 is not yours\n"):
        scheduler.prints("sbatch", text)
        with pytest.raises(SchedulerUnreachable, match="sbatch gave no answer"):
            backend.submit(batch_of(1, name="d-2"))
    scheduler.prints("sbatch", "You have 5 jobs left\nSubmitted batch job 71 on cluster c\n")
    assert backend.submit(batch_of(1, name="d-3"))["d-3-0"].id == "71_0"


@pytest.mark.parametrize(
    "words",
    [
        "Invalid qos specification",
        "Requested node configuration is not available",
        "User's group not permitted to use this partition",
        "Requested time limit is invalid (missing or exceeds some limit)",
        "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
    ],
)
def test_a_refusal_is_a_failure_from_outside_with_its_words(scheduler: Scheduler, tmp_path: Path, words: str) -> None:
    backend = backend_in(tmp_path)
    backend.submit(batch_of(1))
    scheduler.fails(sbatch=f"sbatch: error: Batch job submission failed: {words}")
    (handle,) = backend.submit(batch_of(1, name="d-1")).values()
    log = backend.log(handle)
    assert log is not None
    verdict = classify(backend.poll([handle])["d-1-0"], None, log.read_text())
    assert verdict.kind == "refused"
    assert words in verdict.message
    assert rule(verdict.kind).outside


def test_a_client_that_hangs_is_cut_off(scheduler: Scheduler, tmp_path: Path) -> None:
    (scheduler.directory / "squeue").write_text("#!/bin/sh\nexec sleep 20\n")
    with pytest.raises(SchedulerUnreachable, match="did not answer within"):
        records.queue(timeout=0.3, jobs={"7"})


def test_forgotten_ids_and_missing_accounting_are_no_errors(scheduler: Scheduler, tmp_path: Path) -> None:
    backend = backend_in(tmp_path)
    handles = list(backend.submit(batch_of(1)).values())
    scheduler.fails(
        squeue="slurm_load_jobs error: Invalid job id specified", sacct="Slurm accounting storage is disabled"
    )
    assert backend.poll(handles)["d-0-0"].phase == ABSENT
