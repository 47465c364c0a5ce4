#!/usr/bin/env bash
# Library: torch==2.13.0
# Version: CPU
# Guess: while one thread waits for a key in a TCPStore, another thread of the process sets and gets others with the same client
# Seen: it is held up until the waiting ends, three seconds here; another client of the same server is answered at once
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'E'
import threading
import time
from datetime import timedelta

from torch.distributed import TCPStore

WAITS = 4.0
store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
other = TCPStore("127.0.0.1", store.port, None, False)


def wait():
    try:
        store.wait(["never set"], timedelta(seconds=WAITS))
    except Exception as error:  # DistStoreError
        print(f"the waiting ended with {type(error).__name__}")


def seconds_of_set(client, key):
    began = time.monotonic()
    client.set(key, "x")
    return time.monotonic() - began


waiting = threading.Thread(target=wait)
waiting.start()
time.sleep(1.0)
elsewhere = seconds_of_set(other, "of another client")
own = seconds_of_set(store, "of the same client")
waiting.join()
print(f"set beside a wait of {WAITS:.0f} s: {own:.1f} s with the same client, {elsewhere:.1f} s with another")
assert own > 2.0, "the same client no longer holds its threads up"
assert elsewhere < 1.0
E
