#!/usr/bin/env bash
# Library: transformers==5.23.0
# Version: with torch 2.13.0, CPU
# Guess: a Doge model with its option norm_topk_prob=True can be trained
# Seen: the router divides the softmax's output in place, and the backward pass refuses: the option works in evaluation alone
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'E'
import torch
from transformers import DogeConfig, DogeForCausalLM

torch.manual_seed(0)
config = DogeConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, is_moe=True, num_experts=16, num_experts_per_tok=4, norm_topk_prob=True,
    attn_implementation="eager",
)
model, ids = DogeForCausalLM(config), torch.randint(0, 64, (1, 12))
try:
    model(ids, labels=ids).loss.backward()
except RuntimeError as error:
    print(str(error).split(":")[0])
    assert "modified by an inplace operation" in str(error)
else:
    raise SystemExit("it trains now")
E
