//! What the MODEL argument names, and how it becomes an open checkpoint.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use mainstay_models::Model;

use crate::exit::Usage;
use crate::hub::{self, HubId, MAIN, Reach};
use crate::options::HubArgs;

/// The name of the model in the binary.
const EMBEDDED_NAME: &str = "mainstay-default";

/// Where a model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The small model in the binary.
    Embedded,
    /// A directory in the Hugging Face layout, or a GGUF file.
    Path(PathBuf),
    /// A repository on a hub, or what the cache has of it.
    Hub(HubId, Reach),
}

impl Source {
    /// Reads the MODEL argument. What exists comes before a hub id of the same spelling.
    ///
    /// # Errors
    /// [`Usage`] for what cannot be a model.
    pub(crate) fn parse(text: Option<&str>) -> Result<Self> {
        let Some(text) = text else { return Ok(Source::Embedded) };
        let path = Path::new(text);
        let is_gguf = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
        if path.is_dir() || is_gguf && path.is_file() {
            return Ok(Source::Path(path.to_owned()));
        }
        if let Some(hub) = HubId::parse(text).filter(|hub| hub.file.is_some()) {
            return Ok(Source::Hub(hub, Reach::Hub));
        }
        if is_gguf {
            return Err(Usage(format!("{text}: no such file")).into());
        }
        if path.exists() {
            let what =
                "expected a directory with config.json and safetensors, or a .gguf file, found another file";
            return Err(Usage(format!("{text}: {what}")).into());
        }
        let hub = HubId::parse(text).ok_or_else(|| {
            Usage(format!(
                "{text}: no such directory or file, and no hub id (which reads org/name[:FILE.gguf][@revision])"
            ))
        })?;
        Ok(Source::Hub(hub, Reach::Hub))
    }

    /// The same, as the options say.
    ///
    /// # Errors
    /// [`Usage`] for a revision of what has none, or has another.
    pub(crate) fn told(self, args: &HubArgs) -> Result<Self> {
        match (self, &args.revision) {
            (Source::Hub(mut hub, _), revision) => {
                if let Some(revision) = revision {
                    if hub.revision != MAIN && hub.revision != *revision {
                        let what = format!("--revision {revision}: {} names `{}`", hub.id(), hub.revision);
                        return Err(Usage(what).into());
                    }
                    hub.revision.clone_from(revision);
                }
                Ok(Source::Hub(hub, args.reach()))
            }
            (_, Some(revision)) => {
                let what = "expected a model of the hub, found one that has no revisions";
                Err(Usage(format!("--revision {revision}: {what}")).into())
            }
            (other, None) => Ok(other),
        }
    }

    /// What the model is called in the API if the operator gives no name.
    pub(crate) fn name(&self) -> String {
        match self {
            Source::Embedded => EMBEDDED_NAME.to_owned(),
            Source::Hub(hub, _) => hub.model_name(),
            Source::Path(path) => {
                let whole = path.canonicalize().unwrap_or_else(|_| path.clone());
                let name = if whole.is_file() { whole.file_stem() } else { whole.file_name() };
                name.map_or_else(|| "model".to_owned(), |n| n.to_string_lossy().into_owned())
            }
        }
    }

    /// Fetches what has to be fetched.
    ///
    /// # Errors
    /// What the hub says.
    pub(crate) async fn fetched(self) -> Result<Place> {
        Ok(match self {
            Source::Embedded => Place::Embedded,
            Source::Path(path) => Place::Path(path),
            Source::Hub(hub, reach) => Place::Path(hub::fetch(&hub, reach).await?),
        })
    }

    /// Fetches what has to be fetched and opens the checkpoint.
    ///
    /// # Errors
    /// What the hub or the loader says.
    pub(crate) async fn open(self) -> Result<Model> {
        self.fetched().await?.open().await
    }
}

/// Where the files of a model are, on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the binary.
    Embedded,
    /// A directory, or a file.
    Path(PathBuf),
}

impl Place {
    /// Opens the checkpoint.
    ///
    /// # Errors
    /// What the loader says.
    pub(crate) async fn open(self) -> Result<Model> {
        match self {
            Place::Embedded => open_in_background(Model::embedded).await,
            Place::Path(path) => open_in_background(move || Model::open(&path)).await,
        }
    }
}

async fn open_in_background<E>(open: impl FnOnce() -> Result<Model, E> + Send + 'static) -> Result<Model>
where
    E: std::error::Error + Send + Sync + 'static,
{
    Ok(tokio::task::spawn_blocking(open).await.context("the loader stopped")??)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_argument_is_told_apart() {
        let here = env!("CARGO_MANIFEST_DIR");
        assert_eq!(Source::parse(None).unwrap(), Source::Embedded);
        assert_eq!(Source::parse(Some(here)).unwrap(), Source::Path(here.into()));
        assert_eq!(Source::Path("/a/b/../model-x".into()).name(), "model-x");
        let file = Source::parse(Some("org/name:m-Q8_0.gguf")).unwrap();
        assert_eq!(file.name(), "org/name:m-Q8_0.gguf");
        assert!(
            matches!(Source::parse(Some("org/name@v1")).unwrap(), Source::Hub(h, _) if h.revision == "v1")
        );
    }

    #[test]
    fn a_revision_is_of_a_hub_and_said_once() {
        let told = |text: Option<&str>, revision: &str| {
            let args = HubArgs { revision: Some(revision.to_owned()), offline: true };
            Source::parse(text).unwrap().told(&args).map_err(|e| e.to_string())
        };
        let pinned = told(Some("org/name"), "v1").unwrap();
        assert!(matches!(pinned, Source::Hub(hub, Reach::Cache) if hub.revision == "v1"));
        assert!(told(Some("org/name@v2"), "v1").unwrap_err().contains("`v2`"));
        assert!(told(None, "v1").unwrap_err().contains("no revisions"));
    }

    #[test]
    fn what_cannot_be_a_model_is_refused() {
        let message = |text: &str| {
            let error = Source::parse(Some(text)).unwrap_err();
            assert!(error.is::<Usage>(), "{text}");
            error.to_string()
        };
        assert!(message("some/model.gguf").contains("no such file"));
        assert!(message("/no/such/dir").contains("no such directory or file"));
        assert!(message("nothing-here").contains("no such directory or file"));
        assert!(message(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")).contains("found another file"));
    }
}
