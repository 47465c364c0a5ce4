#!/usr/bin/env bash
# Library: tokenizers==0.23.3
# Version: byte-level BPE, trained
# Guess: a byte-level tokenizer can encode any text: its alphabet are the 256 bytes
# Seen: a trainer without initial_alphabet knows the bytes of its training text alone; all others are dropped in encoding,
#   without an unknown token and without an error. With initial_alphabet=ByteLevel.alphabet() the text comes back whole
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check tokenizers==0.23.3
cd "$folder"
"$folder/venv/bin/python" - <<'E'
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def back(alphabet, text):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["hello world"] * 3, trainer)
    return tokenizer.decode(tokenizer.encode(text).ids)


text = "hello, Zürich (1848)"
print(repr(back([], text)), repr(back(pre_tokenizers.ByteLevel.alphabet(), text)))
assert back(pre_tokenizers.ByteLevel.alphabet(), text) == text
assert len(back([], text)) < len(text) - 5
E
