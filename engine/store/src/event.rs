//! What the journal records: changes of sessions, and whole sessions where a journal begins anew.

use std::{fmt, str::FromStr};

use crate::{
    key::{PageKey, TenantId},
    wire::{Malformed, Reader, Writer},
};

/// Longest opaque field of a session or a turn, bytes.
pub const META_BYTES_MAX: usize = 16 << 20;
/// Longest name of a session, bytes.
pub const NAME_BYTES_MAX: usize = 256;

/// Names a session for ever: 48 bits of time, 80 random ones; sorts by age.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u128);

/// Whose a journal entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Whose {
    pub(crate) tenant: TenantId,
    pub(crate) session: SessionId,
}

impl Whose {
    /// Of the file itself.
    pub(crate) const FILE: Self = Self { tenant: TenantId([0; 16]), session: SessionId(0) };
}

/// Crockford's base 32.
const DIGITS: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (0..26).rev().try_for_each(|place| {
            let digit = DIGITS[(self.0 >> (5 * place)) as usize & 31];
            write!(f, "{}", char::from(digit))
        })
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SessionId({self})")
    }
}

impl FromStr for SessionId {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let malformed = Malformed("session id");
        // 26 digits hold 130 bits; the first may use three of its five.
        if text.len() != 26 || text.as_bytes()[0] > b'7' {
            return Err(malformed);
        }
        text.bytes().try_fold(SessionId(0), |id, byte| {
            let digit = DIGITS.iter().position(|&digit| digit == byte).ok_or(malformed)?;
            Ok(SessionId(id.0 << 5 | digit as u128))
        })
    }
}

/// How much an acknowledged turn survives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Durability {
    /// Nothing: the session lives in memory.
    Ephemeral = 0,
    /// The end of the process; power loss up to the last group sync.
    #[default]
    Async = 1,
    /// Power loss, for tokens.
    Turn = 2,
    /// Power loss, for tokens and pages.
    Full = 3,
}

/// What a session's owner may choose and change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Unique in a tenant.
    pub name: Option<String>,
    /// The model as the server names it.
    pub model: String,
    /// Where the session's chain of page keys begins, once its model is known.
    pub root: Option<PageKey>,
    /// Removed when unused for so long.
    pub ttl_ms: Option<u64>,
    /// Its pages are not evicted, up to the tenant's quota of pinned bytes.
    pub pinned: bool,
    /// Above 0, its pages are let go after those of sessions at 0.
    pub priority: u8,
    /// Whether it is on disk, and when a turn is acknowledged if the request does not say.
    pub durability: Durability,
    /// The server's own.
    pub meta: Vec<u8>,
}

/// Hash over all tokens up to a point in a session.
pub(crate) type HeadHash = [u8; 16];

/// The hash of `tokens` after those of `before`.
pub(crate) fn head_hash(before: HeadHash, tokens: &[u32]) -> HeadHash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&before);
    for token in tokens {
        hasher.update(&token.to_le_bytes());
    }
    *hasher.finalize().as_bytes().first_chunk().expect("a hash has 32 bytes")
}

/// A turn in a journal's base, where it stands alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NodeEvent {
    pub(crate) id: u64,
    pub(crate) parent: Option<u64>,
    pub(crate) number: u32,
    pub(crate) at_ms: u64,
    pub(crate) tokens: Vec<u32>,
    pub(crate) meta: Vec<u8>,
    /// After these tokens.
    pub(crate) hash: HeadHash,
}

/// Tokens of an answer that is being made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InFlight {
    /// What the server needs to go on: request, seed, how the prompt was made.
    pub meta: Vec<u8>,
    /// Tokens of the turn so far: what was sent, then what was sampled.
    pub tokens: Vec<u32>,
}

