//! How fast the disk gives a store's segment files, past the page cache.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use mainstay_engine::store::aligned::AlignedBytes;
use mainstay_engine::store::disk::{Access, Disk, File};
use mainstay_engine::store::{Options, RealDisk};

/// Bytes of one large read.
const CHUNK_BYTES: usize = 4 << 20;
/// More says no more about the rate.
const BYTES_MAX: u64 = 4 << 30;

/// Bytes per second of plain reads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DirectRate {
    /// One thread, 4 MiB at a time.
    pub one: f64,
    /// Four threads, 4 MiB at a time.
    pub four: f64,
    /// A page at a time, by as many threads as a store reads with.
    pub pages: f64,
}

impl DirectRate {
    /// The best one.
    pub fn best(&self) -> f64 {
        self.one.max(self.four).max(self.pages)
    }
}

/// Reads the segments of the store in `dir`, which must be closed, in these three ways.
pub(crate) fn direct_rate(dir: &Path, record_bytes: usize) -> io::Result<DirectRate> {
    let threads = Options::default().reader_threads;
    Ok(DirectRate {
        one: rate(dir, CHUNK_BYTES, 1)?,
        four: rate(dir, CHUNK_BYTES, 4)?,
        pages: rate(dir, record_bytes, threads)?,
    })
}

/// The reads that make up the segments, whole ones but for a file that is shorter.
fn chunks(dir: &Path, chunk_bytes: usize) -> io::Result<Vec<(Arc<dyn File>, u64)>> {
    let disk = RealDisk::new(dir)?;
    let mut chunks = Vec::new();
    let mut bytes = 0;
    for tenant in disk.list("seg")? {
        for name in disk.list(&format!("seg/{tenant}"))? {
            let file = disk.open(&format!("seg/{tenant}/{name}"), Access::Direct)?;
            let whole = file.size()? / chunk_bytes as u64;
            for i in 0..whole.max(1) {
                if bytes < BYTES_MAX {
                    chunks.push((Arc::clone(&file), i * chunk_bytes as u64));
                    bytes += chunk_bytes as u64;
                }
            }
        }
    }
    Ok(chunks)
}

fn rate(dir: &Path, chunk_bytes: usize, threads: usize) -> io::Result<f64> {
    let chunks = chunks(dir, chunk_bytes)?;
    let next = AtomicUsize::new(0);
    let work = |mut buffer: AlignedBytes| -> io::Result<usize> {
        let mut bytes = 0;
        while let Some((file, offset)) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
            bytes += file.read_at(*offset, &mut buffer)?;
        }
        Ok(bytes)
    };
    // Memory that was never touched would be paid for by the first reads.
    let buffers: Vec<AlignedBytes> = (0..threads)
        .map(|_| {
            let mut buffer = AlignedBytes::new(chunk_bytes);
            buffer.fill(1);
            buffer
        })
        .collect();
    let begun = Instant::now();
    let bytes: io::Result<usize> = std::thread::scope(|scope| {
        let work = &work;
        let workers: Vec<_> = buffers.into_iter().map(|buffer| scope.spawn(move || work(buffer))).collect();
        let gone = |_| io::Error::other("a reading thread panicked");
        workers.into_iter().map(|worker| worker.join().map_err(gone)?).sum()
    });
    Ok(bytes? as f64 / begun.elapsed().as_secs_f64().max(1e-9))
}
