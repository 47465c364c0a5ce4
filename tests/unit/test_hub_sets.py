"""What the project knows of the hub's data sets: their layouts, what a plan refuses, how their rows are read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from jobs.data.corpora import Example
from jobs.data.stage import read_rows
from orchestrator import cli
from orchestrator.catalog.benchmarks import BENCHMARKS
from orchestrator.data.hub_sets import HUB_MODELS, HUB_SETS, hub_name
from orchestrator.errors import EXIT_DONE, GridError, SourceError
from orchestrator.grid.files import GRIDS, grid_names
from orchestrator.grid.load import load_grid
from orchestrator.resources import ROOT
from orchestrator.spec.cell import DataSpec
from tests.unit.conftest import Load, Told


def _instructions(tmp_path: Path, *rows: object) -> DataSpec:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSpec(f"file://{path}", format="instruction")


def _lima(*turns: object) -> dict[str, object]:
    return {"conversations": list(turns), "source": "made-up"}


def test_a_conversation_gives_its_first_prompt_and_response(tmp_path: Path) -> None:
    """LIMA's layout, with the fields that a recipe names unless a grid sets others."""
    rows = read_rows(_instructions(tmp_path, _lima("Q one?", "A one."), _lima("Q two?", "A two.", "And?", "More.")))
    found = [(row.prompt, row.response) for row in rows if isinstance(row, Example)]
    assert found == [("Q one?", " A one."), ("Q two?", " A two.")]


def test_a_conversation_of_prompts_alone_is_refused_with_its_row(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"rows\.jsonl, row 2: its conversation has 1 turn, and no response"):
        read_rows(_instructions(tmp_path, _lima("Q?", "A."), _lima("Q?")))


