"""Stage `judge`: one judge's score of every generated response. Another judge reads the same responses.

`items.parquet` has a row a response: task, item, label, judge, revision, template, prompt, response, and the score
under the judge's name in columns (`refusal`, `reward`, ...).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.evaluate.judging.responses import RESPONSES_BLOB, read_responses
from jobs.evaluate.ledger import Ledger
from jobs.evaluate.results import Mean, Table
from orchestrator.catalog.judges import JUDGES
from orchestrator.catalog.parameters import code_of
from orchestrator.catalog.suites import SUITES
from orchestrator.data.benchmark_files import read_labels
from orchestrator.errors import MoegridError
from orchestrator.spec.cell import JudgeSpec

if TYPE_CHECKING:
    from jobs.node.context import StageContext
    from orchestrator.spec.work import JudgeWork

Row = dict[str, Any]
Pair = tuple[str, str]  # prompt, response
Scorer = Callable[[Sequence[Pair]], list[float]]

# Responses judged and stored together.
JUDGED_ITEMS = 32


class Judge:
    """A judge ready to score: what it is called with, and what the results say about it.

    `ranks` processes judge side by side, and share the rate limit of a server.
    """

    def __init__(self, spec: JudgeSpec, device: str, ranks: int = 1) -> None:
        kind = JUDGES.get(spec.name)
        self._score: Scorer = code_of(JUDGES, spec.name, spec.parameters)(spec, device, ranks)
        self.spec = spec
        self.template: str = getattr(self._score, "template", spec.template or kind.template)
        self.revision: str = getattr(self._score, "revision", spec.revision or spec.digest)
        self._bounds: tuple[float, float] = getattr(self._score, "bounds", (kind.low, kind.high))

    @property
    def model_served(self) -> str:
        """The model that a server says it used, else ""."""
        return str(getattr(self._score, "model_served", ""))

    def scores(self, pairs: Sequence[Pair]) -> list[float]:
        """Return one finite score a pair, in the judge's bounds; MoegridError otherwise."""
        found = self._score(pairs)
        if len(found) != len(pairs):
            raise MoegridError(f"judge {self.spec.name!r} gave {len(found)} scores for {len(pairs)} responses")
        low, high = self._bounds
        between = "" if (low, high) == (-math.inf, math.inf) else f" between {low:g} and {high:g}"
        for (prompt, _), score in zip(pairs, found, strict=True):
            if not math.isfinite(score) or not low <= score <= high:
                raise MoegridError(
                    f"judge {self.spec.name!r} gave the score {score}",
                    cause=f"for the response to {prompt[:80]!r}",
                    hint=f"a score must be a finite number{between}",
                )
        return found


def open_labels(judge: JudgeSpec, device: str, ranks: int) -> Scorer:
    """Return the judge that looks a person's labels up."""
    return Labels(Path(judge.source.removeprefix("file://")))


class Labels:
    """A person's labels by (prompt, response); several labels of one response are averaged."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._scores = read_labels(path)

    def __call__(self, pairs: Sequence[Pair]) -> list[float]:
        """Return the labels of `pairs`; MoegridError when one has none."""
        unknown = [pair for pair in pairs if pair not in self._scores]
        if unknown:
            raise MoegridError(
                f"{len(unknown)} of {len(pairs)} responses have no label in {self._path}",
                cause=f"the first is the response to {unknown[0][0][:80]!r}",
                hint="label the responses as they are in responses.parquet of the stage that generated them",
            )
        return [sum(self._scores[pair]) / len(self._scores[pair]) for pair in pairs]


def run(context: StageContext, work: JudgeWork) -> None:
    """Score every response and commit `items.parquet` with the metrics; goes on where a killed run was."""
    if context.world_size > 1:
        from jobs.node.ranks import meet

        # Rank 0 comes here when it has committed the responses, which may be made in this very job.
        meet(f"{context.stage}/responses", context.rank, context.world_size, context.job.signals.check)
    responses = context.manifest(work.responses)
    rows = read_responses(context.fetch(work.responses, RESPONSES_BLOB).read_bytes())
    context.job.live.pop("evaluated", None)  # a judge may need the memory of the model it judges
    judge = Judge(work.judge, context.execution.device, context.world_size)
    ledger = Ledger(context)
    starts = range(0, len(rows), JUDGED_ITEMS)
    parts = [[(row["prompt"], row["response"]) for row in rows[at : at + JUDGED_ITEMS]] for at in starts]
    found = ledger.scored(
        [(f"scores-{number}", partial(judge.scores, pairs)) for number, pairs in enumerate(parts)],
        lambda done: context.progress(min(done * JUDGED_ITEMS, len(rows)), len(rows)),
    )
    scores = [score for part in found for score in part]
    table = summarise(work.suite, work.judge, rows, scores)
    about = {"judge": work.judge.name, "revision": judge.revision, "template": judge.template}
    info: dict[str, object] = {**table.info, **about, "source": work.judge.source, "label": work.judge.label}
    info["model_served"] = judge.model_served
    info |= {name: responses.info.get(name) for name in ("generation", "dola", "seed")}
    items = scores_parquet(rows, scores, about, JUDGES.get(work.judge.name).shown)
    ledger.commit(work, blobs={"items.parquet": items}, metrics=table.metrics, info=info)


def summarise(suite: str, judge: JudgeSpec, rows: Sequence[Row], scores: Sequence[float]) -> Table:
    """Return the mean score of each set and over the sets; for over-refusal, of safe and unsafe prompts apart."""
    column = JUDGES.get(judge.name).shown
    table = Table()
    groups: dict[str, list[float]] = {}
    for row, score in zip(rows, scores, strict=True):
        group = f"{row['task']}_{row['label']}" if row["label"] else row["task"]
        groups.setdefault(group, []).append(score)
    means = {group: Mean.of(values, f"{group}_{column}") for group, values in groups.items()}
    for group, mean in means.items():
        table.add(f"{group}_{column}", mean)
    judging = SUITES.get(suite).judged
    assert judging is not None, f"suite {suite!r} is not judged"
    if judging.sets:
        table.add(f"{judging.prefix}_{column}", Mean.over(list(means.values())))
    # A model that says nothing neither helps nor refuses.
    name = f"{judging.prefix}_empty"
    table.add(name, Mean.of([float(not row["response"].strip()) for row in rows], name, 0.0, 1.0))
    return table


def scores_parquet(rows: Sequence[Row], scores: Sequence[float], about: dict[str, str], column: str) -> bytes:
    """Return `items.parquet` of a judge, in the order of the responses."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: [row[name] for row in rows] for name in ("task", "item", "label", "prompt", "response")}
    columns |= {name: [value] * len(rows) for name, value in about.items()}
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    table = table.append_column(column, pa.array(scores, pa.float64()))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
