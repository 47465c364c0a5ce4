"""What the world does to a job is tried again by `moegrid resume`, what the work itself does is not.

Twenty troubles of a store and ten faults of the work, each when a job starts, works and commits. A trouble lasts until
the first driver has given up; then it is over, and `resume` alone brings the undisturbed results.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Lab, assert_sound, graph
from tests.faults.test_store_faults import small_disk
from tests.faults.troubles import OWN
from tests.s3_faults import FAULTS, FaultyProxy
from tests.s3_lab import S3Lab
from tests.small_grid import GRID, made_up_text, moegrid, weights

FOLDER = ("EROFS", "EACCES", "ESTALE", "EIO", "ENOSPC", "EDQUOT", "ETIMEDOUT", "ENOTCONN", "garbage", "empty")
MOMENTS = ("start", "middle", "commit")
# One of each kind of stage, for what happens while or after a stage runs.
LABELS = {"middle": "pretrain", "commit": "finetune 0-25"}
# What `make test` runs of all this.
SAMPLE = {("EROFS", "start"), ("403 answer", "start"), ("encoding", "commit")}
OUTSIDE = {"unreachable", "disk_full", "corrupt", "parent_missing"}


def cases(names: Iterable[str], mark: str = "") -> list[Any]:
    """Return every (name, moment), the whole of them for `make faults` alone."""
    return [
        pytest.param(name, moment, marks=() if (name + mark, moment) in SAMPLE else pytest.mark.faults)
        for name in names
        for moment in MOMENTS
    ]


def order(lab: Lab, what: str, moment: str, label: str = "") -> None:
    """Let this happen in the jobs that start from now on."""
    lab.folder.mkdir(parents=True, exist_ok=True)
    path = lab.folder / "trouble.json"
    path.write_text(json.dumps({"what": what, "moment": moment, "label": label}))
    lab.environment |= {"FAKE_TROUBLE": str(path), "FAKE_HURRY": "0.1"}


def over(lab: Lab) -> None:
    """Let nothing happen any more."""
    order(lab, "", "")


def kinds(lab: Lab) -> set[str]:
    """Return the kinds of all failures that were written down."""
    store = lab.store()
    found = [store.get_json(e.path) for e in store.objects.list("failures") if e.path.endswith(".json")]
    return {record["kind"] for record in found if record}


def assert_resume_mends(lab: Lab, reference: dict[str, Any], disturbed: tuple[int, str]) -> None:
    """The first driver gave up for reasons outside the work, or the jobs outlasted the trouble; `resume` ends it."""
    code, said = disturbed
    assert kinds(lab) <= OUTSIDE, said
    assert code in (0, 3, 1), said
    if code:
        assert kinds(lab), said
        assert "hint: " in said
        assert "failed unreachable: hint" not in said
    code, said = lab.drive("resume")
    assert code == 0, said
    assert_sound(lab, reference, once=False)


@pytest.mark.parametrize(("what", "moment"), cases(FOLDER))
def test_a_folder_that_fails_is_tried_again_by_resume(
    lab: Lab, reference: dict[str, Any], what: str, moment: str
) -> None:
    order(lab, what, moment, LABELS.get(moment, ""))
    disturbed = lab.drive()
    assert kinds(lab), disturbed[1]
    over(lab)
    assert_resume_mends(lab, reference, disturbed)


@pytest.fixture
def faulty(s3: S3Lab) -> Iterator[FaultyProxy]:
    """A proxy before the lab that only jobs go through."""
    proxy = FaultyProxy(s3.port)
    yield proxy
    proxy.close()


@pytest.mark.parametrize(("what", "moment"), cases(FAULTS, " answer"))
def test_a_bucket_that_fails_is_tried_again_by_resume(
    lab: Lab, reference: dict[str, Any], s3: S3Lab, faulty: FaultyProxy, what: str, moment: str
) -> None:
    lab.url = s3.fresh_url()
    lab.environment["FAKE_ENDPOINT"] = faulty.endpoint
    over(lab)
    part, method = {"start": ("store.json", ""), "middle": ("/attempts/", "PUT"), "commit": ("/artifacts/", "PUT")}[
        moment
    ]
    faulty.fail(what, part, method)
    disturbed = lab.drive()
    faulty.mend()
    assert faulty.met
    assert_resume_mends(lab, reference, disturbed)


@pytest.mark.faults
@pytest.mark.parametrize("stages", [1, 3, 6])
def test_a_store_that_was_made_anew_is_filled_again(lab: Lab, reference: dict[str, Any], stages: int) -> None:
    lab.environment |= {"FAKE_SECONDS": "0.3", "DRIVER_PATIENCE": "5"}
    driver = lab.start()
    lab.wait_for(lambda: len(lab.executions()) >= stages, "the first stages", seconds=60)
    shutil.rmtree(lab.store_path, ignore_errors=True)
    shutil.rmtree(lab.store_path, ignore_errors=True)
    said = driver.communicate(timeout=120)[0]
    assert driver.returncode in (0, 1, 3), said
    code, said = lab.drive("resume")
    assert code == 0, said
    assert_sound(lab, reference, once=False)


def assert_own_fault_stays(lab: Lab, label: str, disturbed: tuple[int, str]) -> None:
    """The stage failed once, its cell is failed, and `resume` does not try it again."""
    failed = [key for key, stage in graph().stages.items() if label in stage.label]
    code, said = disturbed
    assert code == 1, said
    assert not kinds(lab) & OUTSIDE, said
    before = len(lab.executions())
    over(lab)
    code, said = lab.drive("resume")
    assert code == 1, said
    assert len(lab.executions()) == before, "it was tried again"
    assert not lab.results().keys() & set(failed)
    cells = json.loads(lab.drive("status", "--json")[1])["cells"]
    assert {"failed", "blocked"} & {cell["state"] for cell in cells}


@pytest.mark.parametrize(("what", "moment"), cases(OWN))
def test_a_fault_of_the_work_stays_a_failure(lab: Lab, reference: dict[str, Any], what: str, moment: str) -> None:
    if what == "no commit" and moment != "commit":
        pytest.skip("a stage that does not commit does so at its end")
    label = {"start": "tokens", "middle": "pretrain", "commit": "finetune 25-50 freeze router"}[moment]
    order(lab, what, moment, label)
    assert_own_fault_stays(lab, label, lab.drive())
    code, said = lab.drive("resume", "--retry", "all")
    assert code == 0, said
    assert_sound(lab, reference, once=False)


def remount(folder: Path, how: str) -> None:
    """Turn a mounted disk read-only or back, which waits for files that are open to be written."""
    end = time.monotonic() + 60
    while subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], capture_output=True).returncode:
        assert time.monotonic() < end, f"{folder} stays busy"
        time.sleep(0.01)


@pytest.mark.faults
def test_real_jobs_outlast_a_disk_that_turns_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEGRID_RUN_DIR", str(tmp_path / "run"))
    grid = tmp_path / "small.yaml"
    grid.write_text(GRID.format(at="[1.0]", folder=made_up_text(tmp_path)))
    moegrid("run", str(grid), "--store", str(tmp_path / "undisturbed"), "--tracking", "none", "--no-report")
    with small_disk(tmp_path / "disk", "1g"):
        store = tmp_path / "disk" / "store"
        command = [sys.executable, "-m", "orchestrator", "run", str(grid), "--store", str(store), "--tracking", "none"]
        driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for pattern in ("submissions/*", "artifacts/*", "attempts/*/series/*", "partial/*"):
            while driver.poll() is None and not any(store.glob(pattern)):
                time.sleep(0.02)
            remount(tmp_path / "disk", "ro")
            time.sleep(4)
            remount(tmp_path / "disk", "rw")
        driver.wait(timeout=600)
        moegrid("resume", str(grid), "--store", str(store), "--tracking", "none", "--no-report")
        assert weights(grid, store) == weights(grid, tmp_path / "undisturbed")
