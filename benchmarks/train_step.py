"""Speed of a whole training step at scale tiny, ours against transformers' Trainer: `python benchmarks/train_step.py`.

Same weights, batches, balance loss, AdamW (fused), clipping. After the losses were found equal, both train in turns in
one process, with the memory settings of our jobs; setting up is not counted. The last line says where our step's time
goes: what is no matrix product is all that could still be saved.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import OlmoeForCausalLM, Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs.models.backbones import CausalLM, build_model
from jobs.models.convert import export_checkpoint
from jobs.moe.balance import balance_loss
from jobs.numerics import keep_freed_memory
from orchestrator.spec.cell import BalanceSpec
from orchestrator.spec.model import ModelSpec, MoESpec

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
VOCAB, BATCH, LENGTH, LR, COEFFICIENT = 4096, 8, 256, 1e-3, 0.01
BALANCE = BalanceSpec(aux_coef=COEFFICIENT, aux_variant="olmoe_hf", z_coef=0.0)


class Clock(TrainerCallback):
    """Seconds from the first step's start to the last step's end, and its logged losses."""

    def __init__(self, clock: Any) -> None:
        self.clock, self.start, self.stop = clock, 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.start = self.clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop = self.clock()


def train_ours(model: CausalLM, optimizer: torch.optim.Optimizer, batches: list[torch.Tensor], clock: Any) -> float:
    """Return the seconds of one step per batch."""
    model.train()
    start = clock()
    for ids in batches:
        output = model(ids, labels=ids)
        balance, _ = balance_loss(output.routings, BALANCE)
        (output.loss / output.tokens + balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
    return float(clock() - start)


# Kernels by what they are for; everything else is element-wise work, copies and Python.
KINDS = {"matrix products": ("mm",), "attention": ("scaled_dot_product",), "optimizer": ("adamw", "foreach")}


def shares(model: CausalLM, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> dict[str, float]:
    """Return the share of each kind of kernel in the time of three of our steps."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train_ours(model, optimizer, [batch] * 3, time.perf_counter)
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    found = {kind: sum(t for key, t in times.items() if any(n in key for n in names)) for kind, names in KINDS.items()}
    total = sum(times.values())
    return {**{kind: t / total for kind, t in found.items()}, "the rest": 1 - sum(found.values()) / total}


def train_theirs(model: OlmoeForCausalLM, batches: list[torch.Tensor], clock: Any, directory: str) -> float:
    """Return the seconds of one Trainer step per batch."""
    rows = [{"input_ids": row, "labels": row} for ids in batches for row in ids]
    arguments = TrainingArguments(
        output_dir=directory,
        max_steps=len(batches),
        per_device_train_batch_size=BATCH,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        log_level="error",
    )
    timer = Clock(clock)
    Trainer(model, arguments, train_dataset=rows, callbacks=[timer]).train()
    return timer.stop - timer.start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: on a busy machine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    clock = CLOCKS[args.clock]
    moe = MoESpec(preset="olmoe", num_experts=args.experts, top_k=args.top_k, expert_width=args.width)
    torch.manual_seed(0)
    ours = build_model(ModelSpec(moe=dataclasses.replace(moe, renormalise=True)), VOCAB)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=LR, weight_decay=0.01, fused=True)
    with tempfile.TemporaryDirectory() as directory:
        export_checkpoint(ours, Path(directory) / "model")
        theirs = OlmoeForCausalLM.from_pretrained(Path(directory) / "model", output_router_logits=True)
        theirs.config.router_aux_loss_coef = theirs.router_aux_loss_coef = COEFFICIENT
        theirs.set_experts_implementation("grouped_mm")

        probe = torch.randint(0, VOCAB, (BATCH, LENGTH))
        output = ours(probe, labels=probe)
        loss = output.loss / output.tokens + balance_loss(output.routings, BALANCE)[0]
        expected = theirs(input_ids=probe, labels=probe).loss
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)

        times: dict[str, list[float]] = {"ours": [], "transformers": []}
        for i in range(args.rounds + 1):
            batches = [torch.randint(0, VOCAB, (BATCH, LENGTH)) for _ in range(args.steps)]
            seconds = train_ours(ours, optimizer, batches, clock), train_theirs(theirs, batches, clock, directory)
            if i:
                for name, value in zip(times, seconds, strict=True):
                    times[name].append(args.steps * BATCH * LENGTH / value)
        parts = shares(ours, optimizer, batches[0])
    rates = {name: statistics.median(values) for name, values in times.items()}
    print(f"experts {args.experts}, top-k {args.top_k}, width {args.width}; {args.threads} threads, {args.clock} time")
    print(", ".join(f"{name} {rate:.0f} tokens/s" for name, rate in rates.items()), end="; ")
    print(f"ours / transformers' Trainer {rates['ours'] / rates['transformers']:.2f}")
    print("our step: " + ", ".join(f"{kind} {share:.0%}" for kind, share in parts.items()))


if __name__ == "__main__":
    main()
