//! The way to an object store: calls that block, over a small runtime of their own.

use std::{future::Future, ops::Range, sync::Arc, sync::mpsc, time::Duration};

use futures_util::TryStreamExt;
use object_store::{
    BackoffConfig, ClientConfigKey, Error, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions,
    PutPayload, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    local::LocalFileSystem,
    memory::InMemory,
    path::Path,
    prefix::PrefixStore,
};
use tokio::runtime::{Builder, Runtime};

use crate::object::{ObjectError, ObjectOptions};

pub(crate) type Bytes = Vec<u8>;

/// An object store and the runtime that drives it.
pub(crate) struct Link {
    store: Arc<dyn ObjectStore>,
    /// Taken when dropped, for that must not wait where the caller is itself a task.
    runtime: Option<Runtime>,
}

/// An answer on its way.
pub(crate) struct Pending<T>(mpsc::Receiver<Result<T, Error>>);

impl<T> Pending<T> {
    pub(crate) fn wait(self) -> Result<T, ObjectError> {
        match self.0.recv() {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(ObjectError::Address("the call ended without an answer".to_owned())),
        }
    }
}

/// What became of a create.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Put {
    /// The object is there, made by this call.
    Made,
    /// An object of other bytes was there before.
    Taken,
}

/// The object store at an address.
pub(crate) fn open(url: &str, options: &ObjectOptions) -> Result<Arc<dyn ObjectStore>, ObjectError> {
    if url == "memory:" {
        return Ok(Arc::new(InMemory::new()));
    }
    if let Some(dir) = url.strip_prefix("file://") {
        if !dir.starts_with('/') {
            return Err(ObjectError::Address(format!("expected file:///DIRECTORY, found {url:?}")));
        }
        make_private(dir).map_err(|e| ObjectError::Address(format!("{dir}: {e}")))?;
        return Ok(Arc::new(LocalFileSystem::new_with_prefix(dir)?.with_fsync(true)));
    }
    let Some(place) = url.strip_prefix("s3://") else {
        let known = "file:///DIRECTORY, s3://BUCKET/PREFIX or memory:";
        return Err(ObjectError::Address(format!("expected {known}, found {url:?}")));
    };
    let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
    if bucket.is_empty() {
        return Err(ObjectError::Address(format!("{url:?} names no bucket")));
    }
    let prefix = Path::parse(prefix.trim_end_matches('/')).map_err(Error::from)?;
    let store = s3(AmazonS3Builder::from_env(), options).with_bucket_name(bucket).build()?;
    if prefix.as_ref().is_empty() {
        Ok(Arc::new(store))
    } else {
        Ok(Arc::new(PrefixStore::new(store, prefix)))
    }
}

/// Bounds the time of every call.
pub(crate) fn s3(builder: AmazonS3Builder, options: &ObjectOptions) -> AmazonS3Builder {
    let (init_backoff, max_backoff) = (Duration::from_millis(100), Duration::from_secs(2));
    let retry = RetryConfig {
        backoff: BackoffConfig { init_backoff, max_backoff, base: 2.0 },
        max_retries: 8,
        retry_timeout: Duration::from_millis(options.retry_ms),
    };
    let client = |key, ms: u64| (AmazonS3ConfigKey::Client(key), format!("{ms}ms"));
    let (whole, whole_ms) = client(ClientConfigKey::Timeout, options.request_ms);
    let (connect, connect_ms) = client(ClientConfigKey::ConnectTimeout, options.retry_ms);
    builder.with_retry(retry).with_config(whole, whole_ms).with_config(connect, connect_ms)
}

/// Tokens are private: only the owner may enter.
fn make_private(dir: &str) -> std::io::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(dir)
}

