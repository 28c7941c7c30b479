//! Names of pages: what decides their bytes, and a chain of keyed hashes over a sequence's tokens.

use std::fmt;

/// Tokens in a page.
pub const PAGE_TOKENS: usize = 32;

/// What decides the bytes of a page besides its tokens and who computed them. Two models of equal content may share
/// pages; anything else never does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content<'a> {
    /// Merkle root over the bytes of the weights.
    pub weights_root: [u8; 32],
    /// Hash of the configuration that the graph is made from.
    pub config_hash: [u8; 32],
    /// Element type of stored keys and values, such as `bf16`.
    pub kv_dtype: &'a str,
    /// Hash of the scales of quantized keys and values; zeros where there are none.
    pub kv_scales_hash: [u8; 32],
    /// Canonical bytes of the payload's layout: groups, layers, parts, rows, widths.
    pub payload_layout: &'a [u8],
}

/// Hash of a [`Content`]: the `C` of the format.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContentId(pub [u8; 32]);

impl ContentId {
    /// The identity of `content`, in canonical CBOR (RFC 8949, section 4.2) of an array of its fields.
    pub fn of(content: &Content<'_>) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("kvs1.content");
        hasher.update(&[0x86]);
        cbor(&mut hasher, CBOR_BYTES, &content.weights_root);
        cbor(&mut hasher, CBOR_BYTES, &content.config_hash);
        cbor(&mut hasher, CBOR_TEXT, content.kv_dtype.as_bytes());
        cbor(&mut hasher, CBOR_BYTES, &content.kv_scales_hash);
        cbor(&mut hasher, CBOR_BYTES, content.payload_layout);
        cbor_head(&mut hasher, 0, PAGE_TOKENS as u64);
        Self(*hasher.finalize().as_bytes())
    }
}

const CBOR_BYTES: u8 = 2;
const CBOR_TEXT: u8 = 3;

fn cbor(hasher: &mut blake3::Hasher, major: u8, bytes: &[u8]) {
    cbor_head(hasher, major, bytes.len() as u64);
    hasher.update(bytes);
}

/// The shortest head that holds `value`, as canonical encoding asks.
fn cbor_head(hasher: &mut blake3::Hasher, major: u8, value: u64) {
    let (info, width) = match value {
        0..24 => (value as u8, 0),
        24..0x100 => (24, 1),
        0x100..0x1_0000 => (25, 2),
        0x1_0000..0x1_0000_0000 => (26, 4),
        _ => (27, 8),
    };
    hasher.update(&[major << 5 | info]);
    hasher.update(&value.to_be_bytes()[8 - width..]);
}

/// Hash of who computed a page: the `NC` of the format. Pages of another class are found only when asked for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClassId(pub [u8; 32]);

impl ClassId {
    /// Named facts: backend, kernel path, hash of the kernels' sources, probe digest, degrees of parallelism,
    /// invariance. Order counts.
    pub fn of(facts: &[(&str, &[u8])]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("kvs1.class");
        cbor_head(&mut hasher, 5, facts.len() as u64);
        for (name, value) in facts {
            cbor(&mut hasher, CBOR_TEXT, name.as_bytes());
            cbor(&mut hasher, CBOR_BYTES, value);
        }
        Self(*hasher.finalize().as_bytes())
    }
}

/// Stands for a tenant's name in files.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TenantId(pub [u8; 16]);

impl TenantId {
    /// The id of the tenant of this name.
    pub fn of(name: &str) -> Self {
        let hash = blake3::derive_key("kvs1.tenant", name.as_bytes());
        Self(*hash.first_chunk().expect("a hash has 32 bytes"))
    }
}

/// Random and private to a tenant: without it nobody can name its pages.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TenantSecret(pub [u8; 32]);

/// Names a page by everything that decides its contents but the class. The same key names it wherever it lies.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageKey(pub [u8; 32]);

macro_rules! hex_debug {
    ($($name:ident),*) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), hex(&self.0[..8]))
            }
        }
    )*};
}
hex_debug!(ContentId, ClassId, TenantId, PageKey);

impl fmt::Debug for TenantSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TenantSecret(..)")
    }
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What a tenant's chain of keys begins with.
#[derive(Clone, Copy, Debug)]
pub struct Root<'a> {
    /// The model and its layout.
    pub content: ContentId,
    /// Hash of the adapter's bytes.
    pub adapter: Option<[u8; 32]>,
    /// Which of the model's RoPE tables the sequence uses.
    pub rope_table: u32,
    /// The client's own partition of its pages.
    pub salt: &'a [u8],
}

/// What a page is computed from besides the tokens before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Hash of an image or another input that stands in the place of tokens.
    pub content: [u8; 32],
    /// Offset of the page's first token in the input.
    pub offset: u32,
    /// Tokens of the input in this page.
    pub len: u32,
}

/// Computes the keys of one tenant.
#[derive(Clone, Copy, Debug)]
pub struct KeyChain {
    secret: TenantSecret,
}

impl KeyChain {
    /// The chains of the tenant with this secret.
    pub fn new(secret: TenantSecret) -> Self {
        Self { secret }
    }

