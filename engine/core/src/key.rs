//! Names of sealed pages: a keyed hash chain over the tokens of a sequence, rooted in tenant and identity.

use mainstay_backend_api::{Invariance, KvDType, KvLayout, NumericClass, PAGE_TOKENS};

/// The tokens of one page.
pub(crate) type PageTokens = [u32; PAGE_TOKENS];

/// Names a page by everything that decides its contents. The same key names it wherever it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PageKey([u8; 32]);

/// What a sealed page holds. All of it is compared on a hit, so that two pages of equal key by a collision give a
/// miss and never another's keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) key: PageKey,
    /// The key of the page before, or the root.
    pub(crate) parent: PageKey,
    pub(crate) tokens: PageTokens,
}

/// What decides the bytes of a page besides its tokens: the layout of keys and values and who computed them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity([u8; 32]);

impl Identity {
    pub(crate) fn of(layout: &KvLayout, class: &NumericClass) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("mainstay page identity 1");
        // Every list is preceded by its length, so that no two identities give the same bytes.
        let mut number = |n: usize| {
            hasher.update(&(n as u64).to_le_bytes());
        };
        number(PAGE_TOKENS);
        number(layout.groups.len());
        for group in &layout.groups {
            number(group.layers.len());
            group.layers.iter().for_each(|&l| number(l));
            number(group.parts.len());
            for part in &group.parts {
                number(part.rows);
                number(part.width);
                number(match part.dtype {
                    KvDType::F32 => 0,
                    KvDType::BF16 => 1,
                });
            }
        }
        number(match class.invariance {
            Invariance::Full => 0,
            Invariance::None => 1,
        });
        hasher.update(class.path.as_bytes());
        Self(*hasher.finalize().as_bytes())
    }
}

/// The key chains of one tenant.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeyChain {
    secret: [u8; 32],
    root: PageKey,
}

impl KeyChain {
    pub(crate) fn new(tenant: &str, identity: &Identity) -> Self {
        let secret = blake3::derive_key("mainstay tenant 1", tenant.as_bytes());
        let mut hasher = blake3::Hasher::new_keyed(&secret);
        hasher.update(b"root").update(&identity.0);
        Self { secret, root: PageKey(*hasher.finalize().as_bytes()) }
    }

    /// The parent of a sequence's first page.
    pub(crate) fn root(&self) -> PageKey {
        self.root
    }

    /// The header of the page that holds these tokens after the page named `parent`.
    pub(crate) fn next(&self, parent: PageKey, tokens: &PageTokens) -> Header {
        let mut hasher = blake3::Hasher::new_keyed(&self.secret);
        hasher.update(&parent.0);
        let mut bytes = [0; 4 * PAGE_TOKENS];
        for (bytes, token) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(tokens) {
            *bytes = token.to_le_bytes();
        }
        hasher.update(&bytes);
        Header { key: PageKey(*hasher.finalize().as_bytes()), parent, tokens: *tokens }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mainstay_backend_api::kv::{Group, Part};

    fn layout(dtype: KvDType) -> KvLayout {
        let part = |name| Part { name, rows: 2, width: 8, dtype };
        KvLayout { groups: vec![Group { layers: vec![0, 1], parts: vec![part("k"), part("v")] }] }
    }

    fn class(path: &str) -> NumericClass {
        NumericClass { path: path.to_owned(), invariance: Invariance::Full }
    }

    fn identity() -> Identity {
        Identity::of(&layout(KvDType::F32), &class("cpu/avx2"))
    }

    #[test]
    fn equal_histories_have_equal_keys() {
        let (a, b) = (KeyChain::new("t", &identity()), KeyChain::new("t", &identity()));
        let first = a.next(a.root(), &[1; 32]);
        assert_eq!(first, b.next(b.root(), &[1; 32]));
        assert_eq!(a.next(first.key, &[2; 32]), b.next(first.key, &[2; 32]));
    }

    #[test]
    fn everything_before_and_around_a_page_changes_its_key() {
        let chain = KeyChain::new("t", &identity());
        let first = chain.next(chain.root(), &[1; 32]);
        let mut last_differs = [1; 32];
        last_differs[31] = 2;
        let keys = [
            first.key,
            chain.root(),
            chain.next(chain.root(), &last_differs).key,
            chain.next(first.key, &[1; 32]).key,
            KeyChain::new("u", &identity()).next(first.parent, &[1; 32]).key,
        ];
        for (i, a) in keys.iter().enumerate() {
            assert!(keys[i + 1..].iter().all(|b| a != b), "key {i} is not unique");
        }
    }

    #[test]
    fn identity_covers_layout_and_numbers() {
        let roots = [
            identity(),
            Identity::of(&layout(KvDType::BF16), &class("cpu/avx2")),
            Identity::of(&layout(KvDType::F32), &class("cpu/avx512")),
        ]
        .map(|i| KeyChain::new("t", &i).root());
        assert!(roots[0] != roots[1] && roots[0] != roots[2] && roots[1] != roots[2]);
    }
}
