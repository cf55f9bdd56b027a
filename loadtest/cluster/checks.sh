# The checks with a real kubelet. Each leaves the cluster as it found it: two agents of each cluster, all ready. Sourced.
# shellcheck source=loadtest/cluster/towline.sh
. "$(dirname "${BASH_SOURCE[0]}")/towline.sh"

IDLE_SECONDS=60
ROLLOUTS=3

# FR-01, R1: idle pods are ready like others, also over QUIC, which agents prefer.
idle_agents_stay_ready() {
    local end cluster transport
    for cluster in open closed; do
        transport=$(towline cluster get $cluster -o json | json_of status.transport)
        [ "$transport" = quic ] || fail "$cluster: its agents are connected over $transport, not QUIC"
    done
    end=$((SECONDS + IDLE_SECONDS))
    while [ $SECONDS -lt $end ]; do
        for cluster in open closed; do
            agents_ready $cluster 2 >/dev/null || fail "$cluster: an idle agent is not ready: $(agents_ready $cluster 2)"
        done
        sleep 2
    done
    say "four agents over QUIC without a request: ready for $IDLE_SECONDS s"
}

# kubectl prints the same directly and through the gateway, in both modes.
sides_agree() {
    local cluster bad=0
    for cluster in closed open; do lines_agree $cluster || bad=1; done
    [ $bad = 0 ] || fail "a line of kubectl's differs"
}

