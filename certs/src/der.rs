//! Replaces the subject of a certificate, for subjects that the issuing library cannot express.
//!
//! A client's groups are several O values, and the library keeps one value per attribute type. So the library creates the
//! certificate, and this file replaces the subject in the signed part (RFC 5280 section 4.1.2.6) and signs it again.
//! The input is always a certificate that this crate has just created.

use rcgen::SigningKey;
use rustls_pki_types::CertificateDer;

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OID: u8 = 0x06;
const UTF8_STRING: u8 = 0x0c;
const BIT_STRING: u8 = 0x03;
/// 2.5.4.3
const COMMON_NAME: [u8; 3] = [0x55, 0x04, 0x03];
/// 2.5.4.10
const ORGANIZATION: [u8; 3] = [0x55, 0x04, 0x0a];

/// `certificate` with another subject, signed by `issuer`, which must be the key that signed it before.
/// `None` when the certificate is not shaped as the library makes it.
pub(crate) fn with_subject(
    certificate: &CertificateDer<'_>,
    name: &str,
    groups: &[String],
    issuer: &impl SigningKey,
) -> Result<Option<CertificateDer<'static>>, rcgen::Error> {
    let Some((to_be_signed, algorithm)) = replace_subject(certificate, &subject(name, groups)) else {
        return Ok(None);
    };
    let mut signature = vec![0]; // no unused bits
    signature.extend(issuer.sign(&to_be_signed)?);
    let whole = [to_be_signed, algorithm.to_vec(), tlv(BIT_STRING, &signature)].concat();
    Ok(Some(tlv(SEQUENCE, &whole).into()))
}

/// One relative distinguished name per value, as OpenSSL writes them; Go and rustls read both ways.
fn subject(name: &str, groups: &[String]) -> Vec<u8> {
    let attribute = |oid: &[u8], value: &str| {
        tlv(SET, &tlv(SEQUENCE, &[tlv(OID, oid), tlv(UTF8_STRING, value.as_bytes())].concat()))
    };
    let mut names: Vec<u8> = groups.iter().flat_map(|group| attribute(&ORGANIZATION, group)).collect();
    names.extend(attribute(&COMMON_NAME, name));
    tlv(SEQUENCE, &names)
}

fn replace_subject<'a>(certificate: &'a [u8], subject: &[u8]) -> Option<(Vec<u8>, &'a [u8])> {
    let (outer, _) = split(certificate)?;
    let (to_be_signed, rest) = split(outer.content)?;
    let (algorithm, _) = split(rest)?;
    let mut rest = to_be_signed.content;
    // version, serial number, signature algorithm, issuer, validity
    for _ in 0..5 {
        (_, rest) = split(rest)?;
    }
    let before = to_be_signed.content.get(..to_be_signed.content.len() - rest.len())?;
    let (_, after) = split(rest)?;
    Some((tlv(SEQUENCE, &[before, subject, after].concat()), algorithm.whole))
}

struct Tlv<'a> {
    whole: &'a [u8],
    content: &'a [u8],
}

/// The first element of `bytes`, and what follows it.
fn split(bytes: &[u8]) -> Option<(Tlv<'_>, &[u8])> {
    let first = usize::from(*bytes.get(1)?);
    let (header, length) = if first < 0x80 {
        (2, first)
    } else {
        let count = first & 0x7f;
        let digits = bytes.get(2..2 + count)?;
        let length = digits.iter().try_fold(0usize, |sum, digit| {
            sum.checked_mul(256).and_then(|sum| sum.checked_add(usize::from(*digit)))
        })?;
        (2 + count, length)
    };
    let end = header.checked_add(length)?;
    let (whole, rest) = bytes.split_at_checked(end)?;
    Some((Tlv { whole, content: whole.get(header..)? }, rest))
}

#[expect(clippy::indexing_slicing, reason = "at most all digits are counted")]
#[expect(clippy::expect_used, reason = "its message says why it cannot fail")]
fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
    let digits = content.len().to_be_bytes();
    let digits = &digits[digits.iter().take_while(|digit| **digit == 0).count()..];
    let mut bytes = vec![tag];
    match *digits {
        [] => bytes.push(0),
        [short] if short < 0x80 => bytes.push(short),
        _ => {
            let count = u8::try_from(digits.len()).expect("a usize has at most 8 bytes");
            bytes.push(0x80 | count);
            bytes.extend_from_slice(digits);
        }
    }
    bytes.extend_from_slice(content);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_survive_every_header_size() {
        for length in [0, 1, 127, 128, 255, 256, 65_535, 65_536] {
            let content = vec![7; length];
            let mut bytes = tlv(SEQUENCE, &content);
            bytes.push(0xee);
            let (element, rest) = split(&bytes).unwrap();
            assert_eq!(element.content, content);
            assert_eq!(rest, [0xee]);
        }
    }

    #[test]
    fn cut_or_absurd_elements_are_none() {
        let whole: &[&[u8]] = &[
            &[],
            &[0x30],
            &[0x30, 2, 0],
            &[0x30, 0x82, 1],
            &[0x30, 0xff],
            &[0x30, 0x88, 255, 255, 255, 255, 255, 255, 255, 255],
        ];
        for bytes in whole {
            assert!(split(bytes).is_none(), "{bytes:?}");
        }
        assert!(replace_subject(&[0x30, 2, 0x30, 0], &[]).is_none());
    }
}
