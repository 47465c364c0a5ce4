"""Step time and memory of LoRA and Muon against full AdamW, in one process: `python benchmarks/trained_parts.py`.

A model of scale tiny trains in turns under each; the ratio of times is the median of the rounds' own, against the full
AdamW of the same round. Memory is what training holds besides activations: weights, gradients and optimizer state.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs.data.packing import Batch
from jobs.models.adapters import add_adapters
from jobs.models.building import build_model
from jobs.train.engines.torch import TorchEngine
from jobs.train.loop import Trainer
from orchestrator.spec.cell import AdapterSpec, DataSpec, TrainSpec
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.work import Conditions

VOCABULARY, ROWS, LENGTH = 4096, 8, 256
MODEL = ModelSpec(
    hidden_size=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    context=512,
    moe=MoESpec(top_k=2, num_experts=16, expert_width=128),
)
FULL = TrainSpec(data=DataSpec("random"), steps=1000, micro_batch=ROWS, sequence_length=LENGTH, lr=1e-3)
VARIANTS = {
    "adamw": FULL,
    "lora attention": dataclasses.replace(FULL, adapter=AdapterSpec(rank=8)),
    "lora expert": dataclasses.replace(FULL, adapter=AdapterSpec(rank=8, targets="expert")),
    "lora attention+expert": dataclasses.replace(FULL, adapter=AdapterSpec(rank=8, targets="attention+expert")),
    "muon": dataclasses.replace(FULL, optimizer="muon"),
}


class Random:
    """Random token ids as a source of micro-batches, the same for every variant."""

    def micro_batch(self, step: int, index: int, size: int) -> Batch:
        """Return the batch of one optimizer step."""
        ids = torch.randint(VOCABULARY, (size, LENGTH + 1), generator=torch.Generator().manual_seed(step))
        spans = torch.arange(LENGTH).expand(size, -1)
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones_like(spans), spans, spans)


def trainer_of(train: TrainSpec) -> Trainer:
    """Return a trainer of a new model under one phase's settings."""
    torch.manual_seed(0)
    model = build_model(MODEL, VOCABULARY)
    add_adapters(model, train.adapter, 0)
    engine = TorchEngine(model, train)
    engine.freeze("")
    model.train()
    return Trainer(engine, Conditions("finetune", train, "tokens", 0), Random())


def held(trainer: Trainer) -> tuple[int, int, int]:
    """Return the bytes of weights, gradients and optimizer state, as they are at the end of a backward pass."""
    engine = trainer.engine
    parameters = list(engine.model.parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    gradients = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    state = sum(piece.tensor.nbytes for piece in engine.optimizer_tensors().values())
    return weights, gradients, state


def main() -> None:
    """Measure and print a row for each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps a round")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    trainers = {name: trainer_of(train) for name, train in VARIANTS.items()}
    for trainer in trainers.values():
        trainer.train_step()  # what is made at the first step is not counted
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(options.rounds):
        for name, trainer in trainers.items():
            begun = time.process_time()
            for _ in range(options.steps):
                trainer.train_step()
            seconds[name].append((time.process_time() - begun) / options.steps)
    full_memory = sum(held(trainers["adamw"]))
    print(f"{'':24}{'CPU s a step':>14}{'x AdamW':>9}{'MB held':>9}{'x AdamW':>9}{'optimizer MB':>14}")
    for name, trainer in trainers.items():
        ratio = statistics.median(own / full for own, full in zip(seconds[name], seconds["adamw"], strict=True))
        memory = held(trainer)
        print(
            f"{name:24}{statistics.median(seconds[name]):14.3f}{ratio:9.2f}{sum(memory) / 1e6:9.1f}"
            f"{sum(memory) / full_memory:9.2f}{memory[2] / 1e6:14.2f}"
        )


if __name__ == "__main__":
    main()
