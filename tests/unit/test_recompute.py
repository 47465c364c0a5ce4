"""Recomputation: less is kept for the backward pass, and every bit stays."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import simulation as bench
from jobs.data.packing import Batch
from jobs.models.building import build_model
from jobs.simulate.training import simulate_training
from jobs.train.engines.torch import TorchEngine
from jobs.train.loop import Trainer
from orchestrator.errors import GridError
from orchestrator.grid.load import load_grid
from orchestrator.spec.model import MoESpec
from orchestrator.spec.work import Conditions
from tests.training import MODEL, TRAIN, VOCABULARY


@dataclasses.dataclass
class Random:
    """Random ids, the last tokens of each row padding."""

    def micro_batch(self, step: int, index: int, size: int) -> Batch:
        generator = torch.Generator().manual_seed(100 * step + index)
        ids = torch.randint(0, VOCABULARY, (size, 16), generator=generator)
        mask = torch.ones_like(ids)
        mask[:, 13:] = 0
        spans = torch.arange(16).expand(size, 16) // 3
        return Batch(ids, ids.clone(), mask, spans, spans)


def trained(what: str, **moe) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the losses and final weights of three steps with expert dropout."""
    torch.manual_seed(0)
    fields = {item.name: getattr(MODEL.moe, item.name) for item in dataclasses.fields(MoESpec)}
    model = build_model(dataclasses.replace(MODEL, moe=MoESpec(**{**fields, **moe})), VOCABULARY)
    model.recompute = what
    engine = TorchEngine(model, TRAIN)
    engine.freeze("")
    engine.model.train()
    trainer = Trainer(engine, Conditions("pretrain", dataclasses.replace(TRAIN, freeze=""), "", 0), Random())
    losses = [trainer.train_step().values["train/loss"] for _ in range(3)]
    return losses, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("moe", [{}, {"preset": "moepp"}, {"unit": "word"}], ids=["plain", "residual", "spans"])
def test_every_bit_is_the_same_whatever_is_computed_again(moe):
    kept = trained("none", **moe)
    for what in ("block", "layer"):
        again = trained(what, **moe)
        assert again[0] == kept[0]
        assert again[1].keys() == kept[1].keys()
        assert all(torch.equal(again[1][name], kept[1][name]) for name in kept[1])


def test_what_is_computed_again_is_not_held():
    asked = bench.shape("tiny", "fsdp", 2, "bf16")
    held = [simulate_training(dataclasses.replace(asked, recompute=what)) for what in ("none", "block", "layer")]
    activations = [answer.moments["step"].kinds["activations"] for answer in held]
    # A block keeps its input and the first projection of its experts, and then the input alone.
    assert activations[0] > 1.05 * activations[1] > 1.05 * 1.1 * activations[2]
    assert held[0].moments["start"] == held[2].moments["start"]


def test_an_engine_that_cannot_is_refused_by_name():
    words = ["set.execution.engine=deepspeed:3", "set.execution.recompute=layer"]
    words += [f"set.execution.resources.{phase}.processes=2" for phase in ("pretrain", "finetune")]
    with pytest.raises(GridError) as refused:
        load_grid("quickstart", overrides=words)
    assert "engine 'deepspeed:3' does not recompute" in str(refused.value)
