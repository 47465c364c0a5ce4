#!/usr/bin/env bash
# Library: tokenizers==0.23.3
# Version: BpeTrainer
# Guess: vocab_size is the most tokens that a trained vocabulary has
# Seen: special tokens and the initial alphabet are always kept: 50 asked for, 257 given. A model with an embedding of
#   vocab_size rows is indexed out of range
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check tokenizers==0.23.3
cd "$folder"
"$folder/venv/bin/python" - <<'E'
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=50, show_progress=False, special_tokens=["<eos>"], initial_alphabet=alphabet)
tokenizer.train_from_iterator(["hello world"], trainer)
print("asked for 50 tokens, got", tokenizer.get_vocab_size())
assert tokenizer.get_vocab_size() == 257
E
