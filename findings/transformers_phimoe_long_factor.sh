#!/usr/bin/env bash
# Library: transformers==5.23.0
# Version: with torch 2.13.0, CPU
# Guess: in sequences beyond the original context a PhiMoE turns its positions by long_factor, as a Phi-3 does
# Seen: it asks for the frequencies without a length: short_factor counts whatever the length, long_factor is never read
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'E'
import torch
from transformers import Phi3Config, Phi3ForCausalLM, PhimoeConfig, PhimoeForCausalLM

ORIGINAL, LENGTH, PAIRS = 8, 20, 4
SIZES = dict(
    vocab_size=32, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=32, pad_token_id=None, bos_token_id=None, eos_token_id=None,
)


def logits(model, config, long, rope, **own):
    torch.manual_seed(0)
    stretched = {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": ORIGINAL,
        "short_factor": [1.0] * PAIRS, "long_factor": [long] * PAIRS, **rope,
    }
    with torch.no_grad():
        return model(config(**SIZES, rope_parameters=stretched, **own)).eval()(torch.arange(LENGTH)[None]).logits


def moved(*kind, **own):
    return float((logits(*kind, 1.0, **own) - logits(*kind, 50.0, **own)).abs().max())


phi = moved(Phi3ForCausalLM, Phi3Config, rope={}, original_max_position_embeddings=ORIGINAL)
scales = {"short_mscale": 1.2, "long_mscale": 1.2}
moe = moved(PhimoeForCausalLM, PhimoeConfig, rope=scales, num_local_experts=4)
print(f"another long_factor moves the logits of {LENGTH} tokens by {phi:.1e} (Phi-3), {moe:.1e} (PhiMoE)")
if moe:
    raise SystemExit("long_factor counts now")
assert phi > 1e-5
E
