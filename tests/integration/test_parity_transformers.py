"""Our blocks give the outputs and gradients of the public layers in transformers, weights copied (fp32, 1e-5)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock, load_balancing_loss_func

from jobs.moe import build_block
from jobs.moe.balance import load_balance, z_loss
from jobs.moe.experts import Experts

D, F, B, S = 48, 24, 2, 33
TOLERANCE = 1e-5


def random_weights(module: nn.Module, seed: int = 0, std: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(0, std, generator=generator)


def compare(block: nn.Module, reference: nn.Module, pairs: dict[str, Tensor], seed: int = 1) -> None:
    """Load `pairs` (our name -> the reference's tensor), run both forward and backward, compare all."""
    block.load_named({name: tensor.detach() for name, tensor in pairs.items()})
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, S, D, generator=generator)
    target = torch.randn(B, S, D, generator=generator)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, routing = block(ours)
    expected = reference(theirs)
    torch.testing.assert_close(y, expected, atol=TOLERANCE, rtol=TOLERANCE)
    (y * target).sum().backward()
    (expected * target).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4 * 0.1, rtol=1e-4 * 0.1)
    gradients = named_gradients(block)
    for name, tensor in pairs.items():
        if tensor.grad is not None:
            scale = tensor.grad.abs().max().clamp_min(1.0)
            torch.testing.assert_close(gradients[name] / scale, tensor.grad / scale, atol=TOLERANCE, rtol=0)
    assert int(routing.counts.sum()) == B * S * block.moe.top_k


def named_gradients(block: nn.Module) -> dict[str, Tensor]:
    gradients = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    if block.moe.expert == "swiglu":
        fused = gradients.pop("experts.up")
        width = block.experts.width
        gradients["experts.gate"], gradients["experts.up"] = fused[:, :width], fused[:, width:]
    return gradients


class Halves:
    """Gate and up halves of a fused reference parameter, with their gradients."""

    def __init__(self, fused: nn.Parameter, width: int) -> None:
        self.fused, self.width = fused, width

    def tensors(self) -> tuple[Tensor, Tensor]:
        gate, up = self.fused.detach()[:, : self.width].clone(), self.fused.detach()[:, self.width :].clone()
        self.fused.register_post_accumulate_grad_hook(self._copy)
        self.gate, self.up = gate, up
        return gate, up

    def _copy(self, fused: Tensor) -> None:
        self.gate.grad, self.up.grad = fused.grad[:, : self.width], fused.grad[:, self.width :]


def pairs_of(reference: Any, shared: bool) -> dict[str, Tensor]:
    gate, up = Halves(reference.experts.gate_up_proj, F).tensors()
    pairs = {
        "router.weight": reference.gate.weight,
        "experts.gate": gate,
        "experts.up": up,
        "experts.down": reference.experts.down_proj,
    }
    if shared:
        mlp = reference.shared_experts
        pairs |= {
            "shared.gate": mlp.gate_proj.weight,
            "shared.up": mlp.up_proj.weight,
            "shared.down": mlp.down_proj.weight,
        }
    return pairs


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("num_experts, top_k", [(8, 2), (16, 4), (64, 8)])
def test_olmoe_block(num_experts: int, top_k: int, renormalise: bool) -> None:
    config = OlmoeConfig(
        hidden_size=D,
        intermediate_size=F,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=renormalise,
    )
    config._experts_implementation = "eager"
    reference = OlmoeSparseMoeBlock(config)
    random_weights(reference)
    block = build_block(
        {
            "preset": "olmoe",
            "hidden_size": D,
            "num_experts": num_experts,
            "top_k": top_k,
            "expert_width": F,
            "renormalise": renormalise,
        }
    )
    compare(block, reference, pairs_of(reference, shared=False))


