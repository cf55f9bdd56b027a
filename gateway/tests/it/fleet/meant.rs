//! Goal: requests that are probably mistakes are refused with the reason, and never interpreted more broadly: selectors, options, keys,
//! cluster names, foreign user names, and the gateway's own groups.

use super::{ADMIN, CLUSTERS, give_token, world};
use crate::common::{Client, World, error_of, full, text};
use http::header::WARNING;
use serde_json::{Value, json};
use towline_model::Mode;

const RULES: &str = "/apis/towline.io/v1alpha1/accessrules";

/// A world with an admin's client of the fleet's API.
struct Fleet {
    world: World,
    client: Client,
}

struct Told {
    status: u16,
    warnings: Vec<String>,
    object: Value,
}

impl Told {
    fn message(&self) -> &str {
        self.object["message"].as_str().unwrap_or_default()
    }
}

impl Fleet {
    async fn new() -> Self {
        let world = world().await;
        give_token(world.gateway.fleet().unwrap(), ADMIN, "tlat_root").await;
        let client = world.h1(None).await;
        Self { world, client }
    }

    async fn send(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Told {
        let media = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
        let all = [&[("authorization", "Bearer tlat_root"), ("content-type", media)], headers].concat();
        let answer = self.client.ask(method, path, &all, full(body.to_owned())).await;
        let status = answer.status().as_u16();
        let warnings = answer.headers().get_all(WARNING).iter();
        let warnings = warnings.map(|warning| warning.to_str().unwrap().to_owned()).collect();
        let object = serde_json::from_str(&text(answer).await).unwrap_or_default();
        Told { status, warnings, object }
    }

    async fn ask(&mut self, method: &str, path: &str, body: &Value) -> Told {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.send(method, path, &[], &body).await
    }

    async fn register(&mut self, name: &str) -> Told {
        let told = self.ask("POST", CLUSTERS, &cluster(name)).await;
        assert_eq!(told.status, 201, "{}", told.object);
        told
    }

    /// The response to a caller of a cluster that is not connected: 503 if they are authorized.
    async fn call(&self, token: &str, cluster: &str) -> u16 {
        let mut client = self.world.h1(None).await;
        let bearer = format!("Bearer {token}");
        let headers = [("authorization", bearer.as_str())];
        let path = format!("/clusters/{cluster}/version");
        client.ask("GET", &path, &headers, full("")).await.status().as_u16()
    }
}

fn object(kind: &str, name: &str, spec: Value) -> Value {
    json!({"kind": kind, "apiVersion": "towline.io/v1alpha1", "metadata": {"name": name}, "spec": spec})
}

fn cluster(name: &str) -> Value {
    object("Cluster", name, json!({"mode": Mode::Impersonate}))
}

fn rule(name: &str, effect: &str, who: (&str, &str), clusters: &[&str]) -> Value {
    object("AccessRule", name, json!({"effect": effect, who.0: [who.1], "clusters": clusters}))
}

/// Goal: D1, A12: an invalid selector or option is refused on a list and on a watch, and a dry run that is not
/// understood changes nothing.
#[tokio::test]
async fn d1_a12_what_a_query_means_is_understood_or_refused() {
    let mut fleet = Fleet::new().await;
    fleet.register("c-1").await;
    for (query, status) in [
        ("labelSelector=%2C%2C", 400),
        ("labelSelector=env+in+(prod", 400),
        ("labelSelector=a%3Db%3Dc", 400),
        ("labelSelector=bad+key%3Dx", 400),
        ("labelSelector=env%3Da+b", 400),
        ("labelSelector=!%00", 400),
        ("labelSelector=%ff", 400),
        ("labelSelector=a&labelSelector=b", 400),
        ("labelselector=a", 400),
        ("fieldSelector=metadata.name", 400),
        ("limit=-1", 400),
        ("resourceVersion=x", 400),
        ("includeObject=Everything", 400),
        ("resourceVersionMatch=Wat", 422),
    ] {
        for watch in ["", "&watch=1"] {
            let told = fleet.ask("GET", &format!("{CLUSTERS}?{query}{watch}"), &Value::Null).await;
            assert_eq!((told.status, &told.object["kind"]), (status, &json!("Status")), "{query}{watch}");
            assert!(!told.message().is_empty(), "{query}");
        }
    }
    let one = format!("{CLUSTERS}/c-1");
    for query in ["dryRun=%ff", "dryrun=All", "dryRun=", "dryRun=all", "dryRun=All&dryRun=None"] {
        let told = fleet.ask("DELETE", &format!("{one}?{query}"), &Value::Null).await;
        assert_eq!(told.status, 400, "{query}: {}", told.object);
    }
    for options in [
        json!({"dryRun": "All"}),
        json!({"dryRun": [1]}),
        json!({"preconditions": {"UID": "other"}}),
        json!({"preconditions": "other"}),
        json!({"precondition": {"uid": "other"}}),
        json!({"kind": "Cluster"}),
        json!([]),
        json!({"preconditions": []}),
    ] {
        let told = fleet.ask("DELETE", &one, &options).await;
        assert_eq!(told.status, 400, "{options}: {}", told.object);
    }
    let dry = fleet.ask("DELETE", &format!("{one}?dryRun=All"), &json!({"dryRun": ["All"]})).await;
    assert_eq!(dry.status, 200);
    let told =
        fleet.ask("GET", &format!("{CLUSTERS}?labelSelector=!env&limit=5&watch=false"), &Value::Null).await;
    assert_eq!((told.status, told.object["items"].as_array().map(Vec::len)), (200, Some(5)));
    assert_eq!(fleet.ask("GET", &format!("{one}?resourceVersion=x"), &Value::Null).await.status, 400);
    let usual = json!({"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background", "gracePeriodSeconds": 0});
    assert_eq!(fleet.ask("DELETE", &one, &usual).await.status, 200);
    fleet.world.gateway.shutdown().await;
}

/// Goal: A11, AD-03: a duplicate key is refused with every verb.
#[tokio::test]
async fn a11_a_key_given_twice_is_refused() {
    let mut fleet = Fleet::new().await;
    fleet.register("c-1").await;
    let twice = r#"{"kind":"Cluster","apiVersion":"towline.io/v1alpha1","metadata":{"name":"c-NAME"},"spec":{"mode":"restricted","mode":"impersonate"}}"#;
    let one = format!("{CLUSTERS}/c-1");
    for (method, path, body) in [
        ("POST", CLUSTERS, twice.replace("NAME", "2")),
        ("POST", &format!("{CLUSTERS}?fieldValidation=Ignore"), twice.replace("NAME", "2")),
        ("PUT", &one, twice.replace("NAME", "1")),
        ("PATCH", &one, r#"{"spec":{"description":"a","description":"b"}}"#.to_owned()),
        ("DELETE", &one, r#"{"preconditions":{"uid":"x"},"preconditions":{}}"#.to_owned()),
    ] {
        let told = fleet.send(method, path, &[], &body).await;
        assert_eq!(told.status, 400, "{method} {path}: {}", told.object);
        assert!(told.message().contains("strict decoding error: duplicate field"), "{}", told.message());
    }
    let told = fleet.ask("GET", &one, &Value::Null).await;
    assert_eq!((told.status, &told.object["metadata"]["generation"]), (200, &json!(1)));
    assert_eq!(fleet.ask("GET", &format!("{CLUSTERS}/c-2"), &Value::Null).await.status, 404);
    fleet.world.gateway.shutdown().await;
}

/// Goal: FR-08: impersonation is refused with a message, on every path, and without effect.
#[tokio::test]
async fn fr08_nobody_acts_as_somebody_else() {
    let mut fleet = Fleet::new().await;
    fleet.register("c-1").await;
    for name in [
        "Impersonate-User",
        "impersonate-group",
        "Impersonate-Uid",
        "Impersonate-Extra-Scopes",
        "Impersonate-Future",
    ] {
        let headers = [(name, "nobody")];
        for (method, path, body) in [
            ("GET", CLUSTERS, String::new()),
            ("GET", "/apis", String::new()),
            ("GET", "/version", String::new()),
            ("POST", CLUSTERS, cluster("c-2").to_string()),
            ("DELETE", &format!("{CLUSTERS}/c-1"), String::new()),
        ] {
            let told = fleet.send(method, path, &headers, &body).await;
            assert_eq!(told.status, 403, "{name} {method} {path}: {}", told.object);
            assert!(told.message().contains("--as") && told.warnings.len() == 1, "{}", told.message());
        }
    }
    assert_eq!(fleet.ask("GET", &format!("{CLUSTERS}/c-1"), &Value::Null).await.status, 200);
    assert_eq!(fleet.ask("GET", &format!("{CLUSTERS}/c-2"), &Value::Null).await.status, 404);
    fleet.world.gateway.shutdown().await;
}

/// Goal: M9: all invalid fields of an object are reported at once, each with its value and the valid ones.
#[tokio::test]
async fn m9_all_mistakes_are_told_with_their_values() {
    let mut fleet = Fleet::new().await;
    let clusters = "/apis/towline.io/v1alpha1/clusters";
    let spec = json!({"maxAgents": -1, "deletionProtection": "yes", "description": 5, "mode": "restricted"});
    let told = fleet.ask("POST", clusters, &object("Cluster", "c-1", spec)).await;
    assert_eq!(told.status, 422, "{}", told.object);
    for part in [
        "spec.maxAgents: Invalid value: -1: must be 1 to 256",
        "spec.deletionProtection: Invalid value: \"yes\": must be true or false",
        "spec.description: Invalid value: 5: must be a string",
    ] {
        assert!(told.message().contains(part), "{part}: {}", told.message());
    }
    assert_eq!(told.object["details"]["causes"].as_array().map(Vec::len), Some(3), "{}", told.object);
    let told = fleet.ask("POST", clusters, &object("Cluster", "c-1", json!({"maxAgents": 257}))).await;
    assert!(
        told.message().contains("spec.maxAgents: Invalid value: 257: must be 1 to 256"),
        "{}",
        told.message()
    );
    let told = fleet.ask("POST", clusters, &object("Cluster", "c-1", json!({"maxAgents": 256}))).await;
    assert_eq!(told.status, 201, "{}", told.object);
}

/// Goal: D2: a rule that can match nothing is refused, an Allow and a Deny alike; a rule for an unknown cluster causes a warning.
#[tokio::test]
async fn d2_a_rule_names_what_can_be() {
    let mut fleet = Fleet::new().await;
    fleet.register("c-1").await;
    for effect in ["Allow", "Deny"] {
        for (who, clusters, expected) in [
            (
                ("groups", "ops"),
                &["prod-*"][..],
                "\"prod-*\" is no name of a cluster; write \"*\" for every one, or a name; patterns are not supported",
            ),
            (("groups", "ops"), &["c-1", "no such cluster!"], "\"no such cluster!\" is no name of a cluster"),
            (("groups", "ops"), &["C-1"], "\"C-1\" is no name of a cluster"),
            (("groups", "ops"), &[""], "\"\" is no name of a cluster"),
            (("groups", "ops"), &[], "names no clusters"),
            (("groups", "ops-*"), &["*"], "patterns are not supported"),
            (("users", "system:admin"), &["*"], "begins with system:"),
            (("groups", "System:authenticated"), &["*"], "begins with system:"),
            (("users", "jane "), &["*"], "begins or ends with a space"),
        ] {
            let told = fleet.ask("POST", RULES, &rule("r", effect, who, clusters)).await;
            assert_eq!(told.status, 422, "{effect} {who:?} {clusters:?}: {}", told.object);
            assert!(told.message().contains(expected), "{effect} {clusters:?}: {}", told.message());
        }
    }
    // A revocation of whoever cannot be there would take nothing away; whoever can be there can be revoked.
    for (name, status) in [
        ("*", 422),
        ("system:admin", 422),
        ("", 422),
        ("a\nb", 422),
        ("*.ci.example.com", 201),
        (" joe", 201),
    ] {
        let body = json!({"kind": "Revocation", "apiVersion": "towline.io/v1alpha1", "spec": {"user": {"name": name}}});
        let told = fleet.ask("POST", "/apis/towline.io/v1alpha1/revocations", &body).await;
        assert_eq!(told.status, status, "{name:?}: {}", told.object);
    }
    let told = fleet.ask("POST", RULES, &rule("r", "Deny", ("groups", "*"), &["*", "c-1", "prod"])).await;
    assert_eq!((told.status, told.warnings.len()), (201, 0), "{:?}", told.warnings);
    let told = fleet.ask("POST", RULES, &rule("s", "Allow", ("groups", "ops"), &["c-1", "c-2", "c-3"])).await;
    assert_eq!(told.status, 201);
    assert_eq!(told.warnings.len(), 2, "{:?}", told.warnings);
    assert!(told.warnings[0].contains("there is no cluster \\\"c-2\\\" yet"), "{:?}", told.warnings);
    let patch = json!({"spec": {"clusters": ["c-9"]}});
    let told = fleet.ask("PATCH", &format!("{RULES}/s"), &patch).await;
    assert!(told.status == 200 && told.warnings.len() == 1, "{:?}", told.warnings);
    let told = fleet.ask("PATCH", &format!("{RULES}/s"), &json!({"spec": {"clusters": ["c-*"]}})).await;
    assert_eq!(told.status, 422);
    fleet.world.gateway.shutdown().await;
}

/// Goal: S16: an Allow by name applies to the cluster that had the name, and ends with it; a Deny applies to every cluster of the name. A warning says so, and
/// adding the name again makes the rule apply to the new cluster.
#[tokio::test]
async fn s16_an_allow_ends_with_its_cluster() {
    let mut fleet = Fleet::new().await;
    for (user, token) in [("jane", "tlat_jane"), ("joe", "tlat_joe")] {
        give_token(fleet.world.gateway.fleet().unwrap(), user, token).await;
    }
    let only = ("users", "jane");
    for (name, effect, who) in
        [("one", "Allow", only), ("no", "Deny", ("users", "joe")), ("joes", "Allow", ("users", "joe"))]
    {
        // Written before the cluster is there: for the first that comes.
        let clusters = if name == "joes" { ["*"] } else { ["c-1"] };
        assert_eq!(fleet.ask("POST", RULES, &rule(name, effect, who, &clusters)).await.status, 201);
    }
    assert!(fleet.register("c-1").await.warnings.is_empty());
    assert_eq!((fleet.call("tlat_jane", "c-1").await, fleet.call("tlat_joe", "c-1").await), (503, 403));
    assert_eq!(fleet.ask("DELETE", &format!("{CLUSTERS}/c-1"), &Value::Null).await.status, 200);
    let told = fleet.ask("GET", &format!("{RULES}/one"), &Value::Null).await;
    assert_eq!(told.object["status"]["ended"], json!(["c-1"]));
    assert_eq!(told.object["spec"]["clusters"], json!(["c-1"]), "what stands in Git is what is there");

    let told = fleet.register("c-1").await;
    assert!(told.warnings.len() == 1 && told.warnings[0].contains("\\\"one\\\""), "{:?}", told.warnings);
    assert_eq!((fleet.call("tlat_jane", "c-1").await, fleet.call("tlat_joe", "c-1").await), (403, 403));
    // A change of something else is no new word on the cluster.
    for patch in [json!({"metadata": {"labels": {"a": "b"}}}), json!({"spec": {"clusters": ["c-1", "far"]}})]
    {
        let told = fleet.ask("PATCH", &format!("{RULES}/one"), &patch).await;
        assert_eq!((told.status, told.warnings.len()), (200, 1), "{:?}", told.warnings);
        assert_eq!(fleet.call("tlat_jane", "c-1").await, 403);
    }
    for clusters in [json!(["far"]), json!(["far", "c-1"])] {
        let told =
            fleet.ask("PATCH", &format!("{RULES}/one"), &json!({"spec": {"clusters": clusters}})).await;
        assert_eq!((told.status, told.warnings.len()), (200, 0), "{:?}", told.warnings);
    }
    assert_eq!(fleet.call("tlat_jane", "c-1").await, 503);
    assert!(fleet.ask("GET", &format!("{RULES}/one"), &Value::Null).await.object["status"].is_null());
    fleet.world.gateway.shutdown().await;
}

/// Goal: S12: only the gateway's own CA and records may assign its own groups: a certificate of
/// `tls.front.clientCA` with such a group is treated as absent.
#[tokio::test]
async fn s12_a_foreign_ca_makes_nobody_an_admin() {
    let fleet = Fleet::new().await;
    for path in [CLUSTERS, "/clusters/far/version"] {
        let mut mallory = fleet.world.h1(Some("mallory")).await;
        let (status, code, message) = error_of(mallory.get(path).await).await;
        assert_eq!((status, code.as_str()), (401, "TL_UNAUTHENTICATED"), "{message}");
        assert!(message.contains("\"towline:admins\" begins with towline:"), "{message}");
    }
    // The same CA's other words count as ever.
    let mut jane = fleet.world.h1(Some("jane")).await;
    assert_eq!(jane.get("/clusters/far/version").await.status(), 503);
    let refused = jane.get(CLUSTERS).await;
    assert_eq!(refused.status(), 403);
    drop(refused);
    fleet.world.gateway.shutdown().await;
}

/// Goal: D19: kubectl's own requests are answered: the version, the caller's identity, their permissions; but nothing of a cluster.
#[tokio::test]
async fn d19_kubectls_own_questions_are_answered() {
    let mut fleet = Fleet::new().await;
    let mut nobody = fleet.world.h1(None).await;
    assert_eq!(nobody.get("/version").await.status(), 401);
    let told = fleet.ask("GET", "/version?timeout=32s", &Value::Null).await;
    assert_eq!(told.status, 200);
    assert!(told.object["gitVersion"].as_str().unwrap().ends_with("+towline"), "{}", told.object);
    assert_eq!(fleet.ask("POST", "/version", &Value::Null).await.status, 405);

    for version in ["v1", "v1beta1"] {
        let path = format!("/apis/authentication.k8s.io/{version}/selfsubjectreviews");
        let asked =
            json!({"kind": "SelfSubjectReview", "apiVersion": format!("authentication.k8s.io/{version}")});
        let told = fleet.ask("POST", &path, &asked).await;
        assert_eq!((told.status, &told.object["status"]["userInfo"]["username"]), (201, &json!(ADMIN)));
    }
    let mut may = async |group: &str, resource: &str, verb: &str| {
        let attributes = json!({"group": group, "resource": resource, "verb": verb, "namespace": "default"});
        let asked = json!({"kind": "SelfSubjectAccessReview", "apiVersion": "authorization.k8s.io/v1", "spec": {"resourceAttributes": attributes}});
        let told = fleet.ask("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", &asked).await;
        assert_eq!(told.status, 201, "{}", told.object);
        told.object["status"]["allowed"].as_bool().unwrap()
    };
    assert!(may("towline.io", "clusters", "delete").await && may("*", "*", "*").await);
    assert!(!may("", "pods", "list").await && !may("apps", "deployments", "get").await);

    // What kubectl describe asks by itself has no answer and no warning; what lost its prefix has both.
    let events =
        "/api/v1/events?fieldSelector=involvedObject.name%3Dc-1%2CinvolvedObject.kind%3DCluster&limit=500";
    let told = fleet.ask("GET", events, &Value::Null).await;
    assert_eq!((told.status, told.warnings.len()), (404, 0), "{:?}", told.warnings);
    for lost in ["/api/v1/pods", "/api/v1/events", "/apis/apps/v1/deployments", "/readyz"] {
        let told = fleet.ask("GET", lost, &Value::Null).await;
        assert_eq!((told.status, told.warnings.len()), (404, 1), "{lost}");
    }
    let told = fleet.ask("GET", "/apis/towline.io/v1alpha1", &Value::Null).await;
    let is_of = |category: &str, kind: &str| {
        let resources = told.object["resources"].as_array().unwrap();
        let resource = resources.iter().find(|resource| resource["kind"] == kind).unwrap();
        resource["categories"].as_array().is_some_and(|categories| categories.contains(&json!(category)))
    };
    // `kubectl delete all --all` is a thoughtless one.
    for (kind, all) in [("JoinToken", true), ("Cluster", false), ("AccessRule", false), ("Revocation", false)]
    {
        assert!(is_of("all", kind) == all && is_of("towline", kind), "{kind}");
    }
    fleet.world.gateway.shutdown().await;
}

/// Goal: D18: a gateway without a state directory says that it has no fleet API, and why.
#[tokio::test]
async fn d18_a_gateway_without_a_fleet_says_so() {
    let world = World::start().await;
    for path in [CLUSTERS, "/apis/towline.io/v1alpha1/selfsubjectreviews", "/apis/towline.io"] {
        let mut jane = world.h1(Some("jane")).await;
        let (status, code, message) = error_of(jane.get(path).await).await;
        assert_eq!((status, code.as_str()), (404, "TL_BAD_PATH"));
        assert!(message.contains("no fleet API") && message.contains("stateDirectory"), "{message}");
    }
    let (_, _, message) = error_of(world.h1(Some("jane")).await.get("/api/v1/pods").await).await;
    assert!(message.contains("the path names no cluster"), "{message}");
    world.gateway.shutdown().await;
}
