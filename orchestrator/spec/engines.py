"""Training engines by name: who holds parameters, gradients and optimizer state, on how many processes."""

from __future__ import annotations

# torch: one process, or data parallel. fsdp: everything sharded. deepspeed:1: optimizer state partitioned;
# deepspeed:2: gradients as well.
ENGINES = ("torch", "fsdp", "deepspeed:1", "deepspeed:2")
# What could not be shown to freeze, fork and resume with equal bits.
REFUSED = {
    "deepspeed": "it does not say which ZeRO stage: write deepspeed:1 or deepspeed:2",
    "deepspeed:0": "it partitions nothing: engine torch is data parallel too, with a fixed order of sums",
    "deepspeed:3": "its parameters stay partitioned when a freeze phase needs another engine; engine fsdp shards them",
    "ddp": "engine torch is data parallel on several processes",
}


def least_processes(engine: str) -> int:
    """Return how many processes an engine needs at least."""
    return 1 if engine == "torch" else 2
