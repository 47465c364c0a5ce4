"""One process, two ranks, a killed job and its successor, states alone or together: the same items and scores."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs.data.tokenizer import BOS, EOS, PAD, train_bpe
from jobs.evaluate import state
from jobs.evaluate.chunks import CHUNK_ITEMS
from jobs.evaluate.encoding import Encoder
from jobs.models.weights import materialise
from orchestrator.catalog.metrics import BY_SUITE
from orchestrator.spec.cell import GenerationSpec, JudgeSpec, Resources, TaskSpec
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.resolve import resolve_model
from orchestrator.spec.work import EvaluateWork, GenerateWork, InitWork, JudgeWork
from orchestrator.store import Store
from tests.integration.stages import run_stages
from tests.integration.test_training_process import NEEDLESS, imported
from tests.training import ROOT, key, put, start, submit

MODEL = resolve_model(
    ModelSpec(
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        context=256,
        moe=MoESpec(num_experts=4, top_k=2, expert_width=16, router_init_std=0.5),
    )
)
TASKS = (TaskSpec("arc_easy", shots=3), TaskSpec("piqa"))
WORDS = ("red", "green", "blue", "stone", "river", "seven", "moves", "falls", "under", "bright", "dark", "old", "new")


def items_of(count: int) -> dict[str, bytes]:
    """Return generated items in the columns of ARC and PIQA."""
    generator = random.Random(0)

    def text(most: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(2, most)))

    def arc() -> dict[str, object]:
        choices = {"text": [text(4) for _ in range(4)], "label": list("ABCD")}
        return {"id": text(3), "question": f"{text(12)}?", "choices": choices, "answerKey": generator.choice("ABCD")}

    def piqa() -> dict[str, object]:
        return {"goal": text(8), "sol1": text(12), "sol2": text(12), "label": generator.randrange(2)}

    rows = {"arc_easy/train": arc, "arc_easy/test": arc, "piqa/validation": piqa}
    return {f"{n}.jsonl": "".join(json.dumps(make()) + "\n" for _ in range(count)).encode() for n, make in rows.items()}


def fresh(path: Path) -> tuple[Store, EvaluateWork]:
    """Return a store with a model, a tokenizer and items, and the evaluation of these."""
    store = Store.open(str(path))
    tokenizer = train_bpe(iter([" ".join(WORDS) + " Question: Answer: ?\n"] * 2), 300)
    special = json.dumps({"bos": BOS, "eos": EOS, "pad": PAD}).encode()
    info = {"vocab_size": tokenizer.get_vocab_size()}
    put(store, "bpe", "tokenizer", {"tokenizer.json": tokenizer.to_str().encode(), "special.json": special}, info)
    put(store, "items", "data", items_of(3 * CHUNK_ITEMS - 100), {})
    init = InitWork(MODEL, key("bpe"))
    run_stages(store, [init])
    work = EvaluateWork(
        "reasoning", init.key(), MODEL, key("bpe"), items=key("items"), tokens="", tasks=TASKS, max_length=256
    )
    return store, work


def efficiency(work: EvaluateWork) -> EvaluateWork:
    return dataclasses.replace(work, suite="efficiency", limit=40, routing_seeds=1)


def short(work: EvaluateWork) -> EvaluateWork:
    return dataclasses.replace(work, tasks=tuple(dataclasses.replace(task, limit=40) for task in work.tasks))


def result(store: Store, work: EvaluateWork | JudgeWork) -> tuple[bytes, dict[str, float]]:
    """Return the per-item file and the metrics of a committed evaluation, which has left nothing else behind."""
    manifest = store.artifacts.get(work.key())
    assert manifest is not None
    assert list(store.objects.list(f"partial/{work.key()}")) == []
    if isinstance(work, EvaluateWork):  # a judge's columns have the version of the judge
        names = {name.rsplit("/", 1)[-1] for name in manifest.metrics}
        assert names <= set(BY_SUITE[work.suite]), "each metric of a suite has a version: list it"
    return store.artifacts.read(manifest.blob("items.parquet")), dict(manifest.metrics)


def scored(output: str) -> set[str]:
    """Return the chunks that processes say they have scored, each once."""
    found = re.findall(r"scored (\S+)", output)
    assert len(set(found)) == len(found)
    return set(found)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, EvaluateWork]:
    store, work = fresh(tmp_path_factory.mktemp("one") / "store")
    run_stages(store, [work, efficiency(work)])
    return store, work


def test_a_process_that_evaluates_imports_neither_transformers_nor_a_compiler(
    undisturbed: tuple[Store, EvaluateWork],
) -> None:
    store, work = undisturbed
    few = dataclasses.replace(work, tasks=(TaskSpec("piqa", limit=2),))
    generated = dataclasses.replace(few, suite="efficiency", limit=2, routing_seeds=1)
    assert imported(NEEDLESS, submit(store, [few, generated], "light-0")) == []


def test_two_ranks_share_the_chunks_and_change_nothing(tmp_path: Path, undisturbed: tuple[Store, EvaluateWork]) -> None:
    store, work = fresh(tmp_path / "store")
    process = start(submit(store, [work, efficiency(work)], resources=Resources(processes=2)))
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output
    assert result(store, work) == result(*undisturbed)
    assert result(store, efficiency(work)) == result(undisturbed[0], efficiency(work))
    logs = [store.objects.get(f"attempts/batch-0/log/{rank}.txt") or b"" for rank in (0, 1)]
    first, second = (scored(log.decode()) for log in logs)
    assert first
    assert second
    assert not first & second


def responses_of(store: Store, work: EvaluateWork) -> tuple[GenerateWork, JudgeWork]:
    """Put prompts into the store and return the works that answer and judge them."""
    rows = [{"prompt": " ".join(random.Random(number).choices(WORDS, k=6))} for number in range(100)]
    prompts = "".join(json.dumps(row) + "\n" for row in rows).encode()
    put(store, "prompts", "data", {"malicious/test.jsonl": prompts}, {})
    generation = GenerationSpec(new_tokens=6, temperature=1.0)
    tasks = (TaskSpec("malicious"),)
    common: dict[str, Any] = {"state": work.state, "model": MODEL, "tokenizer": key("bpe"), "max_length": 256}
    texts = GenerateWork(benchmark="safety", tasks=tasks, generation=generation, items=key("prompts"), **common)
    return texts, JudgeWork("safety", texts.key(), JudgeSpec("refusal_rate"))


def test_two_ranks_give_the_responses_of_one(tmp_path: Path, undisturbed: tuple[Store, EvaluateWork]) -> None:
    alone, judged_alone = responses_of(*undisturbed)
    run_stages(undisturbed[0], [alone, judged_alone])
    store, work = fresh(tmp_path / "store")
    together, judged = responses_of(store, work)
    process = start(submit(store, [together, judged], resources=Resources(processes=2)))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert (together.key(), judged.key()) == (alone.key(), judged_alone.key())
    assert result(store, judged) == result(undisturbed[0], judged_alone)
    logs = [store.objects.get(f"attempts/batch-0/log/{rank}.txt") or b"" for rank in (0, 1)]
    first, second = (scored(log.decode()) for log in logs)
    assert first | second == {f"{what}-{number}" for what in ("responses", "scores") for number in range(4)}
    assert not first & second


def test_killed_at_random_it_goes_on_and_scores_nothing_twice(
    tmp_path: Path, undisturbed: tuple[Store, EvaluateWork]
) -> None:
    store, work = fresh(tmp_path / "store")
    kept: set[str] = set()
    for attempt in range(2):
        # The successor has one process where the killed job had two.
        resources = Resources(processes=2 - attempt)
        command = submit(store, [work], f"try-{attempt}", resources=resources, ttl=1.0)
        output = tmp_path / f"output-{attempt}.txt"
        with output.open("w") as file:
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        while attempt == 0 and len(stored(store)) <= len(kept) and process.poll() is None:
            time.sleep(0.01)
        if attempt == 0:
            time.sleep(random.random() * 0.05)
            process.kill()
        code = process.wait(timeout=1200)
        assert not scored(output.read_text()) & kept
        if code == 0:
            break
        kept = stored(store)
        assert kept
        assert code == -signal.SIGKILL, output.read_text()
        time.sleep(1.1)  # the dead process's lease runs out
    assert kept
    assert result(store, work) == result(*undisturbed)


def test_states_of_one_job_share_its_tokens_and_score_as_alone(
    undisturbed: tuple[Store, EvaluateWork], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, first = fresh(tmp_path / "store")[0], short(undisturbed[1])
    other = InitWork(MODEL, key("bpe"), seed=1)
    second = dataclasses.replace(first, state=other.key())
    for work in (first, second):
        run_stages(undisturbed[0], [other, work])
    run_stages(store, [other])
    loads: list[str] = []
    encoded: Counter[tuple[str, str]] = Counter()
    load, pairs = materialise, Encoder.pairs

    def loading(*arguments: Any) -> None:
        loads.append("")
        load(*arguments)

    def encoding(self: Encoder, requests: Sequence[tuple[str, str]]) -> Any:
        encoded.update(requests)
        return pairs(self, requests)

    monkeypatch.setattr(state, "materialise", loading)
    monkeypatch.setattr(Encoder, "pairs", encoding)
    run_stages(store, [first, efficiency(first), second])
    assert len(loads) == 2
    assert set(encoded.values()) == {1}
    for work in (first, second):
        assert result(store, work) == result(undisturbed[0], work)
    assert result(store, second) != result(store, first)


def test_bf16_scores_say_how_far_batching_moves_them(undisturbed: tuple[Store, EvaluateWork]) -> None:
    store, work = undisturbed[0], short(undisturbed[1])
    exact, rough = run_stages(store, [dataclasses.replace(work, seed=1, precision=p) for p in ("fp32", "bf16")])
    assert exact.info["precision"] == "fp32"
    assert "loglikelihood_deviation" not in exact.info
    assert rough.info["precision"] == "bf16"
    assert 0 < rough.info["loglikelihood_deviation"] < 2
    assert rough.metrics["answer_bpb"] == pytest.approx(exact.metrics["answer_bpb"], rel=0.02)


def stored(store: Store) -> set[str]:
    """Return the names of the chunks in the store."""
    return {entry.path.rpartition("/")[2].removesuffix(".json") for entry in store.objects.list("partial/")}


def test_two_ranks_score_in_bf16_what_one_does_and_tell_the_same_deviation(
    tmp_path: Path, undisturbed: tuple[Store, EvaluateWork]
) -> None:
    work = dataclasses.replace(short(undisturbed[1]), seed=1, precision="bf16")
    (alone,) = run_stages(undisturbed[0], [work])
    store, _ = fresh(tmp_path / "store")
    process = start(submit(store, [work], resources=Resources(processes=2)))
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output
    together = store.artifacts.get(work.key())
    assert together is not None
    assert together.numerics["world_size"] == 2
    assert result(store, work) == result(undisturbed[0], work)
    for name in ("precision", "loglikelihood_deviation"):
        assert together.info[name] == alone.info[name]
