//! The form of POST /v1/files: a file, written to the disk as it arrives, and what is said of it.

use axum::body::{Body, Bytes};
use axum::extract::multipart::{Field, Multipart, MultipartError};
use axum::extract::{FromRequest, Request};
use serde_json::json;
use tokio::time::timeout;

use super::fields::unexpected;
use crate::body::{self, BodyLimits, DISCARDED_BYTES_MAX};
use crate::error::ApiError;
use crate::files::{About, Draft, Files, waiting};

/// What a client may say that a file is for.
const PURPOSES: [&str; 6] = ["assistants", "batch", "evals", "fine-tune", "user_data", "vision"];
/// Shortest and longest life of a file, seconds: an hour and thirty days.
const LIFETIME_S: [u64; 2] = [3600, 2_592_000];
/// Most bytes of a part that is no file.
const TEXT_BYTES_MAX: usize = 4096;
/// Most characters of the name of a file.
const NAME_CHARS_MAX: usize = 512;
/// Bytes that are gathered before they are written.
const GATHERED_BYTES: usize = 1 << 20;

/// The parts of the form so far.
#[derive(Default)]
struct Form {
    file: Option<(Draft, String)>,
    purpose: Option<String>,
    anchor: Option<String>,
    seconds: Option<String>,
}

/// Takes the form in.
///
/// # Errors
/// 400 that names the part, 408 where it does not arrive, 413 where the file is larger than the limit, and what the disk
/// says. Then nothing is left of the file.
pub(crate) async fn read(
    request: Request<Body>,
    files: &Files,
    (tenant, limits): (&str, BodyLimits),
) -> Result<(Draft, About), ApiError> {
    body::refuse_announced(&request, limits)?;
    let mut parts = Multipart::from_request(request, &()).await.map_err(|rejection| {
        ApiError::bad_request(format!("expected a body of multipart/form-data: {}", rejection.body_text()))
    })?;
    let mut form = Form::default();
    while let Some(part) = soon(limits, parts.next_field()).await? {
        let name = part.name().unwrap_or_default().to_owned();
        match name.as_str() {
            "file" if form.file.is_some() => {
                return Err(ApiError::field("file", "expected one file, found another"));
            }
            "file" => {
                let filename = filename(&part)?;
                form.file = Some((draft(part, files, (tenant, limits)).await?, filename));
            }
            "purpose" => form.purpose = Some(text(part, "purpose", limits).await?),
            "expires_after[anchor]" => form.anchor = Some(text(part, "expires_after", limits).await?),
            "expires_after[seconds]" => form.seconds = Some(text(part, "expires_after", limits).await?),
            _ => {}
        }
    }
    form.checked()
}

impl Form {
    fn checked(self) -> Result<(Draft, About), ApiError> {
        let (draft, filename) =
            self.file.ok_or_else(|| ApiError::field("file", "expected a file, found nothing"))?;
        let purpose = match self.purpose {
            Some(purpose) if PURPOSES.contains(&purpose.as_str()) => purpose,
            Some(other) => return Err(unexpected("purpose", &PURPOSES.join(", "), &json!(other))),
            None => {
                let what = format!("expected one of {}, found nothing", PURPOSES.join(", "));
                return Err(ApiError::field("purpose", what));
            }
        };
        let lifetime_s = lifetime("expires_after", self.anchor.as_deref(), self.seconds.as_deref())?;
        Ok((draft, About { filename, purpose, lifetime_s }))
    }
}

/// How long a file is kept, seconds, as the parts of an object of this name say.
///
/// # Errors
/// 400, naming the part.
pub(crate) fn lifetime(
    name: &str,
    anchor: Option<&str>,
    seconds: Option<&str>,
) -> Result<Option<u64>, ApiError> {
    match (anchor, seconds) {
        (None, None) => return Ok(None),
        (Some("created_at"), _) => {}
        (other, _) => return Err(unexpected(format!("{name}.anchor"), "created_at", &json!(other))),
    }
    let [least, most] = LIFETIME_S;
    let parsed = seconds.and_then(|text| text.parse().ok()).filter(|s| (least..=most).contains(s));
    let expected = format!("an integer from {least} to {most}");
    parsed.map(Some).ok_or_else(|| unexpected(format!("{name}.seconds"), &expected, &json!(seconds)))
}

/// What is not said in time is not said.
async fn soon<T>(
    limits: BodyLimits,
    part: impl Future<Output = Result<T, MultipartError>>,
) -> Result<T, ApiError> {
    let part = timeout(limits.pause, part).await.map_err(|_| ApiError::slow_body())?;
    part.map_err(|error| ApiError::bad_request(format!("the form could not be read: {}", error.body_text())))
}

fn filename(part: &Field<'_>) -> Result<String, ApiError> {
    match part.file_name() {
        Some(name) if (1..=NAME_CHARS_MAX).contains(&name.chars().count()) => Ok(name.to_owned()),
        Some(name) => {
            let expected = format!("a file with a name of 1 to {NAME_CHARS_MAX} characters");
            Err(unexpected("file", &expected, &json!(name)))
        }
        None => Err(ApiError::field("file", "expected a file with a name, found text")),
    }
}

async fn text(mut part: Field<'_>, name: &str, limits: BodyLimits) -> Result<String, ApiError> {
    let mut bytes = Vec::new();
    while let Some(piece) = soon(limits, part.chunk()).await? {
        bytes.extend_from_slice(&piece);
        if bytes.len() > TEXT_BYTES_MAX {
            let what = format!("expected at most {TEXT_BYTES_MAX} bytes, found more");
            return Err(ApiError::field(name, what));
        }
    }
    String::from_utf8(bytes).map_err(|_| ApiError::field(name, "expected UTF-8, found other bytes"))
}

/// Writes a file as it arrives. What is too large is still read for a while, so that the client gets to hear that.
async fn draft(
    mut part: Field<'_>,
    files: &Files,
    (tenant, limits): (&str, BodyLimits),
) -> Result<Draft, ApiError> {
    let (begun, tenant) = (files.clone(), tenant.to_owned());
    let mut draft = Some(waiting(move || begun.begin(&tenant)).await?);
    let (mut gathered, mut total) = (Vec::new(), 0_usize);
    loop {
        let piece = soon(limits, part.chunk()).await?;
        let is_end = piece.is_none();
        let piece = piece.unwrap_or_else(Bytes::new);
        total += piece.len();
        if total > limits.bytes {
            (draft, gathered) = (None, Vec::new());
            if is_end || total > limits.bytes.saturating_add(DISCARDED_BYTES_MAX) {
                return Err(ApiError::file_too_large(limits.bytes as u64));
            }
            continue;
        }
        gathered.extend_from_slice(&piece);
        if let Some(open) = draft.take_if(|_| is_end || gathered.len() >= GATHERED_BYTES) {
            let bytes = std::mem::take(&mut gathered);
            let written = waiting(move || append(open, &bytes)).await?;
            if is_end {
                return Ok(written);
            }
            draft = Some(written);
        }
    }
}

fn append(mut draft: Draft, bytes: &[u8]) -> std::io::Result<Draft> {
    draft.write(bytes)?;
    Ok(draft)
}
