"""The real MLflow: a server that goes away and comes back, a database that is deleted, a publisher that is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.report import attachments, html
from orchestrator.report.collect import collect
from orchestrator.store import Store
from orchestrator.tracking.service import follow, published, sync
from tests.grid_store import FINETUNE_STEPS, LOG_EVERY, GridStore

START_SECONDS = 240.0  # it takes 5 on a quiet machine


class Server:
    """One `mlflow server` on loopback, over a database that outlives it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        command += ["--default-artifact-root", str(self.folder / "artifacts")]
        output = (self.folder / "server.txt").open("ab")
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                    return
            except OSError:
                time.sleep(0.1)
        self.stop()
        raise AssertionError((self.folder / "server.txt").read_text()[-2000:])

    def stop(self) -> None:
        """Stop the server and its worker."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
            self.process = None


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    import mlflow.tracking  # noqa: F401 (once, before a test's threads would race for it)

    running = Server(tmp_path_factory.mktemp("mlflow"))
    running.start()
    yield running
    running.stop()


# What a stage of each suite or phase says it read.
ITEMS = ["evaluation items"]
READ = {"pretrain": [], "finetune": ["finetune demo.jsonl"], "lm": ["finetune demo.jsonl"]}
READ |= {"reasoning": ITEMS, "efficiency": ITEMS}


def content(uri: str, grid: str) -> dict[str, Any]:
    """Return everything a person would compare: runs by key, with name, params, tags, parents and whole series."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(grid)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    keys = {run.info.run_id: run.data.tags["moegrid.key"] for run in runs}
    assert len(set(keys.values())) == len(keys)
    found = {}
    for run in runs:
        series = {}
        for metric in run.data.metrics:
            points = [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, metric)]
            assert len({step for step, _ in points}) == len(points), f"{run.info.run_name} {metric}"
            series[metric] = sorted(points)
        tags = {k: v for k, v in run.data.tags.items() if not k.startswith("mlflow.") or k == "mlflow.runName"}
        parent = keys.get(run.data.tags.get("mlflow.parentRunId", ""), "")
        datasets = sorted((d.dataset.name, d.dataset.digest) for d in run.inputs.dataset_inputs)
        found[keys[run.info.run_id]] = (tags, parent, dict(run.data.params), series, run.info.status, datasets)
    return found


