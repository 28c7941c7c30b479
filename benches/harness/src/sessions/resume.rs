//! The second turn of a session, however the session came to it.

use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use mainstay_backend_api::{PAGE_TOKENS, oldest_page};
use mainstay_engine::store::{Durability, ImportAs, Kind, PageHeader, PageName, SessionId};
use mainstay_engine::{KvState, RestorePolicy};

use super::child::{FirstTurn, Task, run_and_kill};
use super::direct::{DirectRate, direct_rate};
use super::fork::{Forks, forks};
use super::world::{Answer, Ask, Subject, TENANT, World, ms};
use super::{Bench, SessionsError};

/// Bytes of pages that are read together, as the engine does.
const BATCH_BYTES: usize = 4 << 20;
const READ_PATIENCE: Duration = Duration::from_secs(60);
/// How long a server has been up when a session is read from disk: it has memory for pages by then. After a kill, a
/// session is read at once.
const UP: Duration = Duration::from_secs(2);

/// How a session came to its second turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Case {
    /// With nothing: every token is computed, as a server without sessions does.
    Cold,
    /// Its keys and values are in memory.
    Memory,
    /// The store was closed and opened again, with a new engine.
    Disk,
    /// As before, after the process that had made the session was killed.
    Killed,
    /// It was written out with its keys and values, and read in by a store in another directory.
    Moved,
}

impl Case {
    /// All, in the order of tables.
    pub const ALL: [Case; 5] = [Case::Cold, Case::Memory, Case::Disk, Case::Killed, Case::Moved];

    /// As it stands in tables.
    pub fn name(self) -> &'static str {
        match self {
            Case::Cold => "cold",
            Case::Memory => "memory",
            Case::Disk => "disk",
            Case::Killed => "after kill -9",
            Case::Moved => "after move",
        }
    }
}

/// One second turn.
#[derive(Clone, Debug, PartialEq)]
pub struct Resume {
    /// How it began.
    pub case: Case,
    /// Tokens of the session before.
    pub context: usize,
    /// From the submission to the first token, milliseconds.
    pub ttft_ms: f64,
    /// Prompt tokens that were not computed.
    pub cached_tokens: usize,
    /// Of these, such that were read from the store.
    pub restored_tokens: usize,
    /// How long reading took, until the pages were on the device, milliseconds.
    pub restore_ms: f64,
    /// Of this, the engine's thread copying pages to the device, milliseconds.
    pub copy_ms: f64,
    /// As the engine calls it.
    pub state: KvState,
    /// What it drew.
    pub tokens: Vec<u32>,
    /// Bytes of pages that the turn wrote; `None` where it was told to write none.
    pub written_bytes: Option<u64>,
    /// To open the store, milliseconds.
    pub open_ms: f64,
    /// To load the model, milliseconds.
    pub load_ms: f64,
    /// Part of the processors' time that other programs took.
    pub foreign: Option<f64>,
}

/// One restore beside what the disk gives in the same minute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Restore {
    /// Tokens of the session.
    pub context: usize,
    /// Payload bytes of the pages that were restored.
    pub bytes: u64,
    /// From the first read until the pages were on the device, milliseconds.
    pub restore_ms: f64,
    /// Of this, the engine's thread copying pages to the device, milliseconds.
    pub copy_ms: f64,
    /// The same pages read and proven by the store alone, with nothing done with them, milliseconds.
    pub read_ms: f64,
    /// Plain reads of the same files.
    pub direct: DirectRate,
}

impl Restore {
    /// Bytes per second of the restore.
    pub fn rate(&self) -> f64 {
        self.bytes as f64 / (self.restore_ms / 1e3).max(1e-9)
    }

    /// Bytes per second of the store alone.
    pub fn read_rate(&self) -> f64 {
        self.bytes as f64 / (self.read_ms / 1e3).max(1e-9)
    }

    /// Part of the disk's rate that the restore reached.
    pub fn share(&self) -> f64 {
        self.rate() / self.direct.best().max(1.0)
    }
}

/// A move from one directory to another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Move {
    /// Tokens of the session.
    pub context: usize,
    /// Bytes that went over.
    pub bytes: u64,
    /// To write the session out, milliseconds.
    pub export_ms: f64,
    /// To read it in and sync it, milliseconds.
    pub import_ms: f64,
}

/// All about one length of session.
#[derive(Debug, Default)]
pub(crate) struct Lengths {
    pub(crate) firsts: Vec<(usize, FirstTurn)>,
    pub(crate) resumes: Vec<Resume>,
    pub(crate) restores: Vec<Restore>,
    pub(crate) moves: Vec<Move>,
    pub(crate) forks: Vec<Forks>,
}

