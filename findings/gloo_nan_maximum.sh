#!/usr/bin/env bash
# Library: torch==2.13.0
# Version: gloo backend, CPU, two ranks
# Guess: the maximum (or minimum) over ranks is NaN whenever a rank holds a NaN, as torch.maximum says
# Seen: it depends on the rank: with NaN on rank 0 both get NaN, with NaN on rank 1 both get the other number. SUM keeps it.
#   Whoever reduces a loss or gradient norm by MAX to look for NaN misses it
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >ranks.py <<'E'
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as processes


def work(rank: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    found = {}
    for name in ("MAX", "MIN", "SUM"):
        for holder in (0, 1):
            value = torch.tensor([float("nan") if rank == holder else 1.0])
            dist.all_reduce(value, getattr(dist.ReduceOp, name))
            found[name, holder] = bool(value.isnan())
    if rank == 0:
        print({f"{name}, NaN on rank {holder}": "NaN" if nan else "lost" for (name, holder), nan in found.items()})
    assert found == {(name, holder): name == "SUM" or holder == 0 for name, holder in found}
    dist.destroy_process_group()


if __name__ == "__main__":
    processes.spawn(work, (os.path.abspath("rendezvous"),), nprocs=2)
E
"$folder/venv/bin/python" ranks.py
