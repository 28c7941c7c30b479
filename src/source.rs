//! What the MODEL argument names, and how it becomes an open checkpoint.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use mainstay_models::Model;

use crate::exit::Usage;
use crate::hub::{self, HubId};

/// The name of the model in the binary.
const EMBEDDED_NAME: &str = "mainstay-default";

/// Where a model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The small model in the binary.
    Embedded,
    /// A directory in the Hugging Face layout.
    Directory(PathBuf),
    /// A repository on a hub.
    Hub(HubId),
}

impl Source {
    /// Reads the MODEL argument. A directory that exists comes before a hub id of the same spelling.
    ///
    /// # Errors
    /// [`Usage`] for what cannot be a model.
    pub(crate) fn parse(text: Option<&str>) -> Result<Self> {
        let Some(text) = text else { return Ok(Source::Embedded) };
        let path = Path::new(text);
        if path.is_dir() {
            return Ok(Source::Directory(path.to_owned()));
        }
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
            return Err(Usage(format!("{text}: GGUF is not supported yet")).into());
        }
        if path.exists() {
            let what = "expected a directory with config.json and safetensors, found a file";
            return Err(Usage(format!("{text}: {what}")).into());
        }
        let hub = HubId::parse(text).ok_or_else(|| {
            Usage(format!(
                "{text}: no such directory, and no hub id (which reads org/name or org/name@revision)"
            ))
        })?;
        Ok(Source::Hub(hub))
    }

    /// What the model is called in the API if the operator gives no name.
    pub(crate) fn name(&self) -> String {
        match self {
            Source::Embedded => EMBEDDED_NAME.to_owned(),
            Source::Hub(hub) => hub.id(),
            Source::Directory(dir) => {
                let whole = dir.canonicalize().unwrap_or_else(|_| dir.clone());
                whole.file_name().map_or_else(|| "model".to_owned(), |n| n.to_string_lossy().into_owned())
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
            Source::Directory(dir) => Place::Path(dir),
            Source::Hub(hub) => Place::Path(hub::fetch(&hub).await?),
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
    /// Below a directory.
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
            Place::Path(dir) => open_in_background(move || Model::open(&dir)).await,
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
        assert_eq!(Source::parse(Some(here)).unwrap(), Source::Directory(here.into()));
        assert_eq!(Source::Directory("/a/b/../model-x".into()).name(), "model-x");
        assert!(matches!(Source::parse(Some("org/name@v1")).unwrap(), Source::Hub(h) if h.revision == "v1"));
    }

    #[test]
    fn what_cannot_be_a_model_is_refused() {
        let message = |text: &str| {
            let error = Source::parse(Some(text)).unwrap_err();
            assert!(error.is::<Usage>(), "{text}");
            error.to_string()
        };
        assert!(message("some/model.gguf").contains("GGUF is not supported yet"));
        assert!(message("/no/such/dir").contains("no such directory"));
        assert!(message("nothing-here").contains("no such directory"));
        assert!(message(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")).contains("found a file"));
    }
}
