//! Goal: the manifests keep what they promise; the tests parse the printed YAML.

use super::*;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use std::path::PathBuf;
use towline_certs::{JoinToken, TrustDomain};
use towline_gateway::config::GatewayConfig;
use towline_model::{ClusterName, Mode};

const LINE: &str = "tljt1/gateway.example.com:8443/0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef/towline.local/prod-eu-1/first/1/00112233445566778899aabbccddeeff";

fn agent(mode: Mode) -> AgentManifest {
    let token: JoinToken = LINE.parse().unwrap();
    AgentManifest::new(ClusterName::new("prod-eu-1").unwrap(), mode, Some(&token))
}

fn documents(text: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

fn of<'a>(documents: &'a [Value], kind: &str) -> Vec<&'a Value> {
    documents.iter().filter(|document| document["kind"] == kind).collect()
}

/// Goal: a restricted agent holds no right: nothing is bound to its ServiceAccount, and no token that the API server takes is in
/// its pod (EN-03).
#[test]
fn a_restricted_agent_holds_no_right() {
    let documents = documents(&agent(Mode::Restricted).render(Some(LINE)).unwrap());
    assert!(of(&documents, "ClusterRole").is_empty() && of(&documents, "Role").is_empty());
    for binding in of(&documents, "ClusterRoleBinding") {
        assert_eq!(binding["roleRef"]["name"], "system:service-account-issuer-discovery");
        for subject in binding["subjects"].as_array().unwrap() {
            assert_eq!(subject["kind"], "Group", "nothing is bound to the ServiceAccount");
            assert_eq!(subject["name"], "system:unauthenticated");
        }
    }
    let [account] = of(&documents, "ServiceAccount")[..] else { panic!("one ServiceAccount") };
    assert_eq!(account["automountServiceAccountToken"], false);
    let [deployment] = of(&documents, "Deployment")[..] else { panic!("one Deployment") };
    let pod = &deployment["spec"]["template"]["spec"];
    assert_eq!(pod["automountServiceAccountToken"], false);
    let tokens: Vec<_> = pod["volumes"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|volume| volume["projected"]["sources"].as_array().into_iter().flatten())
        .filter_map(|source| source.get("serviceAccountToken"))
        .collect();
    assert_eq!(
        tokens,
        [&json!({ "path": "token", "audience": "towline:towline.local", "expirationSeconds": 600 })]
    );
}

/// Goal: S6: an impersonating agent holds exactly the right to impersonate users, and the groups that something is granted to; those
/// are what it names of a caller's groups; and what the callers may do is said.
#[test]
fn s6_an_impersonating_agent_holds_one_right() {
    let unnarrowed = agent(Mode::Impersonate).render(Some(LINE)).unwrap();
    assert!(
        unnarrowed.contains("can impersonate anybody here") && !unnarrowed.contains("resourceNames: [\"")
    );
    let grants = ["towline:admins=cluster-admin", "dev=view", "towline:admins=edit"];
    let all = AgentManifest {
        grants: grants.map(|grant| grant.parse().unwrap()).to_vec(),
        ..agent(Mode::Impersonate)
    };
    let documents_of_all = documents(&all.render(Some(LINE)).unwrap());
    assert_eq!(
        of(&documents_of_all, "ClusterRole")[0]["rules"][1]["resourceNames"],
        json!(["dev", "towline:admins"])
    );
    for masters in ["system:masters=cluster-admin", "System:x=view"] {
        assert!(matches!(masters.parse::<Grant>(), Err(ManifestError::GrantToSystem(_))), "{masters}");
    }

    let grants = vec!["towline:admins=cluster-admin".parse().unwrap()];
    let manifest = AgentManifest { grants, ..agent(Mode::Impersonate) };
    let text = manifest.render(Some(LINE)).unwrap();
    let documents = documents(&text);
    let [role] = of(&documents, "ClusterRole")[..] else { panic!("one ClusterRole") };
    // Two rules, so that each can be narrowed by itself.
    let rule = |what: &str| json!({ "apiGroups": [""], "resources": [what], "verbs": ["impersonate"] });
    let mut groups = rule("groups");
    groups["resourceNames"] = json!(["towline:admins"]);
    assert_eq!(role["rules"], json!([rule("users"), groups]));
    let config = of(&documents, "ConfigMap")[0]["data"]["agent.yaml"].as_str().unwrap();
    let config: Value = serde_saphyr::from_str(config).unwrap();
    assert_eq!(config["impersonate"]["groups"], json!(["towline:admins"]));
    let [binding, grant] = of(&documents, "ClusterRoleBinding")[..] else {
        panic!("two ClusterRoleBindings")
    };
    assert_eq!(binding["roleRef"]["name"], role["metadata"]["name"]);
    let subject = json!({ "kind": "ServiceAccount", "name": "towline-agent", "namespace": "towline" });
    assert_eq!(binding["subjects"], json!([subject]));
    assert_eq!(grant["roleRef"]["name"], "cluster-admin");
    assert_eq!(grant["subjects"][0]["name"], "towline:admins");
    let head = text.split("---").next().unwrap();
    assert!(head.contains("group towline:admins\" gets the permissions of \"cluster-admin"), "{head}");
    for binding in [binding, grant] {
        let name = binding["metadata"]["name"].as_str().unwrap();
        assert!(head.contains(&format!("clusterrolebinding/{name}")), "how to take it away: {head}");
    }
    let restricted = AgentManifest { grants: manifest.grants, ..agent(Mode::Restricted) };
    assert_eq!(restricted.render(Some(LINE)), Err(ManifestError::GrantInVain));
}

