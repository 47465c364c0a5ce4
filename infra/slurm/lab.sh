#!/usr/bin/env bash
# A private SLURM cluster on this machine, for tests and for trying things: infra/slurm/lab.sh up | down [--wipe] | status
#
# munged, mariadbd, slurmdbd, slurmctld and NODES slurmds of GPUS fake GPUs each, in about ten seconds. Everything listens
# on loopback only: the daemons live in their own UTS namespace whose host name is localhost. State is kept in
# $MOEGRID_LAB/slurm. Needs root (device nodes, namespaces) and the packages of infra/slurm/install.sh.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
. "$here/env.sh"
NODES=${NODES:-4} GPUS=${GPUS:-4} CPUS=${CPUS:-16}
# The nodes share this machine's memory: what SLURM hands out must be there. The smallest job asks for 2 GiB.
total_mb=$(awk '/^MemTotal:/ {print int($2 / 1024)}' /proc/meminfo)
MEMORY_MB=${MEMORY_MB:-$((total_mb / NODES > 4200 ? total_mb / NODES : 4200))}
LAB=$SLURM_LAB
export MOEGRID_SLURM_LAB=$LAB  # marks every process of this lab in /proc/PID/environ

fail() { echo "error: $1" >&2; [ -z "${2:-}" ] || echo "hint: $2" >&2; exit 3; }

await() {  # await SECONDS WHAT COMMAND...: until the command succeeds
    local end=$((SECONDS + $1)) what=$2; shift 2
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt "$end" ] || fail "$what did not come up" "see the logs in $LAB/log"
        sleep 0.05
    done
}

ours() { { tr '\0' '\n' <"/proc/$1/environ"; } 2>/dev/null | grep -qxF "MOEGRID_SLURM_LAB=$LAB"; }

running() { [ -s "$1" ] && ours "$(cat "$1")"; }

daemon() { unshare --uts -- sh -c 'hostname localhost && exec "$@"' daemon "$@" </dev/null >>"$LAB/log/start.log" 2>&1; }

free_ports() {  # the first base port from which eight ports and one for each node are free
    python3 - "$NODES" <<'P'
import socket, sys

def free(port):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True

count = 8 + int(sys.argv[1])
print(next(base for base in range(17000, 20000 - count, 40) if all(free(base + i) for i in range(count))))
P
}

munge_up() {
    mkdir -p "$LAB/munge"
    [ -s "$LAB/munge/munge.key" ] || dd if=/dev/urandom of="$LAB/munge/munge.key" bs=1024 count=1 status=none
    chown -R munge:munge "$LAB/munge"; chmod 755 "$LAB/munge"; chmod 400 "$LAB/munge/munge.key"
    runuser -u munge -- munged --force --key-file "$LAB/munge/munge.key" --socket "$LAB/munge/munge.socket" \
        --pid-file "$LAB/munge/munged.pid" --log-file "$LAB/log/munged.log" --seed-file "$LAB/munge/munged.seed" --num-threads 2
}

database_up() {
    local socket=$LAB/database/socket
    mkdir -p "$LAB/database"; chown mysql:mysql "$LAB/database"
    # Its own user may not write to a caller's TMPDIR.
    local -x TMPDIR=$LAB/database
    [ -d "$LAB/database/data/mysql" ] || mariadb-install-db --no-defaults --user=mysql --datadir="$LAB/database/data" \
        --skip-test-db --auth-root-authentication-method=socket >"$LAB/log/database-install.log" 2>&1
    setsid mariadbd --no-defaults --user=mysql --datadir="$LAB/database/data" --socket="$socket" --port="$1" \
        --bind-address=127.0.0.1 --pid-file="$LAB/database/mariadbd.pid" --innodb-buffer-pool-size=64M \
        --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0 --skip-log-bin --skip-name-resolve \
        </dev/null >"$LAB/log/mariadbd.log" 2>&1 &
    await 20 mariadbd mariadb-admin --no-defaults -S "$socket" ping
    mariadb --no-defaults -S "$socket" <<SQL
create database if not exists slurm_acct_db;
create user if not exists slurm@'127.0.0.1';
alter user slurm@'127.0.0.1' identified by '$2';
grant all on slurm_acct_db.* to slurm@'127.0.0.1';
SQL
}

