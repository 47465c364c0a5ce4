"""Speed of a whole training step at scale tiny, ours against transformers': `python benchmarks/train_step.py`.

Same weights, batches, balance loss, AdamW (fused), clipping. Each side has a process of its own: ours the training loop
of our jobs with their settings (threads, memory, determinism), the Trainer as it comes, and where it is asked for
transformers' model compiled in a plain loop with our settings. After the losses were found equal, they train in turns;
setting up is not counted. A ratio is the median of the rounds' own. The last line says where our step's time goes on
one thread, and what its matrix products take alone: as it takes them, and by `torch.mm`.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import OlmoeForCausalLM, Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.lib.sides import Side, add_arguments, job_environment, serve
from jobs.data.packing import IGNORED, Batch
from jobs.models.backbones import CausalLM
from jobs.models.building import build_model
from jobs.models.convert import export_checkpoint
from jobs.moe.balance import balance_loss
from jobs.moe.products import times
from jobs.node.numerics import keep_freed_memory, prepare_torch
from jobs.train.engines.torch import TorchEngine
from jobs.train.loop import Trainer as OurTrainer
from orchestrator.spec.cell import BalanceSpec, DataSpec, Execution, Resources, TrainSpec
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.work import Conditions

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
VOCAB, BATCH, LENGTH, LR, DECAY, CLIP, COEFFICIENT = 4096, 8, 256, 1e-3, 0.01, 1.0, 0.01
BALANCE = BalanceSpec(aux_coef=COEFFICIENT, aux_variant="olmoe_hf", z_coef=0.0)


class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is read without types
    """Seconds from the first step's start to the last step's end, and its logged losses."""

    def __init__(self, clock: Any) -> None:
        self.clock, self.start, self.stop = clock, 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.start = self.clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop = self.clock()


class Rows:
    """Given token ids as a source of micro-batches."""

    def __init__(self) -> None:
        self.steps: dict[int, Batch] = {}

    def micro_batch(self, step: int, index: int, size: int) -> Batch:
        """Return the batch of one optimizer step."""
        return self.steps.pop(step)

    def put(self, first: int, batches: Sequence[Batch]) -> None:
        """Make these the batches of the steps from `first` on."""
        self.steps.update(enumerate(batches, first))


def as_batch(ids: torch.Tensor) -> Batch:
    """Return [B,S] token ids as the loader of our jobs gives them."""
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
    nothing = torch.zeros_like(ids)
    return Batch(ids, labels, torch.ones_like(ids), nothing, nothing)


def our_trainer(model: CausalLM) -> tuple[OurTrainer, Rows]:
    """Return the training loop of our jobs with the Trainer's settings, and where its batches come from."""
    train = TrainSpec(
        DataSpec("given"),
        steps=1_000_000,
        micro_batch=BATCH,
        sequence_length=LENGTH,
        lr=LR,
        router_lr=LR,
        schedule="constant",
        warmup_ratio=0.0,
        betas=(0.9, 0.999),
        weight_decay=DECAY,
        clip=CLIP,
        freeze="",
        balance=BALANCE,
    )
    rows = Rows()
    engine = TorchEngine(model, train)
    engine.freeze("")
    model.train()
    return OurTrainer(engine, Conditions("pretrain", train, "", 0), rows), rows


def train_ours(trainer: OurTrainer, rows: Rows, batches: Sequence[Batch], clock: Any) -> float:
    """Return the seconds of one step per batch."""
    rows.put(trainer.step, batches)
    start = clock()
    for _ in batches:
        trainer.train_step()
    return float(clock() - start)


# Kernels by what they are for; everything else is element-wise work, copies and Python.
KINDS = {
    "matrix products": ("mm", "_linear_pointwise"),
    "attention": ("scaled_dot_product",),
    "optimizer": ("adamw", "foreach"),
}


