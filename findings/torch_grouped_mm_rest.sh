#!/usr/bin/env bash
# Library: torch==2.13.0
# Version: CPU, fp32
# Guess: rows after the last offset of F.grouped_mm belong to no group, so that their product is zero
# Seen: they are whatever lay in the memory: NaN, inf or numbers of another tensor, different from run to run. A sum over the
#   whole output, or a gradient through it, is wrong
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'E'
import torch
import torch.nn.functional as F

offsets = torch.tensor([8, 16], dtype=torch.int32)
dirty = 0
for _ in range(50):
    junk = torch.full((64, 64), 7.0)
    del junk
    product = F.grouped_mm(torch.ones(64, 16), torch.ones(2, 16, 64), offs=offsets)
    assert bool((product[:16] == 16).all())
    dirty += not bool((product[16:] == 0).all())
print(f"{dirty} of 50 products have rows after the last offset that are not zero")
assert dirty > 0
E
