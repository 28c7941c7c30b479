//! The answers of a batch so far, one a line, appended in groups: after a crash the batch goes on behind the last whole
//! one.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde_json::Value;

use super::record::Counts;

/// The answer to a line.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Answer {
    /// The number of the line.
    pub(crate) line: u64,
    /// Whether it goes to the answers, or to the errors.
    pub(crate) is_success: bool,
    /// The object of the output file, on one line.
    pub(crate) result: String,
}

/// The answers of a batch on disk.
pub(crate) struct Journal {
    file: File,
    len: u64,
}

impl Journal {
    /// Opens it, or begins it; what follows the last whole answer is cut off. Also tells which lines are answered, and
    /// how many of them how.
    ///
    /// # Errors
    /// The disk's.
    pub(crate) fn open(path: &Path) -> io::Result<(Self, HashSet<u64>, Counts)> {
        let (mut answered, mut counts, mut len) = (HashSet::new(), Counts::default(), 0);
        let file =
            OpenOptions::new().read(true).append(true).create(true).truncate(false).mode(0o600).open(path)?;
        let mut reader = BufReader::new(&file);
        while let Some((answer, bytes)) = next(&mut reader)? {
            if !answered.insert(answer.line) {
                break;
            }
            len += bytes;
            *counts.of(answer.is_success) += 1;
        }
        file.set_len(len)?;
        file.sync_all()?;
        Ok((Self { file, len }, answered, counts))
    }

    /// Appends answers; they are on disk when it returns.
    ///
    /// # Errors
    /// The disk's. Then none of them are there.
    pub(crate) fn append(&mut self, answers: &[Answer]) -> io::Result<()> {
        let mut bytes = Vec::new();
        for answer in answers {
            writeln!(bytes, "{} {} {}", answer.line, u8::from(answer.is_success), answer.result)?;
        }
        let written = self.file.write_all(&bytes).and_then(|()| self.file.sync_data());
        if written.is_err() {
            // A half line would hide what comes after it.
            self.file.set_len(self.len)?;
        } else {
            self.len += bytes.len() as u64;
        }
        written
    }
}

/// Reads all answers.
///
/// # Errors
/// The disk's, or those of `take`.
pub(crate) fn read(path: &Path, mut take: impl FnMut(Answer) -> io::Result<()>) -> io::Result<()> {
    let mut reader = BufReader::new(File::open(path)?);
    while let Some((answer, _)) = next(&mut reader)? {
        take(answer)?;
    }
    Ok(())
}

/// The next answer and its length; `None` at the end, or where a crash has left something else.
fn next(reader: &mut impl BufRead) -> io::Result<Option<(Answer, u64)>> {
    let mut bytes = Vec::new();
    reader.read_until(b'\n', &mut bytes)?;
    Ok(parse(&bytes).map(|answer| (answer, bytes.len() as u64)))
}

fn parse(bytes: &[u8]) -> Option<Answer> {
    let text = std::str::from_utf8(bytes.strip_suffix(b"\n")?).ok()?;
    let (line, rest) = text.split_once(' ')?;
    let (is_success, result) = rest.split_once(' ')?;
    let is_success = match is_success {
        "0" => false,
        "1" => true,
        _ => return None,
    };
    serde_json::from_str::<Value>(result).ok().filter(Value::is_object)?;
    Some(Answer { line: line.parse().ok()?, is_success, result: result.to_owned() })
}

impl Counts {
    /// The count that an answer belongs to.
    pub(super) fn of(&mut self, is_success: bool) -> &mut u64 {
        if is_success { &mut self.completed } else { &mut self.failed }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::tests::Directory;

    fn answer(line: u64) -> Answer {
        Answer {
            line, is_success: !line.is_multiple_of(3), result: format!("{{\"custom_id\":\"é{line}\"}}")
        }
    }

    fn all(path: &Path) -> Vec<Answer> {
        let mut found = Vec::new();
        read(path, |answer| {
            found.push(answer);
            Ok(())
        })
        .unwrap();
        found
    }

    #[test]
    fn a_crash_at_any_byte_keeps_the_whole_answers_before_it_and_each_once() {
        let directory = Directory::new();
        let path = directory.path().join("answers");
        let (mut journal, answered, counts) = Journal::open(&path).unwrap();
        assert!(answered.is_empty() && counts == Counts::default());
        journal.append(&[answer(2), answer(1)]).unwrap();
        journal.append(&[answer(6)]).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let ends: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at] == b'\n').collect();
        for cut in 0..=bytes.len() {
            for tail in [&b""[..], b"\0\0\0\n", b"7 1 {}"] {
                std::fs::write(&path, [&bytes[..cut], tail].concat()).unwrap();
                let whole = ends.iter().filter(|end| **end < cut).count();
                let (mut journal, answered, counts) = Journal::open(&path).unwrap();
                assert_eq!(answered.len(), whole, "{cut}");
                assert_eq!(counts.completed, (whole as u64).min(2));
                let left: Vec<Answer> = [2, 1, 6, 4].map(answer)[whole..].to_vec();
                journal.append(&left).unwrap();
                assert_eq!(all(&path), [2, 1, 6, 4].map(answer));
            }
        }
        std::fs::write(&path, [&bytes[..], &bytes[..]].concat()).unwrap();
        assert_eq!(Journal::open(&path).unwrap().1.len(), 3);
        assert_eq!(all(&path).len(), 3);
    }
}
