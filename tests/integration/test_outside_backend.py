"""A backend of another package: a site file names it, its settings are typed, and a whole grid runs on it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.catalog.backends import BACKENDS
from orchestrator.commands.sites import site_of
from orchestrator.errors import GridError, MoegridError
from orchestrator.settings import default_site, load_site, open_backend
from orchestrator.store.attempts import Submission
from tests.faults.harness import Lab
from tests.packages import found, install

CROWD = """
import json
import os
import shlex
import signal
import subprocess
from dataclasses import dataclass, field

from orchestrator.backends.base import ELSEWHERE, ENDED, RUNNING, Handle, JobState, node_command, node_environment
from orchestrator.catalog.backends import BackendKind


@dataclass(frozen=True)
class CrowdSite:
    slots: int = field(default=1, metadata={"least": 1})
    folder: str = "/tmp"
    program: str = ""


class Crowd:
    name = "crowd"

    def __init__(self, site):
        self.site, self.children = site, {}

    def admit(self, wanted):
        running = sum(child.poll() is None for child in self.children.values())
        return [running + index < self.site.slots for index in range(len(wanted))]

    def submit(self, batch):
        return {job.attempt: self.start(batch, job) for job in batch.jobs}

    def start(self, batch, job):
        command = node_command(batch, job)
        command = (*shlex.split(self.site.program), *command[3:]) if self.site.program else command
        environment = {**node_environment(job), **batch.environment}
        with open(f"{self.site.folder}/{job.attempt}.log", "ab") as log:
            child = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        self.children[job.attempt] = child
        return Handle(job.attempt, batch.name, str(child.pid), {"crowd": self.site.folder})

    def poll(self, handles):
        states = {}
        for handle in handles:
            child = self.children.get(handle.attempt)
            code = child.poll() if child else None
            states[handle.attempt] = JobState(
                ELSEWHERE if child is None else RUNNING if code is None else ENDED, exit_code=code
            )
        return states

    def find(self, batch):
        return {}

    def cancel(self, handles, *, now):
        for handle in handles:
            os.kill(int(handle.id), signal.SIGKILL if now else signal.SIGTERM)

    def forget(self, handles):
        pass

    def log(self, handle):
        return None


def open_site(settings, store):
    return Crowd(settings)


CROWD = BackendKind("crowd", "crowds:CrowdSite", "crowds:open_site", "the package crowds lists the settings")
LOST = BackendKind("lost", "crowds:NoSite", "crowds:open_site")
"""


@pytest.fixture
def crowds(tmp_path: Path) -> Iterator[Path]:
    install(tmp_path / "site", "crowds", CROWD, {"backends": {"crowd": "crowds:CROWD", "lost": "crowds:LOST"}})
    with found(tmp_path / "site", "crowds") as folder:
        yield folder


def site(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_a_whole_grid_runs_on_it_and_another_driver_reads_it(tmp_path: Path, crowds: Path) -> None:
    job = Path(__file__).parents[1] / "faults" / "fake_job.py"
    text = f"backend: crowd\nslots: 2\nfolder: {tmp_path}\nprogram: {sys.executable} {job}\n"
    lab = Lab(tmp_path, {"PYTHONPATH": str(crowds)}, site=site(tmp_path, text + "tick_seconds: 0.05\n"))
    try:
        code, said = lab.drive()
        assert code == 0, said
        assert lab.executions()
        submissions = [lab.store().objects.get(entry.path) for entry in lab.store().objects.list("submissions/")]
        assert all(b'"backend": "crowd"' in (text or b"").replace(b'":"', b'": "') for text in submissions)
        code, said = lab.drive("status")
        assert code == 0, said
    finally:
        lab.close()


@pytest.mark.usefixtures("crowds")
def test_its_settings_are_typed_by_its_own_dataclass(tmp_path: Path) -> None:
    made = load_site(str(site(tmp_path, "backend: crowd\nslots: 3\n")))
    assert (made.backend, made.settings.slots, made.settings.folder) == ("crowd", 3, "/tmp")
    assert open_backend(made).name == "crowd"
    assert default_site("crowd").settings.slots == 1


@pytest.mark.usefixtures("crowds")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("backend: crowdd", r"backend 'crowdd' does not exist.*mine.yaml:1.*did you mean 'crowd'"),
        ("backend: crowd\nslot: 1", r"setting 'slot' is unknown.*mine.yaml:2.*did you mean 'slots'"),
        ("backend: crowd\nqueue: 1", r"setting 'queue' is unknown.*the package crowds lists the settings"),
        ("backend: crowd\nslots: 0", r"slots must be at least 1, not 0"),
        ("backend: lost", r"the code of backend 'lost' of crowds 1.2 cannot be imported: crowds:NoSite"),
    ],
)
def test_what_is_wrong_in_its_site_file_is_said_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises((GridError, MoegridError)) as caught:
        load_site(str(site(tmp_path, text + "\n")))
    import re

    assert re.search(said, str(caught.value), re.DOTALL), str(caught.value)


def test_a_site_file_brings_it_in_a_file_that_later_commands_find_as_well(tmp_path: Path) -> None:
    (tmp_path / "crowds.py").write_text(CROWD)
    text = f"backend: crowd\nplugins: [./crowds.py]\nslots: 2\nfolder: {tmp_path}\n"
    path = site(tmp_path, text)
    try:
        made = load_site(str(path))
        assert (made.settings.slots, open_backend(made).name) == (2, "crowd")
        BACKENDS.outside.clear()  # as in another process
        later = site_of(Submission("b", (), site="mine", site_file=str(path), backend="crowd"), None)
        assert open_backend(later).name == "crowd"
        with pytest.raises(GridError, match=r"setting 'slot' is unknown .*mine.yaml:3"):
            load_site(str(site(tmp_path, text.replace("slots", "slot"))))
        with pytest.raises(GridError, match=r"plugin 'crowd.py' does not exist .*mine.yaml:2"):
            load_site(str(site(tmp_path, text.replace("crowds.py", "crowd.py"))))
    finally:
        for name in ("crowd", "lost"):
            BACKENDS.outside.pop(name, None)


def test_ours_look_at_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: pytest.fail("it scanned"))
    assert [load_site(name).backend for name in ("local", "slurm", "ray")] == ["local", "slurm", "ray"]