/// One length of session under measurement.
struct Length<'a, 'b> {
    bench: &'a Bench<'b>,
    context: usize,
    /// Where the session is made.
    dir: PathBuf,
    /// What the second turn sends.
    new: Vec<u32>,
}

/// Measures all cases at every length, and adds what it finds to `found` as it goes.
pub(crate) fn lengths(
    bench: &Bench<'_>,
    tell: &mut dyn FnMut(&str),
    found: &mut Lengths,
) -> Result<(), SessionsError> {
    for &context in &bench.plan.contexts {
        let dir = bench.plan.dir.join(format!("context-{context}"));
        let new = bench.subject.tokens(bench.plan.new, 1_000_003);
        let length = Length { bench, context, dir, new };
        for repeat in 0..bench.plan.repeats {
            let mut tell = |what: &str| {
                tell(&format!("{context} tokens, run {} of {}: {what}", repeat + 1, bench.plan.repeats))
            };
            length.run(repeat, &mut tell, found)?;
        }
        tell(&format!("{context} tokens: forks"));
        let world = length.open(&length.dir, RestorePolicy::Always)?;
        found.forks.push(forks(bench, &world, context)?);
        world.close()?;
        fs::remove_dir_all(&length.dir)?;
    }
    Ok(())
}

impl Length<'_, '_> {
    fn open(&self, dir: &Path, restore: RestorePolicy) -> Result<World, SessionsError> {
        World::open(self.bench.subject, dir, self.bench.plan.room(self.context), restore)
    }

    /// One round of all cases. What is measured in the session's own directory writes no pages, so that the next case
    /// finds what this one found.
    fn run(
        &self,
        repeat: usize,
        tell: &mut dyn FnMut(&str),
        found: &mut Lengths,
    ) -> Result<(), SessionsError> {
        tell("a process makes the session and is killed");
        let task = Task { context: self.context, dir: self.dir.clone() };
        found.firsts.push((self.context, run_and_kill((self.bench.child)()?, &task)?));

        tell("after kill -9");
        let world = self.open(&self.dir, RestorePolicy::Always)?;
        let (session, history) = world.session()?;
        let prompt = [&history[..], &self.new].concat();
        found.resumes.push(self.resume(&world, Case::Killed, &prompt)?);
        tell("writing it out");
        let bundle = self.bench.plan.dir.join("bundle");
        let export_ms = write_out(&world, session, &bundle)?;
        world.close()?;

        tell("from disk");
        let world = self.open(&self.dir, RestorePolicy::Always)?;
        thread::sleep(UP);
        let resume = self.resume(&world, Case::Disk, &prompt)?;
        let read_ms = read_alone(self.bench.subject, &world, &history)?;
        world.close()?;
        found.restores.push(self.restore(&resume, read_ms)?);
        found.resumes.push(resume);

        tell("from memory");
        let world = self.open(&self.dir, RestorePolicy::Always)?;
        world.ask(&Ask { prompt: &history, count: 0, durability: Durability::Ephemeral, salt: 0 })?;
        found.resumes.push(self.resume(&world, Case::Memory, &prompt)?);
        world.close()?;

        tell("after a move");
        found.moves.push(self.moved(&bundle, export_ms, &mut found.resumes)?);

        if repeat < self.bench.plan.cold_repeats {
            tell("cold: everything is computed");
            let dir = self.bench.plan.dir.join("cold");
            let world = self.open(&dir, RestorePolicy::Never)?;
            found.resumes.push(self.resume(&world, Case::Cold, &prompt)?);
            world.close()?;
            fs::remove_dir_all(dir)?;
        }
        Ok(())
    }

    /// The second turn, keeping nothing.
    fn resume(&self, world: &World, case: Case, prompt: &[u32]) -> Result<Resume, SessionsError> {
        world.copies.take_ms();
        let (count, durability) = (self.bench.plan.answer, Durability::Ephemeral);
        let answer = world.ask(&Ask { prompt, count, durability, salt: 0 })?;
        Ok(self.of(world, case, answer))
    }

    fn of(&self, world: &World, case: Case, answer: Answer) -> Resume {
        let (copy_ms, _) = world.copies.take_ms();
        Resume {
            case,
            context: self.context,
            ttft_ms: answer.ttft_ms(),
            cached_tokens: answer.kv.cached_tokens,
            restored_tokens: answer.kv.restored_tokens,
            restore_ms: answer.kv.restore_ms,
            copy_ms,
            state: answer.kv.state,
            tokens: answer.tokens,
            written_bytes: None,
            open_ms: world.open_ms,
            load_ms: world.load_ms,
            foreign: answer.foreign,
        }
    }

