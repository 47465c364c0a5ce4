#!/usr/bin/env bash
# Library: torch==2.13.0
# Version: CPU wheel
# Guess: with set_gradient_divide_factor(2) FSDP2 halves the gradient; set_force_sum_reduction_for_comms(True) changes the
#   collective's operation and no value
# Seen: over a mesh of one rank (experts of as many ranks as there are) the gradient is divided twice: a quarter is left
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'E'
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
mesh, seen = init_device_mesh("cpu", (1,)), {}
for forced in (False, True):
    module = fully_shard(torch.nn.Linear(1, 1, bias=False), mesh=mesh)
    module.set_gradient_divide_factor(2.0)
    module.set_force_sum_reduction_for_comms(forced)
    module(torch.ones(1, 1)).sum().backward()
    seen[forced] = module.weight.grad.to_local().item()
print(seen)
assert seen == {False: 0.5, True: 0.25}
E
