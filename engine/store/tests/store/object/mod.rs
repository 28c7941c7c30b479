//! The object tier between two stores of different secrets: what is moved, who may have it, what is shared.

mod damage;
mod faults;
mod ownership;
mod place;

use mainstay_store::{
    Append, At, BundlePages, Durability, ExportPages, Kind, PageHeader, PageName, SessionId, Settings, Store,
    Tenant,
    object::{Acquire, Acquired, ObjectError, ObjectTier, State, Takeover},
};

use crate::rig::{Rig, class, content, headers, read_pages, root, tokens, write_pages};
use place::{memory, options, places};

/// Number, tokens and metadata.
type TurnView = (u32, Vec<u32>, Vec<u8>);

/// A store on a disk of its own.
struct Server {
    rig: Rig,
    store: Store,
    tenant: Tenant,
}

impl Server {
    fn put(&self, header: PageHeader, bytes: Box<[u8]>) {
        let digest = *blake3::hash(&bytes).as_bytes();
        self.store.write(header, bytes, digest);
    }

    fn new(seed: u64) -> Self {
        let rig = Rig::new(seed);
        // Another disk is another machine: its store draws other secrets.
        (0..seed).for_each(|_| drop(mainstay_store::disk::Disk::list(&rig.disk, "")));
        let (store, _) = rig.open();
        let tenant = store.tenant("t").unwrap();
        Self { rig, store, tenant }
    }

    /// A session of two turns, with its pages.
    fn session(&self, all: &[u32]) -> SessionId {
        self.session_named(Some("chat"), all)
    }

    fn session_named(&self, name: Option<&str>, all: &[u32]) -> SessionId {
        let settings = Settings {
            name: name.map(str::to_owned),
            pinned: true,
            priority: 2,
            meta: b"of the server".to_vec(),
            root: Some(root(&self.tenant)),
            model: "m".to_owned(),
            durability: Durability::Turn,
            ..Settings::default()
        };
        let id = self.store.create(self.tenant.id, settings).unwrap().id;
        let half = all.len() / 2;
        self.turn(id, &all[..half]);
        self.turn(id, &all[half..]);
        write_pages(&self.store, &self.tenant, all);
        self.store.flush().unwrap();
        id
    }

    fn turn(&self, id: SessionId, tokens: &[u32]) {
        let meta = format!("{} tokens", tokens.len()).into_bytes();
        let append = Append { tokens: tokens.to_vec(), meta, ..Append::default() };
        self.store.append_turn(self.tenant.id, id, append).unwrap();
    }

    fn flush(
        &self,
        tier: &ObjectTier,
        id: SessionId,
    ) -> Result<mainstay_store::object::Flushed, ObjectError> {
        tier.flush(&self.store, self.tenant.id, id, Some(made()))
    }

    fn release(
        &self,
        tier: &ObjectTier,
        id: SessionId,
    ) -> Result<mainstay_store::object::Flushed, ObjectError> {
        tier.release(&self.store, self.tenant.id, id, Some(made()))
    }

    fn acquire(&self, tier: &ObjectTier, id: SessionId, takeover: Takeover) -> Result<Acquired, ObjectError> {
        let pages = BundlePages::accept(content(), root(&self.tenant));
        tier.acquire(&self.store, &self.tenant, id, Acquire { pages, takeover })
    }

    /// Settings but for the root, and turns.
    fn view(&self, id: SessionId) -> (Settings, Vec<TurnView>) {
        let settings = Settings { root: None, ..self.store.get(self.tenant.id, id).unwrap().settings };
        let turns = self.store.turns(self.tenant.id, id).unwrap();
        (settings, turns.iter().map(|turn| (turn.number, turn.tokens.clone(), turn.meta.clone())).collect())
    }

    fn has(&self, id: SessionId) -> bool {
        self.store.get(self.tenant.id, id).is_ok()
    }