    /// The parent of a sequence's first page.
    pub fn root(&self, root: &Root<'_>) -> PageKey {
        let mut hasher = blake3::Hasher::new_keyed(&self.secret.0);
        hasher.update(b"root").update(&root.content.0);
        hasher.update(&[root.adapter.is_some().into()]).update(&root.adapter.unwrap_or_default());
        hasher.update(&root.rope_table.to_le_bytes()).update(root.salt);
        PageKey(*hasher.finalize().as_bytes())
    }

    /// The key of the page that holds `tokens` after the page named `parent`. A tail page has fewer than
    /// [`PAGE_TOKENS`] of them.
    pub fn next(&self, parent: PageKey, tokens: &[u32], spans: &[Span]) -> PageKey {
        assert!(tokens.len() <= PAGE_TOKENS, "a page has {PAGE_TOKENS} tokens, found {}", tokens.len());
        let mut hasher = blake3::Hasher::new_keyed(&self.secret.0);
        // The count keeps a tail's tokens and its spans apart.
        hasher.update(&parent.0).update(&(tokens.len() as u32).to_le_bytes());
        let mut bytes = [0; 4 * PAGE_TOKENS];
        for (bytes, token) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(tokens) {
            *bytes = token.to_le_bytes();
        }
        hasher.update(&bytes[..4 * tokens.len()]);
        for span in spans {
            hasher.update(&span.content).update(&span.offset.to_le_bytes()).update(&span.len.to_le_bytes());
        }
        PageKey(*hasher.finalize().as_bytes())
    }

    /// The keys of all pages of `tokens`; the last may be a tail's.
    pub fn keys<'a>(&'a self, root: PageKey, tokens: &'a [u32]) -> impl Iterator<Item = PageKey> + 'a {
        tokens.chunks(PAGE_TOKENS).scan(root, |parent, tokens| {
            *parent = self.next(*parent, tokens, &[]);
            Some(*parent)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content() -> Content<'static> {
        Content {
            weights_root: [1; 32],
            config_hash: [2; 32],
            kv_dtype: "bf16",
            kv_scales_hash: [0; 32],
            payload_layout: b"layout",
        }
    }

    fn root() -> Root<'static> {
        Root { content: ContentId::of(&content()), adapter: None, rope_table: 0, salt: b"" }
    }

    #[track_caller]
    fn all_differ<T: PartialEq + fmt::Debug>(items: &[T]) {
        for (i, a) in items.iter().enumerate() {
            assert!(items[i + 1..].iter().all(|b| a != b), "{a:?}, number {i}, is not unique");
        }
    }

    #[test]
    fn every_fact_changes_the_identity() {
        let base = content();
        all_differ(&[
            ContentId::of(&base),
            ContentId::of(&Content { weights_root: [3; 32], ..base.clone() }),
            ContentId::of(&Content { config_hash: [3; 32], ..base.clone() }),
            ContentId::of(&Content { kv_dtype: "f32", ..base.clone() }),
            ContentId::of(&Content { kv_scales_hash: [3; 32], ..base.clone() }),
            ContentId::of(&Content { payload_layout: b"other", ..base }),
        ]);
        all_differ(&[
            ClassId::of(&[("path", b"avx2"), ("tp", b"1")]),
            ClassId::of(&[("path", b"avx512"), ("tp", b"1")]),
            ClassId::of(&[("path", b"avx2"), ("tp", b"2")]),
            ClassId::of(&[("path", b"avx2")]),
        ]);
    }

    #[test]
    fn everything_before_and_around_a_page_changes_its_key() {
        let chain = KeyChain::new(TenantSecret([7; 32]));
        let start = chain.root(&root());
        let first = chain.next(start, &[1; 32], &[]);
        let mut last_differs = [1; 32];
        last_differs[31] = 2;
        let span = Span { content: [9; 32], offset: 0, len: 32 };
        all_differ(&[
            start,
            first,
            chain.root(&Root { adapter: Some([0; 32]), ..root() }),
            chain.root(&Root { rope_table: 1, ..root() }),
            chain.root(&Root { salt: b"x", ..root() }),
            chain.root(&Root { content: ContentId([0; 32]), ..root() }),
            chain.next(start, &last_differs, &[]),
            chain.next(start, &[1; 31], &[]),
            chain.next(first, &[1; 32], &[]),
            chain.next(start, &[1; 32], &[span]),
            chain.next(start, &[1; 32], &[Span { offset: 1, ..span }]),
            KeyChain::new(TenantSecret([8; 32])).root(&root()),
            KeyChain::new(TenantSecret([8; 32])).next(start, &[1; 32], &[]),
        ]);
        let tokens: Vec<u32> = (0..70).collect();
        let keys: Vec<_> = chain.keys(start, &tokens).collect();
        assert_eq!(keys.len(), 3);
        assert_eq!(keys[1], chain.next(keys[0], &tokens[32..64], &[]));
        assert_eq!(keys[2], chain.next(keys[1], &tokens[64..], &[]));
    }
}