/// A session in a journal's base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WholeEvent {
    pub(crate) tenant: TenantId,
    pub(crate) settings: Settings,
    pub(crate) parent: Option<(SessionId, u32)>,
    pub(crate) created_ms: u64,
    pub(crate) used_ms: u64,
    pub(crate) damaged: bool,
    pub(crate) head: Option<u64>,
    pub(crate) hash: HeadHash,
    pub(crate) in_flight: Option<InFlight>,
}

/// One entry of the journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A file begins.
    Start { epoch: u64, wall_ms: u64 },
    /// A session is made.
    Create { tenant: TenantId, settings: Settings, at_ms: u64 },
    /// A turn stands after `number - 1` others, which have this hash; what came after those is let go.
    Turn { number: u32, before: HeadHash, at_ms: u64, tokens: Vec<u32>, meta: Vec<u8> },
    /// The session is made from the first tokens of another.
    Fork { of: SessionId, len: u32, hash: HeadHash, settings: Settings, at_ms: u64 },
    /// The session keeps its first tokens.
    Rollback { len: u32, hash: HeadHash, at_ms: u64 },
    /// Settings are replaced.
    Set { settings: Settings, at_ms: u64 },
    /// The session is gone.
    Delete,
    /// An answer begins.
    Begin { in_flight: InFlight },
    /// It goes on, at this token of the turn.
    Extend { at: u32, tokens: Vec<u32> },
    /// It ends without becoming a turn.
    Drop,
    /// See the types.
    Node(NodeEvent),
    /// See the types.
    Whole(Box<WholeEvent>),
    /// The base is complete; it had so many entries before this one.
    BaseEnd { entries: u64 },
}

impl Event {
    pub(crate) fn kind(&self) -> u8 {
        match self {
            Event::Start { .. } => 1,
            Event::Create { .. } => 2,
            Event::Turn { .. } => 3,
            Event::Fork { .. } => 4,
            Event::Rollback { .. } => 5,
            Event::Set { .. } => 6,
            Event::Delete => 7,
            Event::Begin { .. } => 8,
            Event::Extend { .. } => 9,
            Event::Drop => 10,
            Event::Node(_) => 11,
            Event::Whole(_) => 12,
            Event::BaseEnd { .. } => 13,
        }
    }

    /// Whether it is of an answer in flight, which is no part of the session yet.
    pub(crate) fn is_answer(&self) -> bool {
        Self::is_answer_kind(self.kind())
    }

    /// Whether it is of a file and says nothing of a session.
    pub(crate) fn is_of_file(&self) -> bool {
        Self::is_file_kind(self.kind())
    }

    pub(crate) fn is_file_kind(kind: u8) -> bool {
        kind == 1 || kind == 13
    }

    pub(crate) fn is_answer_kind(kind: u8) -> bool {
        (8..=10).contains(&kind)
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        match self {
            Event::Start { epoch, wall_ms } => {
                out.u64(*epoch).u64(*wall_ms);
            }
            Event::Create { tenant, settings, at_ms } => {
                write_settings(out.raw(&tenant.0).u64(*at_ms), settings);
            }
            Event::Turn { number, before, at_ms, tokens, meta } => {
                out.u32(*number).raw(before).u64(*at_ms).tokens(tokens).bytes(meta);
            }
            Event::Fork { of, len, hash, settings, at_ms } => {
                out.raw(&of.0.to_le_bytes()).u32(*len).raw(hash).u64(*at_ms);
                write_settings(&mut out, settings);
            }
            Event::Rollback { len, hash, at_ms } => {
                out.u32(*len).raw(hash).u64(*at_ms);
            }
            Event::Set { settings, at_ms } => write_settings(out.u64(*at_ms), settings),
            Event::Begin { in_flight } => {
                write_in_flight(&mut out, in_flight);
            }
            Event::Extend { at, tokens } => {
                out.u32(*at).tokens(tokens);
            }
            Event::Node(node) => {
                out.u64(node.id).option(node.parent, |out, id| {
                    out.u64(id);
                });
                out.u32(node.number).u64(node.at_ms).tokens(&node.tokens).bytes(&node.meta).raw(&node.hash);
            }
            Event::Whole(whole) => write_whole(&mut out, whole),
            Event::BaseEnd { entries } => {
                out.u64(*entries);
            }
            Event::Delete | Event::Drop => {}
        }
        out.0
    }

