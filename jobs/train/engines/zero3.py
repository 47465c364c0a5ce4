"""DeepSpeed ZeRO 3: parameters partitioned as well; modules gather theirs while they run.

Every parameter is cut flat into equal pieces, so a piece may begin within a row. The optimizer's state is written as it
lies. Weights are written, and digested, as rows: each parameter is gathered for as long as its rows are copied.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jobs.models.roles import parameter_roles
from jobs.models.shards import Rows, digest_bytes, digest_text, elements, rows_digest
from jobs.models.weights import canonical_state, load_buffers, move_buffers, replace_parameters
from jobs.train.engines.zero import BUCKET, Piece, Settings, ZeroEngine

# Elements up to which a parameter may stay whole on every rank between steps.
PERSISTENT = 100_000


class ZeroThreeEngine(ZeroEngine):
    """Stage 3 over the empty model: a rank has memory for its pieces, and reads them alone."""

    stage = 3
    _routers: list[Any]

    def freeze(self, frozen: str) -> None:
        super().freeze(frozen)
        self._discover(True)

    def backward(self, loss: Tensor) -> None:
        # The engine's own forward pass would say that another micro-batch begins.
        self._engine.optimizer.clear_backward_seen_flag()
        # What nothing fetches: modules that return no tensor do not tell when their backward pass begins. That is the
        # model itself, which takes the head's weight, and routers, which return records.
        needed = [*getattr(self.model, "_external_params", {}).values(), *self._routers]
        if needed:
            needed[0].all_gather(needed)
        super().backward(loss)
        for parameter in needed:
            if parameter.ds_status.name == "AVAILABLE" and not parameter.ds_active_sub_modules:
                parameter.partition()

    def gradient_norm(self) -> Tensor:
        norms = torch.stack([torch.as_tensor(norm) for norm in self._engine.optimizer._get_norm_groups()])
        # -1 is its sign for not finite.
        return torch.where((norms < 0).any(), torch.full_like(norms[0], float("nan")), norms.square().sum().sqrt())

    def digest(self, names: Collection[str]) -> str:
        wanted = frozenset(names)
        digests = [rows_digest({name: piece}) for name, piece in self._rows(wanted)]
        own = torch.tensor(list(digest_bytes(sum(digests) % (1 << 256))), dtype=torch.uint8, device=self._device)
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(parts, own)
        shared = {name: Rows.whole(tensor) for name, tensor in self._buffers().items() if name in wanted}
        return digest_text([*(int.from_bytes(part.tolist(), "big") for part in parts), rows_digest(shared)])

    def weights(self) -> Iterator[tuple[str, Rows]]:
        yield from self._rows(self._parameters.keys())
        for name, tensor in self._buffers().items() if self.rank == 0 else ():
            yield name, Rows.whole(tensor, shared=True)

    def _buffers(self) -> dict[str, Tensor]:
        """Return what is saved and no parameter."""
        return {name: tensor for name, tensor in canonical_state(self.model).items() if name not in self._parameters}

    def _rows(self, names: Collection[str]) -> Iterator[tuple[str, Rows]]:
        """Yield this rank's rows of the named parameters, one gathered at a time (all ranks together)."""
        for name, parameter in self._parameters.items():
            if name not in names:
                continue
            piece = parameter.ds_tensor.detach().view(torch.uint8)
            whole = piece.new_empty(piece.numel() * self.world_size)
            dist.all_gather_into_tensor(whole, piece)
            tensor = whole.view(parameter.dtype)[: parameter.ds_numel].view(parameter.ds_shape)
            share = -(-len(tensor) // self.world_size)
            rows = tensor[self.rank * share : (self.rank + 1) * share]
            if len(rows):
                yield name, Rows(rows, self.rank * share, tuple(tensor.shape))

    def _fill(self, weights: Mapping[str, Tensor], deepspeed: ModuleType) -> None:
        make = deepspeed.zero.Init(config_dict_or_path=self._config(), dtype=self._dtype)

        def partitioned(name: str, old: nn.Parameter) -> nn.Parameter:
            parameter: Any = nn.Parameter(torch.empty_like(old, device=self._device, dtype=self._dtype))
            # `Init(module=...)` would send every rank the whole parameter, which nobody has.
            make._convert_to_deepspeed_param(parameter)
            parameter.partition()
            start, count = self._span(parameter)
            with torch.no_grad():
                parameter.ds_tensor.zero_()
                parameter.ds_tensor[:count].copy_(elements(weights, name, start, count))
            return parameter  # type: ignore[no-any-return]

        replace_parameters(self.model, partitioned)
        move_buffers(self.model, self._device)
        load_buffers(self.model, weights)
        self._routers = [parameter for _, parameter, role in parameter_roles(self.model) if role == "router"]

    def _span(self, parameter: Any) -> tuple[int, int]:
        """Return (start, count) of this rank's elements of a parameter."""
        size = parameter.partition_numel()
        return self.rank * size, max(0, min(size, parameter.ds_numel - self.rank * size))

    def _cut(self) -> Iterator[tuple[str, Piece]]:
        zero = self._engine.optimizer
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        for partition, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            offset = 0
            for parameter in group:
                start, count = self._span(parameter)
                if count:
                    yield (
                        names[id(parameter)],
                        Piece(partition, offset, partition.detach()[offset : offset + count], start),
                    )
                offset += parameter.partition_numel()

    def _partitioning(self) -> Settings:
        return {"stage3_param_persistence_threshold": PERSISTENT, "stage3_prefetch_bucket_size": 2 * BUCKET}

    def _discover(self, found: bool) -> None:
        """Let DeepSpeed gather what a module takes of another one (the head's weight), as its own forward pass does."""
        for module in self.model.modules():
            vars(module._parameters)["_in_forward"] = found
