#!/usr/bin/env bash
# Library: transformers==5.23.0
# Version: with torch 2.13.0, CPU, attention sdpa
# Guess: the positions that DataCollatorWithFlattening restarts at each example keep the examples of its one row apart under
#   sdpa, as flash attention's do: a causal mask by blocks is made of them. A training forward pass needs no further word
# Seen: with use_cache as it comes (true, in training as well) a cache is made first, and then no block mask: a later
#   example sees those before it. With use_cache=False the logits are those of the examples alone. No warning either way
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'E2'
import torch
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)
model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes)).train()
assert model.config._attn_implementation == "sdpa"
examples = [torch.randint(0, 100, (length,)).tolist() for length in (7, 3, 12)]
row = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": ids, "labels": ids} for ids in examples])
print("given:", sorted(row), row["position_ids"].tolist())
with torch.no_grad():
    alone = torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in examples])
    for words in ({}, {"use_cache": False}):
        error = float((model(**row, **words).logits[0] - alone).abs().max())
        print(words or "as it comes", f"largest difference of logits from the examples alone: {error:.6f}")
        assert (error < 1e-4) == bool(words)
E2