def test_sqlite_is_rebuilt_from_the_store_alone(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store"))
    grid = GridStore(store, settings=("none", "router"), seeds=(0, 1))
    grid.commit_all()
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"

    def files(name: str) -> Path:
        results = collect(name, store)
        return attachments.write(results, html.write(results, tmp_path / "page" / "index.html"), tmp_path / "runs")

    assert sync(store, "demo", uri, files=files)[0].complete
    before = content(uri, "demo")
    for key, stage in grid.stages.items():
        tags, *_, datasets = before[f"demo/stage/{key}"]
        assert tags.get("parent.state") == stage.get("state")
        assert [name for name, _ in datasets] == READ[stage.get("suite", stage["phase"])]
    assert artifacts(uri, run_id(uri, "demo/report")) >= {"index.html", "table.csv", "figures"}
    view = json.loads(experiment_tags(uri, "demo")["mlflow.sharedViewState.cells"])
    assert {"params.`freeze`", "metrics.`eval/answer_bpb`"} <= set(view["selectedColumns"])
    kinds = [column.partition(".")[0] for column in view["columnOrder"]]
    assert kinds == sorted(kinds, key=["attributes", "params", "metrics"].index), "factors stand before metrics"
    assert sync(store, "demo", uri)[0].points == 0
    assert published(store, "demo", uri)
    cell = grid.cell("router", 1)
    tags, parent, params, series, status, datasets = before[f"demo/cell/{cell['id']}"]
    assert (tags["mlflow.runName"], parent, status) == ("freeze=router seed=1", "", "FINISHED")
    assert params["freeze"] == "router"
    assert params["model.moe.top_k"] == "2"
    assert datasets == [("evaluation items", "unknown"), ("finetune demo.jsonl", "ab" * 18)]
    assert [step for step, _ in series["train/loss"]] == list(range(LOG_EVERY, FINETUNE_STEPS + 1, LOG_EVERY))
    assert before[f"demo/stage/{cell['final']}"][1] == f"demo/cell/{cell['id']}"
    (tmp_path / "mlflow.db").unlink()
    assert not published(store, "demo", uri)
    sync(store, "demo", uri, files=files)
    assert content(uri, "demo") == before


def test_a_server_that_goes_away_and_comes_back_loses_and_doubles_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.tracking.service.LONGEST_PAUSE", 1.0)
    store = Store.open(str(tmp_path / "store"))
    grid = GridStore(store, name="away", settings=("none", "router"), seeds=(0,))
    half = grid.cell("none", 0)["stages"][1]
    rows = grid.rows(half)
    grid.commit(grid.base)
    attempt = grid.submit("one", [half])
    store.claims.claim(half, attempt, 600)
    grid.tell(attempt, 0, half, rows[:1])
    stop = threading.Event()
    ended: list[bool] = []
    thread = threading.Thread(
        target=lambda: ended.append(follow(store, ["away"], server.uri, stop=stop, interval=0.2)), daemon=True
    )
    thread.start()
    try:
        wait_for(lambda: steps(server.uri, "away", half) == [rows[0]["step"]])
        server.stop()
        grid.tell(attempt, 1, half, rows[1:])
        time.sleep(1.0)
        grid.commit_all(list(grid.stages)[:4])
        time.sleep(0.5)
        server.start()
        wait_for(lambda: steps(server.uri, "away", half) == [row["step"] for row in rows])
        grid.commit_all()
    finally:
        stop.set()
        thread.join(timeout=60)
    assert ended == [True]
    uri = f"sqlite:///{tmp_path / 'other.db'}"
    sync(store, "away", uri)
    assert content(server.uri, "away") == content(uri, "away")


def test_the_sidecar_publishes_a_last_time_when_it_is_told_to_end(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store"))
    grid = GridStore(store, name="aside", settings=("none",), seeds=(0,))
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    command = [sys.executable, "-m", "orchestrator.tracking", "--store", str(tmp_path / "store")]
    command += ["--tracking-uri", uri, "--grid", "aside", "--interval", "0.2"]
    process = subprocess.Popen(command)
    try:
        grid.commit(grid.base)
        wait_for(lambda: (tmp_path / "mlflow.db").exists())
        grid.commit_all()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
    assert published(store, "aside", uri)
    assert len(content(uri, "aside")) == 1 + len(grid.stages)


def run_id(uri: str, key: str) -> str:
    """Return MLflow's id of the run with this key."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(key.partition("/")[0])
    (run,) = client.search_runs([experiment.experiment_id], filter_string=f"tags.`moegrid.key` = '{key}'")
    return str(run.info.run_id)


def artifacts(uri: str, run: str) -> set[str]:
    """Return the names at the top of a run's artifacts."""
    from mlflow.tracking import MlflowClient

    return {found.path for found in MlflowClient(uri).list_artifacts(run)}


def experiment_tags(uri: str, grid: str) -> dict[str, str]:
    """Return the tags of a grid's experiment."""
    from mlflow.tracking import MlflowClient

    return dict(MlflowClient(uri).get_experiment_by_name(grid).tags)


def steps(uri: str, grid: str, stage: str) -> list[int]:
    """Return the recorded steps of a training stage's loss, [] when it is not there."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(grid)
        if experiment is None:
            return []
        runs = client.search_runs(
            [experiment.experiment_id], filter_string=f"tags.`moegrid.key` = '{grid}/stage/{stage}'"
        )
        return sorted(p.step for run in runs for p in client.get_metric_history(run.info.run_id, "train/loss"))
    except MlflowException:
        return []


def wait_for(condition, seconds: float = 900.0) -> None:
    """Wait until `condition()` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)


def processes_naming(text: str) -> set[int]:
    """Return the ids of the processes whose command line or environment holds `text`."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes():
                found.add(int(entry.name))
        except OSError:
            continue
    return found - {os.getpid()}


def test_a_ui_that_is_killed_leaves_no_server_behind(server: Server, tmp_path: Path) -> None:
    shutil.copy(server.folder / "mlflow.db", tmp_path / "mlflow.db")
    shown = Server(tmp_path)  # it only has a free port and an address here
    words = ["ui", "--store", str(tmp_path), "--tracking", f"sqlite:///{tmp_path}/mlflow.db", "--port", str(shown.port)]
    command = subprocess.Popen([sys.executable, "-m", "orchestrator", *words], start_new_session=True)

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"{shown.uri}/health", timeout=1):
                return True
        except OSError:
            assert command.poll() is None
            return False

    wait_for(answers, START_SECONDS)
    mine = str(tmp_path / "mlflow.db")
    assert len(processes_naming(mine)) >= 3  # the command, its guard, the server
    command.kill()
    command.wait(60)

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", shown.port)) == 0

    wait_for(lambda: not processes_naming(mine) and not listens(), 60)


KILLED_MIGRATION = """
import os, signal, sys
from alembic.runtime.migration import HeadMaintainer
real, left = HeadMaintainer.update_to_step, [5]
def update(self, step):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, step)
HeadMaintainer.update_to_step = update
from mlflow.tracking import MlflowClient
MlflowClient(sys.argv[1]).search_experiments()
"""


def test_a_database_whose_first_migration_was_killed_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.tracking.database.SETTLE_SECONDS", 0.0)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    killed = subprocess.run([sys.executable, "-c", KILLED_MIGRATION, uri], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert (tmp_path / "mlflow.db").stat().st_size
    store = Store.open(f"memory://{tmp_path.name}")
    grid = GridStore(store, settings=("none",), seeds=(0,))
    grid.commit_all()
    first = sync(store, grid.name, uri)[0]
    assert first.created
    assert sync(store, grid.name, uri)[0].points == 0, "the second one finds it all there"
    assert len(list(tmp_path.glob("mlflow.db.half-made-*[0-9a-f]"))) == 1, "nothing was deleted"
    assert not list(tmp_path.glob(".mlflow.db.new-*"))