/// Goal: the join token is in the Secret and nowhere else; the same agent with another token is the same Deployment.
#[test]
fn the_join_token_is_in_the_secret_only() {
    for mode in [Mode::Restricted, Mode::Impersonate] {
        let text = agent(mode).render(Some(LINE)).unwrap();
        let secret = LINE.rsplit_once('/').unwrap().1;
        assert_eq!(text.matches(secret).count(), 0, "it is base64");
        let documents = documents(&text);
        let data = of(&documents, "Secret")[0]["data"]["token"].as_str().unwrap();
        assert_eq!((STANDARD.decode(data).unwrap(), text.matches(data).count()), (LINE.into(), 1));
        let other = agent(mode).render(Some(&LINE.replace("/first/", "/other/"))).unwrap();
        let other: Vec<Value> = serde_saphyr::from_multiple(&other).unwrap();
        for (one, other) in documents.iter().zip(&other) {
            assert_eq!(one == other, one["kind"] != "Secret", "{}", one["kind"]);
        }
    }
}

/// Goal: what a pod security check of the strictest level asks for, and what an agent that is rolled or whose node is drained needs.
#[test]
fn pods_are_restricted_and_replaced_make_before_break() {
    for replicas in [1, 2] {
        let manifest = AgentManifest { replicas, network_policy: true, ..agent(Mode::Restricted) };
        let documents = documents(&manifest.render(Some(LINE)).unwrap());
        let spec = &of(&documents, "Deployment")[0]["spec"];
        assert_eq!(spec["strategy"]["rollingUpdate"], json!({ "maxSurge": 1, "maxUnavailable": 0 }));
        let pod = &spec["template"]["spec"];
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        let context = &pod["containers"][0]["securityContext"];
        assert_eq!(context["allowPrivilegeEscalation"], false);
        assert_eq!(context["readOnlyRootFilesystem"], true);
        assert_eq!(context["capabilities"]["drop"], json!(["ALL"]));
        assert_eq!(of(&documents, "PodDisruptionBudget").len(), usize::from(replicas > 1));
        if let [budget] = of(&documents, "PodDisruptionBudget")[..] {
            // R2: while the gateway is away no agent is ready, and nodes are drained all the same.
            assert_eq!(budget["spec"]["unhealthyPodEvictionPolicy"], "AlwaysAllow");
        }
        let policy = &of(&documents, "NetworkPolicy")[0]["spec"];
        assert!(policy["ingress"].is_null(), "nothing comes in");
        assert_eq!(policy["egress"][1]["ports"][1], json!({ "protocol": "UDP", "port": 8443 }));
    }
    for replicas in [0, 9] {
        let manifest = AgentManifest { replicas, ..agent(Mode::Restricted) };
        assert_eq!(manifest.render(Some(LINE)), Err(ManifestError::Replicas(replicas)));
    }
}

