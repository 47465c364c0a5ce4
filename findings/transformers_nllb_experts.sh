#!/usr/bin/env bash
# Library: transformers==5.23.0
# Version: with torch 2.13.0, CPU
# Guess: each token of NLLB-MoE is computed by the two experts of eight that its router chooses
# Seen: the block takes the one-hot mask of first choices for ids of experts: experts 0 and 1 compute everything, weighted with
#   the second and the first choice's weights, and the others get no token and no gradient
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'E'
import torch
from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration

torch.manual_seed(0)
config = NllbMoeConfig(
    vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=32, decoder_ffn_dim=32, num_experts=8, encoder_sparse_step=1, decoder_sparse_step=1,
    expert_capacity=64, router_dtype="float32",
)
model = NllbMoeForConditionalGeneration(config).eval()
block = model.model.encoder.layers[0].ffn
x = torch.randn(2, 50, 16)
first = block.router.classifier(x).argmax(-1)
print("tokens by first choice:", torch.bincount(first.flatten(), minlength=8).tolist())
block(x).square().sum().backward()
used = [index for index in range(8) if block.experts[f"expert_{index}"].fc1.weight.grad is not None]
print("experts that computed:", used)
assert len(first.unique()) > 4
assert used == [0, 1]
E
