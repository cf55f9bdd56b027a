//! Finds the known word that a user probably meant.

/// The known word that is most like this one, if one is: a few letters differ, or one of the two begins with the other.
#[must_use]
pub fn near<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let close = |other: &&str| {
        let (short, long) = if word.len() < other.len() { (word, *other) } else { (*other, word) };
        let begins = short.len() >= 4
            && long.get(..short.len()).is_some_and(|start| start.eq_ignore_ascii_case(short));
        begins || distance(word, other) <= 1 + word.len().min(other.len()) / 4
    };
    known.into_iter().filter(close).min_by_key(|other| distance(word, other))
}

/// How many letters differ (Levenshtein), without regard to case.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (above, y) in row.iter_mut().skip(1).zip(b.chars()) {
            let substituted = diagonal + usize::from(!x.eq_ignore_ascii_case(&y));
            diagonal = *above;
            left = substituted.min(diagonal + 1).min(left + 1);
            *above = left;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_meant_is_found() {
        let known = ["stateDirectory", "trustDomain", "groups", "users", "clientCA", "address"];
        for (word, meant) in [
            ("stateDir", Some("stateDirectory")),
            ("statedirectory", Some("stateDirectory")),
            ("trustDomian", Some("trustDomain")),
            ("group", Some("groups")),
            ("clientCa", Some("clientCA")),
            ("adress", Some("address")),
            ("gateway", None),
            ("x", None),
            ("", None),
        ] {
            assert_eq!(near(word, known), meant, "{word}");
        }
        assert_eq!(distance("kitten", "sitting"), 3);
    }
}
