#!/usr/bin/env bash
# Library: safetensors==0.8.0
# Version: as released
# Guess: an array that is not contiguous, a transpose say, is written with its values, or refused as the torch writer does
# Seen: the numpy writer takes the bytes in memory order under the shape of the view: the values come back at other places,
#   without an error
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'E'
import numpy as np
from safetensors.numpy import load, save

array = np.arange(6, dtype=np.float32).reshape(2, 3)
back = load(save({"a": array.T}))["a"]
print("written", array.T.tolist(), "read", back.tolist())
assert back.shape == (3, 2)
assert back.tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]] != array.T.tolist()
E
