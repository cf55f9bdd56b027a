# A Kubernetes cluster of one node on this machine without Docker: control plane here, node in namespaces of its own. Sourced.
#
#   missing     prints what this machine lacks, one item per line
#   fetch       gets packages (unpacked, not installed) and Kubernetes' programs (from the Go module proxy), once
#   up          starts control plane and node, and waits until the node is Ready
#   image       builds an image from a directory and loads it into the node
#   power_off   kills the node as a power failure does; its disk stays
#   power_on    starts it again
#   down        removes everything: processes, links, cgroups, files
# shellcheck source=loadtest/cluster/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

missing() {
    local program kind lacks=
    [ "$(uname -sm)" = "Linux x86_64" ] || { echo "Linux on x86_64" && return; }
    [ "$(id -u)" = 0 ] || { echo "root" && return; }
    for program in ip unshare nsenter setsid flock openssl tar sha256sum cc strip go curl python3; do
        command -v $program >/dev/null || lacks+="$program on PATH"$'\n'
    done
    if ! all_unpacked; then
        for program in apt-get dpkg dpkg-deb; do command -v $program >/dev/null || lacks+="$program on PATH"$'\n'; done
    fi
    [ -z "$lacks" ] || { printf %s "$lacks" && return; }
    [ "$(stat -f -c %T /sys/fs/cgroup)" != cgroup2fs ] || echo "cgroups of version 1, for which its node is made"
    grep -qw overlay /proc/filesystems || modprobe -q overlay || echo "overlayfs in the kernel"
    mkdir -p "$KEPT"
    [ "$(stat -f -c %T "$KEPT")" != overlayfs ] || echo "a CARGO_TARGET_DIR that does not lie on overlayfs itself"
    for kind in bridge veth; do
        if ip link add towline-probe type $kind 2>/dev/null; then
            ip link delete towline-probe
        else
            echo "links of kind $kind in the kernel"
        fi
    done
    if ip -4 -o address show to 198.19.240.0/22 | grep -qv " $SWITCH "; then
        echo "the addresses 198.19.240.0/22, which something here has"
    fi
}

PACKAGES=(containerd runc libseccomp2 containernetworking-plugins nftables libnftables1 libnftnl11 libmnl0 libjansson4 busybox-static
    libc6 libgcc-s1 ca-certificates)
# They are for images; programs on this machine use its own libc.
FOR_IMAGES=" libc6 libgcc-s1 ca-certificates "

all_unpacked() { [ -e "$UNPACKED/all" ]; }

fetch() {
    mkdir -p "$KEPT"/{deb,bin,build} "$UNPACKED"
    fetch_packages
    fetch_programs
}

