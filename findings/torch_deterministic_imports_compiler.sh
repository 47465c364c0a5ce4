#!/usr/bin/env bash
# Library: torch==2.13.0
# Version: CPU, nothing compiled
# Guess: torch.use_deterministic_algorithms(True) sets a flag, and so does torch.set_deterministic_debug_mode("error"), which is
#   documented as the same
# Seen: the former imports torch's compiler (torch._inductor, torch._dynamo, sympy, torch.distributed.tensor: 800 modules, about
#   as much CPU as `import torch` itself), to tell it the flag; so does the first parameter group or step of an optimizer, and
#   the first draw into a tensor on the meta device
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'E'
import subprocess
import sys

CASES = {
    "a flag": "torch.use_deterministic_algorithms(True)",
    "the same flag": "torch.set_deterministic_debug_mode('error')",
    "an optimizer": "torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])",
    "a draw": "torch.empty(4, device='meta').normal_()",
}
found = {}
for name, code in CASES.items():
    whole = f"import sys, time, torch; began = time.process_time(); {code}; print('torch._dynamo' in sys.modules, time.process_time() - began)"
    loaded, seconds = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, check=True).stdout.split()
    found[name] = loaded == "True"
    print(f"{name:14s} {float(seconds):.2f} CPU s, torch._dynamo {'imported' if found[name] else 'not imported'}")
assert found == {"a flag": True, "the same flag": False, "an optimizer": True, "a draw": True}
E
