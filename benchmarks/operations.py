"""Operations that write memory in one layer and micro-batch: `python benchmarks/operations.py`.

Ours against transformers'. A model of OLMoE's form with its balance loss, forward and backward, eager, on the path that
a GPU takes: what a third layer adds to two. Every operation counts that reaches torch's kernels, inside our autograd
functions too; views and memory that is only reserved do not. Nothing is compiled on either side. Without a GPU no
values are computed, and our RMS norms are then made of several operations. torch's list of its operators, which comes
with it, says which of them have a kernel on CUDA: a norm is then one operation forward and one backward, counted as
KERNELS. Both counts are printed; with `--device cuda` all is counted on the device itself.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import OlmoeConfig, OlmoeForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs.models.building import build_model
from jobs.models.norm import RMSNorm
from jobs.moe.balance import balance_loss
from jobs.moe.host import know_grouped_products
from orchestrator.spec.cell import BalanceSpec
from orchestrator.spec.model import ModelSpec, MoESpec

VOCAB, HIDDEN, WIDTH, HEADS, EXPERTS, TOP_K, BATCH, LENGTH = 512, 256, 64, 4, 64, 8, 2, 128
BALANCE = BalanceSpec(aux_coef=0.01, aux_variant="olmoe_hf", z_coef=0.0)
NORMS = 4  # of a layer: before attention and experts, of queries and keys
KERNELS = 3  # of a fused norm: the output forward, the gradients of input and weight backward
FUSED = ("_fused_rms_norm", "_fused_rms_norm_backward")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# They reserve memory, or give it another shape without saying that it is a view.
NOTHING_WRITTEN = ("empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view")


class Writes(TorchDispatchMode):
    """Counts operations that write memory, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run one operation and count it if it writes."""
        result: object = func(*args, **(kwargs or {}))
        space, _, name = func._schema.name.partition("::")
        views = [value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns]
        tensors = any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))
        if space != "prim" and tensors and name not in NOTHING_WRITTEN and not (views and all(views)):
            self.found[name] += 1
        return result


Step = Callable[[], object]
Module = TypeVar("Module", bound=nn.Module)


def placed(made: Callable[[], Module], dtype: torch.dtype, device: str) -> Module:
    """Return a module with its parameters in a type, on a device."""
    with torch.device(device):
        module = made()
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def our_step(layers: int, dtype: torch.dtype, device: str) -> Step:
    """Return one micro-batch of our model."""
    moe = MoESpec(preset="olmoe", num_experts=EXPERTS, top_k=TOP_K, expert_width=WIDTH)
    spec = ModelSpec(
        hidden_size=HIDDEN, num_layers=layers, num_heads=HEADS, num_kv_heads=HEADS, context=LENGTH, moe=moe
    )
    model = placed(lambda: build_model(spec, VOCAB), dtype, device)
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long, device=device)

    def step() -> None:
        output = model(ids, labels=ids, shifted=True)
        (output.loss / output.tokens + balance_loss(output.routings, BALANCE)[0]).backward()

    return step


def their_step(layers: int, dtype: torch.dtype, device: str) -> Step:
    """Return one micro-batch of transformers' OLMoE with grouped products."""
    config = OlmoeConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=LENGTH,
        output_router_logits=True,
        eos_token_id=None,
    )
    model = placed(lambda: OlmoeForCausalLM(config), dtype, device)
    model.set_experts_implementation("grouped_mm")
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long, device=device)
    return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def norm_step(dtype: torch.dtype, device: str) -> Step:
    """Return one of our norms."""
    norm = placed(lambda: RMSNorm(HIDDEN, 1e-5), dtype, device)
    x = torch.zeros(BATCH, LENGTH, HIDDEN, dtype=dtype, device=device, requires_grad=True)
    gradient = torch.zeros_like(x)
    return lambda: norm(x).backward(gradient)


def kernels_on(device: str) -> frozenset[str]:
    """Return the operators for which torch declares a kernel of its own on a device (`CUDA`)."""
    declared = (files("torchgen") / "packaged/ATen/native/native_functions.yaml").read_text("utf-8")
    found = set()
    for operator in declared.split("\n- func: ")[1:]:
        dispatch = [line.split(":")[0] for line in operator.split("\n") if line.startswith("    ")]
        if any(device in keys.replace(",", " ").split() for keys in dispatch):
            found.add(operator.split("(", 1)[0])
    return frozenset(found)


def without_values(device: str) -> AbstractContextManager[object]:
    return nullcontext() if device == "cuda" else FakeTensorMode()


def counted(made: Callable[[], Step], device: str) -> Counter[str]:
    """Return what a second micro-batch writes: its gradients are added to those of the first."""
    with without_values(device):
        step = made()
        step()
        writes = Writes()
        with writes:
            step()
    return writes.found


def of_a_layer(made: Callable[[int], Step], device: str) -> Counter[str]:
    """Return what a third layer adds."""
    found = counted(lambda: made(3), device)
    found.subtract(counted(lambda: made(2), device))
    added: Counter[str] = Counter({name: number for name, number in found.items() if number})
    return added


class Counts(NamedTuple):
    """Operations by name: of our layer, of theirs, and those of one of our norms."""

    ours: Counter[str]
    theirs: Counter[str]
    norm: int

    @property
    def fused(self) -> int:
        """Return ours where torch has its fused norm."""
        return self.ours.total() - NORMS * (self.norm - KERNELS)


def measure(dtype: torch.dtype, device: str = "cpu") -> Counts:
    """Count both sides in one type."""
    know_grouped_products()
    ours = of_a_layer(lambda layers: our_step(layers, dtype, device), device)
    theirs = of_a_layer(lambda layers: their_step(layers, dtype, device), device)
    # Two gradients are added to those that are there: of the weight, which the layer adds too, and of x.
    norm = counted(lambda: norm_step(dtype, device), device)
    norm["add_"] -= 2
    return Counts(ours, theirs, KERNELS if device == "cuda" else norm.total())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--by-name", action="store_true", help="list the operations of both sides")
    args = parser.parse_args()
    declares = "declares" if kernels_on("CUDA").issuperset(FUSED) else "does NOT declare"
    print(f"torch {torch.__version__} {declares} kernels of {' and '.join(FUSED)} for CUDA")
    for name, dtype in TYPES.items():
        counts = measure(dtype, args.device)
        ours, theirs = counts.ours.total(), counts.theirs.total()
        print(
            f"{name}: transformers {theirs}; ours {counts.fused} ({counts.fused / theirs:.2f}x) with torch's fused norm"
            f" as {KERNELS} operations, {ours} ({ours / theirs:.2f}x) with its {counts.norm} operations without one"
        )
        if args.by_name:
            for side, found in (("ours", counts.ours), ("transformers", counts.theirs)):
                print(f"    {side}: " + ", ".join(f"{number} {one}" for one, number in found.most_common()))


if __name__ == "__main__":
    main()
