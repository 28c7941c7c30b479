//! Objects that are not what was written: a damaged manifest is told, a damaged extent costs its pages.

use mainstay_store::object::{ObjectError, Takeover};

use super::{
    Server,
    place::{Place, memory, options},
};
use crate::rig::{headers, payload, tokens};

/// A session of 12 pages in 3 extents, released.
fn released(place: &Place, seed: u64) -> (Server, mainstay_store::SessionId, Vec<u32>) {
    let a = Server::new(1);
    let all = tokens(seed, 32 * 12);
    let id = a.session(&all);
    a.release(&place.tier(), id).unwrap();
    (a, id, all)
}

#[test]
fn no_byte_of_a_manifest_may_differ_or_be_missing() {
    let place = memory();
    let (a, id, _) = released(&place, 1);
    let (tier, b) = (place.tier(), Server::new(2));
    let manifest = place.names("session").pop().unwrap();
    let bytes = place.get(&manifest);
    let names = place.names("session");
    let refused = |bytes: Vec<u8>, what: &str| {
        place.put(&manifest, bytes);
        for takeover in [Takeover::No, Takeover::Yes] {
            let result = b.acquire(&tier, id, takeover);
            // Its version may be damaged to a newer one only together with its checksum.
            assert!(matches!(result, Err(ObjectError::Damaged { .. })), "{what}: {result:?}");
        }
        assert!(!b.has(id), "{what}");
        assert_eq!(place.names("session"), names, "{what}: nothing is claimed");
    };
    for at in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << (at % 8);
        refused(flipped, &format!("byte {at}"));
        if at % 7 == 0 {
            refused(bytes[..at].to_vec(), &format!("cut at {at}"));
        }
    }
    refused([&bytes[..], &[0]].concat(), "a byte more");
    // Nor may it be another's, or of another number.
    let other = a.session_named(None, &tokens(2, 40));
    a.flush(&tier, other).unwrap();
    let theirs = place.names("session").into_iter().find(|n| n.contains(&other.to_string())).unwrap();
    let theirs = place.get(&theirs.replace("-0000000000", "-0000000001"));
    place.put(&manifest, theirs);
    assert!(matches!(b.acquire(&tier, id, Takeover::Yes), Err(ObjectError::Damaged { .. })));
    let renumbered = manifest.replace("0000000001-", "0000000003-");
    place.put(&manifest, bytes.clone());
    place.put(&renumbered, bytes);
    assert!(matches!(b.acquire(&tier, id, Takeover::Yes), Err(ObjectError::Damaged { .. })));
    assert!(matches!(tier.collect(), Err(ObjectError::Damaged { .. })), "what it names is not known");
    assert!(matches!(tier.list(b.tenant.id), Err(ObjectError::Damaged { .. })));
    place.delete(&renumbered);
    assert_eq!(b.acquire(&tier, id, Takeover::No).unwrap().pages, 12);
}

#[test]
fn the_owner_writes_anew_what_was_damaged() {
    let place = memory();
    let (tier, a, b) = (place.tier(), Server::new(1), Server::new(2));
    let id = a.session(&tokens(1, 100));
    a.flush(&tier, id).unwrap();
    let manifest = place.names("session").pop().unwrap();
    let mut bytes = place.get(&manifest);
    *bytes.last_mut().unwrap() ^= 1;
    place.put(&manifest, bytes);
    a.release(&tier, id).unwrap();
    assert_eq!(b.acquire(&tier, id, Takeover::No).unwrap().pages, 4);
}

#[test]
fn a_damaged_extent_costs_its_pages_and_no_token() {
    type Damage = fn(&Place, &[String]);
    let damages: [(&str, Damage); 5] = [
        ("flipped", |place, names| {
            let mut bytes = place.get(&names[1]);
            let middle = bytes.len() / 2;
            bytes[middle] ^= 4;
            place.put(&names[1], bytes);
        }),
        ("truncated", |place, names| {
            let bytes = place.get(&names[1]);
            place.put(&names[1], bytes[..bytes.len() - 9].to_vec());
        }),
        ("longer", |place, names| {
            let bytes = place.get(&names[1]);
            place.put(&names[1], [&bytes[..], &[0; 100]].concat());
        }),
        ("swapped", |place, names| {
            let (one, two) = (place.get(&names[0]), place.get(&names[1]));
            place.put(&names[0], two);
            place.put(&names[1], one);
        }),
        ("gone", |place, names| place.delete(&names[1])),
    ];
    for (what, damage) in damages {
        let place = memory();
        let (a, id, all) = released(&place, 3);
        let b = Server::new(2);
        damage(&place, &place.names("extent"));
        let acquired = b.acquire(&place.tier(), id, Takeover::No).unwrap();
        let expected = if what == "swapped" { 4 } else { 8 };
        assert_eq!((acquired.pages, acquired.pages_missed), (expected, 12 - expected), "{what}");
        assert_eq!(b.store.tokens(b.tenant.id, id).unwrap(), all, "{what}");
        b.store.flush().unwrap();
        assert_eq!(b.pages_of(&a, &all), expected as usize, "{what}");
        // Once its new owner has computed them, they are in the tier again.
        for (own, theirs) in headers(&b.tenant, &all).into_iter().zip(headers(&a.tenant, &all)) {
            b.put(own, payload(&theirs));
        }
        let released = b.release(&place.tier(), id).unwrap();
        assert_eq!((released.pages, released.extents_written), (12, (12 - expected) / 4), "{what}");
        let c = Server::new(3);
        assert_eq!(c.acquire(&place.tier(), id, Takeover::No).unwrap().pages, 12, "{what}");
    }
}

#[test]
fn a_moved_session_keeps_the_pages_its_new_owner_lacks() {
    let place = memory();
    let (a, id, all) = released(&place, 4);
    let (b, c) = (Server::new(2), Server::new(3));
    let refuse = mainstay_store::object::Acquire {
        pages: mainstay_store::BundlePages::Refuse,
        takeover: Takeover::No,
    };
    place.tier().acquire(&b.store, &b.tenant, id, refuse).unwrap();
    // It took no page and says nothing of pages: those of the tier still fit.
    let released = place.tier().release(&b.store, b.tenant.id, id, None).unwrap();
    assert_eq!((released.pages, released.extents_written), (12, 0));
    let narrow = mainstay_store::object::ObjectOptions { extent_bytes: 1, transfers: 1, ..options() };
    assert_eq!(c.acquire(&place.tier_with(narrow), id, Takeover::No).unwrap().pages, 12);
    c.store.flush().unwrap();
    assert_eq!(c.pages_of(&a, &all), 12);
}