    /// Pages that came over: those of the sender, byte for byte, under this store's names.
    #[track_caller]
    fn pages_of(&self, sender: &Server, all: &[u32]) -> usize {
        let (own, theirs) = (headers(&self.tenant, all), headers(&sender.tenant, all));
        assert_ne!(own[0].name.key, theirs[0].name.key, "the stores' secrets are different");
        let came = own.iter().zip(&theirs).filter(|(own, theirs)| match self.store.read(own) {
            Ok(page) => {
                assert_eq!(page[..], crate::rig::payload(theirs)[..]);
                true
            }
            Err(_) => false,
        });
        came.count()
    }
}

fn made() -> ExportPages {
    ExportPages { content: content(), class: class(), groups: 1 }
}

#[test]
fn a_second_create_fails() {
    for place in places() {
        place.tier().prove_exclusive().unwrap();
        assert!(place.names("").is_empty(), "the probe is removed");
    }
    let overwrites = place::Faulty::new(memory().store.clone(), |_, _| place::Fault::Overwrites);
    let tier = ObjectTier::new(overwrites, options()).unwrap();
    assert!(matches!(tier.prove_exclusive(), Err(ObjectError::NotExclusive)));
}

#[test]
fn addresses_are_told_apart() {
    let refused =
        ["", "/tmp", "file:", "file://host/dir", "s3://", "s3:///x", "ftp://x/y", "memory", "s3://b/a//b"];
    for url in refused {
        assert!(ObjectTier::open(url, options()).is_err(), "{url}");
    }
    ObjectTier::open("memory:", options()).unwrap();
    let dir = std::env::temp_dir().join(format!("tier-{}", std::process::id()));
    let file = format!("file://{}", dir.display());
    let bucket = std::env::var(place::BUCKET).ok();
    let s3 = bucket.map(|bucket| format!("s3://{bucket}/deep/prefix-{}", std::process::id()));
    for url in [Some(file), s3].into_iter().flatten() {
        let tier = ObjectTier::open(&url, options()).unwrap();
        let (a, b) = (Server::new(1), Server::new(2));
        let id = a.session(&tokens(1, 100));
        a.release(&tier, id).unwrap();
        let again = ObjectTier::open(&url, options()).unwrap();
        assert_eq!(b.acquire(&again, id, Takeover::No).unwrap().pages, 4, "{url}");
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(std::fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn a_session_moves_and_comes_back() {
    for place in places() {
        let tier = place.tier();
        let (a, b) = (Server::new(1), Server::new(2));
        let mut all = tokens(1, 32 * 9 + 5);
        let id = a.session(&all);
        let before = a.view(id);
        let flushed = a.flush(&tier, id).unwrap();
        assert_eq!((flushed.epoch, flushed.number, flushed.pages), (1, 1, 10));
        assert_eq!((flushed.extents, flushed.extents_written), (3, 3));
        assert!(a.has(id), "a flush keeps the session");
        let released = a.release(&tier, id).unwrap();
        assert_eq!((released.epoch, released.number, released.extents_written), (1, 2, 0));
        assert!(!a.has(id));
        let listed = tier.list(a.tenant.id).unwrap();
        assert_eq!(
            (listed[0].id, listed[0].state, listed[0].owner),
            (id, State::Released, a.store.owner_id())
        );

        let acquired = b.acquire(&tier, id, Takeover::No).unwrap();
        assert_eq!((acquired.session.id, acquired.epoch), (id, 2));
        assert_eq!((acquired.pages, acquired.pages_missed), (10, 0));
        assert_eq!(b.view(id), before);
        b.store.flush().unwrap();
        assert_eq!(b.pages_of(&a, &all), 10);
        let listed = tier.list(a.tenant.id).unwrap();
        assert_eq!((listed[0].state, listed[0].owner), (State::Held, b.store.owner_id()));
        assert!(tier.list(mainstay_store::TenantId::of("other")).unwrap().is_empty());

        // What was here before is not read again, nor written again.
        let more = tokens(2, 40);
        b.turn(id, &more);
        all.extend(&more);
        let released = b.release(&tier, id).unwrap();
        assert_eq!((released.epoch, released.number), (2, 1));
        assert!(released.extents_written <= 1, "{released:?}");
        let back = a.acquire(&tier, id, Takeover::No).unwrap();
        assert_eq!((back.epoch, back.session.turn_count), (3, 3));
        assert_eq!(a.store.tokens(a.tenant.id, id).unwrap(), all);
        assert_eq!(read_pages(&a.store, &a.tenant, &all[..32 * 9]), 9);
        // One manifest with contents and three claims are left.
        assert_eq!(place.names("session").len(), 4, "{:?}", place.names("session"));
        assert_eq!(tier.collect().unwrap().removed, 0);
    }
}

#[test]
fn forks_share_the_extents_of_their_common_prefix() {
    for place in places() {
        let tier = place.tier();
        let a = Server::new(1);
        let all = tokens(3, 32 * 16);
        let id = a.session(&all);
        a.flush(&tier, id).unwrap();
        let alone = place.list("extent");
        assert_eq!(alone.len(), 4);
        let mut logical = 4;
        for i in 0..8 {
            let fork = a.store.fork(a.tenant.id, id, At::Head, None).unwrap().id;
            let own = tokens(100 + i, 32 * 2);
            a.turn(fork, &own);
            write_pages(&a.store, &a.tenant, &[&all[..], &own].concat());
            let flushed = a.flush(&tier, fork).unwrap();
            assert_eq!((flushed.extents, flushed.extents_written, flushed.pages), (5, 1, 18));
            logical += flushed.extents;
        }
        let together = place.list("extent");
        assert_eq!((together.len(), logical), (4 + 8, 44));
        let bytes = |list: &[(String, u64)]| list.iter().map(|(_, bytes)| bytes).sum::<u64>();
        assert!(bytes(&together) < 3 * bytes(&alone), "{} and {}", bytes(&together), bytes(&alone));
        // The parent goes; what its forks name stays.
        a.release(&tier, id).unwrap();
        tier.delete(&a.store, a.tenant.id, id, Takeover::No).unwrap();
        let eager = place.tier_with(mainstay_store::object::ObjectOptions { grace_ms: 0, ..options() });
        assert_eq!(eager.collect().unwrap().removed, 0);
    }
}

#[test]
fn a_growing_session_writes_only_what_is_new() {
    let place = memory();
    let tier = place.tier();
    let (a, b) = (Server::new(1), Server::new(2));
    let mut all = tokens(4, 32 * 8);
    let id = a.session(&all);
    a.flush(&tier, id).unwrap();
    for i in 0..8 {
        let more = tokens(50 + i, 20);
        a.turn(id, &more);
        all.extend(&more);
        write_pages(&a.store, &a.tenant, &all);
        let flushed = a.flush(&tier, id).unwrap();
        assert!(flushed.extents_written <= 2, "{flushed:?}");
        assert_eq!(flushed.pages as usize, all.len().div_ceil(32));
    }
    // Tails that were replaced are no longer named, and go when they are old.
    let count = place.names("extent").len();
    assert_eq!(tier.collect().unwrap().kept as usize, count, "they are young");
    let eager = place.tier_with(mainstay_store::object::ObjectOptions { grace_ms: 0, ..options() });
    let collected = eager.collect().unwrap();
    assert!(collected.removed >= 5 && collected.removed_bytes > 0, "{collected:?}");
    a.release(&tier, id).unwrap();
    let acquired = b.acquire(&tier, id, Takeover::No).unwrap();
    assert_eq!((acquired.pages, acquired.pages_missed), (all.len().div_ceil(32) as u32, 0));
    b.store.flush().unwrap();
    assert_eq!(b.pages_of(&a, &all), all.len().div_ceil(32));
    // A rollback to other tokens names no page of the old ones.
    b.store.rollback(b.tenant.id, id, At::Token(40), None).unwrap();
    b.turn(id, &tokens(90, 60));
    let flushed = b.flush(&tier, id).unwrap();
    assert_eq!(flushed.pages, 1, "{flushed:?}");
    assert_eq!(b.release(&tier, id).unwrap().pages, 1);
    let back = a.acquire(&tier, id, Takeover::No).unwrap();
    assert_eq!((back.session.token_count, back.pages), (100, 1));
}

#[test]
fn pages_of_other_content_are_not_taken() {
    let place = memory();
    let tier = place.tier();
    let (a, b) = (Server::new(1), Server::new(2));
    let all = tokens(5, 100);
    for (i, refuse) in [true, false].into_iter().enumerate() {
        let id = a.session(&all);
        let before = a.view(id);
        a.release(&tier, id).unwrap();
        let other = mainstay_store::ContentId([9; 32]);
        let accept = BundlePages::accept(other, root(&b.tenant));
        let pages = if refuse { BundlePages::Refuse } else { accept };
        let how = Acquire { pages, takeover: Takeover::No };
        let acquired = tier.acquire(&b.store, &b.tenant, id, how).unwrap();
        assert_eq!((acquired.pages, acquired.pages_missed), (0, 4));
        assert_eq!(acquired.session.settings.root.is_some(), !refuse);
        let after = b.view(id);
        assert_eq!(after.1, before.1);
        // The second finds the first under its name, which stays the first's.
        assert_eq!(after.0.name, (i == 0).then(|| "chat".to_owned()));
        b.store.flush().unwrap();
        assert_eq!(b.pages_of(&a, &all), 0);
    }
}

#[test]
fn compression_is_used_where_it_saves() {
    let place = memory();
    let a = Server::new(1);
    let all = tokens(6, 32 * 4);
    let id = a.store.create(a.tenant.id, crate::rig::settings(&a.tenant, Durability::Async)).unwrap().id;
    a.turn(id, &all);
    for header in headers(&a.tenant, &all) {
        a.put(header, vec![7; 64 << 10].into());
    }
    let big = place.tier_with(mainstay_store::object::ObjectOptions { extent_bytes: 1 << 20, ..options() });
    let flushed = a.flush(&big, id).unwrap();
    assert_eq!((flushed.pages, flushed.extents), (4, 1));
    assert!(flushed.bytes_written < 2000, "{flushed:?}");
}

#[test]
fn every_group_and_kind_of_a_page_moves() {
    let place = memory();
    let (a, b) = (Server::new(1), Server::new(2));
    let all = tokens(7, 32 * 5);
    let id = a.session_named(None, &all);
    let of = |server: &Server, group, kind| {
        headers(&server.tenant, &all).into_iter().map(move |header| {
            let name = PageName { group, kind, ..header.name };
            PageHeader { name, ..header }
        })
    };
    let others = [(1, Kind::Attention), (1, Kind::State)];
    for (i, (group, kind)) in others.into_iter().enumerate() {
        for (at, header) in of(&a, group, kind).enumerate() {
            a.put(header, vec![(16 * i + at) as u8; 100].into());
        }
    }
    let pages = Some(ExportPages { groups: 2, ..made() });
    let released = place.tier().release(&a.store, a.tenant.id, id, pages).unwrap();
    assert_eq!(released.pages, 15);
    assert_eq!(b.acquire(&place.tier(), id, Takeover::No).unwrap().pages, 15);
    b.store.flush().unwrap();
    assert_eq!(b.pages_of(&a, &all), 5);
    for (i, (group, kind)) in others.into_iter().enumerate() {
        for (at, header) in of(&b, group, kind).enumerate() {
            assert_eq!(b.store.read(&header).unwrap()[..], [(16 * i + at) as u8; 100]);
        }
    }
    // Half of an extent's pages are no whole extent, however many kinds they have.
    let more = tokens(8, 32 * 2);
    b.turn(id, &more);
    write_pages(&b.store, &b.tenant, &[&all[..], &more].concat());
    let pages = Some(ExportPages { groups: 2, ..made() });
    assert_eq!(place.tier().release(&b.store, b.tenant.id, id, pages).unwrap().pages, 17);
}