/// Goal: no name makes other YAML of it, and what cannot work is refused with what to do.
#[test]
fn odd_parts_are_quoted_or_refused() {
    let with = |change: &dyn Fn(&mut AgentManifest)| {
        let mut manifest = agent(Mode::Restricted);
        change(&mut manifest);
        manifest.render(Some(LINE))
    };
    for name in ["on", "123", "1e3", "null"] {
        let text = with(&|manifest| {
            manifest.namespace = name.to_owned();
            manifest.cluster = ClusterName::new(name).unwrap();
        });
        let documents = documents(&text.unwrap());
        assert_eq!(of(&documents, "Namespace")[0]["metadata"]["name"], name);
        assert_eq!(of(&documents, "Deployment")[0]["metadata"]["namespace"], name);
    }
    for namespace in ["", "a b", "a\nb", "A", "-a", &"a".repeat(64)] {
        assert!(matches!(with(&|m| m.namespace = namespace.to_owned()), Err(ManifestError::Name { .. })));
    }
    for image in ["", "a b", "a\nb"] {
        assert!(matches!(with(&|m| m.image = image.to_owned()), Err(ManifestError::Image(_))));
    }
    for address in ["127.0.0.1:8443", "localhost:8443", "[::1]:8443"] {
        let result = with(&|m| m.addresses = vec![address.parse().unwrap()]);
        assert!(result.unwrap_err().to_string().contains("publicAddresses"), "{address}");
    }
    for grant in ["", "a", "a b=view", "=a", "a=", "a=b/c", "a=.."] {
        assert!(grant.parse::<Grant>().is_err(), "{grant}");
    }
    let dotted: Grant = "a=b=system:node".parse().unwrap();
    assert_eq!((dotted.group.as_str(), dotted.role.as_str()), ("a=b", "system:node"));
}

fn pod(options: &PodOptions) -> Value {
    let manifest = AgentManifest { pod: options.clone(), ..agent(Mode::Restricted) };
    let documents = documents(&manifest.render(Some(LINE)).unwrap());
    of(&documents, "Deployment")[0]["spec"]["template"].clone()
}

