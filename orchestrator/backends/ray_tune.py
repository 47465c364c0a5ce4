"""Ray Tune decides which trials of a `search:` section run and which of them stop early; it computes nothing itself."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import MoegridError
from orchestrator.grid.search import SearchAxis, SearchSpec

# A trial runs with its values and yields (fraction of its steps, metric) whenever there is one.
Trial = Callable[[Mapping[str, Any]], Iterator[tuple[float, float]]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One trial: its values, the last fraction it reached, the metric there, and why it failed, if it did."""

    values: Mapping[str, Any]
    fraction: float
    metric: float | None
    error: str = ""


def run_trials(
    spec: SearchSpec, trial: Trial, folder: Path, begun: Sequence[Mapping[str, object]] = ()
) -> list[Outcome]:
    """Run the trials of a search, `concurrency` at a time, and return how they ended.

    With sampler random equal seeds sample equal values. Optuna's depend on which trial ends first: the values of
    `begun`, the trials of a search that was killed, come first. Tune's own records go to `folder`; they are advisory,
    whatever a trial made is in the store.
    """
    # Ray listens on every interface: this one takes nobody without its token. Ray reads the settings when imported.
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    try:
        import ray
        from ray import tune
    except ImportError as error:
        raise MoegridError(
            "a grid with `search:` needs Ray Tune", cause=str(error), hint="make setup SITE=ray"
        ) from error

    def trainable(config: dict[str, Any]) -> None:
        for fraction, value in trial(config):
            tune.report({"metric": value, "percent": 100 * fraction})

    scheduler: object = tune.schedulers.FIFOScheduler()
    if spec.scheduler.name == "asha":
        scheduler = tune.schedulers.ASHAScheduler(
            time_attr="percent",
            max_t=100,
            grace_period=100 * spec.scheduler.grace,
            reduction_factor=spec.scheduler.reduction,
        )
    sampled = spec.sampler != "random" or any(axis.kind != "grid" for axis in spec.space)
    ray.init(
        address="local", num_cpus=spec.concurrency, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    try:
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
            param_space={axis.name: _distribution(tune, axis, spec.sampler) for axis in spec.space},
            tune_config=tune.TuneConfig(
                metric="metric",
                mode=spec.mode,
                num_samples=spec.trials if sampled else 1,
                max_concurrent_trials=spec.concurrency,
                scheduler=scheduler,
                search_alg=_sampler(spec, begun),
            ),
            run_config=tune.RunConfig(storage_path=str(folder.resolve()), name="tune", verbose=0),
        )
        return [_outcome(result) for result in tuner.fit()]
    finally:
        ray.shutdown()


def _sampler(spec: SearchSpec, begun: Sequence[Mapping[str, object]]) -> Any:
    if spec.sampler == "random":
        from ray.tune.search.basic_variant import BasicVariantGenerator

        return BasicVariantGenerator(random_state=spec.seed)
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch
    except ImportError as error:
        raise MoegridError(
            "search.sampler is optuna, which is not installed", cause=str(error), hint="pip install optuna, or: random"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    points = [dict(values) for values in begun]
    return OptunaSearch(metric="metric", mode=spec.mode, seed=spec.seed, points_to_evaluate=points or None)


def _distribution(tune: Any, axis: SearchAxis, sampler: str) -> Any:
    if axis.kind == "grid" and sampler == "random":
        return tune.grid_search(list(axis.values))
    if axis.kind in ("grid", "choice"):
        return tune.choice(list(axis.values))
    if axis.whole:
        whole = tune.lograndint if axis.kind == "loguniform" else tune.randint
        return whole(int(axis.low), int(axis.high) + 1)
    continuous = tune.loguniform if axis.kind == "loguniform" else tune.uniform
    return continuous(axis.low, axis.high)


def _outcome(result: Any) -> Outcome:
    metrics = result.metrics or {}
    error = str(result.error).strip().splitlines()[-1] if result.error else ""
    return Outcome(dict(result.config), metrics.get("percent", 0.0) / 100, metrics.get("metric"), error)
