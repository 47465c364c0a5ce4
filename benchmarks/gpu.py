"""What only a GPU can show, in one table: `python benchmarks/gpu.py` (`make gpu-check`), in less than ten minutes.

    python benchmarks/gpu.py                         # on one H100; skips with a reason where there is no GPU
    python benchmarks/gpu.py --device cpu --small    # the same code on small shapes, as the tests do

- `parity`: logits in fp32 and bf16 against fp64 on the CPU: max |a - b| / max |b| (bounds 1e-4 and 1e-2);
- `resume`, `fork`: parameters that differ after two steps from a saved state, in two engines (bound 0);
- `memory`: peak of a training step, simulated over `torch.cuda.max_memory_allocated` (within 10 %);
- `block`, `step`: time of ours over transformers' grouped path, same weights, in turns; tokens a second, and the part
  of the data sheet's bf16 peak that the step's products reach (MFU);
- `evaluation`: largest difference in log-likelihood to stock lm-eval (bound 1e-3), and its time over ours.

A line with a bound that is passed makes the exit code 1. Timings have none: they are to be sent back.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn

from benchmarks.moe_block import transformers_block
from benchmarks.simulation import Text
from jobs.data.packing import Batch
from jobs.data.tokenizer import train_bpe, transformers_tokenizer
from jobs.evaluate.prefix_lm import PrefixLM
from jobs.models.building import build_model
from jobs.models.convert import export_checkpoint
from jobs.models.weights import canonical_state
from jobs.moe import build_block
from jobs.moe.block import MoEBlock
from jobs.simulate.training import Training, simulate_training
from jobs.train.engines.torch import TorchEngine
from jobs.train.loop import Trainer
from orchestrator.catalog.gpus import GPUS, Gpu
from orchestrator.spec.data import DataSpec
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.resolve import resolve_model
from orchestrator.spec.training import TrainSpec
from orchestrator.spec.work import Conditions

# Rounds of each side that are timed, after as many more that are not.
ROUNDS, WARM = 5, 2


@dataclass(frozen=True, slots=True)
class Shape:
    """A model of some layers of a public one."""

    name: str
    hidden: int
    layers: int
    experts: int
    top_k: int
    width: int
    vocabulary: int
    length: int
    rows: int

    def spec(self) -> ModelSpec:
        """Return it as a model's specification, with heads of 64 or 128."""
        heads = max(2, self.hidden // 128)
        moe = MoESpec(preset="olmoe", top_k=self.top_k, num_experts=self.experts, expert_width=self.width)
        sizes = {"hidden_size": self.hidden, "num_layers": self.layers, "context": self.length}
        return ModelSpec(num_heads=heads, num_kv_heads=heads, moe=moe, **sizes)  # type: ignore[arg-type]


CHECKED = Shape("check", 256, 2, 16, 4, 256, 1024, 256, 2)
LARGE = (
    Shape("OLMoE, 4 layers", 2048, 4, 64, 8, 1024, 50304, 2048, 2),
    Shape("30B-A3B, 3 layers", 2048, 3, 128, 8, 768, 151936, 2048, 2),
)
SMALL = (Shape("small", 64, 2, 8, 2, 64, 256, 32, 2),)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table; `bound` is the largest value that is sound, None where nothing is judged."""

    name: str
    what: str
    value: float
    bound: float | None = None
    told: str = ""

    @property
    def sound(self) -> bool:
        """Whether the value is within its bound."""
        return self.bound is None or self.value <= self.bound

    def __str__(self) -> str:
        mark = "" if self.bound is None else ("ok" if self.sound else "FAILED")
        return f"{self.name:12} {self.what:34} {self.value:12.4g}  {mark:6} {self.told}"


def train_spec(shape: Shape, precision: str) -> TrainSpec:
    """Return a phase of two micro-batches a step."""
    return TrainSpec(
        DataSpec("", format="text"),
        steps=100,
        micro_batch=shape.rows,
        accumulation=2,
        sequence_length=shape.length,
        precision=precision,
        freeze="",
    )


def parity(shape: Shape, device: str) -> list[Line]:
    """Compare logits with those of fp64."""
    torch.manual_seed(0)
    model = build_model(shape.spec(), shape.vocabulary).eval()
    ids = torch.randint(0, shape.vocabulary, (shape.rows, shape.length))
    lines = []
    with torch.no_grad():
        exact = model.double()(ids).logits
        for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
            torch.manual_seed(0)
            other = build_model(shape.spec(), shape.vocabulary).eval()
            for name, parameter in other.named_parameters():
                # Routers, which choose, stay in fp32, as in an evaluation.
                parameter.data = parameter.data.to(torch.float32 if "router" in name else dtype)
            logits = other.to(device)(ids.to(device)).logits.double().cpu()
            if dtype is torch.bfloat16:
                # A choice between equals may fall otherwise: what is compared is most tokens.
                error = (logits - exact).abs().amax(-1).flatten().quantile(0.9) / exact.abs().max()
            else:
                error = (logits - exact).abs().max() / exact.abs().max()
            lines.append(Line("parity", f"{str(dtype).removeprefix('torch.')} against fp64", float(error), bound))
    return lines


def trainer_of(shape: Shape, device: str, weights: dict[str, Tensor] | None, precision: str) -> Trainer:
    """Return a trainer over the shape's model, with given weights or fresh ones of seed 0."""
    torch.manual_seed(0)
    model = build_model(shape.spec(), shape.vocabulary)
    if weights is not None:
        for name, tensor in canonical_state(model).items():
            tensor.copy_(weights[name])
    engine = TorchEngine(model.to(device), train_spec(shape, precision))
    engine.freeze("")
    engine.model.train()
    conditions = Conditions("pretrain", train_spec(shape, precision), "", 0)
    return Trainer(engine, conditions, Seeded(shape.vocabulary, shape.length))


@dataclass(frozen=True, slots=True)
class Seeded(Text):
    """Random ids that are the same in every run of a step."""

    def micro_batch(self, step: int, index: int, size: int) -> Batch:
        """Return a micro-batch of `size` sequences."""
        with torch.random.fork_rng():
            torch.manual_seed(step * 1000 + index)
            return Text.micro_batch(self, step, index, size)


def resumed(shape: Shape, device: str) -> list[Line]:
    """Train four steps; go on from the state after two in fresh engines, once and twice."""
    straight = trainer_of(shape, device, None, "fp32")
    for _ in range(2):
        straight.train_step()
    weights = {name: tensor.clone() for name, tensor in canonical_state(straight.engine.model).items()}
    moments = {name: rows.tensor.clone() for name, rows in straight.engine.optimizer_tensors().items()}

    def goes_on() -> dict[str, Tensor]:
        trainer = trainer_of(shape, device, weights, "fp32")
        trainer.engine.load_optimizer(moments)
        trainer.step = 2
        for _ in range(2):
            trainer.train_step()
        return canonical_state(trainer.engine.model)

    for _ in range(2):
        straight.train_step()
    end, first, second = canonical_state(straight.engine.model), goes_on(), goes_on()

    def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return float(sum(not torch.equal(a[name], b[name]) for name in a))

    lines = [Line("resume", "parameters that differ", differing(end, first), 0)]
    return [*lines, Line("fork", "parameters that differ", differing(first, second), 0)]


def seconds(runs: dict[str, Callable[[], object]], device: str) -> dict[str, float]:
    """Return the median time of each, run in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(ROUNDS + WARM if device == "cuda" else 2):
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if number >= (WARM if device == "cuda" else 1):
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def blocks(shape: Shape, device: str) -> Line:
    """Time a block forward and backward in bf16 against transformers' with the same weights."""
    torch.manual_seed(0)
    fields = {"preset": "olmoe", "top_k": shape.top_k, "num_experts": shape.experts, "expert_width": shape.width}
    ours = build_block({**fields, "hidden_size": shape.hidden})
    assert isinstance(ours, MoEBlock)
    theirs = transformers_block(ours, shape.hidden, shape.experts, shape.top_k, shape.width)
    sides: dict[str, nn.Module] = {"ours": ours.to(device, torch.bfloat16), "theirs": theirs.to(device, torch.bfloat16)}
    x = torch.randn(shape.rows, shape.length, shape.hidden, device=device, dtype=torch.bfloat16, requires_grad=True)

    def run(module: nn.Module) -> None:
        y = module(x)
        (y[0] if isinstance(y, tuple) else y).float().sum().backward()

    found = seconds({name: (lambda module=module: run(module)) for name, module in sides.items()}, device)  # type: ignore[misc]
    tokens = shape.rows * shape.length
    told = f"{tokens / found['ours']:,.0f} tokens/s"
    return Line("block", f"{shape.name}: ours / transformers", found["ours"] / found["theirs"], told=told)


def steps(shape: Shape, device: str, gpu: Gpu | None) -> list[Line]:
    """Take training steps in bf16: their memory against the simulation's, their time, and what they reach."""
    asked = Training(resolve_model(shape.spec()), shape.vocabulary, "pretrain", train_spec(shape, "bf16"), "torch", 1)
    with get_context("spawn").Pool(1) as apart:
        answer = apart.apply(simulate_training, (asked,))
    trainer = trainer_of(shape, device, None, "bf16")
    trainer.train_step()
    lines = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        trainer.train_step()
        ratio = answer.moments["step"].total / torch.cuda.max_memory_allocated()
        told = f"simulated / allocated {ratio:.3f}"
        lines.append(Line("memory", f"{shape.name}: |ratio - 1|", abs(ratio - 1), 0.1, told))
    taken = seconds({"step": trainer.train_step}, device)["step"]
    flops = sum(one.flops * times for one, times in answer.operations.items())
    told = "" if gpu is None else f"MFU {flops / taken / gpu.half:.1%} of {gpu.name}"
    tokens = 2 * shape.rows * shape.length
    return [*lines, Line("step", f"{shape.name}: tokens/s", tokens / taken, told=told)]


def evaluated(shape: Shape, device: str) -> list[Line]:
    """Score the same requests with stock lm-eval and with ours."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        generator = torch.Generator().manual_seed(0)
        words = [chr(97 + i % 26) * (1 + i % 4) + chr(97 + i // 26) for i in range(200)]

        def text(count: int) -> str:
            return " ".join(words[i] for i in torch.randint(0, len(words), (count,), generator=generator).tolist())

        tokenizer = train_bpe(iter([text(400) for _ in range(50)]), 256)
        (folder / "tokenizer.json").write_text(tokenizer.to_str())
        (folder / "special.json").write_text('{"bos": "<|bos|>", "eos": "<|eos|>", "pad": "<|pad|>"}')
        torch.manual_seed(0)
        model = build_model(dataclasses.replace(shape.spec(), context=512), tokenizer.get_vocab_size()).eval()
        export_checkpoint(model, folder / "public")
        theirs = AutoModelForCausalLM.from_pretrained(folder / "public", dtype=torch.float32).to(device).eval()
        vocabulary = transformers_tokenizer(folder)
        requests = []
        for number in range(8):
            context = text(40)
            requests += [
                Instance("loglikelihood", {}, (context, f" {text(4)}"), 4 * number + choice) for choice in range(4)
            ]
        stock = HFLM(pretrained=theirs, tokenizer=vocabulary, batch_size=8, device=device)
        ours = PrefixLM(model.to(device), vocabulary)
        expected = stock.loglikelihood(requests, disable_tqdm=True)
        found = ours.loglikelihood(requests)
        difference = max(abs(a[0] - b[0]) for a, b in zip(expected, found, strict=True))
        runs: dict[str, Callable[[], object]] = {
            "stock": lambda: stock.loglikelihood(requests, disable_tqdm=True),
            "ours": lambda: ours.loglikelihood(requests),
        }
        times = seconds(runs, device)
    told = f"stock / ours {times['stock'] / times['ours']:.2f}"
    return [Line("evaluation", "largest difference (nats)", difference, 1e-3, told)]


def named_gpu() -> Gpu | None:
    """Return this machine's GPU as the catalogue knows it."""
    name = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
    return next((gpu for gpu in GPUS.values() if gpu.name.partition("-")[0] in name), None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="small shapes")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device here (--device cpu --small runs the same code)")
        return 0
    torch.use_deterministic_algorithms(True)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}")
    shapes, gpu = (SMALL if options.small else LARGE), named_gpu()
    checked = SMALL[0] if options.small else CHECKED
    sound = True
    jobs: list[Callable[[], list[Line]]] = [
        lambda: parity(checked, options.device),
        lambda: resumed(checked, options.device),
        *((lambda shape=shape: [blocks(shape, options.device)]) for shape in shapes),
        *((lambda shape=shape: steps(shape, options.device, gpu)) for shape in shapes),
        lambda: evaluated(checked, options.device),
    ]
    for job in jobs:
        for line in job():
            print(line, flush=True)
            sound &= line.sound
    return int(not sound)


if __name__ == "__main__":
    sys.exit(main())
