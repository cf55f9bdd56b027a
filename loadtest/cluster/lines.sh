# Shell lines with their exit codes; the results must be the same directly and through the gateway. Sourced by `sides_agree` in checks.sh.
#
#   line NAME [CODE] <<'SH'
#
# Each line runs with bash in a directory of its side, which contains `big` (50 MB) and the two YAML files below. $K is kubectl with the side's
# kubeconfig in the side's namespace; terminal COMMAND runs a command in a terminal; ready_soon FILE PATTERN waits for a pattern. Names, ages
# and ids are masked afterwards. Later lines may use the objects of earlier ones.
# shellcheck disable=SC2016

line "apply, wait for Ready" <<'SH'
$K apply -f pod.yaml && $K wait --for=condition=Ready pod/web --timeout=60s
SH
line "apply, rollout status" <<'SH'
$K apply -f deployment.yaml && $K rollout status deployment/many --timeout=60s | tail -n 1
SH
line "apply again: unchanged; diff says nothing" <<'SH'
$K apply -f deployment.yaml && $K diff -f deployment.yaml
SH
line "get: table, jsonpath, custom columns, labels" <<'SH'
$K get pod web | awk '{print $1, $2, $3}'
$K get pod web -o 'jsonpath={.status.containerStatuses[*].name}'
$K get pods -l app=web -o custom-columns=NAME:.metadata.name,PHASE:.status.phase
$K get pods -o wide --show-labels | grep -c onenode
SH
line "get of what is not there" 1 <<'SH'
$K get pod nobody
SH
line "get --watch while it is labelled" <<'SH'
timeout 20 $K get pod web -L seen --watch --output-watch-events --no-headers >seen &
ready_soon seen ADDED && $K label pod web seen=yes && ready_soon seen 'MODIFIED.*yes'; kill $!
awk '{print $1, $2}' seen
SH
line "describe a node and a pod" <<'SH'
$K describe node onenode | grep -E '^(Name|Roles|Taints|Unschedulable):|Container Runtime|Kubelet Version'
$K describe pod web | grep -E '^(Name|Status|Node|QoS Class):|Image:|Restart Count:'
SH
line "logs: last lines, since, all containers" <<'SH'
$K logs web -c main --tail=1 | sed 's/[0-9]*$/N/'
$K logs web --all-containers --prefix --tail=1 | sed 's/[0-9]*$/N/' | sort
$K logs web -c main --since=1h | head -n 1
SH
line "logs -f until there were five" <<'SH'
timeout 20 $K logs -f web -c main --tail=1 | head -n 5 | sed 's/[0-9]*$/N/'
SH
line "logs --previous of what never restarted" 1 <<'SH'
$K logs web -c main --previous
SH
line "exec: both outputs, exit code" 42 <<'SH'
$K exec web -c main -- sh -c 'echo out; sleep 0.3; echo err >&2; exit 42'
SH
line "exec: killed" 137 <<'SH'
$K exec web -c main -- sh -c 'kill -9 $$'
SH
line "exec -i: 50 MB in, its checksum out" <<'SH'
[ "$($K exec -i web -c main -- sha256sum <big)" = "$(sha256sum <big)" ] && echo equal
SH
line "exec: 50 MB out" <<'SH'
$K exec web -c main -- head -c 50000000 /dev/zero | sha256sum
SH
line "exec -i: 10 MB both ways at once" <<'SH'
head -c 10000000 big >some; $K exec -i web -c main -- cat <some | cmp - some && echo equal
SH
line "exec -it: a terminal, its size, exit code" 5 <<'SH'
terminal "stty rows 33 cols 111; $K exec -it web -c main -- sh -c 'sleep 1; test -t 0 && test -t 1 && stty size; exit 5'"
SH
line "exec: twenty at once" <<'SH'
for i in $(seq 20); do $K exec web -c main -- echo "$i" & done | sort -n | tr '\n' ' '
SH
line "attach -i: what is said is heard" <<'SH'
(sleep 2; echo one; sleep 1) | timeout 10 $K attach -i web -c side
$K logs web -c side | tail -n 1
SH
line "cp: 50 MB there and back" <<'SH'
$K cp big web:/tmp/big -c main && $K cp web:/tmp/big back -c main >/dev/null && cmp big back && echo equal
rm -f back; $K exec web -c main -- rm /tmp/big
SH
line "cp: a folder of 500 files there and back" <<'SH'
mkdir there; for i in $(seq 500); do echo "$i" >"there/$i"; done
$K cp there web:/tmp/there -c main && $K cp web:/tmp/there back -c main >/dev/null && diff -r there back && echo equal
SH
line "port-forward to a pod: twenty at once" <<'SH'
$K port-forward pod/web :8080 >forward & ready_soon forward 'Forwarding from 127'
port=$(sed -n 's/.*127.0.0.1:\([0-9]*\).*/\1/p' forward | head -n 1)
for i in $(seq 20); do curl -s "http://127.0.0.1:$port/" & done | sort | uniq -c; kill $!
SH
line "port-forward to a service: 20 MB" <<'SH'
$K exec web -c main -- sh -c 'head -c 20000000 /dev/zero >/tmp/www/zeros'
$K port-forward service/web :80 >forward & ready_soon forward 'Forwarding from 127'
port=$(sed -n 's/.*127.0.0.1:\([0-9]*\).*/\1/p' forward | head -n 1)
curl -s "http://127.0.0.1:$port/zeros" | sha256sum; kill $!
SH
line "debug: a container beside, which sees the others" <<'SH'
$K debug web --image=busybox:1 --target=main -c beside -- sh -c 'ps | grep -q [h]ttpd && echo seen'
$K wait pod/web --for='jsonpath={.status.ephemeralContainerStatuses[0].state.terminated.exitCode}=0' --timeout=30s && $K logs web -c beside
SH
line "debug -it: a shell beside" <<'SH'
terminal "$K debug web -it --image=busybox:1 --target=main -c shell -- sh -c 'sleep 2; echo inside'" | grep -o '^inside'
SH
line "debug node: the node's files" <<'SH'
$K debug node/onenode --image=busybox:1 -- ls -d /host/etc | sed 's/onenode-[a-z0-9]*/POD/'
pod=$($K get pods -o name | grep debugger); $K wait "$pod" --for='jsonpath={.status.phase}=Succeeded' --timeout=30s >/dev/null; $K logs "$pod"
SH
line "get --raw: through the API server to kubelet, pod and service" <<'SH'
$K get --raw /api/v1/nodes/onenode/proxy/healthz; echo
$K get --raw /api/v1/nodes/onenode/proxy/metrics | grep -c '^kubelet_running_pods'
$K get --raw "/api/v1/namespaces/$NS/pods/web:8080/proxy/"
$K get --raw "/api/v1/namespaces/$NS/services/web:80/proxy/index.html"
SH
line "top, where nobody measures" 1 <<'SH'
$K top nodes
SH
line "explain, api-resources, api-versions, version" <<'SH'
$K explain pod.spec.containers.image | head -n 4
$K api-resources --no-headers | sort | sha256sum
$K api-versions | sort | sha256sum
$K version -o json | grep -c gitVersion
SH
line "label, annotate, patch, edit, replace" <<'SH'
$K label pod web a=1 && $K annotate pod web b=2 && $K patch pod web -p '{"metadata": {"labels": {"a": null}}}'
KUBE_EDITOR="sed -i 's/kit/tool/'" $K edit configmap words
$K get configmap words -o json | sed 's/tool/box/' | $K replace -f - && $K get configmap words -o 'jsonpath={.data}'
SH
line "auth can-i, create token" <<'SH'
$K auth can-i '*' '*' && $K create token default | tr -dc . | wc -c
SH
line "scale, watched" <<'SH'
$K scale deployment many --replicas=4 && $K rollout status deployment/many --timeout=60s | tail -n 1
$K get deployment many -o 'jsonpath={.status.readyReplicas}'
SH
line "set env, rollout history and undo" <<'SH'
$K set env deployment/many A=1 && $K rollout status deployment/many --timeout=60s | tail -n 1
$K rollout history deployment/many && $K rollout undo deployment/many && $K rollout status deployment/many --timeout=60s | tail -n 1
SH
line "autoscale, expose" <<'SH'
$K autoscale deployment many --max=5 && $K expose deployment many --port=80 && $K get hpa,service -o name
SH
line "a job, waited for, its logs" <<'SH'
$K create job once --image=busybox:1 -- echo worked && $K wait --for=condition=complete job/once --timeout=60s && $K logs job/once
SH
line "run --rm -i: what goes in comes out, exit code" 9 <<'SH'
(sleep 3; echo hello) | timeout 60 $K run short --rm -i --quiet --restart=Never --image=busybox:1 -- sh -c 'read line; echo "heard $line"; sleep 1; exit 9' 2>/dev/null
SH
line "events, watched while a pod fails" <<'SH'
timeout 30 $K events --watch >events 2>&1 & sleep 1
$K run bad --image=busybox:1 --restart=Never -- nosuchprogram && ready_soon events 'Failed.*bad'; kill $!
SH
line "delete a pod, waited for" 1 <<'SH'
$K delete pod web --grace-period=1 --timeout=40s && $K get pod web
SH
line "delete by force" <<'SH'
$K delete "$($K get pods -l app=many -o name | head -n 1)" --grace-period=0 --force 2>&1 | sed 's/many-[a-z0-9-]*/POD/'
$K rollout status deployment/many --timeout=60s | tail -n 1
SH
line "delete everything, dependents first" <<'SH'
$K delete deployment,service,job,hpa --all --cascade=foreground --timeout=60s && $K get replicasets,services,jobs
SH
