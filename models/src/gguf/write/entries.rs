//! Metadata as bytes.

/// Entries of a file, in the order in which they were put.
#[derive(Default)]
pub(super) struct Entries {
    count: u64,
    bytes: Vec<u8>,
}

/// A text as the format stores it.
pub(super) fn text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

impl Entries {
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn begin(&mut self, key: &str, kind: u32) {
        self.count += 1;
        text(&mut self.bytes, key);
        self.bytes.extend(kind.to_le_bytes());
    }

    fn begin_list(&mut self, key: &str, kind: u32, len: usize) {
        const LIST: u32 = 9;
        self.begin(key, LIST);
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend((len as u64).to_le_bytes());
    }

    /// A count: the format's writers use 32 bits.
    pub(super) fn whole(&mut self, key: &str, value: usize) {
        const U32: u32 = 4;
        self.begin(key, U32);
        self.bytes.extend((value as u32).to_le_bytes());
    }

    pub(super) fn number(&mut self, key: &str, value: f32) {
        const F32: u32 = 6;
        self.begin(key, F32);
        self.bytes.extend(value.to_le_bytes());
    }

    pub(super) fn flag(&mut self, key: &str, value: bool) {
        const BOOL: u32 = 7;
        self.begin(key, BOOL);
        self.bytes.push(u8::from(value));
    }

    pub(super) fn text(&mut self, key: &str, value: &str) {
        const TEXT: u32 = 8;
        self.begin(key, TEXT);
        text(&mut self.bytes, value);
    }

    pub(super) fn texts(&mut self, key: &str, values: &[String]) {
        const TEXT: u32 = 8;
        self.begin_list(key, TEXT, values.len());
        values.iter().for_each(|v| text(&mut self.bytes, v));
    }

    pub(super) fn numbers(&mut self, key: &str, values: &[f32]) {
        const F32: u32 = 6;
        self.begin_list(key, F32, values.len());
        values.iter().for_each(|v| self.bytes.extend(v.to_le_bytes()));
    }

    pub(super) fn wholes(&mut self, key: &str, values: &[i32]) {
        const I32: u32 = 5;
        self.begin_list(key, I32, values.len());
        values.iter().for_each(|v| self.bytes.extend(v.to_le_bytes()));
    }

    pub(super) fn flags(&mut self, key: &str, values: &[bool]) {
        const BOOL: u32 = 7;
        self.begin_list(key, BOOL, values.len());
        self.bytes.extend(values.iter().map(|v| u8::from(*v)));
    }
}
