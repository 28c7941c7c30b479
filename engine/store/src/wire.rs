//! Little-endian fields: written plainly, read without trusting a length.

/// The bytes are not what the format says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed {0}")]
pub struct Malformed(pub &'static str);

/// Appends fields.
#[derive(Debug, Default)]
pub(crate) struct Writer(pub(crate) Vec<u8>);

impl Writer {
    pub(crate) fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(crate) fn u8(&mut self, value: u8) -> &mut Self {
        self.raw(&[value])
    }

    pub(crate) fn u16(&mut self, value: u16) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    pub(crate) fn u32(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    pub(crate) fn u64(&mut self, value: u64) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// A length and the bytes.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.u32(u32::try_from(bytes.len()).expect("a field is under 4 GiB")).raw(bytes)
    }

    /// 0, or 1 and what `write` writes.
    pub(crate) fn option<T>(&mut self, value: Option<T>, write: impl FnOnce(&mut Self, T)) -> &mut Self {
        self.u8(value.is_some().into());
        if let Some(value) = value {
            write(self, value);
        }
        self
    }

    /// A count and tokens of 7 bits a byte, low first: most vocabularies need two or three bytes.
    pub(crate) fn tokens(&mut self, tokens: &[u32]) -> &mut Self {
        self.u32(u32::try_from(tokens.len()).expect("a turn is under 2^32 tokens"));
        for &token in tokens {
            let mut rest = token;
            while rest >= 0x80 {
                self.0.push(rest as u8 | 0x80);
                rest >>= 7;
            }
            self.0.push(rest as u8);
        }
        self
    }
}

/// Takes fields off the front.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    /// `what` names the thing in errors.
    pub(crate) fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { rest: bytes, what }
    }

    /// Bytes that are left.
    pub(crate) fn len(&self) -> usize {
        self.rest.len()
    }

    pub(crate) fn malformed(&self) -> Malformed {
        Malformed(self.what)
    }

    pub(crate) fn raw(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(self.malformed())?;
        self.rest = rest;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        Ok(self.raw(N)?.try_into().expect("raw gives as many as asked for"))
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn bytes(&mut self) -> Result<&'a [u8], Malformed> {
        let count = self.u32()? as usize;
        self.raw(count)
    }

    pub(crate) fn text(&mut self) -> Result<String, Malformed> {
        let bytes = self.bytes()?;
        String::from_utf8(bytes.to_vec()).map_err(|_| self.malformed())
    }

    pub(crate) fn option<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, Malformed>,
    ) -> Result<Option<T>, Malformed> {
        match self.u8()? {
            0 => Ok(None),
            1 => read(self).map(Some),
            _ => Err(self.malformed()),
        }
    }

    pub(crate) fn tokens(&mut self) -> Result<Vec<u32>, Malformed> {
        let count = self.u32()? as usize;
        // A token takes a byte at least, so the claim is bounded by what is there.
        if count > self.rest.len() {
            return Err(self.malformed());
        }
        let mut tokens = Vec::with_capacity(count);
        let (malformed, mut bytes) = (self.malformed(), self.rest.iter());
        for _ in 0..count {
            let (mut token, mut place) = (0_u64, 0);
            loop {
                let &byte = bytes.next().ok_or(malformed)?;
                token |= u64::from(byte & 0x7f) << place;
                place += 7;
                if byte < 0x80 {
                    break;
                }
                // Five bytes hold 35 bits.
                if place == 35 {
                    return Err(malformed);
                }
            }
            tokens.push(u32::try_from(token).map_err(|_| malformed)?);
        }
        self.rest = bytes.as_slice();
        Ok(tokens)
    }

    /// All fields were read and nothing follows.
    pub(crate) fn end(self) -> Result<(), Malformed> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.malformed()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_roundtrip_and_claims_are_bounded() {
        let tokens = [0, 1, 127, 128, 16_383, 16_384, 262_143, u32::MAX];
        let mut out = Writer::default();
        out.tokens(&tokens);
        let mut reader = Reader::new(&out.0, "tokens");
        assert_eq!(reader.tokens().unwrap(), tokens);
        reader.end().unwrap();
        for cut in 0..out.0.len() {
            assert!(Reader::new(&out.0[..cut], "tokens").tokens().is_err(), "cut at {cut}");
        }
        assert!(Reader::new(&[0xff, 0xff, 0xff, 0xff, 1], "tokens").tokens().is_err());
        // 2^32 does not fit.
        assert!(Reader::new(&[1, 0, 0, 0, 0x80, 0x80, 0x80, 0x80, 0x10], "tokens").tokens().is_err());
    }
}
