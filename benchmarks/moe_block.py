"""Speed of one MoE block, forward and backward: `python benchmarks/moe_block.py [--threads 2] [--tokens 2048]`.

Ours, transformers' grouped_mm block and the dense block of equal active FLOPs run interleaved in one process, after
their outputs were found equal; beside them the machine's matrix-multiplication rate. A ratio above 1: ours is slower.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs.moe import build_block
from jobs.moe.balance import load_balance, z_loss
from jobs.moe.block import MoEBlock

SHAPES = ((64, 8, 256), (8, 2, 1024))  # experts, top-k, expert width
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def transformers_block(block: MoEBlock, hidden: int, num_experts: int, top_k: int, width: int) -> nn.Module:
    """Return transformers' OLMoE block with our block's weights and the grouped_mm experts."""
    config = OlmoeConfig(
        hidden_size=hidden, intermediate_size=width, num_experts=num_experts, num_experts_per_tok=top_k
    )
    config._experts_implementation = "grouped_mm"
    reference: nn.Module = OlmoeSparseMoeBlock(config)
    reference.load_state_dict(
        {
            "gate.weight": block.router.weight,
            "experts.gate_up_proj": block.experts.up,
            "experts.down_proj": block.experts.down,
        }
    )
    return reference


def gemm_rate(tokens: int, hidden: int, width: int, clock: Callable[[], float]) -> float:
    """Return the machine's GFLOP/s at the dense block's first product."""
    a, b = torch.randn(tokens, hidden), torch.randn(hidden, width)
    times = []
    for _ in range(7):
        start = clock()
        torch.mm(a, b)
        times.append(clock() - start)
    return 2 * tokens * hidden * width / min(times) / 1e9


def measure(num_experts: int, top_k: int, width: int, args: argparse.Namespace) -> None:
    """Check equality, time all blocks in turn and print one line."""
    clock, hidden = CLOCKS[args.clock], args.hidden
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "num_experts": num_experts, "top_k": top_k, "expert_width": width}
    ours = build_block({"preset": "olmoe", **sizes})
    assert isinstance(ours, MoEBlock)
    theirs = transformers_block(ours, hidden, num_experts, top_k, width)
    dense = build_block({"preset": "dense", **sizes})
    x = torch.randn(args.tokens // 512, 512, hidden, requires_grad=True)
    gradient = torch.randn_like(x)
    torch.testing.assert_close(ours(x)[0], theirs(x), atol=1e-5, rtol=1e-5)

    def balanced(x: Tensor) -> Tensor:
        y, routing = ours(x)
        loss: Tensor = y + 0.01 * load_balance([routing]) + 0.001 * z_loss(routing)
        return loss

    runs: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
        "ours": (ours, lambda x: ours(x)[0]),
        "ours+losses": (ours, balanced),
        "transformers": (theirs, theirs),
        "dense": (dense, lambda x: dense(x)[0]),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(args.rounds + 2):
        for name, (module, function) in runs.items():
            module.zero_grad()
            x.grad = None
            start = clock()
            function(x).backward(gradient)
            if i >= 2:
                times[name].append(clock() - start)
    median = {name: statistics.median(values) for name, values in times.items()}
    flops = 18 * args.tokens * hidden * width * top_k
    rates = [f"{name} {value * 1e3:.0f} ms ({flops / value / 1e9:.0f} GFLOP/s)" for name, value in median.items()]
    print(f"N {num_experts}, k {top_k}, f {width}: {', '.join(rates)}")
    print(
        f"    ours/dense {median['ours'] / median['dense']:.2f},"
        f" with losses {median['ours+losses'] / median['dense']:.2f},"
        f" ours/transformers {median['ours'] / median['transformers']:.2f};"
        f" this machine's matrix multiplication: {gemm_rate(args.tokens, hidden, width * top_k, clock):.0f} GFLOP/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: on a busy machine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"tokens {args.tokens}, hidden {args.hidden}, fp32, {args.threads} threads, {args.clock} time, medians")
    for shape in SHAPES:
        measure(*shape, args)


if __name__ == "__main__":
    main()
