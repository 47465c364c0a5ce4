"""How the ranks of a job are laid out: copies of the model, in each its rows, in each of those groups of experts.

`execution.parallel: {shard: S, expert: E}` over data x S ranks: rank = (copy * S/E + group) * E + place in the group.
Routed experts are dealt to the E neighbours of a group, and what each of them holds is cut into S/E pieces; all else is
cut into S pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from jobs.moe.parallel import ExpertGroup
from orchestrator.errors import MoegridError
from orchestrator.spec.cell import Parallel


@dataclass(frozen=True, slots=True)
class Mesh:
    """The meshes of a job's ranks as FSDP2 takes them: [copies,] pieces. Of `copies` of the model this is `copy`."""

    whole: DeviceMesh
    experts: DeviceMesh | None
    group: ExpertGroup | None
    copy: int
    copies: int

    @property
    def pieces(self) -> dist.ProcessGroup:
        """The ranks that hold one copy of the model together."""
        return self.whole.get_group(self.whole.ndim - 1)


def lay_out(device: str, world_size: int, parallel: Parallel) -> Mesh:
    """Return the meshes (all ranks together); MoegridError when the ranks cannot be laid out so."""
    if problem := parallel.problem(world_size):
        raise MoegridError(problem, hint="set execution.parallel or execution.resources")
    copies, shard = parallel.copies(world_size), parallel.shards(world_size)
    if copies == 1:
        whole = init_device_mesh(device, (shard,))
    else:
        whole = init_device_mesh(device, (copies, shard), mesh_dim_names=("data", "shard"))
    copy = 0 if copies == 1 else whole.get_local_rank("data")
    if parallel.expert == 1:
        return Mesh(whole, None, None, copy, copies)
    names = ("data", "shard", "expert")
    every = init_device_mesh(device, (copies, shard // parallel.expert, parallel.expert), mesh_dim_names=names)
    group = ExpertGroup(every.get_group("expert"), every.get_local_rank("expert"), parallel.expert)
    return Mesh(whole, every["shard"] if copies == 1 else every["data", "shard"], group, copy, copies)
