//! Pod options that agent and gateway share: image, placement, resources and labels.

use super::ManifestError;
use minijinja::{Value, context};
use std::collections::BTreeSet;
use std::str::FromStr;
use towline_settings::units::quantity;

/// What a taint does.
const EFFECTS: [&str; 3] = ["NoSchedule", "PreferNoSchedule", "NoExecute"];

/// The pod options of a manifest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodOptions {
    /// Secrets of the type `kubernetes.io/dockerconfigjson` in the namespace, for the registry of the image.
    pub pull_secrets: Vec<String>,
    /// Labels that a node must have.
    pub node_selector: Vec<Label>,
    pub tolerations: Vec<Toleration>,
    pub priority_class: Option<String>,
    /// On every object and on the pod.
    pub labels: Vec<Label>,
    pub resources: Resources,
    /// Whether the platform chooses user and groups, like OpenShift, which refuses explicit ones.
    pub platform_uid: bool,
}

/// `KEY=VALUE` as Kubernetes' labels are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    pub key: String,
    pub value: String,
}

/// `KEY[=VALUE][:EFFECT]`, as `kubectl taint` writes taints; `*` stands for every key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Toleration {
    /// None = every taint.
    pub key: Option<String>,
    /// None = whatever its value.
    pub value: Option<String>,
    /// None = every effect.
    pub effect: Option<String>,
}

/// The container's requests and limits as Kubernetes quantities. `None` = the default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    pub cpu_request: Option<String>,
    pub memory_request: Option<String>,
    pub cpu_limit: Option<String>,
    pub memory_limit: Option<String>,
}

/// The default resources of a program's container.
pub(super) struct Defaults {
    pub(super) cpu: &'static str,
    pub(super) memory: &'static str,
    /// In MiB.
    pub(super) memory_limit: u64,
    /// What the configuration takes by default, of a given memory limit half, in MiB.
    pub(super) own_memory: u64,
    /// The least memory with which the program runs, in MiB.
    pub(super) memory_least: u64,
}

impl FromStr for Label {
    type Err = ManifestError;

    fn from_str(text: &str) -> Result<Self, ManifestError> {
        let label = text.split_once('=').filter(|(key, value)| is_key(key) && is_value(value));
        let (key, value) = label.ok_or_else(|| ManifestError::Label(text.to_owned()))?;
        Ok(Self { key: key.to_owned(), value: value.to_owned() })
    }
}

impl FromStr for Toleration {
    type Err = ManifestError;

    fn from_str(text: &str) -> Result<Self, ManifestError> {
        let wrong = || ManifestError::Toleration(text.to_owned());
        let (taint, effect) =
            text.split_once(':').map_or((text, None), |(taint, effect)| (taint, Some(effect)));
        if effect.is_some_and(|effect| !EFFECTS.contains(&effect)) {
            return Err(wrong());
        }
        let (key, value) = taint.split_once('=').map_or((taint, None), |(key, value)| (key, Some(value)));
        let every = key == "*";
        if every && value.is_some() || !every && !is_key(key) || value.is_some_and(|value| !is_value(value)) {
            return Err(wrong());
        }
        let owned = |text: &str| text.to_owned();
        Ok(Self { key: (!every).then(|| owned(key)), value: value.map(owned), effect: effect.map(owned) })
    }
}

impl FromStr for Resources {
    type Err = ManifestError;

    /// `requests.cpu=100m,limits.memory=1Gi`, in any order, each at most once.
    fn from_str(text: &str) -> Result<Self, ManifestError> {
        let wrong = || ManifestError::Resources(text.to_owned());
        let mut resources = Self::default();
        for part in text.split(',') {
            let (what, quantity) = part.split_once('=').ok_or_else(wrong)?;
            let place = match what {
                "requests.cpu" => &mut resources.cpu_request,
                "requests.memory" => &mut resources.memory_request,
                "limits.cpu" => &mut resources.cpu_limit,
                "limits.memory" => &mut resources.memory_limit,
                _ => return Err(wrong()),
            };
            let fits = if what.ends_with("cpu") { is_cpu(quantity) } else { bytes(quantity).is_some() };
            if !fits || place.replace(quantity.to_owned()).is_some() {
                return Err(wrong());
            }
        }
        Ok(resources)
    }
}

