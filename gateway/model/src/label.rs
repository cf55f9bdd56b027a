//! Labels as Kubernetes writes them: which keys and values there are, and selectors of labels.
//!
//! Selectors are parsed token by token, like `labels.Parse` of k8s.io/apimachinery, and refuse what it refuses: a more lenient parser
//! would select objects that nobody meant, and `kubectl delete -l` would delete them.

use thiserror::Error;

/// A parsed `labelSelector`. The default selects everything.
#[derive(Clone, Debug, Default)]
pub struct Selector(Vec<Requirement>);

/// Why a text is no [`Selector`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("unable to parse requirement: {0}")]
pub struct SelectorError(String);

#[derive(Clone, Debug)]
enum Requirement {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    Missing(String),
    /// The label is a number, and more than this; or less.
    More(String, i64),
    Less(String, i64),
}

impl Selector {
    /// Parses a selector; an empty one selects everything.
    ///
    /// # Errors
    /// An API server would refuse it. The error has the words of the API server.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        Labels { rest: text }.requirements().map(Self).map_err(SelectorError)
    }

    /// Whether an object is selected whose labels `label` looks up.
    pub fn matches<'a>(&self, label: impl Fn(&str) -> Option<&'a str>) -> bool {
        let among = |values: &[String], label: &str| values.iter().any(|value| value == label);
        let number = |key: &str| label(key).and_then(|label| label.parse::<i64>().ok());
        self.0.iter().all(|requirement| match requirement {
            Requirement::In(key, values) => label(key).is_some_and(|label| among(values, label)),
            Requirement::NotIn(key, values) => label(key).is_none_or(|label| !among(values, label)),
            Requirement::Exists(key) => label(key).is_some(),
            Requirement::Missing(key) => label(key).is_none(),
            Requirement::More(key, least) => number(key).is_some_and(|number| number > *least),
            Requirement::Less(key, most) => number(key).is_some_and(|number| number < *most),
        })
    }
}

/// Whether a text can be a label's key: a name, or a subdomain, a slash and a name.
#[must_use]
pub fn is_key(key: &str) -> bool {
    match key.split_once('/') {
        Some((prefix, name)) => is_subdomain(prefix) && is_part(name),
        None => is_part(key),
    }
}

/// Whether a text can be a label's value that is not empty, or the name in its key: 1 to 63 of `a-z A-Z 0-9 - _ .`, first and last a
/// letter or a digit.
#[must_use]
pub fn is_part(text: &str) -> bool {
    let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let inside = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let bytes = text.as_bytes();
    (1..=63).contains(&text.len()) && edge(bytes.first()) && edge(bytes.last()) && text.bytes().all(inside)
}

/// Whether a text is a subdomain as RFC 1123 has it, which most objects' names are: 1 to 253 of `a-z 0-9 - .`, first and last a letter or
/// a digit.
#[must_use]
pub fn is_subdomain(text: &str) -> bool {
    let plain =
        |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    let inside = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.');
    let bytes = text.as_bytes();
    (1..=253).contains(&text.len()) && plain(bytes.first()) && plain(bytes.last()) && text.bytes().all(inside)
}

/// A token of a label selector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token<'a> {
    End,
    Not,
    NotEqual,
    Equal,
    Open,
    Close,
    Comma,
    More,
    Less,
    /// `in` and `notin` too: they are operators only where one is expected.
    Word(&'a str),
}

impl<'a> Token<'a> {
    const fn text(self) -> &'a str {
        match self {
            Self::End => "",
            Self::Not => "!",
            Self::NotEqual => "!=",
            Self::Equal => "=",
            Self::Open => "(",
            Self::Close => ")",
            Self::Comma => ",",
            Self::More => ">",
            Self::Less => "<",
            Self::Word(word) => word,
        }
    }

    fn unexpected<T>(self, expected: &str) -> Result<T, String> {
        Err(format!("found '{}', expected: {expected}", self.text()))
    }
}

/// The unparsed rest of a label selector.
struct Labels<'a> {
    rest: &'a str,
}

impl<'a> Labels<'a> {
    fn requirements(mut self) -> Result<Vec<Requirement>, String> {
        let mut all = Vec::new();
        if self.peek() == Token::End {
            return Ok(all);
        }
        loop {
            all.push(self.requirement()?);
            match self.next() {
                Token::End => return Ok(all),
                Token::Comma => {}
                other => return other.unexpected("',' or 'end of string'"),
            }
        }
    }

    fn requirement(&mut self) -> Result<Requirement, String> {
        let mut token = self.next();
        let missing = token == Token::Not;
        if missing {
            token = self.next();
        }
        let Token::Word(key) = token else { return token.unexpected("!, identifier, or 'end of string'") };
        if !is_key(key) {
            return Err(format!("{key:?} is not a valid label key"));
        }
        let key = key.to_owned();
        if missing {
            return Ok(Requirement::Missing(key));
        }
        if matches!(self.peek(), Token::End | Token::Comma) {
            return Ok(Requirement::Exists(key));
        }
        Ok(match self.next() {
            Token::Word("in") => Requirement::In(key, self.set()?),
            Token::Word("notin") => Requirement::NotIn(key, self.set()?),
            Token::Equal => Requirement::In(key, vec![self.value()?]),
            Token::NotEqual => Requirement::NotIn(key, vec![self.value()?]),
            Token::More => Requirement::More(key, self.number()?),
            Token::Less => Requirement::Less(key, self.number()?),
            other => return other.unexpected("in, notin, =, ==, !=, gt, lt"),
        })
    }

