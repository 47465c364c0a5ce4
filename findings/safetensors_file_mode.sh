#!/usr/bin/env bash
# Library: safetensors==0.8.0
# Version 0.8.0 writes a temporary file and renames it.
# Guess: save_file leaves a file that others may read as the umask says (0644 under 022), like open() does.
# Seen: the file has mode 0600 whatever the umask, beside 0644 files of the same program; a shared folder of exported
# weights cannot be read by its group. It also replaces a file that had another mode before.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q safetensors==0.8.0 numpy==2.2.6
cd "$work"
umask 022
venv/bin/python - <<'PY'
import os, stat
import numpy
from safetensors.numpy import save_file

open("plain", "w").close()
open("weights.safetensors", "w").close()
save_file({"w": numpy.zeros(3, numpy.float32)}, "weights.safetensors")
modes = {name: stat.filemode(os.stat(name).st_mode) for name in ("plain", "weights.safetensors")}
print(modes)
assert modes == {"plain": "-rw-r--r--", "weights.safetensors": "-rw-------"}, "the behaviour changed"
PY