    pub(crate) fn decode(kind: u8, payload: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(payload, "journal entry");
        let event = match kind {
            1 => Event::Start { epoch: r.u64()?, wall_ms: r.u64()? },
            2 => {
                let (tenant, at_ms) = (TenantId(r.array()?), r.u64()?);
                Event::Create { tenant, at_ms, settings: read_settings(&mut r)? }
            }
            3 => Event::Turn {
                number: r.u32()?,
                before: r.array()?,
                at_ms: r.u64()?,
                tokens: r.tokens()?,
                meta: r.bytes()?.to_vec(),
            },
            4 => {
                let of = SessionId(u128::from_le_bytes(r.array()?));
                let (len, hash, at_ms) = (r.u32()?, r.array()?, r.u64()?);
                Event::Fork { of, len, hash, at_ms, settings: read_settings(&mut r)? }
            }
            5 => Event::Rollback { len: r.u32()?, hash: r.array()?, at_ms: r.u64()? },
            6 => Event::Set { at_ms: r.u64()?, settings: read_settings(&mut r)? },
            7 => Event::Delete,
            8 => Event::Begin { in_flight: read_in_flight(&mut r)? },
            9 => Event::Extend { at: r.u32()?, tokens: r.tokens()? },
            10 => Event::Drop,
            11 => Event::Node(NodeEvent {
                id: r.u64()?,
                parent: r.option(Reader::u64)?,
                number: r.u32()?,
                at_ms: r.u64()?,
                tokens: r.tokens()?,
                meta: r.bytes()?.to_vec(),
                hash: r.array()?,
            }),
            12 => Event::Whole(Box::new(read_whole(&mut r)?)),
            13 => Event::BaseEnd { entries: r.u64()? },
            _ => return Err(r.malformed()),
        };
        r.end()?;
        Ok(event)
    }
}

pub(crate) fn write_settings(out: &mut Writer, settings: &Settings) {
    out.option(settings.name.as_deref(), |out, name| {
        out.bytes(name.as_bytes());
    });
    out.bytes(settings.model.as_bytes());
    out.option(settings.root, |out, root| {
        out.raw(&root.0);
    });
    out.option(settings.ttl_ms, |out, ttl| {
        out.u64(ttl);
    });
    out.u8(settings.pinned.into()).u8(settings.priority).u8(settings.durability as u8).bytes(&settings.meta);
}

pub(crate) fn read_settings(r: &mut Reader<'_>) -> Result<Settings, Malformed> {
    Ok(Settings {
        name: r.option(Reader::text)?,
        model: r.text()?,
        root: r.option(Reader::array)?.map(PageKey),
        ttl_ms: r.option(Reader::u64)?,
        pinned: read_flag(r)?,
        priority: r.u8()?,
        durability: match r.u8()? {
            0 => Durability::Ephemeral,
            1 => Durability::Async,
            2 => Durability::Turn,
            3 => Durability::Full,
            _ => return Err(r.malformed()),
        },
        meta: r.bytes()?.to_vec(),
    })
}

fn read_flag(r: &mut Reader<'_>) -> Result<bool, Malformed> {
    match r.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(r.malformed()),
    }
}

fn write_in_flight(out: &mut Writer, in_flight: &InFlight) {
    out.bytes(&in_flight.meta).tokens(&in_flight.tokens);
}

fn read_in_flight(r: &mut Reader<'_>) -> Result<InFlight, Malformed> {
    Ok(InFlight { meta: r.bytes()?.to_vec(), tokens: r.tokens()? })
}

