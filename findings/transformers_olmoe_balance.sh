#!/usr/bin/env bash
# Library: transformers==5.23.0
# Version: with torch 2.13.0, CPU
# Guess: load_balancing_loss_func of OLMoE is 1 at perfect balance, as in the Switch Transformer paper that it cites (eq. 4-6)
# Seen: it is top_k (8 for OLMoE): the assignments of the k ranks are added, not averaged. A coefficient taken from a paper
#   weighs k times as much
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'E'
import torch
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

tokens, experts = 1600, 16
for top_k in (1, 2, 8):
    logits = torch.zeros(tokens, experts)
    for token in range(tokens):
        chosen = [(token * top_k + rank) % experts for rank in range(top_k)]
        logits[token, chosen] = 1e-4
    loss = float(load_balancing_loss_func((logits,), experts, top_k))
    print(f"top {top_k} of {experts}, even: {loss:.4f}")
    assert abs(loss - top_k) < 1e-3
E
