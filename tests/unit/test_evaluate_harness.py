"""The harness's tasks on local items, and what their results mean."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval import tasks as shipped
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from jobs.evaluate.harness import FOLDER, Prepared, load_config
from jobs.evaluate.results import Mean, Outcome, Scored, items_parquet
from jobs.evaluate.suites.efficiency import summarise as efficiency
from jobs.probe.accumulate import RoutingTotals
from jobs.probe.metrics import MetricOutOfRange
from orchestrator.errors import MoegridError, SourceError
from orchestrator.spec.cell import TaskSpec

CHOICES = {"text": ["red", "green", "blue", "a much longer colour"], "label": ["A", "B", "C", "D"]}


def _write(directory: Path, task: str, **splits) -> Path:
    (directory / task).mkdir(parents=True)
    for split, rows in splits.items():
        (directory / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def _arc(count: int, words: int = 3) -> list[dict]:
    return [
        {"id": str(i), "question": f"Number {i}? " + "word " * words, "choices": CHOICES, "answerKey": "ABCD"[i % 4]}
        for i in range(count)
    ]


def _words(requests):
    """Encode a request as one token a word."""
    return [([0] * (len(f"{a}{b}".split()) + 1 - len(b.split())), [0] * len(b.split())) for a, b in requests]


def _prepared(spec: TaskSpec, directory: Path, **options) -> Prepared:
    settings = {"limit": 0, "seed": 1234, "shared": False, "max_length": 4096}
    return Prepared(spec, directory, encode=_words, **{**settings, **options})


def test_every_task_file_names_a_shipped_one_or_is_complete():
    for path in FOLDER.glob("*.yaml"):
        config = load_config(path.stem)
        assert config["task"] == path.stem
        assert config["output_type"] in ("multiple_choice", "loglikelihood", "generate_until")
        assert config["doc_to_text"] is not None


def test_mmlu_reads_like_each_of_the_shipped_subjects(tmp_path):
    row = {"question": " Why? ", "choices": ["a", "b", "c", "d"], "answer": 2}
    folder = Path(shipped.__file__).parent / "mmlu" / "default"
    subjects = {}
    for path in folder.glob("mmlu_*.yaml"):
        config = yaml.safe_load(path.read_text())
        subjects[config["dataset_name"]] = config["description"]
    assert len(subjects) == 57
    rows = [{**row, "subject": subject} for subject in subjects]
    directory = _write(tmp_path, "mmlu", dev=rows * 2, test=rows)
    prepared = _prepared(TaskSpec("mmlu", shots=2), directory)
    for item in prepared.items:
        one = "Why?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
        wanted = f"{subjects[item.doc['subject']]}{one} C\n\n{one} C\n\n{one}"
        assert item.requests[2] == (wanted, " C")
        assert item.gold == 2


def test_a_limit_takes_subjects_in_turn(tmp_path):
    rows = [
        {"question": f"{s}{i}", "subject": s, "choices": list("abcd"), "answer": 0} for s in "xyz" for i in range(5)
    ]
    prepared = _prepared(TaskSpec("mmlu"), _write(tmp_path, "mmlu", test=rows), limit=7)
    assert [item.doc["question"] for item in prepared.items] == ["x0", "y0", "z0", "x1", "y1", "z1", "x2"]


def test_shots_are_as_many_as_the_window_takes(tmp_path):
    directory = _write(tmp_path, "arc_easy", train=_arc(40), test=_arc(10))
    full = _prepared(TaskSpec("arc_easy", shots=10), directory)
    assert (full.shots, full.reduced) == (10, 0)
    assert all(item.requests[0][0].count("Answer:") == 11 for item in full.items)
    some = _prepared(TaskSpec("arc_easy", shots=10), directory, max_length=60)
    assert 0 < some.shots < 10
    for item in some.items:
        assert max(len(f"{a}{b}".split()) for a, b in item.requests) <= 60
        assert item.requests[0][0].endswith(full.items[int(item.id)].requests[0][0].split("\n\n")[-1])
    none = _prepared(TaskSpec("arc_easy", shots=10), directory, max_length=8)
    assert none.shots == 0


def test_an_item_too_long_for_the_shots_of_the_others_has_fewer(tmp_path):
    directory = _write(tmp_path, "arc_easy", train=_arc(40), test=[*_arc(19), *_arc(1, words=60)])
    prepared = _prepared(TaskSpec("arc_easy", shots=5), directory, max_length=90)
    assert prepared.shots == 5
    assert prepared.reduced == 1
    assert prepared.items[-1].shots < 5


def test_shared_shots_are_the_same_for_all_items_and_others_are_not(tmp_path):
    directory = _write(tmp_path, "arc_easy", train=_arc(40), test=_arc(10))
    shared = _prepared(TaskSpec("arc_easy", shots=3), directory, shared=True)
    own = _prepared(TaskSpec("arc_easy", shots=3), directory)
    assert len({item.requests[0][0].rpartition("\n\n")[0] for item in shared.items}) == 1
    assert len({item.requests[0][0].rpartition("\n\n")[0] for item in own.items}) > 5
    assert shared.items[0].requests == own.items[0].requests


def test_what_cannot_be_evaluated_is_said_before_anything_runs(tmp_path):
    with pytest.raises(MoegridError, match="no evaluation task 'arc_esy'"):
        _prepared(TaskSpec("arc_esy"), tmp_path)
    with pytest.raises(SourceError, match="no split 'test'"):
        _prepared(TaskSpec("arc_easy"), tmp_path)
    directory = _write(tmp_path, "arc_easy", test=_arc(2))
    with pytest.raises(SourceError, match="draw shots from"):
        _prepared(TaskSpec("arc_easy", shots=5), directory)
    broken = [{"id": "0", "question": "Why?", "answerKey": "A"}]
    with pytest.raises(SourceError, match="do not fit its template"):
        _prepared(TaskSpec("arc_challenge"), _write(tmp_path, "arc_challenge", test=broken))


def test_an_outcome_is_accuracy_and_bits_per_byte_of_the_right_answer(tmp_path):
    prepared = _prepared(TaskSpec("arc_easy"), _write(tmp_path, "arc_easy", test=_arc(4)))
    outcome = prepared.outcome(prepared.items[3], [(-9.0, False), (-8.0, False), (-7.0, True), (-10.0, False)])
    assert (outcome.acc, outcome.acc_norm) == (0.0, 1.0)  # per character the long answer is the likeliest
    assert outcome.answer_bpb == pytest.approx(10.0 / math.log(2) / len(" a much longer colour"))
    assert prepared.chance == 0.25


def test_winogrande_is_told_by_the_right_filling(tmp_path):
    rows = [{"sentence": "Ann met Bea because _ was near.", "option1": "Ann", "option2": "Bea", "answer": "2"}]
    prepared = _prepared(TaskSpec("winogrande"), _write(tmp_path, "winogrande", validation=rows))
    (item,) = prepared.items
    assert item.requests[item.gold] == ("Ann met Bea because Bea", " was near.")
    assert prepared.outcome(item, [(-3.0, False), (-2.0, False)]).acc == 1.0


def test_the_childrens_book_test_judges_the_word_with_its_sentence(tmp_path):
    row = {
        "sentences": ["Once upon a time.", "There was a cat."],
        "question": "It was the XXXXX of the queen .",
        "answer": "cat",
        "options": ["dog", "cat"],
    }
    prepared = _prepared(TaskSpec("cbt"), _write(tmp_path, "cbt", test=[row]))
    (item,) = prepared.items
    assert item.requests[item.gold] == ("Once upon a time. There was a cat. It was the", " cat of the queen .")


def test_blimp_compares_whole_sentences(tmp_path):
    rows = [{"sentence_good": f"Cats {i} sleep.", "sentence_bad": f"Cats {i} sleeps.", "UID": "x"} for i in range(3)]
    prepared = _prepared(TaskSpec("blimp"), _write(tmp_path, "blimp", train=rows))
    assert prepared.items[0].requests == (("", " Cats 0 sleep."), ("", " Cats 0 sleeps."))
    assert prepared.items[0].gold == 0


def _scored(task, values, intervention="base"):
    return [Scored(task, str(i), 0, Outcome((-1.0,), a, a, b), intervention) for i, (a, b) in enumerate(values)]


def _totals(counts):
    totals = RoutingTotals(1, len(counts))
    totals.counts_LN[0] = counts
    return totals


def test_efficiency_is_paired_by_item_and_averaged_over_tasks():
    rows = {
        "base": _scored("a", [(1, 2.0), (1, 2.0)]) + _scored("b", [(1, 1.0), (0, 1.0)]),
        "pruned": _scored("a", [(0, 2.5), (1, 2.5)]) + _scored("b", [(1, 1.0), (0, 1.5)]),
        "random-0": _scored("a", [(0, 3.0), (0, 3.0)]) + _scored("b", [(1, 2.0), (0, 2.0)]),
        "random-1": _scored("a", [(1, 3.0), (0, 3.0)]) + _scored("b", [(1, 2.0), (0, 2.0)]),
    }
    totals = {"a": _totals([5, 5, 0, 0]), "b": _totals([4, 4, 4, 4])}
    table = efficiency(["a", "b"], rows, totals, {"a": "acc", "b": "acc"})
    assert table.metrics["load_balance"] == pytest.approx(1.5)
    assert table.metrics["capacity"] == pytest.approx(0.25)
    assert table.metrics["capacity_bpb"] == pytest.approx((0.5 + 0.25) / 2)
    assert table.metrics["specialization"] == pytest.approx((0.75 + 0.0) / 2)
    assert table.metrics["specialization_bpb"] == pytest.approx(1.0)
    assert table.stderr["specialization_bpb"] == pytest.approx(0.0)
    assert table.stderr["capacity"] == pytest.approx(0.25)


def test_values_outside_their_range_are_refused():
    with pytest.raises(MetricOutOfRange):
        Mean.of([1.5, 2.0], "acc", 0.0, 1.0)
    with pytest.raises(MetricOutOfRange):
        Mean.of([math.nan], "answer_bpb", 0.0)


def test_the_parquet_file_does_not_depend_on_the_order_of_scoring():
    rows = _scored("b", [(0, 1.0), (1, 2.0)]) + _scored("a", [(1, 2.0)]) + _scored("a", [(1, 2.5)], "pruned")
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    assert items_parquet(rows) == items_parquet(shuffled)


class _Asked(LM):  # type: ignore[misc]
    """Answers anything and notes what was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, str]] = []

    def loglikelihood(self, requests, disable_tqdm=False):
        self.asked += [request.args for request in requests]
        return [(-1.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def generate_until(self, requests, disable_tqdm=False):
        raise NotImplementedError


def _winogrande(count, name):
    return [
        {"sentence": f"{name} {i} met Bea as _ was near.", "option1": "Ann", "option2": "Bea", "answer": "12"[i % 2]}
        for i in range(count)
    ]


def _hellaswag(count, name):
    endings = ["eats [step] soup.", "sings.", "runs away.", "sleeps."]
    return [
        {"activity_label": name, "ctx_a": f"Man {i}", "ctx_b": "he", "endings": endings, "label": str(i % 4)}
        for i in range(count)
    ]


LARGE = {
    "arc_easy": (lambda count, name: [{**row, "question": f"{name} {row['question']}"} for row in _arc(count)], "test"),
    "winogrande": (_winogrande, "validation"),
    "hellaswag": (_hellaswag, "validation"),
}


@pytest.mark.parametrize("task", LARGE)
def test_shots_of_a_large_split_are_those_that_the_stock_harness_draws(tmp_path, task):
    make, evaluated = LARGE[task]
    # Some evaluated items are in the pool too: the harness leaves those out where it draws one more.
    rows = {"train": make(1500, "Shot"), evaluated: [*make(6, "Item"), *make(1500, "Shot")[7:9]]}
    directory = _write(tmp_path, task, **rows)
    prepared = _prepared(TaskSpec(task, shots=7), directory)
    files = {split: str(directory / task / f"{split}.jsonl") for split in rows}
    config = load_yaml(Path(shipped.__file__).parent / load_shipped(task))
    for key in ("training_split", "validation_split", "test_split"):
        config[key] = config.get(key) if config.get(key) in rows else None
    data = {"data_files": files, "cache_dir": str(tmp_path)}
    stock = ConfigurableTask(config={**config, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": data})
    lm = _Asked()
    simple_evaluate(
        model=lm,
        tasks=[stock],
        num_fewshot=7,
        bootstrap_iters=0,
        fewshot_random_seed=1234,
        task_manager=TaskManager(include_defaults=False),
    )
    assert [request for item in prepared.items for request in item.requests] == lm.asked
    own = _Asked()
    simple_evaluate(
        model=own,
        tasks=[prepared.harness_task()],
        num_fewshot=7,
        bootstrap_iters=0,
        fewshot_random_seed=1234,
        task_manager=TaskManager(include_defaults=False),
    )
    assert own.asked == lm.asked


def load_shipped(task):
    """Return the shipped file that a task includes."""
    return yaml.safe_load((FOLDER / f"{task}.yaml").read_text())["include"].removeprefix("lm_eval:")


def test_splits_that_no_shot_comes_from_are_not_read(tmp_path):
    directory = _write(tmp_path, "arc_easy", train=_arc(3), test=_arc(2))
    (directory / "arc_easy" / "train.jsonl").write_text("not read")
    assert len(_prepared(TaskSpec("arc_easy"), directory).items) == 2
