#!/usr/bin/env bash
# Library: obstore==0.12.1
# Version: LocalStore and MemoryStore, Linux
# Guess: deleting a key that does not exist is the same in every store
# Seen: LocalStore raises FileNotFoundError, MemoryStore (like S3) says nothing: a clean-up that runs twice passes its tests in
#   memory and fails on a disk
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check obstore==0.12.1
cd "$folder"
"$folder/venv/bin/python" - <<'E'
from pathlib import Path

import obstore
from obstore.store import LocalStore, MemoryStore

Path("store").mkdir()
obstore.delete(MemoryStore(), "nothing")
try:
    obstore.delete(LocalStore(Path("store").resolve()), "nothing")
    raise SystemExit("both stores say nothing now")
except FileNotFoundError as error:
    print("LocalStore:", str(error).splitlines()[0])
E
