"""Speed of a step of fine-tuning at scale tiny on examples of unequal length: `python benchmarks/finetune_step.py`.

Same weights, examples, balance loss, AdamW (fused), clipping. Ours is the training loop of our jobs with their
settings; transformers' Trainer is given a micro-batch padded to its longest example, and once more flattened to one row
without padding (`DataCollatorWithFlattening`). Each side has a process of its own. After the losses were found equal,
they train in turns; setting up is not counted. A ratio is the median of the rounds' own. Tokens are real ones.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening, OlmoeForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.lib.sides import Side, add_arguments, job_environment, serve
from benchmarks.train_step import (
    BATCH,
    CLOCKS,
    COEFFICIENT,
    VOCAB,
    as_rows,
    our_trainer,
    tiny_model,
    train_ours,
    train_theirs,
)
from jobs.data.packing import IGNORED, Batch
from jobs.models.convert import export_checkpoint
from jobs.moe.balance import balance_loss
from jobs.node.numerics import prepare_torch
from orchestrator.spec.cell import Execution, Resources

LONGEST = 256


def examples_of(number: int, steps: int) -> list[list[Tensor]]:
    """Return the examples of every step of a round, as long as those of instructions are: most short, a few long."""
    generator = torch.Generator().manual_seed(number)
    drawn = torch.randn(steps, BATCH, generator=generator).mul(0.75).add(3.8).exp().long().clamp(8, LONGEST)
    return [[torch.randint(0, VOCAB, (length,), generator=generator) for length in step] for step in drawn.tolist()]


def padded(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return examples as they are padded to the longest; the padding carries no loss."""
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, IGNORED)}


def batch_of(rows: Sequence[Tensor]) -> Batch:
    """Return examples as the loader of our jobs gives them."""
    given = padded(rows)
    labels = torch.nn.functional.pad(given["labels"][:, 1:], (0, 1), value=IGNORED)
    nothing = torch.zeros_like(labels)
    return Batch(given["input_ids"], labels, given["attention_mask"], nothing, nothing)


def pad_rows(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Collate examples by padding."""
    return padded([row["input_ids"] for row in rows])


def run_side(args: argparse.Namespace) -> None:
    """Train one side in this process: the loss before training, then the seconds of every round that is asked for."""
    clock = CLOCKS[args.clock]
    torch.set_num_threads(args.threads)
    probe = examples_of(0, 1)[0]
    args.experts, args.top_k, args.width = 16, 2, 128
    if args.side == "ours":
        prepare_torch(Execution(), Resources(cores=args.threads))
        model = tiny_model(args)
        trainer, source = our_trainer(model)
        batch = batch_of(probe)
        output = model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, shifted=True)
        assert output.loss is not None
        balance = balance_loss(output.routings, trainer.conditions.train.balance)[0]
        first = float((output.loss / output.tokens + balance).detach())
        serve(
            args,
            first,
            lambda number: train_ours(trainer, source, list(map(batch_of, examples_of(number, args.steps))), clock),
            lambda: None,
        )
        return
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = Path(args.directory) / args.side
    export_checkpoint(tiny_model(args), folder)
    theirs = OlmoeForCausalLM.from_pretrained(folder, output_router_logits=True)
    theirs.config.router_aux_loss_coef = theirs.router_aux_loss_coef = COEFFICIENT
    # With a cache, which training has no use for, positions that begin anew are not taken for those of a new example.
    theirs.config.use_cache = False
    theirs.set_experts_implementation("grouped_mm")
    collate = DataCollatorWithFlattening(return_tensors="pt") if args.side == "flattened" else pad_rows
    given = collate(as_rows([probe]))
    loss = float(theirs(**given).loss)
    serve(
        args,
        loss,
        lambda number: train_theirs(theirs, as_rows(examples_of(number, args.steps)), clock, args.directory, collate),
        lambda: None,
    )


def main() -> None:
    """Print what each side trains in a second, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: on a busy machine")
    add_arguments(parser)
    args = parser.parse_args()
    if args.side:
        run_side(args)
        return
    with tempfile.TemporaryDirectory() as directory:
        plain = dict(os.environ)
        sides = {
            "ours": Side("ours", directory, job_environment(args.threads)),
            "padded": Side("padded", directory, plain),
            "flattened": Side("flattened", directory, plain),
        }
        for name, side in sides.items():
            if abs(side.first - sides["ours"].first) > 1e-5 * abs(side.first):
                sys.exit(f"the losses differ: ours {sides['ours'].first}, {name} {side.first}")
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for i in range(args.rounds + 1):
            tokens = sum(len(row) for step in examples_of(i, args.steps) for row in step)
            for name, side in sides.items():
                seconds = side.work(i)
                if i:  # the first round warms up
                    rates[name].append(tokens / seconds)
        for side in sides.values():
            side.end()
    steps = examples_of(1, args.steps)
    real, all_of = (sum(sum(map(len, s)) for s in steps), sum(len(s) * max(map(len, s)) for s in steps))
    share = f"{real / all_of:.0%} of the padded tokens are real"
    print(f"{BATCH} examples a step, {share}; {args.threads} threads, {args.clock} time")
    print(", ".join(f"{name} {statistics.median(found):.0f} tokens/s" for name, found in rates.items()))
    for name in ("padded", "flattened"):
        ratios = [a / b for a, b in zip(rates["ours"], rates[name], strict=True)]
        print(f"ours / transformers' Trainer, {name} {statistics.median(ratios):.2f}", end="")
        print(f"   ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
