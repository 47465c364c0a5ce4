"""Muon for the matrices of hidden layers, AdamW for all else, as one optimizer.

Keller Jordan et al. 2024; with `adjust: rms` as in Liu et al. 2025 (Moonlight), so that AdamW's learning rates and
decay serve. Each expert's matrix is orthogonalised by itself, and so are a gated form's gate and up, which lie in one
tensor. Embeddings (of positions too), the head, the router and vectors are AdamW's.

Where ranks hold rows of parameters, experts are whole on one of them; any other matrix is brought together on the rank
whose share it is, orthogonalised there, and its rows go back. Momentum stays with the rows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw as adamw_update

from jobs.moe.lowrank import MARK
from jobs.train.rows import changed_whole
from orchestrator.catalog.optimizers import Muon as Parameters
from orchestrator.spec.cell import TrainSpec

if TYPE_CHECKING:
    import torch.distributed as dist

# The quintic of Newton-Schulz whose slope at 0 is largest, as in the authors' code and in torch.optim.Muon.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPS = 1e-7
# A bias or a constant of each expert, a vector for each position of a picture, and the factors of adapters.
NO_MATRICES = ("_bias", ".constant.", ".encoder.positions", MARK)
MATRICES = ("attention", "routed_expert", "shared_expert", "other")


def orthogonal(update: Tensor, steps: int) -> Tensor:
    """Return about U V^T of each matrix U S V^T [..., A, B], in bf16: singular values end in 0.7 to 1.2."""
    a, b, c = COEFFICIENTS
    x = update.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    made: Tensor = x.mT if tall else x
    return made


def scale_of(rows: int, columns: int, adjust: str) -> float:
    """Return the factor on the learning rate for a matrix of so many rows and columns."""
    if adjust == "rms":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


class MuonWithAdamW(torch.optim.Optimizer):
    """theta <- theta - lr (scale * orthogonal(momentum) + decay theta) for matrices, AdamW's update for all else."""

    def __init__(self, groups: list[dict[str, Any]], train: TrainSpec, parameters: Parameters) -> None:
        self._train, self._parameters = train, parameters
        # How many matrices lie on each other in the rows of a tensor; what is not here is AdamW's.
        self._stacked: dict[int, int] = {}
        # How many rows a matrix has of which other ranks hold some too.
        self._cut: dict[int, int] = {}
        named = {name: tensor for group in groups for name, tensor in zip(group["names"], group["params"], strict=True)}
        for group in groups:
            whole_rows = group.get("whole_rows", [0] * len(group["names"]))
            for name, tensor, rows in zip(group["names"], group["params"], whole_rows, strict=True):
                # Beside the experts, a matrix each, what takes tokens to them and back is one matrix.
                each = group["role"] == "routed_expert" and ".latent." not in name
                matrix = tensor.ndim == (3 if each else 2)
                if group["role"] in MATRICES and matrix and not any(mark in name for mark in NO_MATRICES):
                    down = named.get(f"{name.removesuffix('up')}down") if name.endswith(".experts.up") else None
                    gated = down is not None and tensor.shape[-2] == 2 * down.shape[-1]
                    self._stacked[id(tensor)] = 2 if gated else 1
                    if rows and tensor.ndim == 2:
                        self._cut[id(tensor)] = rows
        super().__init__(groups, {"lr": train.lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            with_gradient = [tensor for tensor in group["params"] if tensor.grad is not None]
            for tensor in with_gradient:
                if id(tensor) in self._stacked and id(tensor) not in self._cut:
                    self._orthogonal_step(tensor, group["lr"], group["weight_decay"])
            if cut := [tensor for tensor in with_gradient if id(tensor) in self._cut]:
                self._orthogonal_steps_of_rows(cut, group["ranks"], group["lr"], group["weight_decay"])
            rest = [tensor for tensor in with_gradient if id(tensor) not in self._stacked]
            if rest:
                self._adamw_step(rest, group["lr"] * self._parameters.adamw_lr_ratio, group["weight_decay"])

    def _orthogonal_step(self, tensor: Tensor, lr: float, decay: float) -> None:
        *outer, rows, columns = tensor.shape
        stacked = self._stacked[id(tensor)]
        matrices = self._update(tensor).view(*outer, stacked, rows // stacked, columns)
        made = orthogonal(matrices, self._parameters.newton_schulz_steps).reshape(tensor.shape)
        self._move(tensor, made, rows // stacked, lr, decay)

    def _orthogonal_steps_of_rows(
        self, tensors: list[Tensor], ranks: dist.ProcessGroup, lr: float, decay: float
    ) -> None:
        # What is orthogonalised is rounded to bf16 first: in bf16 it may travel.
        updates = [self._update(tensor).bfloat16() for tensor in tensors]
        rows, steps = [self._cut[id(tensor)] for tensor in tensors], self._parameters.newton_schulz_steps
        made = changed_whole(updates, rows, ranks, lambda matrix: orthogonal(matrix, steps))
        for tensor, part, whole_rows in zip(tensors, made, rows, strict=True):
            self._move(tensor, part, whole_rows, lr, decay)

    def _update(self, tensor: Tensor) -> Tensor:
        """Add the gradient to the momentum, and return what is orthogonalised."""
        momentum = self._parameters.momentum
        state = self.state[tensor]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(tensor)
        buffer, gradient = state["momentum_buffer"], cast(Tensor, tensor.grad)
        buffer.lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum) if self._parameters.nesterov else buffer

    def _move(self, tensor: Tensor, made: Tensor, rows: int, lr: float, decay: float) -> None:
        """Move a tensor, or rows of one, along what was made of matrices of so many `rows`."""
        tensor.mul_(1 - lr * decay)
        tensor.add_(made.to(tensor.dtype), alpha=-lr * scale_of(rows, tensor.shape[-1], self._parameters.adjust))

    def _adamw_step(self, tensors: list[Tensor], lr: float, decay: float) -> None:
        states = []
        for tensor in tensors:
            state = self.state[tensor]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(tensor), torch.zeros_like(tensor)
            states.append(state)
        beta1, beta2 = self._train.betas
        adamw_update(
            tensors,
            [cast(Tensor, tensor.grad) for tensor in tensors],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=decay,
            eps=self._train.eps,
            maximize=False,
        )


def muon(groups: list[dict[str, Any]], train: TrainSpec, parameters: Parameters) -> torch.optim.Optimizer:
    """Return Muon over the matrices of `groups` and AdamW over the rest."""
    return MuonWithAdamW(groups, train, parameters)
