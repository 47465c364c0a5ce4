"""LLaMA-MoE: its public layout comes in by its config alone, and computes what a loop over tokens does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from jobs.models.convert import export_checkpoint, import_checkpoint
from jobs.models.weights import canonical_state
from jobs.moe.gates import TanhGate
from orchestrator.catalog.gates import Tanh
from orchestrator.errors import MoegridError, SourceError
from orchestrator.plan.cost import parameters
from orchestrator.spec.public_config import spec_of
from orchestrator.spec.resolve import resolve_model
from tests.public_models import IDS, SHAPE, VOCAB

EXPERTS, CHOSEN, WIDTH, SCALE = 6, 2, 8, 3.0
CONFIG: dict[str, Any] = {
    "model_type": "llama_moe",
    "intermediate_size": EXPERTS * WIDTH,
    "rms_norm_eps": 1e-5,
    "num_experts": EXPERTS,
    "num_selects": CHOSEN,
    "size_experts": [[WIDTH] * EXPERTS] * 2,
    "gate_type": "TopKBalancedNoisyGate",
    "gate_network": "mlp",
    "gate_use_softmax": True,
    "gate_add_noise": True,
    "gate_noise_epsilon": 0.01,
    "calculator_type": "UniversalCalculator",
    "multiply_gate_scores": True,
    "score_scale_factor": SCALE,
    "add_weight_norm": False,
}


class Loop(nn.Module):
    """One token, one expert at a time; parameters are named as the public checkpoints name them."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gate, self.calculator = nn.Module(), nn.Module()
        first, second = nn.Linear(hidden, EXPERTS, bias=False), nn.Linear(EXPERTS, EXPERTS, bias=False)
        self.gate.gate_network = nn.Sequential(first, nn.Tanh(), second)
        self.gate.weight_noise = nn.Linear(hidden, EXPERTS, bias=False)
        self.calculator.experts = nn.Module()
        for name, shape in (("gate", (WIDTH, hidden)), ("up", (WIDTH, hidden)), ("down", (hidden, WIDTH))):
            matrices = [nn.Parameter(torch.randn(shape) * 0.3) for _ in range(EXPERTS)]
            setattr(self.calculator.experts, f"weight_{name}", nn.ParameterList(matrices))

    def forward(self, x: Tensor) -> Tensor:
        experts: Any = self.calculator.experts
        network: Any = self.gate.gate_network
        rows = []
        for token in x.reshape(-1, x.shape[-1]):
            logits = network(token)
            best = logits.argsort(descending=True)[:CHOSEN]
            weights = logits[best].softmax(-1) * SCALE
            row = torch.zeros_like(token)
            for expert, weight in zip(best.tolist(), weights, strict=True):
                hidden = F.silu(experts.weight_gate[expert] @ token) * (experts.weight_up[expert] @ token)
                row = row + weight * (experts.weight_down[expert] @ hidden)
            rows.append(row)
        return torch.stack(rows).view_as(x)


def written(folder: Path, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape: dict[str, Any] = {**SHAPE, "intermediate_size": EXPERTS * WIDTH, "rms_norm_eps": 1e-5}
    model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    for layer in model.model.layers:
        layer.mlp = Loop(shape["hidden_size"])
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**SHAPE, **CONFIG, **changes}))
    return model


def test_a_public_checkpoint_is_computed_as_a_loop_computes_it(tmp_path: Path) -> None:
    reference = written(tmp_path / "theirs")
    model = import_checkpoint(tmp_path / "theirs").eval()
    expected, found = reference(input_ids=IDS).logits, model(IDS).logits
    assert float((found - expected).detach().abs().max() / expected.detach().abs().max()) <= 1e-5
    for logits in (expected, found):
        logits.square().mean().backward()
    block = dict(model.named_parameters())
    for layer in range(2):
        theirs, ours = f"model.layers.{layer}.mlp.", f"backbone.model.layers.{layer}.mlp.block."
        gradients = {name: one.grad for name, one in reference.named_parameters() if name.startswith(theirs)}
        lists = {
            part: torch.stack([gradients[f"{theirs}calculator.experts.weight_{part}.{e}"] for e in range(EXPERTS)])
            for part in ("gate", "up", "down")
        }
        for name, wanted in {
            "experts.up": torch.cat([lists["gate"], lists["up"]], 1),
            "experts.down": lists["down"],
            "router.gate.hidden": gradients[f"{theirs}gate.gate_network.0.weight"],
            "router.gate.weight": gradients[f"{theirs}gate.gate_network.2.weight"],
        }.items():
            gradient = block[ours + name].grad
            assert gradient is not None
            assert wanted is not None
            assert float((gradient - wanted).abs().max() / wanted.abs().max()) <= 1e-5, name
    counted = parameters(resolve_model(spec_of(json.loads((tmp_path / "theirs" / "config.json").read_text()))), VOCAB)
    assert counted.total == sum(parameter.numel() for parameter in reference.parameters())


def test_noise_has_a_learned_size_in_training_alone() -> None:
    gate = TanhGate(5, 7, Tanh(hidden=3, least=0.25))
    gate.reset_parameters(0.5)
    with torch.no_grad():
        assert gate.noise is not None
        gate.noise.normal_()
    x = torch.randn(4, 7)
    plain = torch.tanh(x @ gate.hidden.T) @ gate.weight.T
    torch.testing.assert_close(gate.eval()(x), plain)
    torch.manual_seed(3)
    noisy = gate.train()(x)
    torch.manual_seed(3)
    size = torch.log1p(torch.exp(x @ gate.noise.T)) + 0.25
    torch.testing.assert_close(noisy, plain + torch.randn(4, 5) * size)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gate_network": "linear"}, "gate_network 'linear'"),
        ({"add_weight_norm": True}, "add_weight_norm True"),
        ({"calculator_type": "SwitchDropTokenCalculator"}, "SwitchDropTokenCalculator"),
        ({"size_experts": [[4, 12, 8, 8, 8, 8]] * 2}, r"experts of the widths \[4, 8, 12\]"),
        ({"num_experts": 5}, "5 experts of together 48|experts of the widths"),
    ],
)
def test_what_it_cannot_compute_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(SourceError) as caught:
        spec_of({**SHAPE, **CONFIG, **changes})
    assert re.search(said, str(caught.value)), str(caught.value)


def test_it_goes_out_in_no_layout_of_transformers_and_says_so(tmp_path: Path) -> None:
    written(tmp_path / "theirs", gate_add_noise=True)
    model = import_checkpoint(tmp_path / "theirs")
    assert any(name.endswith("router.gate.noise") for name in canonical_state(model))
    with pytest.raises(MoegridError, match="gate 'tanh_mlp'"):
        export_checkpoint(model, tmp_path / "ours")