/// Goal: D10, FR-54: what a cluster asks of its pods is asked for, the same of the agent and of the gateway; what Kubernetes would
/// refuse, or the program could not start with, is refused here.
#[test]
fn d10_pods_are_scheduled_pulled_and_marked_as_the_cluster_wants() {
    let options = PodOptions {
        pull_secrets: vec!["registry".to_owned()],
        node_selector: vec!["kubernetes.io/os=linux".parse().unwrap()],
        tolerations: ["dedicated=infra:NoSchedule", "edge", "*:NoExecute"]
            .map(|taint| taint.parse().unwrap())
            .to_vec(),
        priority_class: Some("system-cluster-critical".to_owned()),
        labels: vec!["team=net".parse().unwrap(), "example.com/on=true".parse().unwrap()],
        resources: "requests.cpu=1,limits.cpu=1500m,limits.memory=1Gi".parse().unwrap(),
        platform_uid: false,
    };
    let gateway = GatewayManifest { pod: options.clone(), ..gateway() };
    let gateways = documents(&gateway.render().unwrap());
    let agent = AgentManifest { pod: options, ..agent(Mode::Restricted) };
    let agents = documents(&agent.render(Some(LINE)).unwrap());
    let pods = [of(&agents, "Deployment")[0], of(&gateways, "StatefulSet")[0]];
    for template in pods.map(|set| &set["spec"]["template"]) {
        let pod = &template["spec"];
        assert_eq!(pod["imagePullSecrets"], json!([{"name": "registry"}]));
        assert_eq!(pod["nodeSelector"], json!({"kubernetes.io/os": "linux"}));
        let tolerations = json!([
            {"operator": "Equal", "key": "dedicated", "value": "infra", "effect": "NoSchedule"},
            {"operator": "Exists", "key": "edge"},
            {"operator": "Exists", "effect": "NoExecute"},
        ]);
        assert_eq!(pod["tolerations"], tolerations);
        assert_eq!(pod["priorityClassName"], "system-cluster-critical");
        let resources = &pod["containers"][0]["resources"];
        assert_eq!(resources["requests"]["cpu"], 1);
        assert_eq!(resources["limits"], json!({"cpu": "1500m", "memory": "1Gi"}));
    }
    for object in agents.iter().chain(&gateways) {
        if !object["metadata"]["namespace"].is_null() || object["kind"] == "Namespace" {
            let labels = &object["metadata"]["labels"];
            assert_eq!((&labels["team"], &labels["example.com/on"]), (&json!("net"), &json!("true")));
        }
    }
    let config = of(&agents, "ConfigMap")[0]["data"]["agent.yaml"].as_str().unwrap();
    assert!(
        config.contains(
            "processMemory: 512MiB
  sessionMemory: 128MiB"
        ),
        "{config}"
    );
    let config = of(&gateways, "ConfigMap")[0]["data"]["gateway.yaml"].as_str().unwrap();
    let limits = GatewayConfig::parse(config, "gateway.yaml").unwrap().limits;
    let memories = [
        limits.tunnel_memory,
        limits.tunnel_memory_per_cluster,
        limits.upload_memory,
        limits.upload_memory_per_principal,
    ];
    assert_eq!(
        memories.map(|memory| memory.0 >> 20),
        [384, 96, 128, 32],
        "half of the pod's, and a quarter of each"
    );
    let least = PodOptions { resources: "limits.memory=512Mi".parse().unwrap(), ..PodOptions::default() };
    let least = documents(&GatewayManifest { pod: least, ..self::gateway() }.render().unwrap());
    let config = of(&least, "ConfigMap")[0]["data"]["gateway.yaml"].as_str().unwrap();
    assert_eq!(GatewayConfig::parse(config, "gateway.yaml").unwrap().limits.tunnel_memory.0, 192 << 20);
    for text in [
        "", "a", "a=b=c", "a b=c", "a/b/c=d", "-a=b", "a=b
c",
    ] {
        assert!(text.parse::<Label>().is_err(), "{text}");
    }
    for text in ["", "a:b", "a=b c", "*=b", ":NoSchedule"] {
        assert!(text.parse::<Toleration>().is_err(), "{text}");
    }
    for text in
        ["", "cpu=1", "limits.cpu=0", "limits.memory=1GiB", "limits.memory=0", "limits.cpu=1,limits.cpu=2"]
    {
        assert!(text.parse::<Resources>().is_err(), "{text}");
    }
    let refused = |change: &dyn Fn(&mut PodOptions)| {
        let mut pod = PodOptions::default();
        change(&mut pod);
        AgentManifest { pod, ..self::agent(Mode::Restricted) }.check().unwrap_err()
    };
    for own in ["app.kubernetes.io/name=x", "pod-security.kubernetes.io/enforce=baseline"] {
        let own = refused(&|pod| pod.labels = vec![own.parse().unwrap()]);
        assert!(matches!(own, ManifestError::OwnLabel(_)));
    }
    let twice = || vec!["team=a".parse().unwrap(), "x=y".parse().unwrap(), "team=b".parse().unwrap()];
    let wanted = ManifestError::TwiceLabel("team".to_owned());
    assert_eq!(refused(&|pod| pod.labels = twice()), wanted);
    assert_eq!(refused(&|pod| pod.node_selector = twice()), wanted);
    let little = refused(&|pod| pod.resources = "limits.memory=100Mi".parse().unwrap());
    assert!(little.to_string().contains("at least 320Mi"), "{little}");
    let more = refused(&|pod| pod.resources = "requests.memory=1Gi".parse().unwrap());
    assert_eq!(more, ManifestError::MoreThanLimit);
    assert!(matches!(refused(&|pod| pod.pull_secrets = vec!["A b".to_owned()]), ManifestError::Name { .. }));
}

