//! One cell of the grid, and how it is written: `prefill@4096`, `decode@0x8`.

use std::fmt;
use std::str::FromStr;

/// Which half of a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A prompt, many rows a step.
    Prefill,
    /// One row of each sequence a step.
    Decode,
}

impl Phase {
    /// Its name in tables and files.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Prefill => "prefill",
            Phase::Decode => "decode",
        }
    }
}

/// One row of the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// Prefill or decode.
    pub phase: Phase,
    /// Tokens before.
    pub depth: usize,
    /// Sequences; a prefill has one.
    pub batch: usize,
}

impl Case {
    /// A prefill at every depth, then a decode at every depth with every number of sequences.
    pub fn grid(depths: &[usize], batches: &[usize]) -> Vec<Case> {
        let prefills = depths.iter().map(|&depth| Case { phase: Phase::Prefill, depth, batch: 1 });
        let decodes = depths
            .iter()
            .flat_map(|&depth| batches.iter().map(move |&batch| Case { phase: Phase::Decode, depth, batch }));
        prefills.chain(decodes).collect()
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.phase.name(), self.depth)?;
        match self.phase {
            Phase::Prefill => Ok(()),
            Phase::Decode => write!(f, "x{}", self.batch),
        }
    }
}

/// A text that is no case.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected prefill@DEPTH or decode@DEPTHxSEQUENCES, such as decode@4096x8, found `{0}`")]
pub struct UnknownCase(String);

impl FromStr for Case {
    type Err = UnknownCase;

    fn from_str(text: &str) -> Result<Self, UnknownCase> {
        let read = || {
            let (phase, rest) = text.split_once('@')?;
            match phase {
                "prefill" => Some(Case { phase: Phase::Prefill, depth: rest.parse().ok()?, batch: 1 }),
                "decode" => {
                    let (depth, batch) = rest.split_once('x').unwrap_or((rest, "1"));
                    let batch = batch.parse().ok().filter(|&n| n > 0)?;
                    Some(Case { phase: Phase::Decode, depth: depth.parse().ok()?, batch })
                }
                _ => None,
            }
        };
        read().ok_or_else(|| UnknownCase(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_has_each_prefill_once() {
        let names: Vec<String> = Case::grid(&[0, 50], &[1, 3]).iter().map(Case::to_string).collect();
        assert_eq!(
            names,
            ["prefill@0", "prefill@50", "decode@0x1", "decode@0x3", "decode@50x1", "decode@50x3"]
        );
    }

    #[test]
    fn names_are_read_back() {
        for case in Case::grid(&[0, 4096], &[1, 32]) {
            assert_eq!(case.to_string().parse(), Ok(case));
        }
        assert_eq!("decode@7".parse(), Ok(Case { phase: Phase::Decode, depth: 7, batch: 1 }));
        for wrong in ["", "decode", "decode@x8", "decode@0x0", "prefill@0x2", "load@0"] {
            let message = wrong.parse::<Case>().unwrap_err().to_string();
            assert!(
                message.contains("decode@4096x8") && message.ends_with(&format!("`{wrong}`")),
                "{message}"
            );
        }
    }
}
