//! Every parser on bytes that were changed at random: no panic, no memory beyond reason, and what is accepted is what would
//! be written. The same entrances serve cargo-fuzz, see `fuzz/`.

mod corpus;

use mainstay_store::{fuzz, sim::Random};

use corpus::Corpus;

/// Bytes that parsers trip over.
const EDGES: [u8; 6] = [0, 1, 0x7f, 0x80, 0xfe, 0xff];
/// All inputs are under 64 KiB; a length that is believed asks for more than this sooner or later.
const MEMORY_BYTES: u64 = 1 << 30;

fn bound_memory() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Data).maximum;
    let current = Some(maximum.map_or(MEMORY_BYTES, |maximum| maximum.min(MEMORY_BYTES)));
    setrlimit(Resource::Data, Rlimit { current, maximum }).unwrap();
}

/// One input with a few changes; parts of others may come into it.
fn mutated(random: &mut Random, inputs: &[Vec<u8>]) -> Vec<u8> {
    let pick = |random: &mut Random| inputs[random.below(inputs.len() as u64) as usize].clone();
    let mut bytes = pick(random);
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len() as u64 + 1) as usize;
        let end = at + random.below((bytes.len() - at).min(64) as u64 + 1) as usize;
        match random.below(8) {
            0 => bytes.truncate(at),
            1 if at < bytes.len() => bytes[at] = EDGES[random.below(6) as usize],
            2 => bytes[at..end].iter_mut().for_each(|byte| *byte = random.bits() as u8),
            3 => drop(bytes.drain(at..end)),
            4 => {
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part);
            }
            5 => {
                let other = pick(random);
                let from = random.below(other.len() as u64 + 1) as usize;
                bytes.splice(at..end, other[from..].iter().copied().take(64));
            }
            // A count or a length of up to 2^32.
            6 if at + 4 <= bytes.len() => {
                let claim = u32::MAX >> random.below(32);
                bytes[at..at + 4].copy_from_slice(&claim.to_le_bytes());
            }
            _ if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            _ => {}
        }
    }
    bytes
}

/// Feeds inputs as they are, all of which must be taken, and then changed.
fn feed(inputs: &[Vec<u8>], rounds: u64, takes: impl Fn(&[u8]) -> bool) {
    bound_memory();
    for (i, input) in inputs.iter().enumerate() {
        assert!(takes(input), "input {i} is not changed and is refused");
    }
    let rounds = if cfg!(debug_assertions) { rounds / 10 } else { rounds };
    let mut taken = 0;
    for seed in 0..rounds {
        let bytes = mutated(&mut Random::new(seed), inputs);
        // What fails is told by its seed.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| takes(&bytes)));
        taken += u64::from(result.unwrap_or_else(|_| panic!("seed {seed}: {bytes:?}")));
    }
    assert!(taken > 0 && taken < rounds, "{taken} of {rounds} were taken");
}

#[test]
fn journal_entries() {
    feed(&Corpus::new().events, 600_000, fuzz::event);
}

#[test]
fn journals() {
    let journals = Corpus::new().journals;
    let applied: Vec<_> = journals.iter().map(|journal| fuzz::journal(journal)).collect();
    assert!(applied.iter().all(|&count| count > 5), "{applied:?}");
    // Changed ones are taken as far as they make sense.
    feed(&journals, 12_000, |journal| fuzz::journal(journal) >= applied[0].min(applied[1]));
}

#[test]
fn page_headers() {
    feed(&Corpus::new().headers, 60_000, fuzz::record);
}

#[test]
fn segment_indexes() {
    feed(&Corpus::new().indexes, 60_000, fuzz::index);
}

#[test]
fn small_files() {
    feed(&Corpus::new().small_files, 60_000, fuzz::small_file);
}

#[test]
fn bundles_of_changed_parts() {
    feed(&Corpus::new().bundles, 6_000, fuzz::bundle);
}

#[test]
fn changed_bundles() {
    let bundles = Corpus::new().raw_bundles;
    feed(&bundles, 6_000, |bundle| {
        let is_taken = fuzz::raw_bundle(bundle);
        // Not a byte of it may differ, but behind its end.
        assert!(!is_taken || bundles.iter().any(|whole| bundle.starts_with(whole)));
        is_taken
    });
}
