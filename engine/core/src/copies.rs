//! Page copies under way between the executor and the store: pages handed over, and pages read back.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use mainstay_backend_api::{CopyDone, PageRef, Ticket};
use mainstay_store::PageHeader;
use tokio::sync::oneshot;

use crate::run::Engine;
use crate::scheduler::{Load, Spill};
use crate::sequence::LoadId;
use crate::tier::{self, Loaded, PageOut};

/// Bytes of a batch of pages that are read together. Nothing is copied before the first has come, and nothing is read
/// while the last is copied: the smaller they are, the less of a restore is spent so.
const BATCH_BYTES: usize = 4 << 20;
/// Batches of one load that are read at the same time: enough to keep a disk busy, also while the engine's thread copies.
const BATCHES_AHEAD: usize = 12;
/// Batches of all loads that are read at the same time: bounds the memory.
const BATCHES_ASKED_MAX: usize = 32;

/// The books of all copies.
#[derive(Default)]
pub(crate) struct Copies {
    next_ticket: u64,
    in_flight: HashMap<Ticket, Copy>,
    readings: BTreeMap<LoadId, Reading>,
    /// Batches that were asked for and have not come.
    asked: usize,
    done: Vec<CopyDone>,
    /// Who waits until all spills before a ticket are with the system.
    flushes: Vec<(Ticket, Duration, oneshot::Sender<bool>)>,
}

enum Copy {
    Spill(Spill),
    /// Pages of a load on their way to the device. Their references are held until they are there.
    Restore {
        load: LoadId,
        pages: Vec<PageRef>,
        bytes: usize,
    },
}

/// One load under way.
struct Reading {
    /// Batches not yet asked for.
    unasked: VecDeque<Vec<PageHeader>>,
    batches: usize,
    asked: usize,
    /// The batch that comes next, and those that came too early.
    next: usize,
    early: BTreeMap<usize, Loaded>,
    /// Copies to the device under way.
    restoring: usize,
    restored_bytes: usize,
    begun: Instant,
    /// No more is taken, for this reason.
    failed: Option<&'static str>,
}

impl Copies {
    fn ticket(&mut self, copy: Copy) -> Ticket {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.in_flight.insert(ticket, copy);
        ticket
    }

    /// Whether the device is copying.
    pub(crate) fn is_busy(&self) -> bool {
        !self.in_flight.is_empty()
    }
}

impl Reading {
    /// No more pages are taken.
    fn fail(&mut self, reason: &'static str) {
        self.failed = Some(reason);
        self.unasked.clear();
    }
}

impl Engine {
    /// Begins the copies that the scheduler asked for.
    pub(crate) fn begin_copies(&mut self) {
        for load in std::mem::take(&mut self.scheduler.loads) {
            self.begin_load(load);
        }
        for spill in std::mem::take(&mut self.scheduler.spills) {
            let reads = spill.reads.clone();
            let ticket = self.copies.ticket(Copy::Spill(spill));
            self.executor.start_read(&reads, ticket);
        }
    }

    fn begin_load(&mut self, load: Load) {
        let mut batches: VecDeque<Vec<PageHeader>> = VecDeque::new();
        let mut bytes = 0;
        for header in load.headers {
            let page_bytes = self.executor.kv_layout().groups[header.name.group as usize].page_bytes();
            match batches.back_mut().filter(|_| bytes + page_bytes <= BATCH_BYTES) {
                Some(batch) => batch.push(header),
                None => {
                    batches.push_back(vec![header]);
                    bytes = 0;
                }
            }
            bytes += page_bytes;
        }
        let reading = Reading {
            batches: batches.len(),
            unasked: batches,
            asked: 0,
            next: 0,
            early: BTreeMap::new(),
            restoring: 0,
            restored_bytes: 0,
            begun: Instant::now(),
            failed: None,
        };
        self.copies.readings.insert(load.id, reading);
        self.ask();
    }

    /// Asks for the next batches, those of the oldest load first.
    fn ask(&mut self) {
        let tier = self.tier.as_ref().expect("what is loaded was found in a store");
        let mut refused = Vec::new();
        for (&load, reading) in &mut self.copies.readings {
            while self.copies.asked < BATCHES_ASKED_MAX
                && reading.asked - reading.next < BATCHES_AHEAD
                && let Some(headers) = reading.unasked.pop_front()
            {
                if !tier.read(load, reading.asked, headers) {
                    reading.fail("late");
                    refused.push(load);
                    break;
                }
                reading.asked += 1;
                self.copies.asked += 1;
            }
        }
        refused.into_iter().for_each(|load| self.end_load_if_over(load));
    }

    /// Pages came from the store.
    pub(crate) fn loaded(&mut self, loaded: Loaded) {
        let load = loaded.load;
        self.copies.asked -= 1;
        if self.scheduler.loading(load).is_none() {
            // Its sequence was cancelled, or gave its pages to another.
            self.copies.readings.remove(&load);
            self.ask();
            return;
        }
        let Some(reading) = self.copies.readings.get_mut(&load) else { return };
        reading.early.insert(loaded.batch, loaded);
        while let Some(batch) = self.next_batch(load) {
            self.restore(batch);
        }
        self.ask();
        self.end_load_if_over(load);
    }

