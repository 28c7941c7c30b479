//! Bearer keys: which tenant a request speaks for, and whether as the operator.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use axum::http::{HeaderMap, header};

use crate::error::ApiError;

/// What a key opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// What belongs to its tenant.
    User,
    /// Also what belongs to the operator: the store as a whole, and what is loaded.
    Admin,
}

/// A key and the tenant it belongs to. Only the key's hash is kept.
#[derive(Clone)]
pub struct ApiKey {
    tenant: Arc<str>,
    role: Role,
    hash: blake3::Hash,
}

/// Why a key was not accepted. Never shows the key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("API key: expected `KEY` or `TENANT:KEY` of visible ASCII characters, found {0}")]
pub struct ApiKeyError(&'static str);

/// Whose requests are when no key says otherwise.
pub(crate) const DEFAULT_TENANT: &str = "default";

impl FromStr for ApiKey {
    type Err = ApiKeyError;

    /// Parses `key`, which belongs to the tenant `default`, or `tenant:key`.
    fn from_str(text: &str) -> Result<Self, ApiKeyError> {
        let (tenant, key) = text.split_once(':').unwrap_or((DEFAULT_TENANT, text));
        if tenant.is_empty() {
            return Err(ApiKeyError("an empty tenant"));
        }
        if key.is_empty() {
            return Err(ApiKeyError("an empty key"));
        }
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(ApiKeyError("a space, a control character or a character outside ASCII"));
        }
        Ok(Self { tenant: tenant.into(), role: Role::User, hash: blake3::hash(key.as_bytes()) })
    }
}

impl ApiKey {
    /// The same key, of the operator.
    pub fn admin(self) -> Self {
        Self { role: Role::Admin, ..self }
    }

    /// Whether it is one of the operator's.
    pub fn is_admin(&self) -> bool {
        self.role == Role::Admin
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiKey").field("tenant", &self.tenant).finish_non_exhaustive()
    }
}

/// Who is asking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tenant(pub(crate) Arc<str>);

/// The tenant and the role of a request. With no user's keys configured everyone is a user of the default tenant, and the
/// operator whoever presents a key of the operator.
///
/// Time does not depend on where a presented key differs: hashes are compared, all of them, each in constant time.
pub(crate) fn authenticate(keys: &[ApiKey], headers: &HeaderMap) -> Result<(Tenant, Role), ApiError> {
    let presented = presented(headers);
    let hash = presented.as_ref().ok().map(|key| blake3::hash(key));
    let mut found = None;
    for key in keys {
        if hash == Some(key.hash) {
            found = Some((Tenant(key.tenant.clone()), key.role));
        }
    }
    if let Some(found) = found {
        return Ok(found);
    }
    if keys.iter().all(|key| key.role == Role::Admin) {
        return Ok((Tenant(DEFAULT_TENANT.into()), Role::User));
    }
    presented.and_then(|_| Err(ApiError::unauthorized("the API key is not known here")))
}

fn presented(headers: &HeaderMap) -> Result<&[u8], ApiError> {
    match (headers.get(header::AUTHORIZATION), headers.get(X_API_KEY)) {
        (Some(presented), _) => bearer(presented.as_bytes()).ok_or_else(|| {
            ApiError::unauthorized("expected the header `Authorization: Bearer KEY`, found another scheme")
        }),
        (None, Some(key)) => Ok(key.as_bytes().trim_ascii()),
        (None, None) => {
            let message = "expected the header `Authorization: Bearer KEY`, found none";
            Err(ApiError::unauthorized(message))
        }
    }
}

/// Where clients of Anthropic's API put the key.
const X_API_KEY: &str = "x-api-key";

fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, rest) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| rest.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(texts: &[&str]) -> Vec<ApiKey> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn ask(keys: &[ApiKey], authorization: Option<&str>) -> Option<String> {
        let mut headers = HeaderMap::new();
        if let Some(value) = authorization {
            headers.insert(header::AUTHORIZATION, value.parse().unwrap());
        }
        authenticate(keys, &headers).ok().map(|(tenant, _)| tenant.0.to_string())
    }

    #[test]
    fn a_key_names_its_tenant() {
        let keys = keys(&["sk-a", "acme:sk-b", "acme:sk:with:colons"]);
        assert_eq!(ask(&keys, Some("Bearer sk-a")).as_deref(), Some("default"));
        assert_eq!(ask(&keys, Some("bearer  sk-b")).as_deref(), Some("acme"));
        assert_eq!(ask(&keys, Some("Bearer sk:with:colons")).as_deref(), Some("acme"));
        for wrong in
            ["Bearer sk-", "Bearer sk-ab", "Bearer ", "Bearer", "Basic sk-a", "sk-a", "Bearer acme:sk-b"]
        {
            assert_eq!(ask(&keys, Some(wrong)), None, "{wrong}");
        }
        assert_eq!(ask(&keys, None), None);
        assert_eq!(ask(&[], None).as_deref(), Some("default"));
    }

    #[test]
    fn only_an_operators_key_is_one() {
        let key = |text: &str| text.parse::<ApiKey>().unwrap();
        let keys = [key("sk-a"), key("sk-op").admin()];
        for (presented, expected) in [("sk-a", Role::User), ("sk-op", Role::Admin)] {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, format!("Bearer {presented}").parse().unwrap());
            assert_eq!(authenticate(&keys, &headers).unwrap().1, expected, "{presented}");
        }
        assert_eq!(authenticate(&[], &HeaderMap::new()).unwrap().1, Role::User);
        // A key of the operator's alone closes nothing.
        let open = &keys[1..];
        assert_eq!(authenticate(open, &HeaderMap::new()).unwrap().1, Role::User);
        assert_eq!(ask(open, Some("Bearer EMPTY")).as_deref(), Some("default"));
        assert!(authenticate(&keys, &HeaderMap::new()).is_err());
    }

    #[test]
    fn a_malformed_key_is_refused_and_never_shown() {
        for wrong in ["", ":k", "t:", "has space", "tab\t", "é"] {
            assert!(wrong.parse::<ApiKey>().is_err(), "{wrong:?}");
        }
        let key: ApiKey = "acme:secret".parse().unwrap();
        assert!(!format!("{key:?}").contains("secret"));
    }
}