lines_agree() { # CLUSTER
    local cluster=$1 side pids=() same=0 all=0 number name
    head -c 50000000 /dev/urandom >"$RUN/big"
    for side in direct through; do
        lines_of "$cluster" $side &
        pids+=($!)
    done
    wait "${pids[@]}"
    while IFS=$'\t' read -r number name; do
        all=$((all + 1))
        if cmp -s "$RUN/lines/direct/$number.said" "$RUN/lines/through/$number.said" && [ ! -e "$RUN/lines/direct/$number.wrong" ]; then
            same=$((same + 1))
        else
            say "$cluster: DIFFERS: $name"
            diff "$RUN/lines/direct/$number.said" "$RUN/lines/through/$number.said" | head -n 20 || true
            cat "$RUN/lines"/*/"$number.wrong" 2>/dev/null || true
        fi
    done <"$RUN/lines/direct/names"
    say "$cluster: $same of $all lines of kubectl's are the same directly and through the gateway"
    kubectl_direct delete namespace "lines-direct" "lines-through" --wait=true >/dev/null
    rm -rf "$RUN/lines" "$RUN/big"
    [ "$same" = "$all" ]
}

# Runs all lines on one side; records the masked output and exit code of each.
lines_of() { # CLUSTER SIDE
    local cluster=$1 side=$2 directory=$RUN/lines/$2 number=0
    export NS=lines-$side
    export K="kubectl --kubeconfig $RUN/$cluster.$side.yaml --cache-dir $directory/cache -n $NS"
    mkdir -p "$directory/work"
    kubectl_direct create namespace "$NS" >/dev/null
    kubectl_direct -n "$NS" create configmap words --from-literal=word=kit >/dev/null
    cp "$HERE"/{pod,deployment}.yaml "$directory/work/"
    ln "$RUN/big" "$directory/work/big"
    # shellcheck source=loadtest/cluster/lines.sh
    . "$HERE/lines.sh"
}

line() { # NAME [CODE], and what to run on stdin
    local name=$1 wanted=${2:-0} code=0 text
    number=$((number + 1))
    printf '%s\t%s\n' $number "$name" >>"$directory/names"
    text=$(cat)
    (
        cd "$directory/work" || exit
        # shellcheck source=loadtest/cluster/words.sh
        timeout 150 bash -c ". '$HERE/words.sh'; $text" </dev/null 2>&1
    ) >"$directory/$number.raw" || code=$?
    {
        mask <"$directory/$number.raw"
        echo "exit code $code"
    } >"$directory/$number.said"
    [ $code = "$wanted" ] || printf '%s: exit code %s, not %s:\n%s\n' "$side" $code "$wanted" "$(head -c 1000 "$directory/$number.raw")" >"$directory/$number.wrong"
}

mask() {
    sed -E -e "s/lines-(direct|through)/NAMESPACE/g" -e "s#$RUN/[a-z.]+yaml#KUBECONFIG#g" -e "s#$RUN/lines/[a-z]+#DIRECTORY#g" \
        -e 's/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}/UID/g' -e 's/Handling connection for [0-9]+/Handling connection/' \
        -e 's/-[0-9a-f]{8,10}-[a-z0-9]{5}\b/-POD/g' -e 's/node-debugger-onenode-[a-z0-9]{5}/DEBUGGER/g' -e 's/\r//g' -e '/^Handling connection$/d'
}

# K1, FR-05: while all agents are replaced, three times, no request fails and no watch has to list again.
rollouts_are_not_noticed() {
    local cluster
    for cluster in closed open; do
        traffic_starts $cluster
        for _ in $(seq $ROLLOUTS); do
            kubectl_direct -n $cluster rollout restart deployment/towline-agent >/dev/null
            kubectl_direct -n $cluster rollout status deployment/towline-agent --timeout=120s >/dev/null
            # The replaced agents finish their requests, watches included.
            until_ok 60 agents_ready $cluster 2
            announce
        done
        traffic_ends "$cluster: $ROLLOUTS rollouts"
    done
}

# traffic_starts CLUSTER [get]: continuous requests of four clients with one connection each, GETs alone or with POSTs; client-go
# informers; and `kubectl wait`. They run until
# traffic_ends WHAT: no request has failed, every watcher saw everything, and by the API server's audit log none listed again (K1, K2).
traffic_starts() {
    local cluster=$1 token
    kubectl_direct create namespace watched >/dev/null
    kubectl_direct -n watched create secret generic awaited >/dev/null
    # No other client uses this name in this namespace.
    case $cluster in
    closed)
        WATCHER=system:serviceaccount:kube-system:informer
        token=$(service_account informer --clusterrole=cluster-admin)
        sed "s/token: '[^']*'/token: '$token'/" "$RUN/closed.through.yaml" >"$RUN/informer.yaml"
        ;;
    open)
        WATCHER=$(kubectl --kubeconfig "$RUN/open.through.yaml" auth whoami -o 'jsonpath={.status.userInfo.username}')
        cp "$RUN/open.through.yaml" "$RUN/informer.yaml"
        ;;
    esac
    truncate -s 0 "$RUN"/{informer,waiter,load,audit}.log
    beside informer client watch "$RUN/informer.yaml" watched
    beside waiter kubectl --kubeconfig "$RUN/informer.yaml" -n watched wait --for=delete secret/awaited --timeout=300s
    MADE=0
    announce
    until_ok 20 have_listed
    LISTS=$(audited list)
    WATCHES=$(audited watch)
    beside load client load "$RUN/$cluster.through.yaml" "${2:-get-and-post}"
    sleep 2
}

traffic_ends() {
    local what=$1 lists
    announce
    end load
    kubectl_direct -n watched delete secret awaited >/dev/null
    until_ok 20 ended_well waiter
    end informer
    lists=$(($(audited list) - LISTS))
    say "$what: $(head -n 1 "$RUN/load.log"); watches begun anew: $(($(audited watch) - WATCHES)), lists: $lists"
    kubectl_direct delete namespace watched >/dev/null
    grep -q ' 0 failed' "$RUN/load.log" || fail "$what: $(cat "$RUN/load.log")"
    [ "$lists" = 0 ] || fail "$what: informers have listed again"
}

# Creates another ConfigMap, which both informers must see.
announce() {
    local kind
    MADE=$((MADE + 1))
    kubectl_direct -n watched create configmap "event-$MADE" >/dev/null
    for kind in protobuf json; do until_ok 60 grep -qx "$kind event-$MADE" "$RUN/informer.log"; done
}

# Starts two informers and `kubectl wait`.
have_listed() { [ "$(audited list)" -ge 3 ] && [ "$(audited watch)" -ge 3 ]; }

audited() { # list|watch: how many requests of $WATCHER's in the namespace `watched`
    python3 - "$RUN/audit.log" "$WATCHER" "$1" <<'PY'
import json, sys
path, user, verb = sys.argv[1:]
stage = {"list": "ResponseComplete", "watch": "ResponseStarted"}[verb]
events = (json.loads(line) for line in open(path) if line.endswith("\n"))
print(sum(event["verb"] == verb and event["stage"] == stage and event.get("objectRef", {}).get("namespace") == "watched"
          and event.get("impersonatedUser", event["user"])["username"] == user for event in events))
PY
}

ended_well() { # NAME: `kubectl wait` has
    ! pid_of "$1" && grep -q 'condition met' "$RUN/$1.log"
}

# An agent whose pod is evicted finishes its requests before it ends.
an_eviction_is_not_noticed() {
    local cluster pod
    for cluster in closed open; do
        traffic_starts $cluster
        pod=$(kubectl_direct -n $cluster get pods -o 'jsonpath={.items[0].metadata.name}')
        evict $cluster "$pod" || fail "$cluster: the eviction of one of two ready agents was refused"
        until_ok 60 kubectl_direct -n $cluster wait --for=delete "pod/$pod" --timeout=1s
        until_ok 60 agents_ready $cluster 2
        traffic_ends "$cluster: an eviction"
    done
}

evict() { # NAMESPACE POD
    kubectl_direct create --raw "/api/v1/namespaces/$1/pods/$2/eviction" -f - <<-JSON >/dev/null
	{"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "$2", "namespace": "$1"}}
	JSON
}

# The node is drained while another agent of the cluster runs elsewhere, as on a second node. There is one replica, because a budget for two
# would rightly wait for a node that can run the second.
a_drain_is_not_noticed() {
    agent_outside closed
    replicas 1
    until_ok 20 connected closed 2
    traffic_starts closed
    drain
    uncordon
    until_ok 60 agents_ready closed 1
    traffic_ends "closed: a drain of the node, one agent elsewhere"
    end agent
    replicas 2
}

replicas() { # COUNT, of both
    local cluster
    for cluster in open closed; do kubectl_direct -n $cluster scale deployment/towline-agent --replicas="$1" >/dev/null; done
    for cluster in open closed; do until_ok 90 agents_ready $cluster "$1"; done
}

drain() {
    local began=$SECONDS
    kubectl_direct drain onenode --pod-selector=app.kubernetes.io/name=towline-agent --delete-emptydir-data --timeout=45s \
        >"$RUN/drain.log" 2>&1 || fail "the drain was refused: $(tail -n 3 "$RUN/drain.log")"
    say "drained after $((SECONDS - began)) s"
}

uncordon() { kubectl_direct uncordon onenode >/dev/null; }

# R2: an outage of the service in the cloud does not stop work on the nodes of a cluster.
a_drain_without_the_gateway_is_granted() {
    local cluster
    end gateway
    for cluster in open closed; do until_ok 60 none_ready $cluster; done
    drain
    gateway_starts
    uncordon
    for cluster in open closed; do
        until_ok 90 agents_ready $cluster 2
        until_ok 20 connected $cluster 2
    done
}

none_ready() { # CLUSTER
    local ready
    ready=$(kubectl_direct -n "$1" get pods -o 'jsonpath={.items[*].status.containerStatuses[0].ready}')
    [[ $ready != *true* ]] || { echo "ready: $ready" && return 1; }
}

# The node loses power and restarts with its agents, while another agent runs elsewhere. Requests of a dead agent fail: the gateway retries a
# GET but must not retry a POST, so the load has only GETs. Each agent reconnects with its identity.
a_reboot_is_waited_out() {
    local cluster agents
    agent_outside closed
    until_ok 20 connected closed 3
    agents=$(towline cluster get closed -o json | json_of status.agents)
    traffic_starts closed get
    power_off
    until_ok 30 connected closed 1
    power_on
    until_ok 120 connected closed 3
    [ "$(towline cluster get closed -o json | json_of status.agents)" = "$agents" ] || fail "closed: an agent reconnected with a new identity"
    traffic_ends "closed: the node loses power and comes back, one agent elsewhere"
    end agent
    for cluster in open closed; do until_ok 90 agents_ready $cluster 2; done
    until_ok 20 connected open 2
}

# The gateway runs by its own manifest, with a volume and a load balancer's address. Its first admin connects, and a cluster joins.
a_gateway_runs_in_the_cluster() {
    in_node mkdir -p /var/lib/volumes/gateway
    kubectl_direct apply -f - >/dev/null <<-YAML
	apiVersion: v1
	kind: PersistentVolume
	metadata: {name: gateway}
	spec:
	  capacity: {storage: 1Gi}
	  accessModes: [ReadWriteOnce]
	  local: {path: /var/lib/volumes/gateway}
	  nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions:
	    [{key: kubernetes.io/hostname, operator: In, values: [onenode]}]}]}}
	YAML
    "$PRODUCT/towline" gateway manifest $BALANCER:8443 >"$RUN/gateway.manifest.yaml"
    kubectl_direct apply -f "$RUN/gateway.manifest.yaml" >/dev/null
    kubectl_direct -n towline-gateway patch service towline-gateway --subresource=status --type=merge \
        -p '{"status": {"loadBalancer": {"ingress": [{"ip": "'$BALANCER'"}]}}}' >/dev/null
    kubectl_direct -n towline-gateway rollout status statefulset/towline-gateway --timeout=60s >/dev/null
    # As in the manifest's first lines.
    (
        cd "$RUN"
        eval "$(sed -n 's/^#   (umask 077; \(.*\))$/\1/p' gateway.manifest.yaml | sed -e "s#kubectl#kubectl --kubeconfig=$RUN/admin-direct.yaml#" -e 's#admin.yaml$#inside.yaml#')"
    )
    TOWLINE_KUBECONFIG=$RUN/inside.yaml "$PRODUCT/towline" agent manifest within --register --namespace within \
        >"$RUN/within.manifest.yaml" 2>"$RUN/within.log"
    kubectl_direct apply -f "$RUN/within.manifest.yaml" >/dev/null
    until_ok 60 agents_ready within 1
    TOWLINE_KUBECONFIG=$RUN/inside.yaml "$PRODUCT/towline" status --check >"$RUN/within.status" 2>&1 || fail "$(cat "$RUN/within.status")"
    say "a gateway in a pod, reached by a LoadBalancer's address, and its agent: connected"
    kubectl_direct delete -f "$RUN/within.manifest.yaml" -f "$RUN/gateway.manifest.yaml" >/dev/null
}
