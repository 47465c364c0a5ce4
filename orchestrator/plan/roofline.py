"""Times from what a simulation counted: each operation takes as long as its products or its bytes, whichever is longer.

Peaks are of data sheets (`orchestrator.catalog.gpus`); which part of them is reached is assumed, and said with every
time. Source of the model: Williams et al. 2009.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.catalog.gpus import Gpu, bytes_sent
from orchestrator.plan.answers import Answer

# Parts of the peak that products, memory and links reach, and the bytes/s of a node's network for each of its GPUs.
PRODUCTS, MEMORY, LINK, NETWORK = 0.5, 0.7, 0.7, 25e9
# Of memory: what the driver, the communication library and fragmentation take.
RESERVED = 0.06
# Of host memory, in each process beside its tensors: Python and torch, and the driver where there is a GPU.
PROCESS_BYTES = {"cpu": 700_000_000, "cuda": 2_500_000_000}
HALF = ("torch.bfloat16", "torch.float16")


@dataclass(frozen=True, slots=True)
class Reckoned:
    """Seconds of one step or pass: of operations and of collectives, one after the other."""

    compute: float
    communication: float
    sent: float  # bytes of each rank

    @property
    def seconds(self) -> float:
        """Both, as if nothing overlapped."""
        return self.compute + self.communication


def reckoned(answer: Answer, gpu: Gpu, ranks: int, nodes: int) -> Reckoned:
    """Return how long one step or pass takes each rank."""
    compute = 0.0
    for flops, size, dtype, times in answer.operations:
        peak = gpu.half if dtype in HALF else gpu.single
        compute += times * max(flops / (PRODUCTS * peak), size / (MEMORY * gpu.bandwidth))
    sent = sum(times * bytes_sent(name, size, ranks) for name, size, times in answer.collectives)
    return Reckoned(compute, sent / (NETWORK if nodes > 1 else LINK * gpu.link), sent)


def assumptions(gpu: Gpu) -> list[str]:
    """Return what is assumed, in words."""
    return [
        f"{gpu.name}: {gpu.half / 1e12:.0f} TFLOP/s in bf16, {gpu.single / 1e12:.0f} in fp32 (no TF32), "
        f"{gpu.bandwidth / 1e12:.2f} TB/s of memory, {gpu.link / 1e9:.0f} GB/s to each side of a link (data sheet)",
        f"reached: {PRODUCTS:.0%} of the products' peak, {MEMORY:.0%} of memory's, {LINK:.0%} of the link's; between "
        f"nodes {NETWORK / 1e9:.0f} GB/s a GPU; nothing overlaps (assumed)",
        f"{RESERVED:.0%} of the GPU's memory is taken by driver, NCCL and fragmentation; each process takes "
        f"{PROCESS_BYTES['cuda'] / 1e9:.1f} GB of host memory beside its tensors (assumed)",
        "a task has all its items, each as long as is usual for it (orchestrator.catalog.tasks)",
        "experts are evenly loaded; products of experts are grouped, logits in chunks, attention never holds its "
        "scores: the paths of a GPU",
    ]
