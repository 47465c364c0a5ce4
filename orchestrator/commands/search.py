"""`moegrid run` of a grid with a `search:` section: a trial is an ordinary run of ordinary cells over the same store.

Nothing is lost by a kill: an equal seed samples the same values again (Optuna is given those of the trials that were
begun), and what their cells reached is in the store.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.backends.ray_tune import Outcome, run_trials
from orchestrator.commands import again
from orchestrator.commands.context import Context
from orchestrator.errors import EXIT_DONE, EXIT_FAILED, MoegridError
from orchestrator.grid.files import find_grid
from orchestrator.grid.load import load_grid
from orchestrator.grid.search import SearchSpec
from orchestrator.plan.graph import StageGraph, build_graph
from orchestrator.settings import module_environment
from orchestrator.store import Store

POLL_SECONDS = 2.0
STOP_SECONDS = 60.0
# How this process was started; tests replace it.
PROGRAM: tuple[str, ...] = (sys.executable, "-m", "orchestrator")


@dataclass(frozen=True, slots=True)
class TrialRun:
    """Runs the cells of one trial in a `moegrid run` of its own and reads their metric from the store."""

    name: str
    program: tuple[str, ...]
    arguments: Mapping[str, Any]
    store: str
    tracking: str
    metric: str
    fractions: tuple[float, ...]
    folder: str  # where the command was given: relative paths of sites, trackers and caches are meant from there
    environment: Mapping[str, str]

    def __call__(self, values: Mapping[str, object]) -> Iterator[tuple[float, float]]:
        """Yield (fraction, mean of the metric over the trial's cells) as the states at the fractions are evaluated."""
        overrides = [*self.arguments["overrides"], *trial_overrides(values, self.fractions)]
        graph = self.graph(overrides)
        store = Store.open(self.store)
        digest = hashlib.sha256(json.dumps(dict(values), sort_keys=True).encode()).hexdigest()
        store.create_json(f"{begun_folder(self.name)}/{digest[:32]}.json", {"values": dict(values)})
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(
                [*self.program, *self.words(overrides)],
                cwd=self.folder,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
            )
            try:
                for fraction in self.fractions:
                    value = self.wait(graph, store, fraction, process)
                    if value is None:
                        said.seek(0)
                        tail = said.read().decode(errors="replace").strip()[-2000:]
                        raise MoegridError(f"the trial has no {self.metric} at {fraction:g}", cause=tail)
                    yield fraction, value
                process.wait()
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)  # stopped early: the states reached are saved
                    try:
                        process.wait(STOP_SECONDS)
                    except subprocess.TimeoutExpired:
                        process.kill()
                        process.wait()

    def graph(self, overrides: Sequence[str]) -> StageGraph:
        """Return the stages of the trial's cells."""
        known = self.arguments
        grid = load_grid(
            known["grid"], scale=known["scale"], overrides=overrides, only=known["only"], seeds=known["seeds"]
        )
        return build_graph(grid, share=not known["no_share"])

    def words(self, overrides: Sequence[str]) -> list[str]:
        """Return the command line of the trial."""
        known = self.arguments
        words = ["run", known["grid"], "--scale", known["scale"], "--site", known["site"], "--no-report"]
        words += ["--store", self.store, "--tracking", self.tracking or "none", "--retry", known["retry"]]
        words += ["--max-jobs", str(known["max_jobs"])]
        words += [f"--{name.replace('_', '-')}" for name in ("no_share", "allow_numerics") if known[name]]
        words += [part for value in known["only"] for part in ("--only", value)]
        words += [part for value in overrides for part in ("--set", value)]
        if known["seeds"] is not None:
            words += ["--seeds", ",".join(str(seed) for seed in known["seeds"])]
        return words

    def wait(self, graph: StageGraph, store: Store, fraction: float, process: subprocess.Popen[bytes]) -> float | None:
        """Return the metric at `fraction` once it is there; None when the run ended without it."""
        while True:
            over = process.poll() is not None
            value = self.value(graph, store, fraction)
            if value is not None or over:
                return value
            time.sleep(POLL_SECONDS)

    def value(self, graph: StageGraph, store: Store, fraction: float) -> float | None:
        """Return the mean of the metric over the cells at `fraction`, None while one of them has none."""
        found = []
        for cell in graph.cells.values():
            keys = [result.key for result in cell.results if math.isclose(result.at, fraction)]
            manifests = store.artifacts.many(keys).values()
            values = [m.metrics[self.metric] for m in manifests if self.metric in m.metrics]
            if not values:
                return None
            found.append(values[0])
        return sum(found) / len(found)


