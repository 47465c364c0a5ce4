"""Tokens per second of a training stage, all logging included, against transformers' own OLMoE in a plain loop.

    python benchmarks/training.py [--steps 40] [--threads 2]

Same shape, batch, AdamW (fused) and data. Each side has a process of its own, the stage with the settings of our jobs;
rounds alternate, so that a busy machine hits both alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.lib.sides import Side, add_arguments, job_environment, serve
from jobs.node.numerics import prepare_torch
from orchestrator.spec.cell import THREADS, Execution, Resources

VOCABULARY, HIDDEN, LAYERS, HEADS = 4096, 128, 4, 4
EXPERTS, TOP_K, WIDTH = 16, 2, 128
BATCH, LENGTH = 8, 256


def plain_loop(steps: int) -> Any:
    """Yield after every round of `steps` optimizer steps of transformers' OLMoE; the value is tokens per second."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=512,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        pad_token_id=None,
        eos_token_id=None,
    )
    model = OlmoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    while True:
        began = time.monotonic()
        for _ in range(steps):
            ids = torch.randint(VOCABULARY, (BATCH, LENGTH))
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        yield steps * BATCH * LENGTH / (time.monotonic() - began)


def stage(steps: int, rounds: int, threads: int) -> Any:
    """Yield the same of a training stage, one segment per round."""
    import numpy as np

    from orchestrator.spec.cell import DataSpec, TrainSpec
    from orchestrator.spec.model import ModelSpec, MoESpec
    from tests import training as bench

    model = ModelSpec(
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=HEADS,
        context=512,
        moe=MoESpec(preset="olmoe", top_k=TOP_K, num_experts=EXPERTS, expert_width=WIDTH),
    )
    train = TrainSpec(DataSpec("benchmark://"), rounds * steps, BATCH, 1, LENGTH)
    bench.VOCABULARY = VOCABULARY
    with tempfile.TemporaryDirectory() as folder:
        store = bench.prepare(folder)
        tokens = np.random.default_rng(0).integers(0, VOCABULARY, 200_000).astype(np.uint16)
        starts = np.ones(len(tokens), dtype=bool)
        blobs = {"tokens": tokens, "spans_word": starts, "spans_sentence": starts}
        bench.put(store, "random", "tokens", {f"train_{n}.npy": bench._npy(a) for n, a in blobs.items()}, {"pad": 0})
        cuts = [("", i * steps, (i + 1) * steps) for i in range(rounds)]
        works = bench.segments(cuts, train, model=model, tokens="random")
        init = bench.init_work(model)
        bench.run_chain(store, [init], "init")
        works = [dataclasses.replace(work, init=init.key()) for work in works]
        execution = Execution(log_every=10, checkpoint_seconds=0.0)
        job = bench.make_job(store, works, execution=execution, resources=Resources(cores=threads))
        job.reporter.start()
        from jobs.node.context import StageContext
        from jobs.train.stage import run

        for work in works:
            began = time.monotonic()
            run(StageContext(job, work.key(), "benchmark"), work)
            yield steps * BATCH * LENGTH / (time.monotonic() - began)
        for finish in job.finishers:
            finish()
        job.reporter.close()


def main() -> None:
    """Print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    add_arguments(parser)
    options = parser.parse_args()
    if options.side:
        import torch

        torch.set_num_threads(options.threads)
        if options.side == "ours":
            prepare_torch(Execution(), Resources(cores=options.threads))
            rates = stage(options.steps, options.rounds, options.threads)
        else:
            rates = plain_loop(options.steps)
        serve(options, None, lambda _: next(rates), lambda: None)
        return
    with tempfile.TemporaryDirectory() as directory:
        theirs = Side("transformers", directory, {**os.environ, **dict.fromkeys(THREADS, str(options.threads))})
        ours = Side("ours", directory, job_environment(options.threads))
        pairs = [(theirs.work(i), ours.work(i)) for i in range(options.rounds)][1:]
        for side in (theirs, ours):
            side.end()
    for name, values in (("transformers", [p[0] for p in pairs]), ("stage", [p[1] for p in pairs])):
        print(f"{name:<14}{statistics.median(values):8.0f} tokens/s   {[round(v) for v in values]}")
    print(f"ratio         {statistics.median(ours / theirs for theirs, ours in pairs):8.2f}")


if __name__ == "__main__":
    main()