fn write_whole(out: &mut Writer, whole: &WholeEvent) {
    out.raw(&whole.tenant.0);
    write_settings(out, &whole.settings);
    out.option(whole.parent, |out, (id, turn)| {
        out.raw(&id.0.to_le_bytes()).u32(turn);
    });
    out.u64(whole.created_ms).u64(whole.used_ms).u8(whole.damaged.into());
    out.option(whole.head, |out, head| {
        out.u64(head);
    });
    out.raw(&whole.hash);
    out.option(whole.in_flight.as_ref(), write_in_flight);
}

fn read_whole(r: &mut Reader<'_>) -> Result<WholeEvent, Malformed> {
    Ok(WholeEvent {
        tenant: TenantId(r.array()?),
        settings: read_settings(r)?,
        parent: r.option(|r| Ok((SessionId(u128::from_le_bytes(r.array()?)), r.u32()?)))?,
        created_ms: r.u64()?,
        used_ms: r.u64()?,
        damaged: read_flag(r)?,
        head: r.option(Reader::u64)?,
        hash: r.array()?,
        in_flight: r.option(read_in_flight)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings {
            name: Some("a name".to_owned()),
            model: "m".to_owned(),
            root: Some(PageKey([4; 32])),
            ttl_ms: Some(5),
            pinned: true,
            priority: 6,
            durability: Durability::Full,
            meta: vec![1, 2],
        }
    }

    fn events() -> Vec<Event> {
        let in_flight = InFlight { meta: vec![7], tokens: vec![1, 70_000] };
        let (tenant, of) = (TenantId([1; 16]), SessionId(9));
        let (hash, meta, tokens) = ([3; 16], vec![0, 255], vec![5, 6, 151_000]);
        vec![
            Event::Start { epoch: 1, wall_ms: 2 },
            Event::Create { tenant, settings: Settings::default(), at_ms: 1 },
            Event::Turn { number: 1, before: hash, at_ms: 2, tokens: tokens.clone(), meta: meta.clone() },
            Event::Fork { of, len: 3, hash, settings: settings(), at_ms: 4 },
            Event::Rollback { len: 1, hash, at_ms: 5 },
            Event::Set { settings: settings(), at_ms: 6 },
            Event::Delete,
            Event::Begin { in_flight: in_flight.clone() },
            Event::Extend { at: 2, tokens: tokens.clone() },
            Event::Drop,
            Event::Node(NodeEvent { id: 1, parent: Some(2), number: 3, at_ms: 4, tokens, meta, hash }),
            Event::Whole(Box::new(WholeEvent {
                tenant,
                settings: settings(),
                parent: Some((of, 2)),
                created_ms: 1,
                used_ms: 2,
                damaged: true,
                head: Some(8),
                hash,
                in_flight: Some(in_flight),
            })),
            Event::BaseEnd { entries: 4 },
        ]
    }

    #[test]
    fn entries_roundtrip_and_their_parts_do_not_pass() {
        for event in events() {
            let bytes = event.encode();
            assert_eq!(Event::decode(event.kind(), &bytes).as_ref(), Ok(&event));
            for cut in 0..bytes.len() {
                assert!(Event::decode(event.kind(), &bytes[..cut]).is_err(), "{event:?} cut at {cut}");
            }
            let longer = [&bytes[..], &[0]].concat();
            assert!(Event::decode(event.kind(), &longer).is_err(), "{event:?} and a byte");
        }
    }

    #[test]
    fn ids_roundtrip_as_text() {
        for id in [0, 1, u128::MAX, 0x0123_4567_89ab_cdef_0123_4567_89ab_cdef].map(SessionId) {
            assert_eq!(id.to_string().parse(), Ok(id));
        }
        assert!("80000000000000000000000000".parse::<SessionId>().is_err(), "129 bits");
        assert!("0000000000000000000000000U".parse::<SessionId>().is_err());
        assert!("".parse::<SessionId>().is_err());
    }
}