def begun_folder(name: str) -> str:
    """Return where a search keeps the values of the trials it began, so that a killed one goes on with them."""
    return f"searches/{name}"


def begun_trials(store: Store, name: str, spec: SearchSpec) -> list[dict[str, Any]]:
    """Return the values of the trials that this search has begun, in their order; a changed space drops some."""
    entries = sorted((entry.modified, entry.path) for entry in store.objects.list(begun_folder(name)))
    found = [(store.find_json(path) or {}).get("values") for _, path in entries]
    return [dict(values) for values in found if isinstance(values, dict) and _inside(spec, values)][: spec.trials]


def _inside(spec: SearchSpec, values: Mapping[str, Any]) -> bool:
    if values.keys() != {axis.name for axis in spec.space}:
        return False
    return all(
        values[axis.name] in axis.values if axis.values else axis.low <= values[axis.name] <= axis.high
        for axis in spec.space
    )


def trial_overrides(values: Mapping[str, object], fractions: Sequence[float]) -> list[str]:
    """Return the settings that make a grid with a search the grid of one trial."""
    axes = [f"factors.{name}={json.dumps([value])}" for name, value in values.items()]
    return ["search=null", f"at={json.dumps(list(fractions))}", *axes]


def search(context: Context, spec: SearchSpec, name: str) -> int:
    """Run the search, show its trials from the best on, write them to the store; return the exit code."""
    arguments, console = context.arguments, context.console
    # Tune's workers have working directories of their own: what is named here is named in full, and run from here.
    grid = str(find_grid(arguments.grid))
    environment = {
        "RAY_ADDRESS": "local",
        **module_environment(),
    }  # a trial on site ray must not settle in Tune's own Ray
    keys = ("grid", "scale", "site", "retry", "overrides", "only", "seeds", "no_share", "allow_numerics", "max_jobs")
    run = TrialRun(
        name=name,
        program=PROGRAM,
        arguments={key: getattr(arguments, key) for key in keys} | {"grid": grid},
        folder=os.getcwd(),
        store=context.store.url,
        tracking=context.tracking_uri,
        metric=spec.metric,
        fractions=spec.fractions,
        environment=environment,
    )
    console.print(
        f"{name}: search for the {spec.mode} of {spec.metric}, {spec.trials} trials, {spec.concurrency} at a time"
    )
    with tempfile.TemporaryDirectory(prefix="moegrid-tune-") as folder:
        outcomes = run_trials(spec, run, Path(folder), begun_trials(context.store, name, spec))
    sign = 1.0 if spec.mode == "min" else -1.0
    ranked = sorted(outcomes, key=lambda one: (-one.fraction, math.inf if one.metric is None else sign * one.metric))
    for outcome in ranked:
        console.print(_line(spec, outcome))
    record = {"grid": name, "metric": spec.metric, "mode": spec.mode, "trials": [_plain(one) for one in ranked]}
    context.store.put_json(f"searches/{name}.json", record)
    best = ranked[0]
    if best.metric is None:
        return EXIT_FAILED
    written = [*arguments.written, *trial_overrides(best.values, (1.0,))]
    chosen = again.command(argparse.Namespace(**{**vars(arguments), "written": written}), "run")
    console.print(f"the best trial is an ordinary grid: {chosen}")
    return EXIT_FAILED if any(one.error for one in outcomes) else EXIT_DONE


def _line(spec: SearchSpec, outcome: Outcome) -> str:
    values = " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in outcome.values.items()
    )
    metric = "no value" if outcome.metric is None else f"{spec.metric} {outcome.metric:.4f} at {outcome.fraction:g}"
    return f"  {values}: {metric}{'  failed: ' + outcome.error if outcome.error else ''}"


def _plain(outcome: Outcome) -> dict[str, Any]:
    return {
        "values": dict(outcome.values),
        "fraction": outcome.fraction,
        "metric": outcome.metric,
        "error": outcome.error,
    }