impl PodOptions {
    /// Validates everything.
    pub(super) fn check(&self, defaults: &Defaults) -> Result<(), ManifestError> {
        for (what, names) in
            [("the pull secret", &self.pull_secrets), ("the priority class", &self.priority_class_list())]
        {
            for name in names {
                let dotted = |part: &str| super::check_name(what, part, 63).is_ok();
                if name.len() > 253 || !name.split('.').all(dotted) {
                    return Err(ManifestError::Name { what, text: name.clone(), most: 253 });
                }
            }
        }
        let own = [super::NAME_LABEL, super::SECURITY_LABEL];
        if let Some(own) = self.labels.iter().find(|label| own.contains(&label.key.as_str())) {
            return Err(ManifestError::OwnLabel(own.key.clone()));
        }
        for labels in [&self.labels, &self.node_selector] {
            let mut seen = BTreeSet::new();
            if let Some(twice) = labels.iter().find(|label| !seen.insert(&label.key)) {
                return Err(ManifestError::TwiceLabel(twice.key.clone()));
            }
        }
        let limit = self.memory_limit(defaults);
        if limit < defaults.memory_least << 20 {
            let given = self.resources.memory_limit.clone().unwrap_or_default();
            return Err(ManifestError::Memory { given, least: defaults.memory_least });
        }
        let asked = self.resources.memory_request.as_deref().and_then(bytes);
        if asked.is_some_and(|asked| asked > limit) {
            return Err(ManifestError::MoreThanLimit);
        }
        Ok(())
    }

    fn priority_class_list(&self) -> Vec<String> {
        self.priority_class.iter().cloned().collect()
    }

    /// The most memory that the container may have, in bytes.
    pub(super) fn memory_limit(&self, defaults: &Defaults) -> u64 {
        let given = self.resources.memory_limit.as_deref().and_then(bytes);
        given.unwrap_or(defaults.memory_limit << 20)
    }

    /// The program's own memory limit in MiB; `None` if the default fits.
    pub(super) fn own_memory(&self) -> Option<u64> {
        let given = self.resources.memory_limit.as_deref().and_then(bytes)?;
        Some(given >> 21)
    }

    /// What the templates know of it.
    pub(super) fn values(&self, defaults: &Defaults) -> Value {
        let Self { pull_secrets, node_selector, tolerations, priority_class, labels, .. } = self;
        let pairs = |labels: &[Label]| -> Vec<Value> {
            labels.iter().map(|Label { key, value }| context! { key, value }).collect()
        };
        let tolerations: Vec<Value> = tolerations
            .iter()
            .map(|Toleration { key, value, effect }| context! { key, value, effect })
            .collect();
        let Resources { cpu_request, memory_request, cpu_limit, memory_limit } = &self.resources;
        context! {
            pull_secrets,
            tolerations,
            priority_class,
            node_selector => pairs(node_selector),
            labels => pairs(labels),
            platform_uid => self.platform_uid,
            resources => context! {
                cpu_request => cpu_request.as_deref().unwrap_or(defaults.cpu),
                memory_request => memory_request.as_deref().unwrap_or(defaults.memory),
                cpu_limit,
                memory_limit => memory_limit.clone().unwrap_or_else(|| shown(defaults.memory_limit)),
                own_memory => shown(self.own_memory().unwrap_or(defaults.own_memory)),
            },
        }
    }
}

/// MiB as Kubernetes writes them, in the largest unit that is whole.
fn shown(mib: u64) -> String {
    if mib.is_multiple_of(1024) { format!("{}Gi", mib / 1024) } else { format!("{mib}Mi") }
}

/// `[PREFIX/]NAME`
fn is_key(text: &str) -> bool {
    let (prefix, name) = text.split_once('/').map_or((None, text), |(prefix, name)| (Some(prefix), name));
    let domain = |text: &str| {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
        !text.is_empty() && text.len() <= 253 && text.chars().all(plain)
    };
    prefix.is_none_or(domain) && !name.is_empty() && is_value(name)
}

fn is_value(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let edge = |byte: Option<&u8>| byte.is_none_or(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    bytes.len() <= 63 && text.bytes().all(inner) && edge(bytes.first()) && edge(bytes.last())
}

/// `2`, `0.5`, `500m`
fn is_cpu(text: &str) -> bool {
    let number = text.strip_suffix('m').unwrap_or(text);
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let (whole, rest) = number.split_once('.').map_or((number, None), |(whole, rest)| (whole, Some(rest)));
    let fits = digits(whole) && rest.is_none_or(digits) && !(text.ends_with('m') && rest.is_some());
    fits && number.bytes().any(|byte| byte.is_ascii_digit() && byte != b'0')
}

/// The bytes of `128Mi`, `1Gi`, `500M`, `1000000`.
fn bytes(text: &str) -> Option<u64> {
    const UNITS: [(&str, u64); 7] = [
        ("", 1),
        ("k", 1_000),
        ("M", 1_000_000),
        ("G", 1_000_000_000),
        ("Ki", 1 << 10),
        ("Mi", 1 << 20),
        ("Gi", 1 << 30),
    ];
    quantity(text, &UNITS).filter(|bytes| *bytes > 0 && !text.contains(' '))
}
