# Shared parts of `make test-cluster`: directories, addresses, and background processes. Sourced.
set -euo pipefail
umask 077
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
HERE=$ROOT/loadtest/cluster
TARGET=$(realpath -m "${CARGO_TARGET_DIR:-$ROOT/target}")
PRODUCT=${TOWLINE:-$TARGET/release} # towline, towline-agent, towline-gateway; built unless $TOWLINE says where they are
KEPT=$TARGET/cluster                # what is fetched and built once: deb, unpacked, bin, build
RUN=$KEPT/run                       # all that one run writes; gone after it
UNPACKED=$KEPT/unpacked
PROGRAMS=(etcd kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl)

KUBERNETES=v1.34.2
ETCD=v3.6.16
# The newest kubelet for which Debian's containerd is new enough, and its client-go.
CLIENT_GO=v0.${KUBERNETES#v1.}

# In 198.18.0.0/15, which is reserved for measurements and not routed.
HOST=198.19.240.1    # the control plane and the gateway: this machine, as the node sees it
NODE=198.19.240.2
BALANCER=198.19.240.200
PODS=198.19.241.0/24
SERVICES=198.19.242.0/24
API=https://$HOST:6443
GATEWAY=$HOST:8443
SWITCH=towline-switch # a bridge: the machine keeps its address while the node is away
PLUG=towline-node

export PATH=$KEPT/bin:$UNPACKED/usr/bin:$UNPACKED/usr/sbin:$PATH
# For programs that are unpacked, not installed.
LIBRARIES=$UNPACKED/usr/lib/x86_64-linux-gnu:$UNPACKED/lib/x86_64-linux-gnu

step() { printf '\n== %s (%d s so far)\n' "$*" "$SECONDS"; }
say() { printf '   %s\n' "$*"; }
skip() {
    printf 'SKIP test-cluster: %s\n' "$*"
    exit 0
}
fail() {
    printf 'FAILED %s\n' "$*" >&2
    exit 1
}

# until_ok SECONDS COMMAND...: tries it twice a second. Its output is shown only if it never succeeds.
until_ok() {
    local seconds=$1 end said
    end=$((SECONDS + seconds))
    shift
    until said=$("$@" 2>&1); do
        [ "$SECONDS" -lt "$end" ] || fail "not within $seconds s: $*: ${said:-no output}"
        sleep 0.5
    done
}

# A process is identified by its id and its start time, because an id can be reused.
born() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }

# beside NAME COMMAND...: runs it in the background, with a log and a record of its process.
beside() {
    local name=$1
    shift
    setsid nice -n 5 "$@" >>"$RUN/$name.log" 2>&1 </dev/null 8>&- &
    echo "$! $(born $!)" >"$RUN/$name.process"
    # The shell prints no message when it is killed.
    disown
}

pid_of() {
    local pid born
    read -r pid born <"$RUN/$1.process" && [ -n "$born" ] && [ "$(born "$pid")" = "$born" ] && echo "$pid"
} 2>/dev/null

# end NAME [SIGNAL]: signals it and waits until it is gone.
end() {
    local pid
    pid=$(pid_of "$1") || return 0
    kill "-${2:-TERM}" "$pid"
    for _ in $(seq 300); do
        # A zombie is gone too.
        [ "$(sed 's/.*) //' "/proc/$pid/stat" 2>/dev/null | cut -c1)" = Z ] || [ ! -e "/proc/$pid" ] && break
        sleep 0.1
    done
    rm -f "$RUN/$1.process"
}

kubectl_direct() { kubectl --kubeconfig="$RUN/admin-direct.yaml" "$@"; }
