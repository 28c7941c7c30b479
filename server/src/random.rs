//! Randomness from the operating system: seeds and ids.

/// Random bytes. Where the system has none, which it never lacks in practice, the time must do.
fn bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    if let Err(error) = getrandom::fill(&mut bytes) {
        tracing::warn!(%error, "no random numbers from the system");
        let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos();
        let hash = blake3::hash(&now.to_le_bytes());
        for (to, from) in bytes.iter_mut().zip(hash.as_bytes()) {
            *to = *from;
        }
    }
    bytes
}

/// The seed of a request that names none.
pub(crate) fn seed() -> u64 {
    u64::from_le_bytes(bytes())
}

/// `prefix` and 128 random bits in hexadecimal.
pub(crate) fn id(prefix: &str) -> String {
    format!("{prefix}{:032x}", u128::from_le_bytes(bytes()))
}
