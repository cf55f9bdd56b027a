//! SPDY header compression: one zlib stream per direction, started with the dictionary of SPDY/3.

use super::frame::Headers;
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};
use std::io;

const WORDS: &[&str] = &[
    "options",
    "head",
    "post",
    "put",
    "delete",
    "trace",
    "accept",
    "accept-charset",
    "accept-encoding",
    "accept-language",
    "accept-ranges",
    "age",
    "allow",
    "authorization",
    "cache-control",
    "connection",
    "content-base",
    "content-encoding",
    "content-language",
    "content-length",
    "content-location",
    "content-md5",
    "content-range",
    "content-type",
    "date",
    "etag",
    "expect",
    "expires",
    "from",
    "host",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "last-modified",
    "location",
    "max-forwards",
    "pragma",
    "proxy-authenticate",
    "proxy-authorization",
    "range",
    "referer",
    "retry-after",
    "server",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
    "vary",
    "via",
    "warning",
    "www-authenticate",
    "method",
    "get",
    "status",
    "200 OK",
    "version",
    "HTTP/1.1",
    "url",
    "public",
    "set-cookie",
    "keep-alive",
    "origin",
];
const TEXT: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505\
    203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized\
    403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable\
    Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT\
    chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,\
    text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.";
const DICTIONARY_BYTES: usize = 1423;
/// Headers of a stream are a few hundred bytes.
const BLOCK_MAX: usize = 64 * 1024;

/// Compresses the header blocks of one direction.
pub(super) struct Deflater(Compress);

impl Deflater {
    pub(super) fn new() -> io::Result<Self> {
        let mut stream = Compress::new(Compression::default(), true);
        stream.set_dictionary(&dictionary()).map_err(io::Error::other)?;
        Ok(Self(stream))
    }

    pub(super) fn block(&mut self, headers: &[(&str, &str)]) -> io::Result<Vec<u8>> {
        let mut plain = (headers.len() as u32).to_be_bytes().to_vec();
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            plain.extend_from_slice(&(text.len() as u32).to_be_bytes());
            plain.extend_from_slice(text.as_bytes());
        }
        // With room for the worst case, one call takes everything.
        let mut out = Vec::with_capacity(plain.len() * 2 + 256);
        self.0.compress_vec(&plain, &mut out, FlushCompress::Sync).map_err(io::Error::other)?;
        Ok(out)
    }
}

/// Decompresses the header blocks of one direction.
pub(super) struct Inflater(Decompress);

impl Inflater {
    pub(super) fn new() -> Self {
        Self(Decompress::new(true))
    }

    pub(super) fn headers(&mut self, block: &[u8]) -> io::Result<Headers> {
        let plain = self.inflate(block)?;
        parse(&plain).ok_or_else(|| invalid("bad header block"))
    }

    fn inflate(&mut self, mut block: &[u8]) -> io::Result<Vec<u8>> {
        let mut plain = Vec::with_capacity(4096);
        loop {
            let before = self.0.total_in();
            let result = self.0.decompress_vec(block, &mut plain, FlushDecompress::Sync);
            // Not more than the block's length.
            block = &block[(self.0.total_in() - before) as usize..];
            match result {
                Err(error) if error.needs_dictionary().is_some() => {
                    self.0.set_dictionary(&dictionary()).map_err(io::Error::other)?;
                }
                Err(error) => return Err(io::Error::other(error)),
                Ok(_) if plain.len() < plain.capacity() && block.is_empty() => return Ok(plain),
                Ok(_) if plain.len() < plain.capacity() => return Err(invalid("bad compression")),
                Ok(_) if plain.len() > BLOCK_MAX => return Err(invalid("header block too large")),
                Ok(_) => plain.reserve(4096),
            }
        }
    }
}

fn parse(mut plain: &[u8]) -> Option<Headers> {
    let number = |plain: &mut &[u8]| {
        let (bytes, rest) = plain.split_first_chunk::<4>()?;
        *plain = rest;
        Some(u32::from_be_bytes(*bytes) as usize)
    };
    let count = number(&mut plain)?;
    let mut headers = Headers::new();
    for _ in 0..count {
        let mut pair = [String::new(), String::new()];
        for part in &mut pair {
            let length = number(&mut plain)?;
            let (text, rest) = plain.split_at_checked(length)?;
            plain = rest;
            *part = String::from_utf8_lossy(text).into_owned();
        }
        let [name, value] = pair;
        headers.push((name, value));
    }
    Some(headers)
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// The dictionary: length-prefixed words, then loose text.
fn dictionary() -> Vec<u8> {
    let mut dictionary = Vec::with_capacity(DICTIONARY_BYTES);
    for word in WORDS {
        dictionary.extend_from_slice(&(word.len() as u32).to_be_bytes());
        dictionary.extend_from_slice(word.as_bytes());
    }
    dictionary.extend_from_slice(TEXT.as_bytes());
    dictionary
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the dictionary is the specified one, by its length and its Adler-32.
    #[test]
    fn dictionary_is_the_specified_one() {
        let (mut low, mut high) = (1_u32, 0_u32);
        for byte in dictionary() {
            low = (low + u32::from(byte)) % 65_521;
            high = (high + low) % 65_521;
        }
        assert_eq!(dictionary().len(), DICTIONARY_BYTES);
        assert_eq!(high << 16 | low, 0xe3c6_a7c2);
    }

    /// Goal: several blocks of one stream survive, large ones too.
    #[test]
    fn blocks_round_trip() {
        let (mut deflater, mut inflater) = (Deflater::new().unwrap(), Inflater::new());
        let large = "x".repeat(20_000);
        for value in ["stdin", "stdout", &large, ""] {
            let block = deflater.block(&[("streamtype", value), ("port", "80")]).unwrap();
            let headers = inflater.headers(&block).unwrap();
            assert_eq!(headers[0], ("streamtype".to_owned(), value.to_owned()));
            assert_eq!(headers[1], ("port".to_owned(), "80".to_owned()));
        }
    }
}