    fn next_batch(&mut self, load: LoadId) -> Option<Loaded> {
        let reading = self.copies.readings.get_mut(&load)?;
        let batch = reading.early.remove(&reading.next).filter(|_| reading.failed.is_none())?;
        reading.next += 1;
        if let Some(miss) = &batch.miss {
            reading.fail(tier::reason(miss));
        }
        Some(batch)
    }

    /// Copies a batch to the device.
    fn restore(&mut self, batch: Loaded) {
        let count = batch.pages.len();
        let Some(sequence) = self.scheduler.loading(batch.load) else { return };
        if count == 0 {
            return;
        }
        // Pages of this load that are still being copied come first.
        let ahead = self.copies.in_flight.values().map(|copy| match copy {
            Copy::Restore { load, pages, .. } if *load == batch.load => pages.len(),
            _ => 0,
        });
        let ahead: usize = ahead.sum();
        let targets: Vec<PageRef> = sequence.targets(ahead + count).split_off(ahead);
        targets.iter().for_each(|page| self.pool.share(page.group as usize, page.page));
        let reading = self.copies.readings.get_mut(&batch.load).expect("a batch belongs to a load");
        reading.restoring += 1;
        let bytes = batch.pages.iter().map(|page| (**page).as_ref().len()).sum();
        let pages = targets.iter().copied().zip(batch.pages).collect();
        let ticket = self.copies.ticket(Copy::Restore { load: batch.load, pages: targets, bytes });
        self.executor.start_write(pages, ticket);
        self.take_copies();
    }

    /// Takes in the copies that are done.
    pub(crate) fn take_copies(&mut self) {
        let mut done = std::mem::take(&mut self.copies.done);
        self.executor.poll(&mut done);
        for copy in done.drain(..) {
            match self.copies.in_flight.remove(&copy.ticket) {
                Some(Copy::Spill(spill)) => self.spilled(spill, copy),
                Some(Copy::Restore { load, pages, bytes }) => self.restored(load, &pages, bytes, &copy),
                None => {}
            }
        }
        self.copies.done = done;
        self.answer_flushes();
    }

    fn spilled(&mut self, spill: Spill, copy: CopyDone) {
        spill.reads.iter().for_each(|read| self.pool.release(read.page.group as usize, read.page.page));
        // A page that the device could not copy is missed later, and computed again.
        if copy.result.is_err() {
            return;
        }
        let Some(tier) = &self.tier else { return };
        let pages = spill.headers.into_iter().zip(copy.bytes).zip(copy.digests);
        for ((header, bytes), digest) in pages {
            let taken = tier.write(PageOut { header, bytes, digest, must: spill.must });
            let totals = &mut self.scheduler.totals;
            *(if taken { &mut totals.pages_spilled } else { &mut totals.pages_dropped }) += 1;
        }
    }

    fn restored(&mut self, load: LoadId, pages: &[PageRef], bytes: usize, copy: &CopyDone) {
        let sequence = self.scheduler.loading(load);
        let reading = self.copies.readings.get_mut(&load);
        if let (Some(sequence), Some(reading)) = (sequence, reading) {
            reading.restoring -= 1;
            if copy.result.is_ok() && reading.failed != Some("device") {
                sequence.arrived(pages.len(), &mut self.pool);
                reading.restored_bytes += bytes;
            } else {
                // Pages after it would leave a gap: no more is taken.
                reading.fail("device");
            }
        }
        pages.iter().for_each(|page| self.pool.release(page.group as usize, page.page));
        self.end_load_if_over(load);
    }

    fn end_load_if_over(&mut self, load: LoadId) {
        let Some(reading) = self.copies.readings.get(&load) else { return };
        let all = reading.next == reading.batches;
        if reading.restoring > 0 || !(all || reading.failed.is_some()) {
            return;
        }
        let (elapsed, reason) = (reading.begun.elapsed(), reading.failed);
        if reading.restored_bytes > 0 {
            self.planner.has_read(reading.restored_bytes, elapsed);
        }
        self.copies.readings.remove(&load);
        self.scheduler.end_load(load, elapsed.as_secs_f64() * 1e3, reason, &mut self.pool);
    }

    /// Answers when the pages of all sequences that have finished are with the system.
    pub(crate) fn flush(&mut self, patience: Duration, reply: oneshot::Sender<bool>) {
        self.copies.flushes.push((Ticket(self.copies.next_ticket), patience, reply));
        self.answer_flushes();
    }

    fn answer_flushes(&mut self) {
        if self.copies.flushes.is_empty() {
            return;
        }
        let copies = &mut self.copies;
        let spills = copies.in_flight.iter().filter(|(_, copy)| matches!(copy, Copy::Spill(_)));
        let oldest = spills.map(|(ticket, _)| ticket.0).min().unwrap_or(u64::MAX);
        let (waiting, ready) = std::mem::take(&mut copies.flushes).into_iter().partition(|f| f.0.0 > oldest);
        copies.flushes = waiting;
        for (_, patience, reply) in ready {
            match &self.tier {
                Some(tier) => tier.flush(patience, reply),
                None => {
                    // Whoever asked may have gone.
                    let _ = reply.send(true);
                }
            }
        }
    }

    /// Waits for the copies under way, so that no page is lost at the end.
    pub(crate) fn end_copies(&mut self) {
        let until = Instant::now() + Duration::from_secs(5);
        self.take_copies();
        while self.copies.is_busy() && Instant::now() < until {
            std::thread::sleep(Duration::from_micros(200));
            self.take_copies();
        }
    }
}
