"""MLflow as the tracker: the only file that imports mlflow, and only when it is used."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.tracking.database import prepare
from orchestrator.tracking.tracker import FAILED, FINISHED, KEY_TAG, KILLED, Point, Recorded, Run, TrackerAway

T = TypeVar("T")

# Together with the tags of a run they stay below MLflow's 1,000 entries a call.
METRICS_A_BATCH = 800
PARAMS_A_BATCH = 100
LONGEST_PARAM = 5000
NOTE = "mlflow.note.content"
# What "share" makes in MLflow's own page: a tag with the state of the table, and an address that names it.
VIEW_TAG = "mlflow.sharedViewState.cells"
VIEW_KEY = "viewStateShareKey=cells"
PARENT = "mlflow.parentRunId"


class MlflowTracker:
    """Runs in one MLflow tracking server or SQLite database, always in batches."""

    def __init__(self, tracking_uri: str) -> None:
        # A server that is away must be noticed in seconds, not after MLflow's own minutes of retries.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        self._uri = tracking_uri
        self._experiment = ""
        self._folder = ""
        self._database: Path | None = None
        if tracking_uri.startswith("sqlite:///"):
            self._database = Path(tracking_uri.removeprefix("sqlite:///")).absolute()
            self._folder = (self._database.parent / "mlartifacts").as_uri()
        self._client: Any = None

    def open(
        self, experiment: str, description: str, tags: Mapping[str, str], columns: Sequence[tuple[str, str]]
    ) -> dict[str, Recorded]:
        """Make sure the experiment exists and return its runs by key; its description links to a view of `columns`."""
        return self._reach(lambda: self._open(experiment, description, tags, columns))

    def create(self, run: Run, parent: str) -> Recorded:
        """Create the run under the run id `parent` ("" for none), with its params and data sets."""
        return self._reach(lambda: self._create(run, parent))

    def write(
        self, recorded: Recorded, points: Sequence[Point], params: Mapping[str, str], tags: Mapping[str, str]
    ) -> None:
        """Add points, params and tags in as few calls as MLflow's limits allow, the tags in the last one."""
        from mlflow.entities import Metric, Param, RunTag

        texts = [Param(name, text[:LONGEST_PARAM]) for name, text in params.items()]
        metrics = [Metric(p.metric, p.value, int(p.time * 1000), p.step) for p in points]
        labels = [RunTag(name, text) for name, text in tags.items()]
        batches = max(1, -(-len(texts) // PARAMS_A_BATCH), -(-len(metrics) // METRICS_A_BATCH))
        for i in range(batches):
            batch = {
                "params": texts[i * PARAMS_A_BATCH : (i + 1) * PARAMS_A_BATCH],
                "metrics": metrics[i * METRICS_A_BATCH : (i + 1) * METRICS_A_BATCH],
                "tags": labels if i == batches - 1 else [],
            }
            self._reach(partial(self._client.log_batch, recorded.id, **batch))
        recorded.params.update(params)
        recorded.tags.update(tags)
        for point in points:
            recorded.last[point.metric] = max(point.step, recorded.last.get(point.metric, -1))

    def remove(self, recorded: Recorded, tags: Iterable[str]) -> None:
        """Remove tags."""
        for name in tags:
            self._reach(partial(self._client.delete_tag, recorded.id, name))
            recorded.tags.pop(name, None)

    def steps(self, recorded: Recorded, metric: str) -> set[int]:
        """Return the recorded steps of one metric."""
        history = self._reach(lambda: self._client.get_metric_history(recorded.id, metric))
        return {point.step for point in history}

    def attach(self, recorded: Recorded, folder: Path) -> None:
        """Add the files below `folder` as artifacts of the run."""
        self._reach(lambda: self._client.log_artifacts(recorded.id, str(folder)))

    def finish(self, recorded: Recorded, status: str, ended: float) -> None:
        """Set the run's status; finished, failed and killed runs get their end time."""
        if status in (FINISHED, FAILED, KILLED):
            end = int(ended * 1000) or None
            self._reach(lambda: self._client.set_terminated(recorded.id, status, end))
        else:
            self._reach(lambda: self._client.update_run(recorded.id, status=status))
        recorded.status = status

    def _open(
        self, experiment: str, description: str, tags: Mapping[str, str], columns: Sequence[tuple[str, str]]
    ) -> dict[str, Recorded]:
        from mlflow.tracking import MlflowClient

        if self._client is None and self._database is not None:
            prepare(self._database, _make_database, _newest_version)
        client = self._client = self._client or MlflowClient(self._uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            location = f"{self._folder}/{experiment}" if self._folder else None
            self._experiment = client.create_experiment(experiment, artifact_location=location)
            held: Mapping[str, str] = {}
        else:
            self._experiment, held = found.experiment_id, found.tags
            if found.lifecycle_stage == "deleted":
                client.restore_experiment(self._experiment)
        link = f"[The cells with their factors and primary metrics](#/experiments/{self._experiment}/runs?{VIEW_KEY})"
        wanted = {
            **tags,
            NOTE: f"{description}\n\n{link}",
            VIEW_TAG: json.dumps(_view(columns)),
            "mlflow.experimentKind": "custom_model_development",
        }
        for name, text in wanted.items():
            if held.get(name) != text:
                client.set_experiment_tag(self._experiment, name, text)
        return self._runs()

    def _runs(self) -> dict[str, Recorded]:
        recorded: dict[str, Recorded] = {}
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment], max_results=1000, order_by=["attributes.start_time DESC"], page_token=token
            )
            for run in page:
                key = run.data.tags.get(KEY_TAG)
                if key:
                    # Of two runs with one key the older stays.
                    recorded[key] = Recorded(
                        run.info.run_id,
                        dict(run.data.tags),
                        set(run.data.params),
                        {metric.key: metric.step for metric in run.data._metric_objs},
                        run.info.status,
                    )
            token = page.token
            if not token:
                return recorded

    def _create(self, run: Run, parent: str) -> Recorded:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        tags = {KEY_TAG: run.key, "mlflow.runName": run.name, "mlflow.source.name": "moegrid", **run.tags}
        if parent:
            tags[PARENT] = parent
        start = int(run.started * 1000) or None
        created = self._client.create_run(self._experiment, start_time=start, tags=tags, run_name=run.name)
        inputs = [
            DatasetInput(
                Dataset(name=d.name, digest=d.digest[:36] or "unknown", source_type="moegrid", source=d.source),
                [InputTag("mlflow.data.context", d.context)],
            )
            for d in run.datasets
        ]
        if inputs:
            self._client.log_inputs(created.info.run_id, inputs)
        return Recorded(created.info.run_id, dict(created.data.tags), set(), {}, created.info.status)

    def _reach(self, call: Callable[[], T]) -> T:
        """Return what `call` returns; raises TrackerAway for whatever goes wrong between here and the tracker."""
        try:
            return call()
        except ImportError as error:
            raise TrackerAway("MLflow is not installed here", cause=str(error), hint="pip install mlflow") from error
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise TrackerAway(
                f"the tracker {safe_uri(self._uri)} cannot be used",
                cause=f"{type(error).__name__}: {reason}",
                hint="nothing is lost: `moegrid sync` fills it in when it is back, and a new one if it is moved away",
            ) from error


def _make_database(path: Path) -> None:
    """Let MLflow make its tables in a new SQLite file."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{path}")
    client.search_experiments(max_results=1)
    # The file is about to get another name: no connection may stay open on this one.
    client._tracking_client.store.engine.dispose()


def _newest_version() -> str:
    """Return the version of a database that this MLflow has finished making."""
    import mlflow
    from alembic.script import ScriptDirectory

    return str(ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations")).get_current_head())


def _view(columns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return a shared view of MLflow's table of runs: the cells, with their start and these columns."""
    shown = [f"{kind}.`{name}`" for kind, name in (("attributes", "Created"), *columns)]
    return {
        "selectedColumns": shown,
        "columnOrder": shown,  # else parameters, which the factors are, come behind all metrics
        "searchFilter": 'tags.kind = "cell"',
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "runsHiddenMode": "FIRST_20_RUNS",
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "autoRefreshEnabled": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
        **{key: [] for key in ("runsPinned", "runsHidden")},
        **{key: {} for key in ("columnWidths", "runsExpanded", "runsVisibilityMap", "groupsExpanded")},
    }


def safe_uri(uri: str) -> str:
    """Return `uri` without credentials."""
    return re.sub(r"//[^/@]*@", "//", uri)