    /// The values in brackets; nothing between two commas is the empty value.
    fn set(&mut self) -> Result<Vec<String>, String> {
        let open = self.next();
        if open != Token::Open {
            return open.unexpected("'('");
        }
        let mut values = Vec::new();
        if self.peek() == Token::Close {
            return Err("for 'in', 'notin' operators, values set can't be empty".to_owned());
        }
        loop {
            let value = match self.peek() {
                Token::Word(word) => {
                    self.next();
                    word
                }
                _ => "",
            };
            values.push(checked(value)?);
            match self.next() {
                Token::Comma => {}
                Token::Close => return Ok(values),
                other => return other.unexpected("',', ')' or identifier"),
            }
        }
    }

    /// The one value behind an operator, which may be the empty one.
    fn value(&mut self) -> Result<String, String> {
        match self.peek() {
            Token::End | Token::Comma => Ok(String::new()),
            Token::Word(word) => {
                self.next();
                checked(word)
            }
            other => other.unexpected("identifier"),
        }
    }

    fn number(&mut self) -> Result<i64, String> {
        let value = self.value()?;
        value.parse().map_err(|_| format!("for 'gt', 'lt' operators, {value:?} has to be an integer"))
    }

    fn peek(&self) -> Token<'a> {
        Labels { rest: self.rest }.next()
    }

    fn next(&mut self) -> Token<'a> {
        let blank = [' ', '\t', '\r', '\n'];
        self.rest = self.rest.trim_start_matches(blank);
        let (token, length) = match self.rest.as_bytes() {
            [] => (Token::End, 0),
            [b'!', b'=', ..] => (Token::NotEqual, 2),
            [b'!', ..] => (Token::Not, 1),
            [b'=', b'=', ..] => (Token::Equal, 2),
            [b'=', ..] => (Token::Equal, 1),
            [b'(', ..] => (Token::Open, 1),
            [b')', ..] => (Token::Close, 1),
            [b',', ..] => (Token::Comma, 1),
            [b'>', ..] => (Token::More, 1),
            [b'<', ..] => (Token::Less, 1),
            _ => {
                let ends =
                    |c: char| blank.contains(&c) || matches!(c, '!' | '=' | '(' | ')' | ',' | '>' | '<');
                let end = self.rest.find(ends).unwrap_or(self.rest.len());
                (Token::Word(self.rest.split_at(end).0), end)
            }
        };
        self.rest = self.rest.split_at(length).1;
        token
    }
}

fn checked(value: &str) -> Result<String, String> {
    let fits = value.is_empty() || is_part(value);
    if fits { Ok(value.to_owned()) } else { Err(format!("{value:?} is not a valid label value")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: every operator selects what it should, and nothing else.
    #[test]
    fn every_operator_selects() {
        let labels = [("app", "web"), ("tier", "front"), ("in", "x"), ("size", "12"), ("none", "")];
        let label = |wanted: &str| labels.iter().find(|(key, _)| *key == wanted).map(|(_, value)| *value);
        let matches = |selector: &str| Selector::parse(selector).unwrap().matches(label);
        for all in [
            "",
            "  ",
            "app=web,tier in (front, back)",
            "app==web,!gone,tier,other notin (x),app!=box",
            " app = web , tier in ( front ) ",
            "in in (in,x)",
            "in=x,in notin (in)",
            "none=,none in (,a),none in (a,)",
            "none in (a,,b)",
            "tier in(front)",
            "size>11,size<13",
            "gone!=x",
            "towline.io/team notin (a),!example.com/b",
        ] {
            assert!(matches(all), "{all}");
        }
        for none in [
            "app!=web",
            "tier in (back)",
            "gone",
            "!app",
            "gone=",
            "size>12",
            "size<12",
            "app>1",
            "none in (a)",
        ] {
            assert!(!matches(none), "{none}");
        }
    }

    /// Goal: D1, A12: a selector that the API server refuses is refused, and selects neither everything nor something else.
    #[test]
    fn d1_a12_a_malformed_selector_is_refused() {
        for labels in [
            ",,",
            ",",
            "a,",
            ",a",
            "a,,b",
            "env in (prod",
            "env in prod)",
            "env in prod",
            "env in ((prod))",
            "env in (prod))",
            "env in ()",
            "env in",
            "env notin (a",
            "a in (",
            "a=b=c",
            "a!=b=c",
            "a==b==c",
            "!a=b",
            "!!a",
            "!",
            "bad key=x",
            "env=a b",
            "a b",
            "=b",
            "(a)",
            "a=(b)",
            "a=!b",
            "a>b",
            "a>",
            "a<1.5",
            "a>1,b>",
            "a/b/c=d",
            "/b=c",
            "A.B/=c",
            "-a=b",
            "a=-b",
            "a=b_",
            "!\0",
            "a=\0",
            "a=b;c=d",
            "a=ü",
            "a\u{a0}=b",
            "*",
            "a=*",
            "{}",
        ] {
            let refused = Selector::parse(labels).unwrap_err().to_string();
            assert!(refused.starts_with("unable to parse requirement: "), "{labels:?}: {refused}");
        }
        let long = "a".repeat(64);
        assert!(Selector::parse(&long).is_err() && Selector::parse(&format!("a={long}")).is_err());
    }
}
