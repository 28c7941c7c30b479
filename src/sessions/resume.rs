//! A session to talk in: found by its name, or made.

use anyhow::Result;
use reqwest::Method;
use serde_json::{Value, json};

use super::path;
use crate::api::{Api, Refused};

/// A session that goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Resumed {
    pub(crate) id: String,
    pub(crate) turns: u64,
    pub(crate) model: String,
}

impl Resumed {
    fn of(session: &Value) -> Self {
        let text = |key: &str| session[key].as_str().unwrap_or_default().to_owned();
        Self { id: text("id"), turns: session["turn_count"].as_u64().unwrap_or(0), model: text("model") }
    }
}

/// The session of this id or name; `None` where there is none.
///
/// # Errors
/// What else the server says.
pub(crate) async fn resume(api: &Api, id: &str) -> Result<Option<Resumed>> {
    let found = api.json(Method::GET, &path(id), None).await;
    let is_unknown = |error: &anyhow::Error| {
        error.downcast_ref::<Refused>().is_some_and(|refused| refused.code == "session_not_found")
    };
    match found {
        Ok(session) => Ok(Some(Resumed::of(&session))),
        Err(error) if is_unknown(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Makes a session.
///
/// # Errors
/// What the server says.
pub(crate) async fn begin(api: &Api, name: Option<&str>, model: &str) -> Result<Resumed> {
    let body = json!({"name": name, "model": model});
    Ok(Resumed::of(&api.json(Method::POST, "/v1/sessions", Some(&body)).await?))
}