@pytest.mark.parametrize(
    "row, hint",
    [
        (_lima({"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}), "conversations.0.value"),
        (
            {"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]},
            "messages.1.content",
        ),
        ({"instruction": "Q?", "input": "", "output": "A."}, "prompt_field: instruction, response_field: output"),
    ],
)
def test_other_layouts_are_refused_with_the_fields_to_set(tmp_path: Path, row: dict[str, object], hint: str) -> None:
    with pytest.raises(SourceError, match="row 1 has no column 'prompt'") as raised:
        read_rows(_instructions(tmp_path, row))
    assert hint in raised.value.hint
    fields = dict(re.findall(r"(prompt_field|response_field): ([\w.]+)", raised.value.hint))
    data = _instructions(tmp_path, row)
    (read,) = read_rows(DataSpec(data.source, format="instruction", **fields))
    assert isinstance(read, Example)
    assert (read.prompt, read.response) == ("Q?", " A.")


def test_columns_named_prompt_and_response_win_over_a_conversation(tmp_path: Path) -> None:
    (row,) = read_rows(_instructions(tmp_path, {"prompt": "P", "response": "R", **_lima("Q?", "A.")}))
    assert isinstance(row, Example)
    assert (row.prompt, row.response) == ("P", " R")


# Sets of pictures that LibMoE trains on: their columns were not seen, so that a plan checks none of them.
UNSEEN = {
    "FreedomIntelligence/ALLaVA-4V",
    "liuhaotian/LLaVA-Instruct-150K",
    "liuhaotian/LLaVA-Pretrain",
    "lmms-lab/LLaVA-OneVision-Data",
}


def test_every_hub_source_that_the_project_names_is_known() -> None:
    named = set()
    tasks = ROOT / "jobs" / "evaluate" / "tasks"
    for path in (*GRIDS.rglob("*.yaml"), *tasks.glob("*.yaml"), *(ROOT / "docs").glob("*.md")):
        text = path.read_text()
        named |= {hub_name(f"hub://{found}").name for found in re.findall(r"hub://([\w./:-]+/[\w./:+*-]+)", text)}
        named |= set(re.findall(r"^dataset_path: (\S+/\S+)$", text, re.M))
    named |= {benchmark.hub.partition(":")[0] for benchmark in BENCHMARKS.values() if benchmark.hub}
    assert named - {"ORG/NAME"} == set(HUB_SETS) | set(HUB_MODELS) | UNSEEN


@pytest.mark.parametrize("scale", ["small", "large", "paper"])
def test_the_grids_read_columns_that_the_hub_sets_have(scale: str) -> None:
    read = set()
    for name in grid_names():
        for item in load_grid(name, scale=scale).cells:
            for train in (item.cell.pretrain, item.cell.finetune):
                if train is not None:
                    read.add(hub_name(train.data.source).name)
    slim = "cerebras/SlimPajama-627B" if scale == "large" else "DKYoon/SlimPajama-6B"
    tuned = {"tatsu-lab/alpaca", "nyu-mll/glue", "stanfordnlp/snli", "facebook/anli"} if scale == "paper" else set()
    assert read == {"JeanKaddour/minipile", "GAIR/lima", slim, *tuned}


@pytest.mark.parametrize(
    "line, key, message, hint",
    [
        ("text_field: content", "pretrain.data.text_field", "no column 'content'", "it has the columns text"),
        ("split: tests", "pretrain.data.split", "no split 'tests'", "did you mean 'test'"),
        ("source: hub://JeanKaddour/minipile:en", "pretrain.data.source", "no configuration 'en'", "default"),
    ],
)
def test_a_plan_refuses_a_field_that_a_known_set_does_not_have(
    told: Told, line: str, key: str, message: str, hint: str
) -> None:
    field, _, value = line.partition(": ")
    data = {"source": "hub://JeanKaddour/minipile", "revision": "main", field: value}
    problem = told(f"factors: {{freeze: [none]}}\nset: {{pretrain.data: {json.dumps(data)}}}\n")
    assert message in problem.message
    assert hint in problem.hint
    assert problem.key == key


@pytest.mark.parametrize(
    "line, message, hint",
    [
        (
            "finetune.data.prompt_field: question",
            "GAIR/lima has no column 'question'",
            "source; prompt and response",
        ),
        ("finetune.data.response_field: output", "GAIR/lima has no column 'output'", "mean the first exchange"),
        ("finetune.data.split: validation", "GAIR/lima has no split 'validation'", "train, test"),
        (
            "finetune.data.mix: {source: hub://GAIR/lima, revision: main, rows: 5}",
            "GAIR/lima has no column 'instruction'",
            "mean the first exchange",
        ),
        (
            "evaluate.tasks.race: {source: hub://GAIR/lima, revision: main}",
            "GAIR/lima has no column 'article', which task 'race' reads",
            "conversations",
        ),
        (
            "evaluate.tasks.race: {source: hub://EleutherAI/race:hihg, revision: main}",
            "EleutherAI/race has no configuration 'hihg'",
            "did you mean 'high'",
        ),
        (
            "evaluate.xstest: {source: hub://facebook/anli, revision: main}",
            "facebook/anli does not hold the items of xstest",
            "use hub://walledai/XSTest",
        ),
    ],
)
def test_a_plan_refuses_a_hub_set_that_cannot_be_read_as_asked(load: Load, line: str, message: str, hint: str) -> None:
    lines = {
        "finetune.data.source": "hub://GAIR/lima",
        "finetune.data.revision": "main",
        "evaluate.suites": "[lm, over_refusal]",
    }
    text = "".join(f"  {key}: {value}\n" for key, value in lines.items())
    with pytest.raises(GridError) as raised:
        load(f"factors: {{freeze: [none]}}\nset:\n{text}  {line}\n")
    assert any(message in problem.message and hint in problem.hint for problem in raised.value.problems), raised.value


def test_the_columns_of_lima_are_fields_too(load: Load) -> None:
    grid = load(
        "factors: {freeze: [none]}\nset: {finetune.data: {source: hub://GAIR/lima, revision: main, "
        "prompt_field: conversations.0, response_field: conversations.1}}"
    )
    assert grid.cells


def test_a_plan_names_the_gated_repositories_that_it_reads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    prompts = ["set.evaluate.safety.source=hub://made/prompts", "set.evaluate.safety.revision=main"]
    arguments = ["plan", "safety_freeze", *prompts, "--scale", "paper", "--store", str(tmp_path / "store")]
    monkeypatch.setenv("OPENAI_API_KEY", "made up")
    assert cli.main(arguments) == EXIT_DONE
    said = capsys.readouterr().out
    for name in ("GAIR/lima", "meta-llama/LlamaGuard-7b"):
        assert f"hub://{name} is gated, and this machine has no HF_TOKEN" in said
    assert "allenai/OLMoE-1B-7B-0924 is gated" not in said
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    assert cli.main([*arguments, "--json"]) == EXIT_DONE
    assert {gate["name"] for gate in json.loads(capsys.readouterr().out)["gated"]} == {
        "GAIR/lima",
        "meta-llama/LlamaGuard-7b",
    }
    assert cli.main(arguments) == EXIT_DONE
    assert "hub://GAIR/lima is gated\n" in capsys.readouterr().out