impl Link {
    pub(crate) fn new(store: Arc<dyn ObjectStore>) -> Result<Self, ObjectError> {
        let mut builder = Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).thread_name("object-tier").enable_all().build();
        let runtime = runtime.map_err(|e| ObjectError::Address(format!("no thread: {e}")))?;
        Ok(Self { store, runtime: Some(runtime) })
    }

    fn start<T, F>(&self, work: impl FnOnce(Arc<dyn ObjectStore>) -> F) -> Pending<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        let (answer, pending) = mpsc::sync_channel(1);
        let work = work(self.store.clone());
        if let Some(runtime) = &self.runtime {
            runtime.spawn(async move {
                // Nobody waits any more where the caller met another error first.
                let _ = answer.send(work.await);
            });
        }
        Pending(pending)
    }

    /// Puts an object whose name follows from its bytes.
    pub(crate) fn start_put(&self, path: Path, bytes: Bytes) -> Pending<()> {
        self.start(|store| async move { store.put(&path, PutPayload::from(bytes)).await.map(|_| ()) })
    }

    /// Makes an object that must not exist. An answer that was lost is told from a name that was taken by what is
    /// there, for two makers' bytes are never equal.
    pub(crate) fn create(&self, path: &Path, bytes: Bytes) -> Result<Put, ObjectError> {
        let (to, payload) = (path.clone(), PutPayload::from(bytes.clone()));
        let made = self.start(|store| async move {
            let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
            store.put_opts(&to, payload, options).await
        });
        let Err(failed) = made.wait() else { return Ok(Put::Made) };
        match self.get(path, bytes.len() as u64) {
            Ok(Some(found)) if found == bytes => Ok(Put::Made),
            Ok(Some(_)) | Err(ObjectError::Damaged { .. }) => Ok(Put::Taken),
            Ok(None) | Err(_) => Err(failed),
        }
    }

    /// An object of at most `bytes_max`; `None` where there is none.
    pub(crate) fn get(&self, path: &Path, bytes_max: u64) -> Result<Option<Bytes>, ObjectError> {
        self.start_get(path.clone(), bytes_max).wait()?.transpose()
    }

    pub(crate) fn start_get(
        &self,
        path: Path,
        bytes_max: u64,
    ) -> Pending<Option<Result<Bytes, ObjectError>>> {
        self.start(|store| async move {
            let got = match store.get(&path).await {
                Err(Error::NotFound { .. }) => return Ok(None),
                got => got?,
            };
            if got.meta.size > bytes_max {
                let what = format!("{} bytes, at most {bytes_max}", got.meta.size);
                return Ok(Some(Err(ObjectError::Damaged { path: path.to_string(), what })));
            }
            Ok(Some(Ok(got.bytes().await?.into())))
        })
    }

    /// The first bytes of an object, fewer where it is shorter; `None` where there is none.
    pub(crate) fn get_range(&self, path: &Path, range: Range<u64>) -> Result<Option<Bytes>, ObjectError> {
        let path = path.clone();
        let got = self.start(|store| async move {
            match store.get_range(&path, range).await {
                Err(Error::NotFound { .. }) => Ok(None),
                // An empty object has no range, and stores have no error of their own for it.
                Err(e) => match store.head(&path).await {
                    Ok(meta) if meta.size == 0 => Ok(Some(Bytes::new())),
                    _ => Err(e),
                },
                Ok(bytes) => Ok(Some(bytes.into())),
            }
        });
        got.wait()
    }

    pub(crate) fn start_head(&self, path: Path) -> Pending<Option<ObjectMeta>> {
        self.start(|store| async move {
            match store.head(&path).await {
                Err(Error::NotFound { .. }) => Ok(None),
                head => head.map(Some),
            }
        })
    }

    pub(crate) fn list(&self, prefix: &str) -> Result<Vec<ObjectMeta>, ObjectError> {
        let prefix = Path::from(prefix);
        self.start(|store| async move { store.list(Some(&prefix)).try_collect().await }).wait()
    }

    /// Removes an object, if it is there.
    pub(crate) fn delete(&self, path: &Path) -> Result<(), ObjectError> {
        let path = path.clone();
        let deleted = self.start(|store| async move {
            match store.delete(&path).await {
                Err(Error::NotFound { .. }) => Ok(()),
                deleted => deleted,
            }
        });
        deleted.wait()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, net::TcpListener, time::Instant};

    use super::*;

    /// A server that gives every caller the same answer, or none.
    fn server(answer: &'static str) -> Link {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            let mut open = Vec::new();
            for mut stream in listener.incoming().flatten() {
                let _ = stream.write_all(answer.as_bytes());
                // A silent server keeps its callers.
                open.push(stream);
            }
        });
        let options = ObjectOptions { retry_ms: 500, request_ms: 700, ..ObjectOptions::default() };
        let builder = AmazonS3Builder::new().with_endpoint(url).with_allow_http(true).with_region("r");
        let builder = builder.with_access_key_id("a").with_secret_access_key("b").with_bucket_name("c");
        Link::new(Arc::new(s3(builder, &options).build().unwrap())).unwrap()
    }

    #[test]
    fn a_store_that_fails_or_is_silent_is_given_up_in_time() {
        for answer in ["HTTP/1.1 503 Slow Down\r\ncontent-length: 0\r\nconnection: close\r\n\r\n", ""] {
            let link = server(answer);
            let path = Path::from("x");
            for what in ["get", "put", "create", "list"] {
                let begun = Instant::now();
                let result = match what {
                    "get" => link.get(&path, 9).map(|_| ()),
                    "put" => link.start_put(path.clone(), vec![1]).wait(),
                    "create" => link.create(&path, vec![1]).map(|_| ()),
                    _ => link.list("y").map(|_| ()),
                };
                assert!(matches!(result, Err(ObjectError::Remote(_))), "{what}: {result:?}");
                assert!(begun.elapsed() < Duration::from_secs(8), "{what} {answer:?}: {:?}", begun.elapsed());
            }
        }
    }
}
