//! Object stores to test on, and one that fails on command.

use std::{
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use futures_util::{StreamExt, TryStreamExt, stream::BoxStream};
use mainstay_store::object::{ObjectOptions, ObjectTier};
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
    aws::AmazonS3Builder, local::LocalFileSystem, memory::InMemory, path::Path, prefix::PrefixStore,
};
use tokio::runtime::Runtime;

/// Names an S3 bucket, with the `AWS_*` variables, to run these tests on too.
pub(crate) const BUCKET: &str = "MAINSTAY_TEST_BUCKET";

/// Small extents of four test pages.
pub(crate) fn options() -> ObjectOptions {
    ObjectOptions { extent_bytes: 4 * crate::rig::PAGE_BYTES, retry_ms: 2000, ..ObjectOptions::default() }
}

/// An object store that is empty, and the means to look into it.
pub(crate) struct Place {
    pub(crate) store: Arc<dyn ObjectStore>,
    runtime: Runtime,
    dir: Option<std::path::PathBuf>,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(dir) = &self.dir {
            let _ = std::fs::remove_dir_all(dir);
        }
    }
}

fn place(store: Arc<dyn ObjectStore>, dir: Option<std::path::PathBuf>) -> Place {
    Place { store, runtime: tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap(), dir }
}

pub(crate) fn memory() -> Place {
    place(Arc::new(InMemory::new()), None)
}

/// Empty object stores of every kind: in memory, in a directory, and in the bucket if one is named.
pub(crate) fn places() -> Vec<Place> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let name = format!("objects-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let dir = std::env::temp_dir().join(&name);
    std::fs::create_dir(&dir).unwrap();
    let local = LocalFileSystem::new_with_prefix(&dir).unwrap().with_fsync(true);
    let mut places = vec![memory(), place(Arc::new(local), Some(dir))];
    if let Ok(bucket) = std::env::var(BUCKET) {
        let s3 = AmazonS3Builder::from_env().with_bucket_name(bucket).build().unwrap();
        places.push(place(Arc::new(PrefixStore::new(s3, name)), None));
    }
    places
}

impl Place {
    pub(crate) fn tier(&self) -> ObjectTier {
        self.tier_with(options())
    }

    pub(crate) fn tier_with(&self, options: ObjectOptions) -> ObjectTier {
        ObjectTier::new(self.store.clone(), options).unwrap()
    }

    /// Names and sizes of all objects below a prefix, sorted.
    pub(crate) fn list(&self, prefix: &str) -> Vec<(String, u64)> {
        let prefix = Path::from(prefix);
        let listed: Vec<ObjectMeta> =
            self.runtime.block_on(self.store.list(Some(&prefix)).try_collect()).unwrap();
        let mut names: Vec<_> = listed.into_iter().map(|o| (o.location.to_string(), o.size)).collect();
        names.sort();
        names
    }

    pub(crate) fn names(&self, prefix: &str) -> Vec<String> {
        self.list(prefix).into_iter().map(|(name, _)| name).collect()
    }

    pub(crate) fn get(&self, name: &str) -> Vec<u8> {
        let name = Path::from(name);
        self.runtime.block_on(async { self.store.get(&name).await?.bytes().await }).unwrap().to_vec()
    }

    pub(crate) fn put(&self, name: &str, bytes: Vec<u8>) {
        self.runtime.block_on(self.store.put(&Path::from(name), PutPayload::from(bytes))).unwrap();
    }

    pub(crate) fn delete(&self, name: &str) {
        self.runtime.block_on(self.store.delete(&Path::from(name))).unwrap();
    }
}

/// What happens at a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// It fails.
    Before,
    /// It is done, and the answer is lost.
    After,
    /// A create overwrites.
    Overwrites,
}

type Hook = Box<dyn FnMut(u64, &Path) -> Fault + Send>;

/// An object store that asks at every call what to do. Calls are numbered from 1.
pub(crate) struct Faulty {
    inner: Arc<dyn ObjectStore>,
    calls: AtomicU64,
    hook: Mutex<Hook>,
}

impl Faulty {
    pub(crate) fn new(
        inner: Arc<dyn ObjectStore>,
        hook: impl FnMut(u64, &Path) -> Fault + Send + 'static,
    ) -> Arc<Self> {
        Arc::new(Self { inner, calls: AtomicU64::new(0), hook: Mutex::new(Box::new(hook)) })
    }

    pub(crate) fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    fn ask(&self, path: &Path) -> Fault {
        let call = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
        (self.hook.lock().unwrap())(call, path)
    }
}

fn failure() -> Error {
    Error::Generic { store: "faulty", source: "503 on command".into() }
}

impl fmt::Debug for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Faulty")
    }
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Faulty")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, to: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        match self.ask(to) {
            Fault::None => self.inner.put_opts(to, payload, options).await,
            Fault::Before => Err(failure()),
            Fault::After => self.inner.put_opts(to, payload, options).await.and(Err(failure())),
            Fault::Overwrites => {
                let options = PutOptions { mode: PutMode::Overwrite, ..options };
                self.inner.put_opts(to, payload, options).await
            }
        }
    }

    async fn put_multipart_opts(
        &self,
        to: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(to, options).await
    }

    async fn get_opts(&self, from: &Path, options: GetOptions) -> Result<GetResult> {
        match self.ask(from) {
            Fault::Before | Fault::After => Err(failure()),
            _ => self.inner.get_opts(from, options).await,
        }
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        match self.ask(&Path::default()) {
            Fault::Before => futures_util::stream::once(async { Err(failure()) }).boxed(),
            Fault::After => self.inner.delete_stream(paths).map(|_| Err(failure())).boxed(),
            _ => self.inner.delete_stream(paths),
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.ask(prefix.unwrap_or(&Path::default())) {
            Fault::Before | Fault::After => futures_util::stream::once(async { Err(failure()) }).boxed(),
            _ => self.inner.list(prefix),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}
