"""Words of other tools are understood as what they mean here: every place that a hint names is one."""

from __future__ import annotations

import pytest

from orchestrator.errors import GridError
from orchestrator.grid.document import MERGED, REPLACED, TOP
from orchestrator.grid.factors import short_names
from orchestrator.grid.vocabulary import _MEANT, meaning, places, words
from orchestrator.spec.fields import field_paths
from orchestrator.spec.rules import STAGE_RESOURCES
from tests.unit.conftest import Load

OPTIONS = ("--store", "--tracking", "--site")
OF_A_TASK = ("shots", "limit")


def test_every_place_exists() -> None:
    fields = {".".join(path) for path in field_paths()}
    resources = {
        f"execution.resources.{phase}.{name}" for phase in STAGE_RESOURCES for name in ("nodes", "processes", "gpus")
    }
    known = fields | resources | {*TOP, *MERGED, *REPLACED, *OPTIONS, *OF_A_TASK, "seed"}
    assert [place for place in places() if place.replace("PHASE", "finetune") not in known] == []


def test_no_word_is_a_name_of_its_own_or_has_two_meanings() -> None:
    listed = [word for others, _ in _MEANT.values() for word in others.split()]
    assert sorted(listed) == sorted(set(listed))
    assert not set(words()) & (set(short_names("finetune", "finetune")) - {"max_length", "name", "template"})
    assert not set(words()) & {*TOP, *MERGED, *REPLACED}


@pytest.mark.parametrize(
    ("word", "place"),
    [
        ("learning_rate", "finetune.lr"),
        ("per_device_train_batch_size", "finetune.micro_batch"),
        ("gradient_accumulation_steps", "finetune.accumulation"),
        ("max_steps", "finetune.steps"),
        ("num_train_epochs", "finetune.steps"),
        ("warmup_steps", "finetune.warmup_ratio"),
        ("lr_scheduler_type", "finetune.schedule"),
        ("max_grad_norm", "finetune.clip"),
        ("model_name_or_path", "model.checkpoint"),
        ("num_experts_per_tok", "model.moe.top_k"),
        ("moe_router_topk", "model.moe.top_k"),
        ("n_routed_experts", "model.moe.num_experts"),
        ("router_aux_loss_coef", "finetune.balance.aux_coef"),
        ("norm_topk_prob", "model.moe.renormalise"),
        ("sequence_len", "finetune.sequence_length"),
        ("training.seq_len", "finetune.sequence_length"),
        ("num-fewshot", "shots"),
    ],
)
def test_a_word_is_named_by_its_place(load: Load, word: str, place: str) -> None:
    assert f" is {place} here" in meaning(word, "finetune")
    with pytest.raises(GridError) as caught:
        load(f"factors: {{{word}: [1]}}\n")
    assert f"is {place} here" in caught.value.problems[0].hint
