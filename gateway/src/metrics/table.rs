//! The table that the gateway's metrics are written in: one row for each, from which the rest is made.
//!
//! A row is `VERB method(label: Values, …) = name, help;`, and its method does what the verb says:
//!
//! | verb | the method |
//! |---|---|
//! | `count` | counts one |
//! | `add` | counts as many as its last argument says |
//! | `guard` | counts one in a gauge until the guard that it returns is dropped |
//! | `set` | sets a gauge |
//! | `raise` | sets a gauge to 1, for good |
//! | `observe … in BUCKETS` | puts a time into a histogram of these buckets |
//! | `open` | none: a gauge whose label has any text as its value (`label: str`), for the code to set |
//!
//! The labels' names are those of the arguments, and their values those of the arguments' types. All series but those of `open` rows exist
//! from the start, so that a rate over them is right from its first event. Each is looked up once, when the metrics are made.

#![allow(clippy::expect_used, reason = "names and labels are constants, which a test registers")]

use super::labels::Label;
use prometheus::core::{Collector, MetricVec, MetricVecBuilder};
use prometheus::{IntGauge, Registry};
use std::fmt;

/// Makes the struct `Metrics` with its method `unset`, which registers everything, and the methods of the rows.
macro_rules! table {
    (@field open $($values:tt)*) => { IntGaugeVec };
    (@field observe) => { Histogram };
    (@field count $($values:tt)*) => { [IntCounter; series(&[$(<$values as Label>::ALL.len()),*])] };
    (@field add $($values:tt)*) => { table!(@field count $($values)*) };
    (@field $gauge:ident $($values:tt)*) => { [IntGauge; series(&[$(<$values as Label>::ALL.len()),*])] };

    (@make $registry:ident open $name:expr, $help:literal, $($label:ident: str)?) => {
        add($registry, IntGaugeVec::new(Opts::new($name, $help), &[$(stringify!($label)),*]))
    };
    (@make $registry:ident observe $name:expr, $help:literal, in $buckets:ident) => {
        add($registry, Histogram::with_opts(HistogramOpts::new($name, $help).buckets($buckets.to_vec())))
    };
    (@make $registry:ident count $name:expr, $help:literal, $($label:ident: $values:tt)*) => {
        resolve(
            add($registry, IntCounterVec::new(Opts::new($name, $help), &[$(stringify!($label)),*])),
            &[$(texts::<$values>()),*],
        )
    };
    (@make $registry:ident add $($rest:tt)*) => { table!(@make $registry count $($rest)*) };
    (@make $registry:ident $gauge:ident $name:expr, $help:literal, $($label:ident: $values:tt)*) => {
        resolve(
            add($registry, IntGaugeVec::new(Opts::new($name, $help), &[$(stringify!($label)),*])),
            &[$(texts::<$values>()),*],
        )
    };

    (@series $metrics:ident $method:ident $($label:ident: $values:tt)*) => {
        &$metrics.$method[index(&[$(($label.index(), <$values as Label>::ALL.len())),*])]
    };

    (@method $vis:vis open $method:ident $help:literal $($rest:tt)*) => {};
    (@method $vis:vis observe $method:ident $help:literal) => {
        #[doc = $help]
        $vis fn $method(&self, time: Duration) {
            self.$method.observe(time.as_secs_f64());
        }
    };
    (@method $vis:vis count $method:ident $help:literal $($label:ident: $values:tt)*) => {
        #[doc = $help]
        $vis fn $method(&self, $($label: $values),*) {
            table!(@series self $method $($label: $values)*).inc();
        }
    };
    (@method $vis:vis add $method:ident $help:literal $($label:ident: $values:tt)*) => {
        #[doc = $help]
        $vis fn $method(&self, $($label: $values,)* count: u64) {
            table!(@series self $method $($label: $values)*).inc_by(count);
        }
    };
    (@method $vis:vis guard $method:ident $help:literal $($label:ident: $values:tt)*) => {
        #[doc = $help]
        #[must_use]
        $vis fn $method(&self, $($label: $values),*) -> Counted {
            Counted::new(table!(@series self $method $($label: $values)*))
        }
    };
    (@method $vis:vis set $method:ident $help:literal $($label:ident: $values:tt)*) => {
        #[doc = $help]
        $vis fn $method(&self, $($label: $values,)* value: usize) {
            table!(@series self $method $($label: $values)*).set(i64::try_from(value).unwrap_or(i64::MAX));
        }
    };
    (@method $vis:vis raise $method:ident $help:literal) => {
        #[doc = $help]
        $vis fn $method(&self) {
            table!(@series self $method).set(1);
        }
    };

    ($($vis:vis $verb:ident $method:ident($($label:ident: $values:tt),*) $(in $buckets:ident)? = $name:expr, $help:literal;)*) => {
        /// Every metric of a gateway.
        pub struct Metrics {
            registry: Registry,
            $($method: table!(@field $verb $($values)*),)*
        }

        impl Metrics {
            /// Name and labels of each row.
            #[cfg(test)]
            const ROWS: &'static [(&'static str, &'static [&'static str])] = &[$(($name, &[$(stringify!($label)),*])),*];

            fn unset() -> Self {
                let registry = Registry::new();
                let r = &registry;
                Self {
                    $($method: table!(@make r $verb $name, $help, $($label: $values)* $(in $buckets)?),)*
                    registry,
                }
            }

            $(table!(@method $vis $verb $method $help $($label: $values)*);)*
        }
    };
}

pub(super) use table;

const REASON: &str = "the names in the table are valid and different: a test makes them all";

pub(super) fn register(registry: &Registry, collector: impl Collector + 'static) {
    registry.register(Box::new(collector)).expect(REASON);
}

/// Registers a metric.
pub(super) fn add<C: Collector + Clone + 'static>(registry: &Registry, metric: prometheus::Result<C>) -> C {
    let metric = metric.expect(REASON);
    register(registry, metric.clone());
    metric
}

/// How many series labels with so many values have.
pub(super) const fn series(values: &[usize]) -> usize {
    let (mut product, mut at) = (1, 0);
    while at < values.len() {
        product *= values[at];
        at += 1;
    }
    product
}

/// Where the series of these values is: of each label, where its value stands and how many there are.
pub(super) fn index(labels: &[(usize, usize)]) -> usize {
    labels.iter().fold(0, |before, (value, values)| before * values + value)
}

pub(super) fn texts<L: Label>() -> Vec<&'static str> {
    L::ALL.iter().map(|value| value.text()).collect()
}

/// Every series of a metric, in the order of [`index`].
pub(super) fn resolve<B: MetricVecBuilder, const SERIES: usize>(
    family: MetricVec<B>,
    labels: &[Vec<&'static str>],
) -> [B::M; SERIES] {
    std::array::from_fn(|mut place| {
        let mut values: Vec<&str> = Vec::new();
        for texts in labels.iter().rev() {
            values.push(texts[place % texts.len()]);
            place /= texts.len();
        }
        values.reverse();
        family.with_label_values(&values)
    })
}

/// Guard that counts one in a gauge until it is dropped.
pub struct Counted(IntGauge);

impl Counted {
    pub(super) fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl fmt::Debug for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Counted")
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}
