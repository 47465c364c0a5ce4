#!/usr/bin/env bash
# A Ray cluster of several nodes on this machine, for tests and for trying things: infra/ray/lab.sh up | down | status
#
# NODES raylets with CPUS logical cores and GPUS logical GPUs each, and a resource of their own name; state in $MOEGRID_LAB/ray. Ray listens on every
# interface, so the cluster takes nobody without its token. Point a shell at it with: . $MOEGRID_LAB/ray/env
# Stopped by its own process ids: `ray stop` would end every Ray of the machine.
set -euo pipefail
root=$(dirname "$(readlink -f "$0")")/../..
MOEGRID_LAB=${MOEGRID_LAB:-${TMPDIR:-/tmp}/moegrid-lab-$(id -u)}
LAB=$MOEGRID_LAB/ray
NODES=${NODES:-2} CPUS=${CPUS:-4} GPUS=${GPUS:-0} MEMORY_MB=${MEMORY_MB:-8000} HEAD_SECONDS=${HEAD_SECONDS:-120}
RAY=${RAY:-$root/.venv/bin/ray}
export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$LAB/token
unset RAY_AUTH_TOKEN RAY_ADDRESS

fail() { echo "error: $1" >&2; [ -z "${2:-}" ] || echo "hint: $2" >&2; exit 3; }

started() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | awk '$1 != "Z" {print $20}'; }

alive() {  # what ended before its start was noted has none, then and now
    local since; [ -s "$1" ] && since=$(started "$(cut -d' ' -f1 "$1")") && [ -n "$since" ] && [ "$since" = "$(cut -d' ' -f2 "$1")" ]
}

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

node() {  # node NAME ARGUMENTS...: a raylet (the head: also the control store) under one process that ends them all
    local name=$1; shift
    setsid "$RAY" start "$@" --block --node-ip-address=127.0.0.1 --num-cpus="$CPUS" --num-gpus="$GPUS" \
        --resources="{\"$name\": 1}" --memory=$((MEMORY_MB * 1048576)) --object-store-memory=100000000 --disable-usage-stats \
        </dev/null >"$LAB/$name.log" 2>&1 &
    echo "$! $(started $!)" >"$LAB/$name.pid"
}

listens() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

await_head() {  # await_head ADDRESS: until the control store answers; false at once when the head ends, or after HEAD_SECONDS
    local end=$((SECONDS + HEAD_SECONDS)) healthy=false
    while [ $SECONDS -lt $end ] && alive "$LAB/head.pid"; do
        # The command takes a second to start, and long to give up where nobody listens.
        if listens "${1#*:}" && timeout 20 "$RAY" health-check --address "$1" >/dev/null 2>&1; then healthy=true; break; fi
        sleep 0.2
    done
    $healthy && alive "$LAB/head.pid"
}

up() {
    [ -x "$RAY" ] || command -v "$RAY" >/dev/null || fail "ray is not installed" "make setup SITE=ray"
    local address i
    if alive "$LAB/head.pid"; then
        echo "the Ray lab is up already; nodes that are missing come back" >&2
        address=$(sed 's/.*RAY_ADDRESS=\([^ ]*\).*/\1/' "$LAB/env")
    else
        mkdir -p "$LAB"
        (umask 077; od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$LAB/token")
        address=127.0.0.1:$(free_port)
        node head --head --port="${address#*:}" --include-dashboard=false --temp-dir="$LAB/tmp"
        if ! await_head "$address"; then
            down
            fail "the head node did not come up; $LAB/head.log ends with:
$(tail -n 30 "$LAB/head.log")"
        fi
    fi
    for i in $(seq 2 "$NODES"); do alive "$LAB/node$i.pid" || node "node$i" --address="$address"; done
    printf 'export RAY_ADDRESS=%s RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=%s\n' "$address" "$RAY_AUTH_TOKEN_PATH" >"$LAB/env"
    echo "Ray lab: $NODES nodes; point a shell at it with: . $LAB/env" >&2
}

down() {
    local file pid i; for file in "$LAB"/node*.pid "$LAB/head.pid"; do
        alive "$file" || continue
        pid=$(cut -d' ' -f1 "$file"); kill "$pid"
        for i in $(seq 100); do alive "$file" || break; sleep 0.1; done
        rm -f "$file"
    done
    [ "${1:-}" != --wipe ] || rm -rf "$LAB"
}

case ${1:-} in
    up) up ;;
    down) down "${2:-}" ;;
    status) alive "$LAB/head.pid" && (. "$LAB/env"; "$RAY" status) || fail "the Ray lab is down" "$0 up" ;;
    *) echo "usage: $0 up | down [--wipe] | status" >&2; exit 2 ;;
esac