configure() {
    local base=$1 password=$2 nodes="" i
    : >"$LAB/gres.conf"
    for i in $(seq "$NODES"); do
        nodes+="NodeName=n$i NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((base + 7 + i)) CPUs=$CPUS Boards=1 SocketsPerBoard=1 "
        nodes+="CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=$MEMORY_MB Gres=gpu:fake:$GPUS State=UNKNOWN"$'\n'
        echo "NodeName=n$i Name=gpu Type=fake File=$LAB/dev/gpu[0-$((GPUS - 1))]" >>"$LAB/gres.conf"
    done
    mkdir -p "$LAB/dev"
    for i in $(seq 0 $((GPUS - 1))); do [ -e "$LAB/dev/gpu$i" ] || mknod "$LAB/dev/gpu$i" c 1 3; done
    echo "CgroupAutomount=no" >"$LAB/cgroup.conf"
    fill() {
        local text; text=$(<"$here/$1.in")
        text=${text//@LAB@/$LAB}; text=${text//@NODES@/$nodes}; text=${text//@PASSWORD@/$password}
        text=${text//@CONTROLLER_PORT@/$((base + 1))}; text=${text//@ACCOUNTING_PORT@/$((base + 2))}
        text=${text//@DATABASE_PORT@/$((base + 3))}
        (umask 077; printf '%s\n' "$text" >"$LAB/$1")
    }
    fill slurm.conf; fill slurmdbd.conf; chmod 644 "$LAB/slurm.conf"
}

accounts() {  # QOS high preempts QOS low; no grace time: preempted jobs would end as TIMEOUT instead of being requeued
    sacctmgr -i -Q add cluster lab || true
    sacctmgr -i -Q add account lab Description=lab Organization=lab || true
    sacctmgr -i -Q add user root Account=lab DefaultAccount=lab || true
    sacctmgr -i -Q add qos low Priority=0 || true
    sacctmgr -i -Q add qos high Priority=1000 Preempt=low PreemptMode=requeue || true
    sacctmgr -i -Q modify qos low set GraceTime=0 || true
    sacctmgr -i -Q modify user root set qos+=low,high,normal || true
}

up() {
    [ "$(id -u)" = 0 ] || fail "the SLURM lab needs root" "run as root, in a container for example"
    local tool; for tool in slurmctld slurmd slurmdbd sbatch munged mariadbd unshare; do
        command -v "$tool" >/dev/null || fail "$tool is not installed" "$here/install.sh"
    done
    if running "$LAB/slurmctld.pid"; then echo "the SLURM lab is up already: . $here/env.sh" >&2; return; fi
    down
    mkdir -p "$LAB"/{log,controller,spool}; chmod 755 "$MOEGRID_LAB" "$LAB"; chmod 1777 "$LAB/log"
    if [ "$(cat "$LAB/shape" 2>/dev/null)" != "$NODES $GPUS $CPUS $MEMORY_MB" ]; then rm -rf "$LAB"/{controller,spool}/*; fi
    echo "$NODES $GPUS $CPUS $MEMORY_MB" >"$LAB/shape"
    local base password; base=$(free_ports); password=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
    munge_up
    configure "$base" "$password"
    database_up $((base + 3)) "$password"
    await 5 munged munge -S "$LAB/munge/munge.socket" -n
    daemon slurmdbd
    await 20 slurmdbd timeout 5 sacctmgr -n list cluster
    accounts >>"$LAB/log/start.log" 2>&1
    daemon slurmctld -i -f "$SLURM_CONF"
    await 20 slurmctld sh -c 'timeout 5 scontrol ping | grep -q "is UP"'
    local i; for i in $(seq "$NODES"); do daemon slurmd -f "$SLURM_CONF" -N "n$i"; done
    await 20 "the nodes" sh -c "test \"\$(timeout 5 sinfo -h -N -t idle -o %N | wc -l)\" = $NODES"
    echo "SLURM lab: $NODES nodes with $GPUS fake GPUs each; point a shell at it with: . $here/env.sh" >&2
}

stop() {  # stop PIDFILE...: only a process of this lab is signalled
    local file pid i; for file in "$@"; do
        running "$file" || continue
        pid=$(cat "$file"); kill "$pid" 2>/dev/null || continue
        for i in $(seq 100); do ours "$pid" || break; sleep 0.05; done
    done
}

down() {
    [ -d "$LAB" ] || return 0
    if running "$LAB/slurmctld.pid"; then timeout 10 scancel -f --user=root >/dev/null 2>&1 || true; fi
    stop "$LAB"/slurmd.*.pid "$LAB/slurmctld.pid" "$LAB/slurmdbd.pid" "$LAB/database/mariadbd.pid" "$LAB/munge/munged.pid"
    # What is left: a daemon that did not listen, or the step of a slurmd that was killed.
    local round pid left; for round in TERM KILL; do
        left=""
        for pid in /proc/[0-9]*; do pid=${pid#/proc/}; if [ "$pid" != $$ ] && [ "$pid" != "$PPID" ] && left_over "$pid"; then left+=" $pid"; fi; done
        [ -n "$left" ] || break
        # shellcheck disable=SC2086
        kill -s "$round" $left 2>/dev/null || true; sleep 0.3
    done
    [ "${1:-}" != --wipe ] || rm -rf "$LAB"
}

left_over() { case $(cat "/proc/$1/comm" 2>/dev/null) in slurm*|munged|mariadbd) ours "$1" ;; *) false ;; esac; }

case ${1:-} in
    up) up ;;
    down) down "${2:-}" ;;
    status) running "$LAB/slurmctld.pid" && timeout 5 sinfo || fail "the SLURM lab is down" "$0 up" ;;
    *) echo "usage: $0 up | down [--wipe] | status" >&2; exit 2 ;;
esac