    fn restore(&self, resume: &Resume, read_ms: f64) -> Result<Restore, SessionsError> {
        Ok(Restore {
            context: self.context,
            bytes: self.bench.subject.bytes_after(resume.restored_tokens),
            restore_ms: resume.restore_ms,
            copy_ms: resume.copy_ms,
            read_ms,
            direct: direct_rate(&self.dir, self.bench.subject.record_bytes())?,
        })
    }

    /// Reads a session in at another place and goes on there, as a server would: its turn is kept.
    fn moved(&self, bundle: &Path, export_ms: f64, resumes: &mut Vec<Resume>) -> Result<Move, SessionsError> {
        let dir = self.bench.plan.dir.join("moved");
        let world = self.open(&dir, RestorePolicy::Always)?;
        let bytes = fs::metadata(bundle)?.len();
        let (session, import_ms) = read_in(&world, bundle)?;
        let before = world.written_bytes();
        world.copies.take_ms();
        let answer = world.turn(session, &self.new, self.bench.plan.answer)?;
        let mut resume = self.of(&world, Case::Moved, answer);
        world.settle()?;
        resume.written_bytes = Some(world.written_bytes() - before);
        resumes.push(resume);
        world.close()?;
        fs::remove_dir_all(dir)?;
        fs::remove_file(bundle)?;
        Ok(Move { context: self.context, bytes, export_ms, import_ms })
    }
}

fn write_out(world: &World, session: SessionId, bundle: &Path) -> Result<f64, SessionsError> {
    let begun = Instant::now();
    let mut out = BufWriter::with_capacity(1 << 20, File::create(bundle)?);
    let len = world.store.get(world.tenant.id, session)?.token_count as usize;
    let pages = world.handle.export_pages(len);
    world.store.export(world.tenant.id, session, Some(pages), &mut out)?;
    out.flush()?;
    out.get_ref().sync_all()?;
    Ok(ms(begun))
}

fn read_in(world: &World, bundle: &Path) -> Result<(SessionId, f64), SessionsError> {
    let begun = Instant::now();
    let pages = world.handle.import_pages(TENANT, None)?;
    let mut input = BufReader::with_capacity(1 << 20, File::open(bundle)?);
    let imported = world.store.import(&world.tenant, &mut input, ImportAs::default(), pages)?;
    world.store.flush()?;
    if imported.pages_refused > 0 {
        return Err(SessionsError::Broken(format!("{} pages were refused", imported.pages_refused)));
    }
    Ok((imported.session.id, ms(begun)))
}

/// Reads the pages that a session needs to go on through the store's own threads, and does nothing with them.
pub(crate) fn read_alone(
    subject: &Subject<'_>,
    world: &World,
    history: &[u32],
) -> Result<f64, SessionsError> {
    let wanted = headers(subject, world, history)?;
    let groups = usize::from(world.handle.export_pages(history.len()).groups);
    let batch = (BATCH_BYTES / subject.page_bytes().max(1)).max(1) * groups;
    let (done, all) = mpsc::channel();
    let begun = Instant::now();
    for batch in wanted.chunks(batch) {
        let done = done.clone();
        world.store.start_read(batch.to_vec(), READ_PATIENCE, move |pages| {
            // Whoever waits has gone only if the measurement failed.
            let _ = done.send(pages.iter().filter(|page| page.is_err()).count());
        });
    }
    drop(done);
    let missed: usize = all.iter().sum();
    if missed > 0 {
        return Err(SessionsError::Broken(format!("{missed} of {} pages are gone", wanted.len())));
    }
    Ok(ms(begun))
}

/// What names the pages that a session needs, its tail included: its last token has no keys and values yet.
pub(crate) fn headers(
    subject: &Subject<'_>,
    world: &World,
    history: &[u32],
) -> Result<Vec<PageHeader>, SessionsError> {
    let export = world.handle.export_pages(history.len());
    let tenant = &world.tenant;
    let root = world.handle.root(TENANT, (None, b""), history.len())?;
    let mut parent = root.ok_or_else(|| SessionsError::Broken("the engine has no store".into()))?;
    let (mut headers, windows) = (Vec::new(), subject.windows());
    let computed = &history[..history.len().saturating_sub(1)];
    for (page, tokens) in computed.chunks(PAGE_TOKENS).enumerate() {
        let key = tenant.chain.next(parent, tokens, &[]);
        let needs = |&group: &u16| page >= oldest_page(windows[usize::from(group)], computed.len());
        for group in (0..export.groups).filter(needs) {
            let name = PageName { tenant: tenant.id, key, class: export.class, group, kind: Kind::Attention };
            headers.push(PageHeader { name, content: export.content, parent, tokens: tokens.to_vec() });
        }
        parent = key;
    }
    Ok(headers)
}
