# Towline in the cluster: its images, a gateway on this machine, agents from their printed manifests, and clients. Sourced.
# shellcheck source=loadtest/cluster/cluster.sh
. "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

# The image with one static program of the cluster's own, and the two that deploy/Dockerfile describes.
images() {
    local name
    fresh_image
    cc -O2 -static -x c -o "$RUN/image/pause" - <<-'C'
	#include <signal.h>
	#include <sys/wait.h>
	#include <unistd.h>
	static void end(int signal) { (void)signal; _exit(0); }
	static void reap(int signal) { (void)signal; while (waitpid(-1, 0, WNOHANG) > 0) { } }
	int main(void) {
	    signal(SIGTERM, end);
	    signal(SIGINT, end);
	    signal(SIGCHLD, reap);
	    for (;;) pause();
	}
	C
    image cluster.local/pause:1 65535:65535 '["/pause"]'

    fresh_image bin etc root
    cp "$UNPACKED/bin/busybox" "$RUN/image/bin/"
    for name in $("$UNPACKED/bin/busybox" --list); do
        [ "$name" = busybox ] || ln -s busybox "$RUN/image/bin/$name"
    done
    echo 'root:x:0:0:root:/root:/bin/sh' >"$RUN/image/etc/passwd"
    image docker.io/library/busybox:1 0:0 '[]'

    for name in agent gateway; do towline_image $name; done
}

fresh_image() { # [DIRECTORY...]
    rm -rf "$RUN/image"
    mkdir -p "$RUN/image/tmp" "${@/#/$RUN/image/}"
    chmod -R go+rX "$RUN/image"
    chmod 1777 "$RUN/image/tmp"
}

# The images of deploy/Dockerfile without Debian's unused programs: the program and its libraries, the trust store, the user. User and
# command are read from that file.
towline_image() { # agent|gateway
    local name=$1 directory=$RUN/image file=$ROOT/deploy/Dockerfile package user command tag
    fresh_image usr/{lib,lib64,bin,local/bin} etc/ssl/certs
    ln -s usr/lib usr/lib64 usr/bin "$directory/"
    for package in libc6 libgcc-s1 ca-certificates; do
        dpkg-deb --fsys-tarfile "$KEPT/deb/${package}"_*.deb | tar -C "$directory" --keep-directory-symlink -xf -
    done
    cat "$directory"/usr/share/ca-certificates/mozilla/*.crt >"$directory/etc/ssl/certs/ca-certificates.crt"
    cp "$PRODUCT/towline-$name" "$directory/usr/local/bin/"
    strip "$directory/usr/local/bin/towline-$name"
    chmod -R go+rX "$directory"
    user=$(sed -n 's/^USER //p' "$file")
    command=$(sed -n "/^FROM .* AS $name\$/,\$ s/^ENTRYPOINT //p" "$file" | head -n 1)
    tag=$(sed -n "s/.*-t \(towline-$name:[^ ]*\).*/\1/p" "$file")
    [ -n "$user" ] && [ -n "$command" ] && [ -n "$tag" ] || fail "deploy/Dockerfile does not say what $name needs"
    image "docker.io/library/$tag" "$user" "$command"
}

gateway() {
    cat >"$RUN/gateway.yaml" <<-YAML
	apiVersion: towline.io/v1alpha1
	kind: GatewayConfiguration
	stateDirectory: $RUN/gateway
	publicAddresses: ['$GATEWAY']
	trustDomain: towline.local
	listen: { address: '$GATEWAY' }
	admin: { address: '$HOST:9180' }
	access: [{ effect: Allow, groups: ['towline:admins'], clusters: ['*'] }]
	YAML
    mkdir -p "$RUN/gateway"
    "$PRODUCT/towline-gateway" --config "$RUN/gateway.yaml" --check >"$RUN/gateway.check"
    gateway_starts
    until_ok 20 "$PRODUCT/towline-gateway" --config "$RUN/gateway.yaml" admin-kubeconfig --output "$RUN/admin.yaml"
}

gateway_starts() {
    beside gateway "$PRODUCT/towline-gateway" --config "$RUN/gateway.yaml"
    until_ok 20 curl -sf "http://$HOST:9180/readyz"
}

towline() { TOWLINE_KUBECONFIG=$RUN/admin.yaml "$PRODUCT/towline" "$@"; }