@pytest.mark.parametrize("method, n_group, topk_group", [("greedy", 1, 1), ("group_limited_greedy", 4, 2)])
def test_deepseek_v2_block(method: str, n_group: int, topk_group: int) -> None:
    config = DeepseekV2Config(
        hidden_size=D,
        moe_intermediate_size=F,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=2,
        topk_method=method,
        n_group=n_group,
        topk_group=topk_group,
        routed_scaling_factor=1.7,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    config._experts_implementation = "eager"
    reference = DeepseekV2Moe(config)
    random_weights(reference)
    spec = {
        "preset": "deepseek_moe",
        "variant": "v2",
        "hidden_size": D,
        "num_experts": 16,
        "top_k": 4,
        "expert_width": F,
        "n_group": n_group,
        "topk_group": topk_group,
        "routed_scaling": 1.7,
    }
    compare(build_block(spec), reference, pairs_of(reference, shared=True))


@pytest.mark.parametrize("n_group, topk_group", [(1, 1), (4, 2)])
def test_deepseek_v3_block(n_group: int, topk_group: int) -> None:
    config = DeepseekV3Config(
        hidden_size=D,
        moe_intermediate_size=F,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=1,
        n_group=n_group,
        topk_group=topk_group,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    config._experts_implementation = "eager"
    reference = DeepseekV3MoE(config)
    random_weights(reference)
    spec = {
        "preset": "deepseek_moe",
        "variant": "v3",
        "hidden_size": D,
        "num_experts": 16,
        "top_k": 4,
        "expert_width": F,
        "n_group": n_group,
        "topk_group": topk_group,
        "shared_experts": 1,
        "routed_scaling": 2.5,
    }
    pairs = pairs_of(reference, shared=True) | {"router.bias": reference.gate.e_score_correction_bias}
    compare(build_block(spec), reference, pairs)


def test_olmoe_balance_loss_is_transformers_with_padding() -> None:
    torch.manual_seed(0)
    blocks = [build_block({"preset": "olmoe", "hidden_size": D, "num_experts": 8, "top_k": 2}) for _ in range(3)]
    x, padding = torch.randn(B, S, D), torch.zeros(B, S, dtype=torch.bool)
    padding[1, 20:] = True
    for mask in (None, padding):
        routings = [block(x * 20, padding=mask)[1] for block in blocks]
        attention_mask = None if mask is None else (~mask).long()
        expected = load_balancing_loss_func(tuple(r.logits for r in routings), 8, 2, attention_mask)
        torch.testing.assert_close(load_balance(routings, "olmoe_hf"), expected, atol=1e-6, rtol=1e-6)


def test_z_loss_is_the_mean_square_of_logsumexp_over_real_tokens() -> None:
    block = build_block({"preset": "smoe", "hidden_size": D, "num_experts": 8, "top_k": 2, "router_init_std": 1.0})
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[0, 10:] = True
    _, routing = block(torch.randn(B, S, D), padding=padding)
    real = routing.logits[~padding.view(-1)].double()
    values = [torch.log(torch.exp(h).sum()).item() ** 2 for h in real]
    assert z_loss(routing).item() == pytest.approx(sum(values) / len(values), rel=1e-6)


@pytest.mark.parametrize("form", ["swiglu", "relu_mlp", "gelu_mlp_bias"])
@pytest.mark.parametrize("path", ["slices", "grouped"])
def test_expert_paths_agree(form: str, path: str) -> None:
    if form == "gelu_mlp_bias" and path == "slices":
        pytest.skip("biased experts have no sliced path")
    torch.manual_seed(0)
    experts = Experts(6, 32, 16, form)
    experts.reset_parameters(0.3)
    indices = torch.randint(-1, 6, (40, 3))
    results = []
    for name in ("loop", path):
        experts.zero_grad()
        x = torch.randn(40, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
        weights = torch.rand(40, 3, generator=torch.Generator().manual_seed(3)).requires_grad_()
        y = experts(x, indices, weights, path=name)
        y.square().sum().backward()
        results.append((y, x.grad, weights.grad, *[p.grad.clone() for p in experts.parameters()]))
    for ours, expected in zip(*results, strict=True):
        scale = expected.abs().max()
        torch.testing.assert_close(ours / scale, expected / scale, atol=2e-6, rtol=0)


@pytest.mark.parametrize("form", ["swiglu", "relu_mlp", "gelu_mlp_bias"])
@pytest.mark.parametrize("path", ["slices", "loop"])
def test_gradcheck(form: str, path: str) -> None:
    if form == "gelu_mlp_bias" and path == "slices":
        pytest.skip("biased experts have no sliced path")
    torch.manual_seed(0)
    experts = Experts(3, 4, 5, form).double()
    experts.reset_parameters(0.5)
    indices = torch.tensor([[0, 2], [1, -1], [2, 2], [-1, -1], [0, 1]])
    x, weights = torch.randn(5, 4, dtype=torch.double), torch.rand(5, 2, dtype=torch.double)
    parameters = [p.detach().clone().requires_grad_() for p in experts.parameters()]

    def run(x: Tensor, weights: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip([name for name, _ in experts.named_parameters()], values, strict=True))
        return torch.func.functional_call(experts, named, (x, indices, weights), {"path": path})

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), weights.requires_grad_(), *parameters))