fetch_packages() {
    local package
    if all_unpacked; then return; fi
    (
        cd "$KEPT/deb"
        rm -f ./*.deb
        apt-get -q download "${PACKAGES[@]}" || { apt-get -q update && apt-get -q download "${PACKAGES[@]}"; }
    ) >"$KEPT/apt.log" 2>&1 || skip "the packages ${PACKAGES[*]} could not be fetched: see $KEPT/apt.log"
    for package in "${PACKAGES[@]}"; do
        [[ $FOR_IMAGES = *" $package "* ]] || dpkg -x "$KEPT/deb/$package"_*.deb "$UNPACKED"
    done
    touch "$UNPACKED/all"
}

# go_program NAME [REQUIRE...]: builds the main.go in its directory, with these modules.
go_program() {
    local name=$1 place=$KEPT/build/$1
    shift
    printf 'module scratch\ngo 1.25\n' >"$place/go.mod"
    printf 'require %s\n' "$@" >>"$place/go.mod"
    (cd "$place" && go mod tidy) >"$KEPT/build/$name.log" 2>&1 ||
        skip "the Go modules of $name could not be fetched: see $KEPT/build/$name.log"
    (cd "$place" && nice -n 10 go build -trimpath -ldflags '-s -w' -o "$KEPT/bin/$name" .) >"$KEPT/build/$name.log" 2>&1 ||
        fail "$name was not built: see $KEPT/build/$name.log"
}

fetch_programs() {
    local program flags='-s -w' package minor tree=$KEPT/build/kubernetes-$KUBERNETES
    export GOFLAGS=-mod=mod CGO_ENABLED=0
    # Another release of Kubernetes is built again.
    if [ "$(cat "$KEPT/bin/versions" 2>/dev/null)" != "$KUBERNETES $ETCD" ]; then
        rm -f "${PROGRAMS[@]/#/$KEPT/bin/}"
        echo "$KUBERNETES $ETCD" >"$KEPT/bin/versions"
    fi
    mkdir -p "$KEPT/build/client"
    if ! cmp -s "$HERE/client.go" "$KEPT/build/client/main.go" || [ ! -x "$KEPT/bin/client" ]; then
        cp "$HERE/client.go" "$KEPT/build/client/main.go"
        go_program client "k8s.io/client-go $CLIENT_GO" "k8s.io/apimachinery $CLIENT_GO"
    fi
    if [ ! -x "$KEPT/bin/etcd" ]; then
        say "building etcd"
        mkdir -p "$KEPT/build/etcd"
        cat >"$KEPT/build/etcd/main.go" <<-GO
		package main

		import (
		    "os"

		    "go.etcd.io/etcd/server/v3/etcdmain"
		)

		func main() { etcdmain.Main(os.Args) }
		GO
        go_program etcd "go.etcd.io/etcd/server/v3 $ETCD"
    fi
    minor=$(cut -d. -f2 <<<"$KUBERNETES")
    for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
        flags+=" -X $package.gitVersion=$KUBERNETES -X $package.gitMajor=1 -X $package.gitMinor=$minor"
        flags+=" -X $package.gitTreeState=clean -X $package.buildDate=2026-01-01T00:00:00Z"
    done
    for program in "${PROGRAMS[@]}"; do
        [ -x "$KEPT/bin/$program" ] && continue
        [ -d "$tree" ] || kubernetes_tree "$tree"
        say "building $program"
        (cd "$tree" && nice -n 10 go build -trimpath -ldflags "$flags" -o "$KEPT/bin/$program" "./cmd/$program") \
            >"$KEPT/build/$program.log" 2>&1 || fail "$program was not built: see $KEPT/build/$program.log"
    done
}

# The published module builds if the modules below staging/ are replaced by the separately published ones.
kubernetes_tree() {
    local module
    module=$(cd "$KEPT/build" && go mod download -json "k8s.io/kubernetes@$KUBERNETES" | sed -n 's/.*"Dir": "\(.*\)".*/\1/p') || true
    [ -d "$module" ] || skip "the Go module k8s.io/kubernetes@$KUBERNETES could not be fetched"
    rm -rf "$1.new"
    cp -r "$module" "$1.new"
    chmod -R u+w "$1.new"
    rm -rf "$1.new"/{go.work,go.work.sum,vendor,staging}
    sed -i -E "s#=> \./staging/src/(\S+)#=> \1 $CLIENT_GO#" "$1.new/go.mod"
    mv "$1.new" "$1"
}

authority() { # NAME
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj "/CN=cluster-$1" \
        -keyout "$1.key" -out "$1.crt" 2>/dev/null
}

certificate() { # CA NAME SUBJECT [ALTERNATIVE-NAMES]
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "$3" -keyout "$2.key" -out "$2.csr" 2>/dev/null
    {
        echo "extendedKeyUsage=serverAuth,clientAuth"
        [ -z "${4:-}" ] || echo "subjectAltName=$4"
    } >"$2.ext"
    openssl x509 -req -in "$2.csr" -CA "$1.crt" -CAkey "$1.key" -CAcreateserial -days 2 -extfile "$2.ext" -out "$2.crt" 2>/dev/null
}

kubeconfig() { # NAME SUBJECT
    certificate ca "$1" "$2"
    cat >"$1.yaml" <<-YAML
	apiVersion: v1
	kind: Config
	current-context: cluster
	contexts: [{name: cluster, context: {cluster: cluster, user: user}}]
	clusters: [{name: cluster, cluster: {server: '$API', certificate-authority: $RUN/ca.crt}}]
	users: [{name: user, user: {client-certificate: $RUN/$1.crt, client-key: $RUN/$1.key}}]
	YAML
}

identities() {
    local program
    authority ca
    authority front
    certificate ca api /CN=kube-apiserver \
        "DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,IP:$HOST,IP:${SERVICES%.0/*}.1"
    certificate ca kubelet-client /O=system:masters/CN=kubelet-client
    certificate ca kubelet-server /O=system:nodes/CN=system:node:onenode "DNS:onenode,IP:$NODE"
    certificate front front-client /CN=front-proxy-client
    kubeconfig admin-direct /O=system:masters/CN=kubernetes-admin
    kubeconfig kubelet /O=system:nodes/CN=system:node:onenode
    for program in controller-manager scheduler proxy; do kubeconfig "kube-$program" "/CN=system:kube-$program"; done
    # RSA, as kubeadm creates it.
    openssl genrsa -out sa.key 2048 2>/dev/null
    openssl rsa -in sa.key -pubout -out sa.pub 2>/dev/null
}

up() {
    rm -rf "$RUN"
    mkdir -p "$RUN"
    cd "$RUN"
    identities
    ip link add $SWITCH type bridge
    ip address add $HOST/24 dev $SWITCH
    ip link set $SWITCH up
    # Pods reach the control plane under their node's address; this machine reaches them under their own.
    ip route add "$PODS" via $NODE
    ip route add $BALANCER via $NODE
    control_plane
    power_on
    until_ok 120 kubectl_direct wait --for=condition=Ready node/onenode --timeout=1s
}

control_plane() {
    local etcd=http://$HOST
    beside etcd etcd --data-dir=etcd --unsafe-no-fsync --listen-client-urls=$etcd:2379 --advertise-client-urls=$etcd:2379 \
        --listen-peer-urls=$etcd:2380 --initial-advertise-peer-urls=$etcd:2380 --initial-cluster=default=$etcd:2380
    # One log line for each request, and one more for each watch, without contents.
    cat >audit.yaml <<-YAML
	apiVersion: audit.k8s.io/v1
	kind: Policy
	omitStages: [RequestReceived]
	rules: [{level: Metadata}]
	YAML
    local flags=(
        --etcd-servers=$etcd:2379
        --bind-address=$HOST --advertise-address=$HOST --secure-port=6443
        --tls-cert-file=api.crt --tls-private-key-file=api.key --client-ca-file=ca.crt
        --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --allow-privileged=true
        --service-cluster-ip-range=$SERVICES
        --service-account-issuer=https://kubernetes.default.svc.cluster.local
        --service-account-key-file=sa.pub --service-account-signing-key-file=sa.key
        --kubelet-client-certificate=kubelet-client.crt --kubelet-client-key=kubelet-client.key
        --kubelet-certificate-authority=ca.crt --kubelet-preferred-address-types=InternalIP
        --requestheader-client-ca-file=front.crt --requestheader-allowed-names=front-proxy-client
        --requestheader-extra-headers-prefix=X-Remote-Extra- --requestheader-group-headers=X-Remote-Group
        --requestheader-username-headers=X-Remote-User
        --proxy-client-cert-file=front-client.crt --proxy-client-key-file=front-client.key
        --audit-log-path=audit.log --audit-policy-file=audit.yaml
    )
    beside kube-apiserver kube-apiserver "${flags[@]}"
    until_ok 120 kubectl_direct get --raw /readyz
    beside kube-controller-manager kube-controller-manager --kubeconfig=kube-controller-manager.yaml --bind-address=$HOST \
        --use-service-account-credentials --service-account-private-key-file=sa.key --root-ca-file=ca.crt --leader-elect=false
    beside kube-scheduler kube-scheduler --kubeconfig=kube-scheduler.yaml --bind-address=$HOST --leader-elect=false
    kubectl_direct create clusterrolebinding kube-proxy --clusterrole=system:node-proxier --user=system:kube-proxy >/dev/null
}

power_on() {
    rm -f "$RUN/node.entered"
    beside node unshare --mount --net --pid --uts --ipc --cgroup --fork --kill-child --mount-proc "$HERE/node"
    until_ok 20 test -e "$RUN/node.entered"
    ip link add $PLUG type veth peer name eth0 netns "$(first_process)"
    ip link set $PLUG master $SWITCH up
}

# Process ids of the node, as this machine sees them.
first_process() {
    local pid
    pid=$(pid_of node) && cat "/proc/$pid/task/$pid/children" | tr -d ' '
}

in_node() { nsenter --target "$(first_process)" --mount --pid --net --uts --ipc --cgroup env LD_LIBRARY_PATH="$LIBRARIES" "$@"; }

power_off() {
    local controllers place
    end node KILL
    ip link delete $PLUG 2>/dev/null || true
    while IFS=: read -r _ controllers place; do
        place=/sys/fs/cgroup/${controllers#name=}${place%/}/kubepods
        [ ! -d "$place" ] || until_ok 20 remove_cgroups "$place"
    done </proc/self/cgroup
}

# A cgroup can be removed when its last process is gone, shortly after the kill.
remove_cgroups() {
    find "$1" -depth -type d -exec rmdir {} + || true
    [ ! -d "$1" ]
}

# image NAME USER ENTRYPOINT: builds it from the directory $RUN/image, in the format of `docker save`.
image() {
    local layer archive=$RUN/archive
    rm -rf "$archive"
    mkdir -p "$archive"
    tar --owner=0 --group=0 --numeric-owner -C "$RUN/image" -cf "$archive/layer.tar" .
    layer=$(sha256sum <"$archive/layer.tar" | cut -d' ' -f1)
    cat >"$archive/config.json" <<-JSON
	{"architecture": "amd64", "os": "linux",
	    "config": {"User": "$2", "Entrypoint": $3, "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]},
	    "rootfs": {"type": "layers", "diff_ids": ["sha256:$layer"]}}
	JSON
    echo '[{"Config": "config.json", "RepoTags": ["'"$1"'"], "Layers": ["layer.tar"]}]' >"$archive/manifest.json"
    tar -C "$archive" -cf "$RUN/image.tar" manifest.json config.json layer.tar
    in_node ctr --namespace k8s.io images import "$RUN/image.tar" >/dev/null || fail "the node rejected the image $1"
    rm -rf "$archive" "$RUN/image" "$RUN/image.tar"
}

down() {
    local name record
    cd "$ROOT"
    [ -d "$RUN" ] || return 0
    # The others first, because they would log errors about the API server. No state is kept, so none of them has to finish.
    for record in "$RUN"/*.process; do
        name=$(basename "$record" .process)
        case $name in
        etcd | kube-apiserver | node | containerd | kubelet | kube-proxy | '*') ;;
        *) end "$name" KILL ;;
        esac
    done
    power_off
    end kube-apiserver KILL
    end etcd KILL
    # Its routes are removed with it.
    ip link delete $SWITCH 2>/dev/null || true
    rm -rf "$RUN"
}
