//! Tenants and their secrets: one small file each, so that deleting it makes a tenant's keys unknowable.

use std::{collections::HashMap, sync::Arc};

use crate::{
    disk::Disk,
    error::StoreError,
    key::{KeyChain, TenantId, TenantSecret, hex},
    seal::{Keys, Purpose},
    twin::{Found, Twin},
    wire::{Malformed, Reader, Writer},
};

pub(crate) const DIR: &str = "tenants";
pub(crate) const MAGIC: [u8; 8] = *b"MSTTENA\n";
/// Longest name of a tenant, bytes.
pub const TENANT_BYTES_MAX: usize = 256;

/// A tenant, as the engine uses it.
#[derive(Clone, Copy, Debug)]
pub struct Tenant {
    /// Stands for it in every call.
    pub id: TenantId,
    /// Computes the keys of its pages.
    pub chain: KeyChain,
}

pub(crate) struct Tenants {
    keys: Arc<Keys>,
    known: HashMap<TenantId, (Arc<str>, TenantSecret)>,
}

fn path(id: TenantId) -> String {
    format!("{DIR}/{}", hex(&id.0))
}

fn parse(body: &[u8]) -> Result<(String, TenantSecret), Malformed> {
    let mut r = Reader::new(body, "tenant");
    let found = (r.text()?, TenantSecret(r.array()?));
    r.end()?;
    Ok(found)
}

impl Tenants {
    /// Reads all tenants; the paths of those whose files are damaged go to `damaged`. In a store that seals, one whose
    /// copies are both damaged fails it: its sessions would be lost without anybody's having wanted it.
    pub(crate) fn load(
        disk: &dyn Disk,
        keys: &Arc<Keys>,
        damaged: &mut Vec<String>,
    ) -> Result<Self, StoreError> {
        let (mut known, mut whole) = (HashMap::new(), Vec::new());
        let mut stems: Vec<_> = disk.list(DIR)?;
        stems.retain(|name| name.ends_with(".a") || name.ends_with(".b"));
        stems.iter_mut().for_each(|name| name.truncate(name.len() - 2));
        stems.dedup();
        for stem in stems {
            let path = format!("{DIR}/{stem}");
            let twin = Twin { disk, path: &path, magic: MAGIC };
            let (bodies, one_is) = match twin.read()? {
                Found::Whole { bodies, damaged } => (bodies, damaged),
                _ => (Vec::new(), true),
            };
            // Copies differ only where a crash came between a tenant's deletion and its return: either will do.
            let found = bodies.first().and_then(|body| {
                let body = keys.unwrap(Purpose::Tenant, stem.as_bytes(), body)?;
                parse(&body).ok()
            });
            match found {
                Some((name, secret)) => {
                    damaged.extend(one_is.then(|| path.clone()));
                    whole.push((path, bodies));
                    known.insert(TenantId::of(&name), (name.into(), secret));
                }
                None if keys.seals() => return Err(StoreError::Lost { path }),
                None => damaged.push(path),
            }
        }
        for (path, bodies) in whole {
            Twin { disk, path: &path, magic: MAGIC }.mend(&bodies)?;
        }
        known.iter().for_each(|(&id, (_, secret))| keys.learn(id, secret));
        Ok(Self { keys: keys.clone(), known })
    }

    /// The tenant of this name, with a new secret if it is new.
    pub(crate) fn tenant(&mut self, disk: &dyn Disk, name: &str) -> Result<Tenant, StoreError> {
        if name.len() > TENANT_BYTES_MAX {
            return Err(StoreError::TooLong { what: "tenant", found: name.len(), limit: TENANT_BYTES_MAX });
        }
        let id = TenantId::of(name);
        if let Some((_, secret)) = self.known.get(&id) {
            return Ok(Tenant { id, chain: KeyChain::new(*secret) });
        }
        let mut secret = TenantSecret([0; 32]);
        self.keys.entropy().fill(&mut secret.0);
        let mut body = Writer::default();
        body.bytes(name.as_bytes()).raw(&secret.0);
        let body = self.keys.wrap(Purpose::Tenant, hex(&id.0).as_bytes(), &body.0);
        Twin { disk, path: &path(id), magic: MAGIC }.write(&body)?;
        self.keys.learn(id, &secret);
        self.known.insert(id, (name.into(), secret));
        Ok(Tenant { id, chain: KeyChain::new(secret) })
    }

    pub(crate) fn chain(&self, id: TenantId) -> Option<KeyChain> {
        self.known.get(&id).map(|(_, secret)| KeyChain::new(*secret))
    }

    pub(crate) fn all(&self) -> Vec<(TenantId, Arc<str>)> {
        let mut all: Vec<_> = self.known.iter().map(|(id, (name, _))| (*id, name.clone())).collect();
        all.sort();
        all
    }

    pub(crate) fn remove(&mut self, disk: &dyn Disk, id: TenantId) -> Result<(), StoreError> {
        Twin { disk, path: &path(id), magic: MAGIC }.remove()?;
        disk.sync_dir(DIR)?;
        self.keys.forget(id);
        self.known.remove(&id);
        Ok(())
    }
}
