"""The suite `seeing`: questions about pictures, answered by the likeliest of their choices, and again blind.

Blind, a question is asked about another question's picture, whose answer is another one where there are enough: what is
right then is what the words give away, and no answer that two pictures happen to share.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.data.images import BLOB, load_images, pixels
from jobs.data.tokenizer import Vocabulary
from jobs.evaluate.ledger import Ledger
from jobs.evaluate.picture_scores import Asked, PictureScorer, outcome_of
from jobs.evaluate.results import Mean, Scored, Table, items_parquet
from jobs.evaluate.state import load_state
from orchestrator.errors import MoegridError

if TYPE_CHECKING:
    from jobs.node.context import StageContext
    from orchestrator.spec.work import EvaluateWork

BLIND = "blind"
# Encoded side by side, and stored together: few enough to lose little when a job is killed.
PICTURES_A_PART = 16


def run(context: StageContext, work: EvaluateWork) -> None:
    """Score every question of one set, with its picture and with another's, and commit `items.parquet`.

    What a killed run has scored is taken as it is; the ranks of a job take parts in turn.
    """
    if work.model.vision is None:
        raise MoegridError("a model that reads text alone cannot be asked about pictures", hint="set model.vision")
    state, size = load_state(context, work), work.model.vision.image_size
    encoded = load_images(context.fetch(work.items, BLOB))
    asked = [one for task in work.tasks for one in _questions(context, work, task.name, task.limit)]
    scorer = PictureScorer(state.model, Vocabulary.load(state.tokenizer_directory), work.max_length)
    parts = list(parts_of(asked))

    def scored(part: Sequence[Sequence[Asked]]) -> list[list[list[float]]]:
        names = [questions[0].picture for questions in part]
        features = scorer.features(np.stack([pixels(encoded[name], size, f"picture {name}") for name in names]))
        found = []
        for seen, questions in zip(features, part, strict=True):
            context.check()
            found.append(scorer.scores(seen, questions))
        return found

    ledger = Ledger(context)
    values = ledger.scored(
        [(_name(work, number, part), partial(scored, part)) for number, part in enumerate(parts)],
        lambda done: context.progress(done, len(parts)),
    )
    rows = [
        Scored(one.task, one.id, one.label, outcome_of(one, scores), one.intervention)
        for part, value in zip(parts, values, strict=True)
        for questions, of_picture in zip(part, value, strict=True)
        for one, scores in zip(questions, of_picture, strict=True)
    ]
    table = summarise(rows, {one.task: len(one.choices) for one in asked})
    told = {"pictures_encoded": sum(map(len, parts)), "questions_scored": len(asked)}
    ledger.commit(
        work, blobs={"items.parquet": items_parquet(rows)}, metrics=table.metrics, info={**table.info, **told}
    )


def parts_of(asked: Sequence[Asked]) -> Iterator[list[list[Asked]]]:
    """Yield the questions by picture, in parts of pictures that are scored and stored together."""
    by_picture: dict[str, list[Asked]] = {}
    for one in asked:
        by_picture.setdefault(one.picture, []).append(one)
    pictures = list(by_picture.values())
    yield from (pictures[at : at + PICTURES_A_PART] for at in range(0, len(pictures), PICTURES_A_PART))


def _name(work: EvaluateWork, number: int, part: Sequence[Sequence[Asked]]) -> str:
    """Return set, number and what is asked: scores of other questions can never be taken for these."""
    texts = [text for questions in part for one in questions for text in (one.picture, one.prompt, *one.choices)]
    return f"{work.benchmark}-{number}-{hashlib.sha256(chr(0).join(texts).encode()).hexdigest()[:12]}"


def summarise(rows: Sequence[Scored], choices: Mapping[str, int]) -> Table:
    """Return each task's accuracy, its accuracy blind, and how much the pictures give."""
    table = Table()
    for task, number in choices.items():
        own = {row.item: row.outcome.acc for row in rows if row.task == task and row.intervention != BLIND}
        blind = {row.item: row.outcome.acc for row in rows if row.task == task and row.intervention == BLIND}
        bits = [row.outcome.answer_bpb for row in rows if row.task == task and row.intervention != BLIND]
        table.add(f"{task}/acc", Mean.of(list(own.values()), f"{task}/acc", 0.0, 1.0), 1 / number)
        table.add(f"{task}/blind_acc", Mean.of(list(blind.values()), f"{task}/blind_acc", 0.0, 1.0), 1 / number)
        gain = [own[item] - blind[item] for item in own]
        table.add(f"{task}/sight", Mean.of(gain, f"{task}/sight", -1.0, 1.0))
        table.add(f"{task}/answer_bpb", Mean.of(bits, f"{task}/answer_bpb", 0.0))
    return table


def exchanged(answers: Sequence[str], pictures: Sequence[str]) -> list[int]:
    """Return for each question the place of the one whose picture it is asked about blind; every place occurs once.

    As few questions as can be get a picture of their own answer (none where no answer is that of more than half of
    them); where swaps can help it none gets its own picture.
    """
    number = len(answers)
    ordered = sorted(range(number), key=lambda place: (answers[place], place))
    # Equal answers lie side by side: half of all further on they meet as few equals as can be.
    found = [0] * number
    for rank, place in enumerate(ordered):
        found[place] = ordered[(rank + number // 2) % number]

    def faults(place: int, other: int) -> int:
        return 2 * (pictures[place] == pictures[other]) + (answers[place] == answers[other])

    for place in range(number):
        if pictures[place] != pictures[found[place]]:
            continue
        for swap in (*range(place + 1, number), *range(place)):
            mine, theirs = found[place], found[swap]
            if faults(place, theirs) + faults(swap, mine) < faults(place, mine) + faults(swap, theirs):
                found[place], found[swap] = theirs, mine
                break
    return found


def _questions(context: StageContext, work: EvaluateWork, task: str, limit: int) -> Iterator[Asked]:
    """Yield the questions of a task, each about its picture, then each about the one that it is exchanged for."""
    lines = context.fetch(work.items, f"{task}/test.jsonl").read_text().splitlines()
    items: list[dict[str, Any]] = [json.loads(line) for line in lines if line]
    if limit:  # spread over the whole set, which is ordered by what it is about
        items = [items[place * len(items) // limit] for place in range(min(limit, len(items)))]
    name = f"{work.benchmark}/{task}"
    answers = [str(item["choices"][int(item["label"])]) for item in items]
    blind = exchanged(answers, [item["images"][0] for item in items])
    for item, other in zip(items, (items[place] for place in blind), strict=True):
        for intervention, shown in (("base", item), (BLIND, other)):
            yield Asked(
                name, str(item["id"]), shown["images"][0], item["prompt"], tuple(item["choices"]), int(item["label"]),
                intervention,
            )  # fmt: skip