# join NAME [ARGUMENT...]: applies the printed manifest, in a namespace of this name.
join() {
    local name=$1
    shift
    towline agent manifest "$name" --register --namespace "$name" "$@" >"$RUN/$name.manifest.yaml" 2>"$RUN/$name.log"
    kubectl_direct apply -f "$RUN/$name.manifest.yaml" >/dev/null
}

agents_ready() { # CLUSTER REPLICAS
    local ready
    ready=$(kubectl_direct -n "$1" get pods -o 'jsonpath={range .items[*]}{.status.containerStatuses[0].ready} {end}')
    [ "$(wc -w <<<"$ready")" = "$2" ] && [[ $ready != *false* ]] || { echo "ready: $ready" && return 1; }
}

connected() { # CLUSTER SESSIONS
    local sessions
    sessions=$(towline cluster get "$1" -o json | json_of status.sessions)
    [ "$sessions" = "$2" ] || { echo "sessions: $sessions" && return 1; }
}

json_of() { # PATH.OF.KEYS
    python3 -c 'import functools, json, sys
print(functools.reduce(lambda value, key: value[key], sys.argv[1].split("."), json.load(sys.stdin)))' "$1"
}

# An agent of a cluster on this machine, in place of a second node's agent, so that the cluster survives the loss of its only node.
agent_outside() { # CLUSTER
    mkdir -p "$RUN/outside"
    towline token create "$1" >"$RUN/outside.token" 2>"$RUN/outside.log"
    cat >"$RUN/outside.yaml" <<-YAML
	apiVersion: towline.io/v1alpha1
	kind: AgentConfiguration
	gateway: { addresses: ['$GATEWAY'] }
	identity: { directory: $RUN/outside, joinTokenFile: $RUN/outside.token }
	mode: restricted
	apiServer: { url: '$API', ca: $RUN/ca.crt }
	admin: { address: '$HOST:9465' }
	YAML
    beside agent "$PRODUCT/towline-agent" --config "$RUN/outside.yaml"
    until_ok 20 curl -sf "http://$HOST:9465/readyz"
}

# sides CLUSTER: two kubeconfigs for the same caller, a ServiceAccount with all permissions: CLUSTER.direct.yaml and CLUSTER.through.yaml. In
# mode impersonate, the caller through the gateway is the fleet's admin, who has the same permissions.
sides() {
    local cluster=$1 token ca part certificate
    token=$(service_account sides --clusterrole=cluster-admin)
    side "$cluster.direct" "$API" "$RUN/ca.crt" "{token: '$token'}"
    ca=$RUN/front.ca.crt
    kubectl --kubeconfig "$RUN/admin.yaml" config view --raw -o 'jsonpath={.clusters[0].cluster.certificate-authority-data}' |
        base64 -d >"$ca"
    for part in client-certificate client-key; do
        kubectl --kubeconfig "$RUN/admin.yaml" config view --raw -o "jsonpath={.users[0].user.$part-data}" |
            base64 -d >"$RUN/fleet.$part"
    done
    certificate="client-certificate: $RUN/fleet.client-certificate, client-key: $RUN/fleet.client-key"
    case $2 in
    restricted) side "$cluster.through" "https://$GATEWAY/clusters/$cluster" "$ca" "{$certificate, token: '$token'}" ;;
    impersonate) side "$cluster.through" "https://$GATEWAY/clusters/$cluster" "$ca" "{$certificate}" ;;
    esac
}

service_account() { # NAME RIGHT: made if it is missing; its token
    kubectl_direct -n kube-system get serviceaccount "$1" >/dev/null 2>&1 || {
        kubectl_direct -n kube-system create serviceaccount "$1"
        kubectl_direct create clusterrolebinding "$1" "$2" --serviceaccount="kube-system:$1"
    } >/dev/null
    kubectl_direct -n kube-system create token "$1" --duration=8h
}

side() { # NAME SERVER CA USER
    cat >"$RUN/$1.yaml" <<-YAML
	apiVersion: v1
	kind: Config
	current-context: side
	contexts: [{name: side, context: {cluster: side, user: side}}]
	clusters: [{name: side, cluster: {server: '$2', certificate-authority: $3}}]
	users: [{name: side, user: $4}]
	YAML
}