def parts_of(trainer: OurTrainer, rows: Rows, batch: torch.Tensor) -> dict[str, Any]:
    """Return of our step on one thread: CPU seconds, those of its products alone, and each kind of kernel's share."""
    torch.set_num_threads(1)
    steps = [train_ours(trainer, rows, [as_batch(batch)], time.process_time) for _ in range(5)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        train_ours(trainer, rows, [as_batch(batch)], time.perf_counter)
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    found = {kind: sum(t for key, t in times.items() if any(n in key for n in names)) for kind, names in KINDS.items()}
    total = sum(times.values())
    shares = {kind: t / total for kind, t in found.items()}
    return {
        "step": statistics.median(steps),
        "products": products_alone(profile),
        "shares": {**shares, "the rest": 1 - sum(shares.values())},
    }


# Where the first of an operator's two matrices stands among the inputs that it is listed with, counted from the last.
OPERANDS = {"aten::mm": -2, "aten::addmm_": -4, "mkldnn::_linear_pointwise": -6}


def operands(name: str, shapes: list[list[int]]) -> tuple[torch.Size, torch.Size]:
    """Return the shapes of the two matrices that an operator of a profile multiplied.

    An operator that TorchScript calls is listed with all that lies on the interpreter's stack, its own inputs last.
    """
    first = OPERANDS[name]
    if name == "aten::mm" and len(shapes) > 2 and shapes[-1] == [shapes[-3][0], shapes[-2][-1]]:
        first -= 1  # what is written to comes last
    left, right = (torch.Size(shape) for shape in shapes[first:][:2])
    return left, right


def products_alone(profile: torch.profiler.profile) -> tuple[float, float]:
    """Return the CPU seconds of a step's matrix products, those of attention aside, one after another and no more.

    First each by the library that the step takes it from, then all of them by `torch.mm`.
    """
    made: dict[tuple[bool, torch.Size, torch.Size], tuple[torch.Tensor, ...]] = {}
    works = []
    for event in profile.events() or ():
        if event.name not in OPERANDS:
            continue
        left, right = operands(event.name, event.input_shapes)
        turned = event.name.startswith("mkldnn")
        if (turned, left, right) not in made:
            columns = right[0] if turned else right[1]
            made[turned, left, right] = torch.randn(left), torch.randn(right), torch.empty(left[0], columns)
        works.append((turned, made[turned, left, right]))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(5):
        for by_mm, found in seconds.items():
            start = time.process_time()
            for turned, (x, w, out) in works:
                if turned and not by_mm:
                    times(x, w)
                else:
                    torch.mm(x, w.t() if turned else w, out=out)
            found.append(time.process_time() - start)
    return statistics.median(seconds[False]), statistics.median(seconds[True])


def as_rows(batches: Iterable[Iterable[torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Return the sequences of all batches as a data set of the Trainer."""
    return [{"input_ids": row, "labels": row} for batch in batches for row in batch]


def train_theirs(
    model: OlmoeForCausalLM, rows: list[Any], clock: Any, directory: str, collate: Callable[..., Any] | None = None
) -> float:
    """Return the seconds of one Trainer step for each micro-batch of rows."""
    arguments = TrainingArguments(
        output_dir=directory,
        max_steps=len(rows) // BATCH,
        per_device_train_batch_size=BATCH,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        optim="adamw_torch_fused",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        log_level="error",
    )
    timer = Clock(clock)
    Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[timer]).train()
    return timer.stop - timer.start


class Compiled:
    """transformers' model, compiled, in a plain loop."""

    def __init__(self, model: OlmoeForCausalLM) -> None:
        self.loss = torch.compile(lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss)
        self.parameters = list(model.train().parameters())
        decayed = {decay: [p for p in self.parameters if (p.ndim >= 2) == bool(decay)] for decay in (DECAY, 0.0)}
        groups = [{"params": found, "weight_decay": decay} for decay, found in decayed.items()]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), fused=True)

    def train(self, batches: list[torch.Tensor], clock: Any) -> float:
        """Return the seconds of one step per batch."""
        start = clock()
        for ids in batches:
            self.loss(ids).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return float(clock() - start)


def tiny_model(args: argparse.Namespace) -> CausalLM:
    """Return our model with the weights that both sides start from."""
    moe = MoESpec(preset="olmoe", num_experts=args.experts, top_k=args.top_k, expert_width=args.width)
    torch.manual_seed(0)
    return build_model(ModelSpec(moe=dataclasses.replace(moe, renormalise=True)), VOCAB)


def batches_of(seed: int, steps: int) -> list[torch.Tensor]:
    """Return the token ids [BATCH, LENGTH] of the steps of one round."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator) for _ in range(steps)]


def run_side(args: argparse.Namespace) -> None:
    """Train one side in this process: the loss before training, then the seconds of every round that is asked for."""
    clock = CLOCKS[args.clock]
    torch.set_num_threads(args.threads)
    probe = batches_of(0, 1)[0]
    if args.side == "ours":
        prepare_torch(Execution(), Resources(cores=args.threads))
        ours = tiny_model(args)
        trainer, rows = our_trainer(ours)
        output = ours(probe, labels=probe)
        loss = output.loss / output.tokens + balance_loss(output.routings, BALANCE)[0]
        serve(
            args,
            float(loss.detach()),
            lambda number: train_ours(trainer, rows, list(map(as_batch, batches_of(number, args.steps))), clock),
            lambda: parts_of(trainer, rows, probe),
        )
        return
    logging.getLogger("transformers").setLevel(logging.ERROR)
    export_checkpoint(tiny_model(args), Path(args.directory) / "model")
    theirs = OlmoeForCausalLM.from_pretrained(Path(args.directory) / "model", output_router_logits=True)
    theirs.config.router_aux_loss_coef = theirs.router_aux_loss_coef = COEFFICIENT
    theirs.set_experts_implementation("grouped_mm")
    loss = float(theirs(input_ids=probe, labels=probe).loss)
    if args.side == "compiled":
        keep_freed_memory()
        compiled = Compiled(theirs)
        serve(args, loss, lambda number: compiled.train(batches_of(number, args.steps), clock), lambda: None)
        return
    serve(
        args,
        loss,
        lambda number: train_theirs(theirs, as_rows(batches_of(number, args.steps)), clock, args.directory),
        lambda: None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: on a busy machine")
    parser.add_argument(
        "--compiled", action="store_true", help="transformers' model compiled as well: needs a compiler"
    )
    add_arguments(parser)
    args = parser.parse_args()
    if args.side:
        run_side(args)
        return
    with tempfile.TemporaryDirectory() as directory:
        environment = job_environment(args.threads)
        sides = {
            "ours": Side("ours", directory, environment),
            "transformers": Side("transformers", directory, dict(os.environ)),
        }
        if args.compiled:
            sides["compiled"] = Side("compiled", directory, environment)
        for name, side in sides.items():
            if abs(side.first - sides["ours"].first) > 1e-5 * abs(side.first):
                sys.exit(f"the losses differ: ours {sides['ours'].first}, {name} {side.first}")
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for i in range(args.rounds + 1):
            for name, side in sides.items():
                seconds = side.work(i)
                if i:  # the first round warms up, and compiles
                    rates[name].append(args.steps * BATCH * LENGTH / seconds)
        parts = {name: side.end() for name, side in sides.items()}["ours"]
    print(f"experts {args.experts}, top-k {args.top_k}, width {args.width}; {args.threads} threads, {args.clock} time")
    print(", ".join(f"{name} {statistics.median(found):.0f} tokens/s" for name, found in rates.items()))
    for name, called in (("transformers", "transformers' Trainer"), ("compiled", "transformers compiled")):
        if name in rates:
            ratios = [a / b for a, b in zip(rates["ours"], rates[name], strict=True)]
            print(f"ours / {called} {statistics.median(ratios):.2f}   ({min(ratios):.2f} to {max(ratios):.2f})")
    step, (products, by_mm) = parts["step"], parts["products"]
    print(
        f"our step on one thread: {step * 1e3:.0f} ms of CPU, {step / products:.2f}x its matrix products alone", end=""
    )
    print(f" ({step / by_mm:.2f}x those products by torch.mm); ", end="")
    print(", ".join(f"{kind} {share:.0%}" for kind, share in parts["shares"].items()))


if __name__ == "__main__":
    main()