/// Goal: D10, FR-54: an agent behind a proxy is configured with it, its password is in a Secret and nowhere else, and its CA beside
/// the configuration.
#[test]
fn d10_an_agent_behind_a_proxy_is_told_of_it() {
    let proxy = |url: &str, password, ca| AgentProxy { url: url.parse().unwrap(), password, ca };
    let ca = "-----BEGIN CERTIFICATE-----
MA==
-----END CERTIFICATE-----
"
    .to_owned();
    let given =
        proxy("https://joe@proxy.corp:3129", Password::Printed("s3cret:x".to_owned()), Some(ca.clone()));
    let manifest = AgentManifest {
        proxy: Some(given),
        transport: Transport::Tcp,
        quic_addresses: vec!["udp.example.com:443".parse().unwrap()],
        network_policy: true,
        ..agent(Mode::Restricted)
    };
    let text = manifest.render(Some(LINE)).unwrap();
    assert!(!text.contains("s3cret") && !format!("{manifest:?}").contains("s3cret"));
    let documents = documents(&text);
    let data = &of(&documents, "ConfigMap")[0]["data"];
    let config: Value = serde_saphyr::from_str(data["agent.yaml"].as_str().unwrap()).unwrap();
    let wanted = json!({"url": "https://joe@proxy.corp:3129", "ca": "/etc/towline/proxy-ca.crt",
        "passwordFile": "/var/run/secrets/towline/proxy-password"});
    assert_eq!((&config["proxy"], &config["transport"]), (&wanted, &json!("tcp")));
    assert_eq!(config["gateway"]["quicAddresses"], json!(["udp.example.com:443"]));
    assert_eq!(data["proxy-ca.crt"], ca);
    let [_, secret] = of(&documents, "Secret")[..] else { panic!("two Secrets") };
    assert_eq!(secret["data"]["password"], STANDARD.encode("s3cret:x"));
    let pod = &of(&documents, "Deployment")[0]["spec"]["template"]["spec"];
    let sources = pod["volumes"][1]["projected"]["sources"].as_array().unwrap();
    let mounted =
        json!({"name": secret["metadata"]["name"], "items": [{"key": "password", "path": "proxy-password"}]});
    assert!(sources.iter().any(|source| source["secret"] == mounted), "{sources:?}");
    let egress = of(&documents, "NetworkPolicy")[0]["spec"]["egress"].as_array().unwrap();
    assert!(
        egress.iter().any(|rule| rule["ports"] == json!([{"protocol": "TCP", "port": 3129}])),
        "{egress:?}"
    );
    for (proxy, why) in [
        (proxy("http://joe:x@p:1", Password::None, None), "--proxy-password-file"),
        (proxy("http://p:1", Password::Elsewhere, None), "names no user"),
        (
            proxy(
                "http://joe@p:1",
                Password::Printed(
                    "a
b"
                    .to_owned(),
                ),
                None,
            ),
            "one line",
        ),
        (proxy("http://p:1", Password::None, Some(ca)), "the CA would not be used"),
        (proxy("https://p:1", Password::None, Some("x".to_owned())), "no certificate"),
    ] {
        let error = AgentManifest { proxy: Some(proxy), ..agent(Mode::Restricted) }.check().unwrap_err();
        assert!(error.to_string().contains(why) && !error.to_string().contains("joe:x"), "{error}");
    }
    let two = AgentManifest { quic_addresses: vec!["a:1".parse().unwrap(); 2], ..agent(Mode::Restricted) };
    assert_eq!(two.check(), Err(ManifestError::QuicAddresses(2, 1)));
}

/// Goal: every file that an agent's configuration names is mounted into its pod under that name, its port is the one that is probed, and
/// the pod is given more time to end than the drain takes.
#[test]
fn an_agent_finds_what_its_configuration_names() {
    let ca = "-----BEGIN CERTIFICATE-----\nMA==\n-----END CERTIFICATE-----\n".to_owned();
    let url = "https://joe@proxy.corp:3129".parse().unwrap();
    let proxy = Some(AgentProxy { url, password: Password::Elsewhere, ca: Some(ca) });
    let keys = IssuerKeys::Given("{\"keys\": [{\"kty\": \"EC\"}]}".to_owned());
    for mode in [Mode::Restricted, Mode::Impersonate] {
        let manifest = AgentManifest { proxy: proxy.clone(), keys: keys.clone(), ..agent(mode) };
        let documents = documents(&manifest.render(Some(LINE)).unwrap());
        let [map] = of(&documents, "ConfigMap")[..] else { panic!("one ConfigMap") };
        let text = map["data"]["agent.yaml"].as_str().unwrap();
        let config: Value = serde_saphyr::from_str(text).unwrap();
        let pod = &of(&documents, "Deployment")[0]["spec"]["template"]["spec"];
        let container = &pod["containers"][0];
        let directory = |volume: &str| {
            let mut mounts = container["volumeMounts"].as_array().unwrap().iter();
            mounts.find(|mount| mount["name"] == volume).unwrap()["mountPath"].as_str().unwrap()
        };
        let sources = pod["volumes"][1]["projected"]["sources"].as_array().unwrap().iter();
        let paths = sources.flat_map(|source| {
            let token = source["serviceAccountToken"]["path"].as_str();
            let items = [&source["secret"]["items"], &source["configMap"]["items"]];
            let items = items.into_iter().filter_map(Value::as_array).flatten();
            token.into_iter().chain(items.filter_map(|item| item["path"].as_str()))
        });
        let given = paths.map(|path| format!("{}/{path}", directory("given")));
        let own = map["data"].as_object().unwrap().keys().map(|key| format!("{}/{key}", directory("config")));
        let mounted: Vec<String> = given.chain(own).collect();
        let words = text.split_whitespace().filter(|word| word.starts_with('/'));
        let named: Vec<&str> = words.collect();
        for path in &named {
            assert!(mounted.iter().any(|known| known == path), "{path}: {mounted:?}");
        }
        assert_eq!(
            named.len(),
            6,
            "token, keys or the token for the API server, join token, CA, proxy: {named:?}"
        );
        assert_eq!(container["args"], json!([format!("--config={}/agent.yaml", directory("config"))]));
        let port = container["ports"][0]["containerPort"].as_u64().unwrap();
        assert_eq!(config["admin"]["address"], format!("0.0.0.0:{port}"));
        let drain: u64 = config["drain"]["deadline"].as_str().unwrap().trim_end_matches('s').parse().unwrap();
        assert!(pod["terminationGracePeriodSeconds"].as_u64().unwrap() > drain);
    }
}

