//! One description of a section: struct, reader, printer and schema come from it.

/// The name of a key in a file: that of its field, in camel case.
#[must_use]
#[doc(hidden)]
pub fn key_of(field: &str) -> String {
    let mut parts = field.split('_');
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |mut key, part| {
        let mut letters = part.chars();
        key.extend(letters.next().map(|first| first.to_ascii_uppercase()));
        key.push_str(letters.as_str());
        key
    })
}

/// Describes a section of a configuration, and generates its struct.
///
/// ```ignore
/// section! {
///     /// What the section is about.
///     #[derive(Clone, Debug)]
///     #[section(default, check)]
///     pub struct Example {
///         /// A key without a default is required, unless its type is an `Option`, a `Vec` or a section without required keys.
///         pub name: String;
///         /// The key's name, if it is not the field's name in camel case; and its text form, if it is not that of the type.
///         pub client_ca ["clientCA"]: Option<Host> as Each<Text>;
///         /// A default, which may use fields above that have a default; and the legal range.
///         pub places: usize = 16, in 1..=1024;
///         pub reserve: usize = places / 4;
///         @ /// A field that is not in the file.
///         pub places: Places;
///     }
/// }
/// ```
///
/// `#[section(default)]` implements `Default`: each key has one. `#[section(check)]` calls `self.check(&Section)`, a method that
/// reports contradictions.
///
/// A check runs also when values cannot be read, so that all mistakes are told at once. A stand-in is in the place of such a value:
/// its default, or a legal value of the type; a list has as many items as are written. What a check says of a key with a stand-in is
/// not told. So it names every key that it looks at ([`Section::contradiction`](crate::Section::contradiction)), or asks
/// ([`Section::knows`](crate::Section::knows), [`Section::known`](crate::Section::known)).
#[macro_export]
macro_rules! section {
    (
        $(#[doc = $about:literal])*
        $(#[derive($($derive:ident),+ $(,)?)])?
        $(#[section($($flag:ident),+)])?
        $vis:vis struct $name:ident {
            $(
                $(#[doc = $doc:literal])*
                $fvis:vis $field:ident $([$key:literal])? : $type:ty $(as $how:ty)? $(= $default:expr)? $(, in $range:expr)?;
            )*
            $(
                @ $(#[doc = $sdoc:literal])*
                $svis:vis $skip:ident : $stype:ty;
            )*
        }
    ) => {
        $(#[doc = $about])*
        $(#[derive($($derive),+)])?
        $vis struct $name {
            $(
                $(#[doc = $doc])*
                $(#[doc = concat!("\nDefault: `", stringify!($default), "`.")])?
                $(#[doc = concat!("\nLegal: `", stringify!($range), "`.")])?
                $fvis $field: $type,
            )*
            $(
                $(#[doc = $sdoc])*
                $svis $skip: $stype,
            )*
        }

        $crate::section! { @reads $name [$($($flag)+)?] [concat!($($about, "\n",)* "")]
            { $($field [$($key)?] [$type] [$($how)?] [$($default)?] [$($range)?] [concat!($($doc, "\n",)* "")])* }
            { $($skip)* }
        }
        $crate::section! { @default [$($($flag)+)?] $name { $($field [$type] [$($default)?])* } { $($skip)* } }
    };

    (
        @reads $name:ident $flags:tt [$about:expr]
        { $($field:ident $key:tt [$type:ty] $how:tt $default:tt $range:tt [$doc:expr])* }
        { $($skip:ident)* }
    ) => {
        impl $crate::Reads<$name> for $crate::Own {
            const REQUIRED: bool = false $(|| $crate::section!(@required [$type] $how $default))*;

            fn read(spot: &$crate::Spot<'_>) -> Option<$name> {
                let section = $crate::Section::open(spot)?;
                $(
                    let $field = {
                        let spot = section.spot(&$crate::section!(@key $field $key));
                        let spot = $crate::section!(@legal spot [$type] $how $range);
                        let value = $crate::section!(@take spot [$type] $how $default $range);
                        section.follow(stringify!($field), &spot, stringify!($default));
                        value
                    };
                )*
                section.close();
                let value = $name {
                    $($field: $crate::section!(@give $field $default),)*
                    $($skip: ::core::default::Default::default(),)*
                };
                $crate::section!(@check value section $flags);
                Some(value)
            }

            fn absent(spot: &$crate::Spot<'_>) -> Option<$name> {
                <Self as $crate::Reads<$name>>::read(spot)
            }

            fn stand_in() -> Option<$name> {
                $(let $field: $type = $crate::section!(@stand_in [$type] $how $default);)*
                Some($name { $($field,)* $($skip: ::core::default::Default::default(),)* })
            }

            fn check(value: &$name, spot: &$crate::Spot<'_>) {
                let Some(section) = $crate::Section::open(spot) else { return };
                $({
                    let spot = section.spot(&$crate::section!(@key $field $key));
                    <$crate::section!(@how $how) as $crate::Reads<$type>>::check(&value.$field, &spot);
                    let _within = $crate::section!(@within spot (&value.$field) [$type] $how $range);
                })*
                $crate::section!(@check value section $flags);
            }

            fn show(value: &$name) -> $crate::Shown {
                $crate::Shown::Section(vec![
                    $((
                        $crate::section!(@key $field $key),
                        <$crate::section!(@how $how) as $crate::Reads<$type>>::show(&value.$field),
                    ),)*
                ])
            }

            fn schema() -> $crate::Schema {
                let section = $crate::Schema::section($about);
                $(
                    $crate::section!(@let $field [$type] $default);
                    let section = {
                        let schema = <$crate::section!(@how $how) as $crate::Reads<$type>>::schema();
                        let schema = schema.describe($doc);
                        let schema = $crate::section!(@schema schema $field [$type] $how $default);
                        let schema = $crate::section!(@range schema [$type] $how $range);
                        let required = $crate::section!(@required [$type] $how $default);
                        section.property(&$crate::section!(@key $field $key), schema, required)
                    };
                )*
                section
            }
        }
    };

    (@how []) => { $crate::Own };
    (@how [$how:ty]) => { $how };

    (@key $field:ident []) => { $crate::key_of(stringify!($field)) };
    (@key $field:ident [$key:literal]) => { ::std::string::String::from($key) };

    (@required [$type:ty] $how:tt [$default:expr]) => { false };
    (@required [$type:ty] $how:tt []) => { <$crate::section!(@how $how) as $crate::Reads<$type>>::REQUIRED };

    (@let $field:ident [$type:ty] []) => {};
    (@let $field:ident [$type:ty] [$default:expr]) => { let $field: $type = $default; };

    (@schema $schema:ident $field:ident [$type:ty] $how:tt []) => { $schema };
    (@schema $schema:ident $field:ident [$type:ty] $how:tt [$default:expr]) => {
        $schema.default(&<$crate::section!(@how $how) as $crate::Reads<$type>>::show(&$field))
    };

    (@range $schema:ident [$type:ty] $how:tt []) => { $schema };
    (@range $schema:ident [$type:ty] $how:tt [$range:expr]) => {
        $schema.range(&$crate::legal::<$crate::section!(@how $how), $type>(&$range))
    };

    (@within $spot:ident ($value:expr) [$type:ty] $how:tt []) => {{
        let _: &$type = $value;
        true
    }};
    (@within $spot:ident ($value:expr) [$type:ty] $how:tt [$range:expr]) => {
        $crate::within::<$crate::section!(@how $how), $type>(&$spot, $value, &$range)
    };

    (@legal $spot:ident [$type:ty] $how:tt []) => { $spot };
    (@legal $spot:ident [$type:ty] $how:tt [$range:expr]) => {
        $spot.legal(&$crate::legal::<$crate::section!(@how $how), $type>(&$range))
    };

    (@take $spot:ident [$type:ty] $how:tt [$default:expr] $range:tt) => {{
        let read = $crate::optional::<$crate::section!(@how $how), $type>(&$spot);
        match read.filter(|value| $crate::section!(@within $spot (value) [$type] $how $range)) {
            Some(value) => value,
            None => $default,
        }
    }};
    (@take $spot:ident [$type:ty] $how:tt [] $range:tt) => {{
        let read = $crate::required::<$crate::section!(@how $how), $type>(&$spot);
        let read = read.filter(|value| $crate::section!(@within $spot (value) [$type] $how $range));
        read.or_else(<$crate::section!(@how $how) as $crate::Reads<$type>>::stand_in)
    }};

    (@stand_in [$type:ty] $how:tt [$default:expr]) => { $default };
    (@stand_in [$type:ty] $how:tt []) => { <$crate::section!(@how $how) as $crate::Reads<$type>>::stand_in()? };

    (@give $field:ident [$default:expr]) => { $field };
    (@give $field:ident []) => { $field? };

    (@check $value:ident $section:ident []) => {};
    (@check $value:ident $section:ident [default $($flag:ident)*]) => {
        $crate::section!(@check $value $section [$($flag)*]);
    };
    (@check $value:ident $section:ident [check $($flag:ident)*]) => {
        $value.check(&$section);
    };

    (@default [] $($rest:tt)*) => {};
    (@default [check $($flag:ident)*] $($rest:tt)*) => {
        $crate::section!(@default [$($flag)*] $($rest)*);
    };
    (@default [default $($flag:ident)*] $name:ident { $($field:ident [$type:ty] [$($default:expr)?])* } { $($skip:ident)* }) => {
        impl ::core::default::Default for $name {
            fn default() -> Self {
                $(let $field: $type = $crate::section!(@or_default [$($default)?]);)*
                Self { $($field,)* $($skip: ::core::default::Default::default(),)* }
            }
        }
    };
    (@or_default []) => { ::core::default::Default::default() };
    (@or_default [$default:expr]) => { $default };
}

/// Describes a key's possible words, and generates their reader: `as NAME` in a [`section!`].
///
/// ```ignore
/// words! {
///     pub ModeWords for Mode {
///         /// The caller's own credential goes through.
///         Restricted = "restricted",
///         /// The agent impersonates the caller.
///         Impersonate = "impersonate",
///     }
/// }
/// ```
#[macro_export]
macro_rules! words {
    (
        $vis:vis $way:ident for $type:ty {
            $($(#[doc = $doc:literal])+ $variant:ident = $word:literal),+ $(,)?
        }
    ) => {
        /// The text form of these words.
        #[derive(Clone, Copy, Debug)]
        $vis struct $way;

        impl $crate::Reads<$type> for $way {
            fn read(spot: &$crate::Spot<'_>) -> Option<$type> {
                const WORDS: &[&str] = &[$($word),+];
                match spot.word(WORDS)? {
                    $($word => Some(<$type>::$variant),)+
                    _ => None,
                }
            }

            fn stand_in() -> Option<$type> {
                [$(<$type>::$variant),+].into_iter().next()
            }

            fn show(value: &$type) -> $crate::Shown {
                $crate::Shown::Text(match value { $(<$type>::$variant => $word,)+ }.to_owned())
            }

            fn schema() -> $crate::Schema {
                $crate::Schema::words(&[$(($word, concat!($($doc, " "),+).trim().to_owned())),+])
            }
        }
    };
}
