//! What a real store writes, taken apart for fuzzers.

use std::{collections::BTreeMap, sync::Arc};

use mainstay_store::{
    Append, At, ClassId, ContentId, ExportPages, InFlight, Kind, Options, PAGE_TOKENS, PageHeader, PageName,
    Root, Settings, Store, Tenant, fuzz,
    sim::{SimClock, SimDisk, SimEntropy},
};

const CONTENT: ContentId = ContentId([3; 32]);
const CLASS: ClassId = ClassId([5; 32]);
const BLOCK: usize = 4096;

/// Inputs for each entrance.
#[derive(Default)]
pub(crate) struct Corpus {
    pub(crate) events: Vec<Vec<u8>>,
    pub(crate) journals: Vec<Vec<u8>>,
    pub(crate) headers: Vec<Vec<u8>>,
    pub(crate) indexes: Vec<Vec<u8>>,
    pub(crate) small_files: Vec<Vec<u8>>,
    pub(crate) bundles: Vec<Vec<u8>>,
    pub(crate) raw_bundles: Vec<Vec<u8>>,
}

impl Corpus {
    pub(crate) fn new() -> Self {
        let disk = SimDisk::new(1);
        let mut corpus = Self::default();
        let bundles = fill(&disk, 1 << 20);
        let before = disk.files();
        // Opened again with a small limit, the journal begins anew.
        fill(&disk, 300);
        for files in [before, disk.files()] {
            corpus.take(&files);
        }
        for bundle in bundles {
            corpus.bundles.push(parts(&bundle));
            corpus.raw_bundles.push(bundle);
        }
        corpus
    }

    fn take(&mut self, files: &BTreeMap<String, Vec<u8>>) {
        for (path, bytes) in files {
            match path.split_once('/').map_or(&**path, |(dir, _)| dir) {
                "journal" => self.journal(bytes),
                "seg" => self.segment(bytes),
                // A preamble, a length, the body and a checksum.
                _ if bytes.len() > 28 => self.small_files.push(bytes[20..bytes.len() - 8].to_vec()),
                _ => {}
            }
        }
    }

    fn journal(&mut self, bytes: &[u8]) {
        let (mut at, mut journal, mut ids) = (16, Vec::new(), Vec::new());
        while at + 96 <= bytes.len() {
            let len = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap()) as usize;
            let (id, kind) = (&bytes[at + 16..at + 32], bytes[at + 64]);
            let payload = &bytes[at + 80..at + 80 + len];
            let place = ids.iter().position(|other| other == id).unwrap_or_else(|| {
                ids.push(id.to_vec());
                ids.len() - 1
            });
            assert!(place < 8, "three bits tell sessions apart");
            self.events.push([&[kind], payload].concat());
            journal.extend(fuzz::piece(kind | (place as u8) << 5, payload));
            at += 96 + len;
        }
        // One that only begins has nothing to apply.
        if ids.len() > 1 {
            self.journals.push(journal);
        }
    }

    fn segment(&mut self, bytes: &[u8]) {
        self.headers
            .extend(bytes.chunks(BLOCK).filter(|block| block.starts_with(b"MSPG")).map(<[u8]>::to_vec));
        let trailer = &bytes[bytes.len() - BLOCK..];
        if trailer.starts_with(b"MSTSEGT\n") {
            let offset = u64::from_le_bytes(trailer[8..16].try_into().unwrap()) as usize;
            let len = u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap()) as usize;
            // The tenant and number of the segment that is asked for stand first.
            let rest = &bytes[offset + 4 + 24..offset + 4 + len];
            self.indexes.push([&[1; 16], &1_u64.to_le_bytes()[..], rest].concat());
        }
    }
}

/// The parts of a bundle without their hashes.
fn parts(bundle: &[u8]) -> Vec<u8> {
    let (mut at, mut parts) = (16, Vec::new());
    while at < bundle.len() {
        let len = u32::from_le_bytes(bundle[at + 1..at + 5].try_into().unwrap()) as usize;
        parts.extend(fuzz::piece(bundle[at], &bundle[at + 5..at + 5 + len]));
        at += 5 + len + 32;
    }
    parts
}

/// Uses a store for everything that it has a format for; two bundles of it.
fn fill(disk: &SimDisk, rebase_bytes: u64) -> Vec<Vec<u8>> {
    let options = Options { threads: false, reserve_bytes: 0, rebase_bytes, ..Options::default() };
    let entropy = Arc::new(SimEntropy::new(disk.calls()));
    let world = (Arc::new(disk.clone()), Arc::new(SimClock::new(1)));
    let (store, _) = Store::open(world.0, world.1, entropy, options).unwrap();
    let tenant = store.tenant("t").unwrap();
    let root = tenant.chain.root(&Root { content: CONTENT, adapter: None, rope_table: 0, salt: b"" });
    let settings = Settings {
        root: Some(root),
        model: "m".into(),
        ttl_ms: Some(9),
        meta: vec![7; 20],
        ..Settings::default()
    };
    let id = store.create(tenant.id, settings).unwrap().id;
    let tokens: Vec<u32> = (0..75).map(|i| i * 1999).collect();
    for new in tokens.chunks(40) {
        let append = Append { tokens: new.to_vec(), meta: b"meta".to_vec(), ..Append::default() };
        store.append_turn(tenant.id, id, append).unwrap();
    }
    write_pages(&store, &tenant, root, &tokens);
    let in_flight = InFlight { meta: vec![1], tokens: vec![2, 3] };
    store.begin_answer(tenant.id, id, None, in_flight).unwrap();
    store.extend_answer(tenant.id, id, &[4, 5]).unwrap();
    let fork = store.fork(tenant.id, id, At::Token(33), None).unwrap().id;
    store.patch(tenant.id, fork, |settings| settings.pinned = true).unwrap();
    let gone = store.fork(tenant.id, fork, At::Head, None).unwrap().id;
    store.rollback(tenant.id, gone, At::Turn(0), None).unwrap();
    store.drop_answer(tenant.id, gone).unwrap();
    store.flush().unwrap();
    let pages = ExportPages { content: CONTENT, class: CLASS, groups: 1 };
    let bundles = [None, Some(pages)].map(|pages| {
        let mut bundle = Vec::new();
        store.export(tenant.id, id, pages, &mut bundle).unwrap();
        bundle
    });
    store.delete(tenant.id, gone).unwrap();
    store.close().unwrap();
    bundles.into()
}

fn write_pages(store: &Store, tenant: &Tenant, root: mainstay_store::PageKey, tokens: &[u32]) {
    let mut parent = root;
    for tokens in tokens.chunks(PAGE_TOKENS) {
        let key = tenant.chain.next(parent, tokens, &[]);
        let name = PageName { tenant: tenant.id, key, class: CLASS, group: 0, kind: Kind::Attention };
        let header = PageHeader { name, content: CONTENT, parent, tokens: tokens.to_vec() };
        let payload = key.0.repeat(5).into_boxed_slice();
        let digest = *blake3::hash(&payload).as_bytes();
        store.write(header, payload, digest);
        parent = key;
    }
}