/// Goal: D10: a text for a repository holds no secret, and says how those are made that it leaves out.
#[test]
fn d10_a_manifest_for_a_repository_holds_no_secret() {
    let url = "http://joe@proxy.corp:3128".parse().unwrap();
    let proxy = Some(AgentProxy { url, password: Password::Elsewhere, ca: None });
    let manifest = AgentManifest { proxy, ..agent(Mode::Restricted) };
    let text = manifest.render(None).unwrap();
    let documents = documents(&text);
    assert!(of(&documents, "Secret").is_empty() && !text.contains(LINE.rsplit_once('/').unwrap().1));
    let two = AgentManifest { replicas: 2, ..manifest }.render(None).unwrap();
    assert!(two.contains("towline token create prod-eu-1 --uses 2 | "), "{two}");
    let (namespace, secret) = (text.find("kubectl create namespace towline\n"), text.find("create secret"));
    assert!(namespace.is_some() && namespace < secret, "a Secret needs its namespace: {text}");
    for line in [
        "towline token create prod-eu-1 | kubectl -n towline create secret generic towline-agent-join --from-file=token=/dev/stdin",
        "kubectl -n towline create secret generic towline-agent-proxy --from-file=password=FILE",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    assert!(!text.contains("Do not commit"));
    let config = of(&documents, "ConfigMap")[0]["data"]["agent.yaml"].as_str().unwrap();
    assert!(config.contains("passwordFile"), "{config}");
}

/// Goal: FR-53: a platform that chooses users and groups finds none chosen, and whoever it takes can read what it is given.
#[test]
fn fr53_user_and_groups_can_be_left_to_the_platform() {
    let chosen = pod(&PodOptions::default());
    assert_eq!(chosen["spec"]["securityContext"]["runAsUser"], 65_532);
    assert_eq!(chosen["spec"]["volumes"][1]["projected"]["defaultMode"], 0o440);
    let platform = PodOptions { platform_uid: true, ..PodOptions::default() };
    let own = documents(&GatewayManifest { pod: platform.clone(), ..gateway() }.render().unwrap());
    let own = of(&own, "StatefulSet")[0]["spec"]["template"].clone();
    let left = pod(&platform);
    for pod in [&left, &own] {
        let context = pod["spec"]["securityContext"].as_object().unwrap();
        assert!(
            !["runAsUser", "runAsGroup", "fsGroup"].iter().any(|key| context.contains_key(*key)),
            "{context:?}"
        );
        assert_eq!(context["runAsNonRoot"], true);
    }
    assert_eq!(left["spec"]["volumes"][1]["projected"]["defaultMode"], 0o444);
}

/// Goal: FR-52: DNS is reached where a Service's port is 53 and the pods' is 5353, as on OpenShift: a policy counts the pods'.
#[test]
fn fr52_dns_may_listen_on_5353() {
    let manifest = AgentManifest { network_policy: true, ..agent(Mode::Restricted) };
    let documents = documents(&manifest.render(Some(LINE)).unwrap());
    let rule = |protocol: &str, port: u16| json!({"protocol": protocol, "port": port});
    let dns = json!([rule("UDP", 53), rule("TCP", 53), rule("UDP", 5353), rule("TCP", 5353)]);
    assert_eq!(of(&documents, "NetworkPolicy")[0]["spec"]["egress"][0]["ports"], dns);
}

/// Goal: R4: nobody asks an agent whether it is ready before it can be, so that a start leaves no warning behind; and what is applied
/// again is unchanged, for which a Secret has `data`.
#[test]
fn r4_a_start_leaves_no_warning_and_nothing_changes_by_itself() {
    let agents = documents(&agent(Mode::Restricted).render(Some(LINE)).unwrap());
    let gateways = documents(&gateway().render().unwrap());
    assert!(of(&agents, "Secret")[0].get("stringData").is_none());
    for set in [of(&agents, "Deployment")[0], of(&gateways, "StatefulSet")[0]] {
        let probe = &set["spec"]["template"]["spec"]["containers"][0]["startupProbe"];
        assert_eq!(probe["httpGet"]["path"], "/livez", "ready it may be later");
        let wait = |field: &str| probe[field].as_u64().unwrap();
        assert!(wait("initialDelaySeconds") > 0 && wait("periodSeconds") * wait("failureThreshold") >= 60);
    }
}

/// Goal: M12: who is told that an address is a pod's own is told what to give instead, also for clusters on this machine.
#[test]
fn m12_a_loopback_address_is_refused_with_what_to_give() {
    let manifest =
        AgentManifest { addresses: vec!["127.0.0.1:1".parse().unwrap()], ..agent(Mode::Restricted) };
    let text = manifest.check().unwrap_err().to_string();
    for part in ["127.0.0.1:1", "--gateway HOST:PORT", "host.docker.internal", "Nothing was registered"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

/// Goal: D13: keys by which an agent could not come back are refused: none at all, or none that signs ServiceAccount tokens.
#[test]
fn d13_keys_that_let_nobody_back_are_refused() {
    for keys in
        ["", "{}", "{\"keys\": 1}", "{\"keys\":[]}", "{\"keys\":[{}]}", "{\"keys\":[{\"kty\":\"oct\"}]}"]
    {
        let manifest = AgentManifest { keys: IssuerKeys::Given(keys.to_owned()), ..agent(Mode::Restricted) };
        assert!(matches!(manifest.check(), Err(ManifestError::Keys(_))), "{keys}");
    }
}

/// Goal: keys that are given go with the configuration, and nothing in the cluster changes for them.
#[test]
fn issuer_keys_can_be_given_as_a_file() {
    let keys = "{\"keys\": [{\"kty\": \"EC\", \"kid\": \"1\"}]}\n";
    let manifest = AgentManifest { keys: IssuerKeys::Given(keys.to_owned()), ..agent(Mode::Restricted) };
    let documents = documents(&manifest.render(Some(LINE)).unwrap());
    assert!(of(&documents, "ClusterRoleBinding").is_empty());
    let data = &of(&documents, "ConfigMap")[0]["data"];
    assert_eq!(data["jwks.json"], keys.trim());
    let config: Value = serde_saphyr::from_str(data["agent.yaml"].as_str().unwrap()).unwrap();
    assert_eq!(config["identity"]["serviceAccount"]["jwksFile"], "/etc/towline/jwks.json");
}

fn gateway() -> GatewayManifest {
    let domain = TrustDomain::new("towline.local").unwrap();
    GatewayManifest::new(vec!["gateway.example.com:8443".parse().unwrap()], domain)
}

/// Goal: the gateway in the manifest reads its configuration, and keeps what it remembers on its volume.
#[test]
fn a_gateway_keeps_its_records_on_its_volume() {
    let documents = documents(&gateway().render().unwrap());
    let text = of(&documents, "ConfigMap")[0]["data"]["gateway.yaml"].as_str().unwrap();
    let config = GatewayConfig::parse(text, "gateway.yaml").unwrap();
    let pod = &of(&documents, "StatefulSet")[0]["spec"]["template"]["spec"];
    let mounts = pod["containers"][0]["volumeMounts"].as_array().unwrap();
    let volume = mounts.iter().find(|mount| mount["name"] == "state").unwrap()["mountPath"].as_str().unwrap();
    assert!(config.state_directory.unwrap().starts_with(volume));
    let grace = pod["terminationGracePeriodSeconds"].as_u64().unwrap();
    assert!(grace > (config.drain.delay + config.drain.deadline).as_secs());
    assert!(of(&documents, "ClusterRole").is_empty() && of(&documents, "ClusterRoleBinding").is_empty());
    for storage in ["", "Gi", "1 Gi", "1Gi\nx"] {
        let manifest = GatewayManifest { storage: storage.to_owned(), ..gateway() };
        assert!(matches!(manifest.render(), Err(ManifestError::Size(_))), "{storage}");
    }
}

/// Goal: the Service listens where agents and clients are told to go, on every port that is named; keys on the volume stay the
/// gateway's alone; nobody else's namespace is changed.
#[test]
fn the_service_listens_where_it_is_said_to() {
    let addresses = ["gw.example.com:443", "10.0.0.1:8443"].map(|address| address.parse().unwrap());
    let manifest = GatewayManifest { addresses: addresses.to_vec(), ..gateway() };
    let documents = documents(&manifest.render().unwrap());
    let ports = of(&documents, "Service")[0]["spec"]["ports"].as_array().unwrap().clone();
    let shown: Vec<_> = ports
        .iter()
        .map(|port| (port["protocol"].as_str().unwrap(), port["port"].as_u64().unwrap()))
        .collect();
    assert_eq!(shown, [("TCP", 443), ("UDP", 443), ("TCP", 8443), ("UDP", 8443)]);
    let names: std::collections::HashSet<_> = ports.iter().map(|port| port["name"].to_string()).collect();
    assert_eq!(names.len(), 4);
    let pod = &of(&documents, "StatefulSet")[0]["spec"]["template"]["spec"];
    assert_eq!(pod["securityContext"]["fsGroupChangePolicy"], "OnRootMismatch");
    for namespace in ["default", "kube-system"] {
        let manifest = GatewayManifest { namespace: namespace.to_owned(), ..gateway() };
        assert!(matches!(manifest.render(), Err(ManifestError::Shared(_))), "{namespace}");
    }
}

/// A4: with a NetworkPolicy nobody but a node reaches the private port, and one slow answer takes no gateway out of service.
#[test]
fn a4_the_private_port_of_a_gateway_is_closed_to_pods() {
    let documents = documents(&GatewayManifest { network_policy: true, ..gateway() }.render().unwrap());
    let [policy] = of(&documents, "NetworkPolicy")[..] else { panic!("one NetworkPolicy") };
    let pod = &of(&documents, "StatefulSet")[0]["spec"]["template"];
    assert_eq!(policy["spec"]["podSelector"]["matchLabels"], pod["metadata"]["labels"]);
    let open =
        json!([{ "ports": [{ "protocol": "TCP", "port": 8443 }, { "protocol": "UDP", "port": 8443 }] }]);
    assert_eq!(policy["spec"]["ingress"], open);
    assert_eq!(policy["spec"]["policyTypes"], json!(["Ingress", "Egress"]));
    let probe = &pod["spec"]["containers"][0]["readinessProbe"];
    assert!(probe["failureThreshold"].as_u64().unwrap() > 1);
}

/// Goal: deploy/manifests is what this program prints. `TOWLINE_WRITE=1` writes it again.
#[test]
fn the_files_in_deploy_are_what_is_printed() {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../deploy/manifests");
    let agent = |mode| {
        let pins = Vec::new();
        let manifest = AgentManifest { pins, replicas: 2, network_policy: true, ..agent(mode) };
        let flags = match mode {
            Mode::Restricted => "",
            Mode::Impersonate => " --mode impersonate",
        };
        format!(
            "# An example: what `towline agent manifest prod-eu-1{flags} --replicas 2 --network-policy --no-secret` prints, but for the pins. The
# cluster's name, the gateway's address and trust domain (in audience) and the image are yours.
#
{}",
            manifest.render(None).unwrap()
        )
    };
    let gateway = format!(
        "# An example: what `towline gateway manifest gateway.example.com:8443 --network-policy` prints. Address and image are yours.
#
{}",
        GatewayManifest { network_policy: true, ..gateway() }.render().unwrap()
    );
    let files = [
        ("agent.yaml", agent(Mode::Restricted)),
        ("agent-impersonate.yaml", agent(Mode::Impersonate)),
        ("gateway.yaml", gateway),
    ];
    for (name, text) in files {
        let path = directory.join(name);
        if std::env::var_os("TOWLINE_WRITE").is_some_and(|value| value == "1") {
            std::fs::write(&path, &text).unwrap();
        }
        let found = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            found == text,
            "{name} is not what is printed; TOWLINE_WRITE=1 cargo test -p towline-cli writes it anew"
        );
    }
}
