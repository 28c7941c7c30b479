//! Manifests: immutable numbered objects that say who has a session and what it is.

use std::fmt;

use object_store::path::Path;

use crate::{
    bundle::{self, ExportPages, In, Out, SESSION, TURN},
    error::StoreError,
    event::{SessionId, Settings},
    key::{ClassId, ContentId, TenantId, hex},
    object::{ObjectError, OwnerId, State},
    twin::PREAMBLE_BYTES,
    wire::{Malformed, Reader, Writer},
};

const MAGIC: [u8; 8] = *b"MSTMANI\n";
/// Parts of a manifest besides those of a bundle.
const HEAD: u8 = 5;
const ABOUT: u8 = 6;
const EXTENTS: u8 = 7;
/// The head's payload.
const HEAD_BYTES: usize = 16 + 16 + 4 + 4 + 16 + 1 + 8 + 16;
/// Preamble and head, with the hash of both: enough to tell whose a session is.
pub(crate) const BEGIN_BYTES: u64 = (PREAMBLE_BYTES + 5 + HEAD_BYTES + 32) as u64;
/// Longest manifest: the tokens and metadata of a session are at most 1 GiB.
pub(crate) const MANIFEST_BYTES_MAX: u64 = 5 << 28;

/// The number of a manifest. Who makes number 0 of an epoch has the session; the others are that owner's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) epoch: u32,
    pub(crate) number: u32,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:010}-{:010}", self.epoch, self.number)
    }
}

impl Place {
    /// The place an object's name states; `None` where it is no name of ours.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        let (epoch, number) = name.split_once('-')?;
        let place = Self { epoch: epoch.parse().ok()?, number: number.parse().ok()? };
        (place.to_string() == name).then_some(place)
    }

    /// Number 0 claims an epoch and holds no session.
    pub(crate) fn is_claim(self) -> bool {
        self.number == 0
    }
}

/// A session's directory in the tier.
pub(crate) fn dir(tenant: TenantId, id: SessionId) -> String {
    format!("session/{}/{id}", hex(&tenant.0))
}

/// Where and whose a manifest is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) tenant: TenantId,
    pub(crate) id: SessionId,
    pub(crate) place: Place,
    pub(crate) owner: OwnerId,
    pub(crate) state: State,
    pub(crate) at_ms: u64,
    /// Tells two manifests of one number apart.
    pub(crate) nonce: [u8; 16],
}

/// An extent as a manifest names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Index of its first page in the session.
    pub(crate) first: u32,
    /// It holds pages of so many indices at most.
    pub(crate) span: u32,
    /// Tokens of the session up to the extent's end, when it was made.
    pub(crate) tokens_end: u32,
    /// Pages in it.
    pub(crate) pages: u32,
    /// Its length.
    pub(crate) bytes: u64,
    /// BLAKE3 of its bytes.
    pub(crate) name: [u8; 32],
}

impl Entry {
    pub(crate) fn path(&self) -> Path {
        Path::from(format!("extent/{}", hex(&self.name)))
    }
}

/// The pages of a session.
#[derive(Clone, Debug)]
pub(crate) struct Extents {
    pub(crate) made: ExportPages,
    pub(crate) list: Vec<Entry>,
}

/// A session.
#[derive(Clone, Debug)]
pub(crate) struct Contents {
    pub(crate) id: SessionId,
    pub(crate) created_ms: u64,
    pub(crate) used_ms: u64,
    pub(crate) parent: Option<(SessionId, u32)>,
    /// The parts of a bundle without pages, but for its end.
    pub(crate) parts: Vec<(u8, Vec<u8>)>,
    pub(crate) settings: Settings,
    pub(crate) tokens: Vec<u32>,
    pub(crate) extents: Option<Extents>,
}

impl Head {
    pub(crate) fn path(&self) -> Path {
        Path::from(format!("{}/{}", dir(self.tenant, self.id), self.place))
    }

    fn encode(&self) -> Writer {
        let mut out = Writer::default();
        out.raw(&self.tenant.0).raw(&self.id.0.to_le_bytes()).u32(self.place.epoch).u32(self.place.number);
        out.raw(&self.owner.0).u8(self.state as u8).u64(self.at_ms).raw(&self.nonce);
        out
    }

    fn decode(part: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(part, "head");
        let (tenant, id) = (TenantId(r.array()?), SessionId(u128::from_le_bytes(r.array()?)));
        let place = Place { epoch: r.u32()?, number: r.u32()? };
        let owner = OwnerId(r.array()?);
        let state = match r.u8()? {
            0 => State::Held,
            1 => State::Released,
            2 => State::Deleted,
            _ => return Err(r.malformed()),
        };
        let head = Self { tenant, id, place, owner, state, at_ms: r.u64()?, nonce: r.array()? };
        r.end()?;
        Ok(head)
    }

    /// Reads the head at the front of a manifest that should be at `expected`.
    pub(crate) fn read(mut bytes: &[u8], expected: (TenantId, SessionId, Place)) -> Result<Self, StoreError> {
        let mut input = In::new(&mut bytes, MAGIC, "the manifest")?;
        Self::next(&mut input, expected)
    }

    fn next(input: &mut In<'_>, expected: (TenantId, SessionId, Place)) -> Result<Self, StoreError> {
        let Some((HEAD, part)) = input.next()? else {
            return Err(StoreError::Bundle("it does not begin with a head".to_owned()));
        };
        let head = Self::decode(&part)?;
        let found = (head.tenant, head.id, head.place);
        if found != expected {
            return Err(StoreError::Bundle(format!("it is {found:?}, expected {expected:?}")));
        }
        Ok(head)
    }
}

impl Extents {
    fn encode(&self) -> Writer {
        let mut out = Writer::default();
        out.raw(&self.made.content.0).raw(&self.made.class.0).u16(self.made.groups);
        out.u32(self.list.len() as u32);
        for entry in &self.list {
            out.u32(entry.first).u32(entry.span).u32(entry.tokens_end).u32(entry.pages);
            out.u64(entry.bytes).raw(&entry.name);
        }
        out
    }

    fn decode(part: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(part, "extents");
        let (content, class) = (ContentId(r.array()?), ClassId(r.array()?));
        let made = ExportPages { content, class, groups: r.u16()? };
        let mut list = Vec::new();
        for _ in 0..r.u32()? {
            list.push(Entry {
                first: r.u32()?,
                span: r.u32()?,
                tokens_end: r.u32()?,
                pages: r.u32()?,
                bytes: r.u64()?,
                name: r.array()?,
            });
        }
        r.end()?;
        Ok(Self { made, list })
    }
}

/// What the turns of a bundle say.
fn turn_tokens(part: &[u8]) -> Result<Vec<u32>, Malformed> {
    Reader::new(part, "turn").tokens()
}

impl Contents {
    /// The session that a bundle without pages holds.
    pub(crate) fn of_bundle(id: SessionId, mut bundle: &[u8]) -> Result<Self, StoreError> {
        let mut input = In::new(&mut bundle, bundle::MAGIC, "the bundle")?;
        let mut parts = Vec::new();
        while let Some(part) = input.next()? {
            parts.push(part);
        }
        Self::of_parts(id, parts)
    }

    fn of_parts(id: SessionId, parts: Vec<(u8, Vec<u8>)>) -> Result<Self, StoreError> {
        let Some((SESSION, session)) = parts.first() else {
            return Err(StoreError::Bundle("it holds no session".to_owned()));
        };
        let (_, _, settings) = bundle::parse_session(session)?;
        let mut tokens = Vec::new();
        for (kind, part) in &parts[1..] {
            if *kind != TURN {
                return Err(StoreError::Bundle(format!("a part of kind {kind}")));
            }
            tokens.extend(turn_tokens(part)?);
        }
        let (created_ms, used_ms, parent, extents) = (0, 0, None, None);
        Ok(Self { id, created_ms, used_ms, parent, parts, settings, tokens, extents })
    }

    /// The bundle of this session, for an import.
    pub(crate) fn bundle(&self) -> Result<Vec<u8>, StoreError> {
        let mut bytes = Vec::new();
        let mut out = Out::new(&mut bytes, bundle::MAGIC)?;
        for (kind, part) in &self.parts {
            out.part(*kind, part, &[])?;
        }
        out.end()?;
        Ok(bytes)
    }

    fn encode(&self, out: &mut Out<'_>) -> Result<(), StoreError> {
        let mut about = Writer::default();
        about.u64(self.created_ms).u64(self.used_ms).option(self.parent, |out, (id, turn)| {
            out.raw(&id.0.to_le_bytes()).u32(turn);
        });
        out.part(ABOUT, &about.0, &[])?;
        for (kind, part) in &self.parts {
            out.part(*kind, part, &[])?;
        }
        if let Some(extents) = &self.extents {
            out.part(EXTENTS, &extents.encode().0, &[])?;
        }
        Ok(())
    }
}

/// A manifest's bytes; a claim has no contents.
pub(crate) fn encode(head: &Head, contents: Option<&Contents>) -> Result<Vec<u8>, StoreError> {
    let mut bytes = Vec::new();
    let mut out = Out::new(&mut bytes, MAGIC)?;
    out.part(HEAD, &head.encode().0, &[])?;
    if let Some(contents) = contents {
        contents.encode(&mut out)?;
    }
    out.end()?;
    Ok(bytes)
}

/// The session of a manifest that should be at `expected`, which is no claim. No length is believed.
pub(crate) fn decode(
    mut bytes: &[u8],
    expected: (TenantId, SessionId, Place),
) -> Result<Contents, StoreError> {
    let mut input = In::new(&mut bytes, MAGIC, "the manifest")?;
    let head = Head::next(&mut input, expected)?;
    let Some((ABOUT, about)) = input.next()? else {
        return Err(StoreError::Bundle("it holds no session".to_owned()));
    };
    let (mut parts, mut extents) = (Vec::new(), None);
    while let Some((kind, part)) = input.next()? {
        match kind {
            EXTENTS if extents.is_none() => extents = Some(Extents::decode(&part)?),
            _ => parts.push((kind, part)),
        }
    }
    if !bytes.is_empty() {
        return Err(StoreError::Bundle(format!("{} bytes follow its end", bytes.len())));
    }
    let mut r = Reader::new(&about, "manifest");
    let (created_ms, used_ms) = (r.u64()?, r.u64()?);
    let parent = r.option(|r| Ok((SessionId(u128::from_le_bytes(r.array()?)), r.u32()?)))?;
    r.end()?;
    Ok(Contents { created_ms, used_ms, parent, extents, ..Contents::of_parts(head.id, parts)? })
}

/// The error of an object that is not what it should be.
pub(crate) fn damaged(path: &Path, e: StoreError) -> ObjectError {
    match e {
        StoreError::Newer { found, known, .. } => {
            ObjectError::Store(StoreError::Newer { path: path.to_string(), found, known })
        }
        e => ObjectError::Damaged { path: path.to_string(), what: e.to_string() },
    }
}
