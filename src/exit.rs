//! How the program ends: 0, 1 for a failure, 2 for bad arguments, with one clear line on stderr.

use std::process::ExitCode;

/// What the operator asked for cannot be meant: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Usage(pub(crate) String);

/// Prints the error, if any, and gives the exit code.
pub(crate) fn code(result: anyhow::Result<()>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    eprintln!("mainstay: {}", causes(&error));
    ExitCode::from(if error.chain().any(|e| e.is::<Usage>()) { 2 } else { 1 })
}

/// The error and what caused it on one line, without causes that the message before them repeats.
fn causes(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(|cause| cause.to_string()) {
        if line.is_empty() {
            line = cause;
        } else if !line.ends_with(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Ends with clap's word on the command line: help and version as they are, everything else as one line.
pub(crate) fn arguments(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        // nobody is left to tell if stdout is closed
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    eprintln!("mainstay: {}", one_line(&error.to_string()));
    ExitCode::from(2)
}

/// clap's message without its `error:`, usage and hint paragraphs.
pub(crate) fn one_line(message: &str) -> String {
    let end = message.find("\n\nUsage:").or_else(|| message.find("\n\nFor more")).unwrap_or(message.len());
    let text = message[..end].trim_start_matches("error:");
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    format!("{text} (see --help)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_stand_once_on_one_line() {
        let inner = anyhow::anyhow!("no such\nfile");
        let error = inner.context("a.txt: no such\nfile").context("the model");
        assert_eq!(causes(&error), "the model: a.txt: no such file");
    }

    #[test]
    fn clap_speaks_in_one_line() {
        let message = "error: unexpected argument '--x' found\n\n  tip: did you mean '--y'\n\nUsage: mainstay serve\n\nFor more information, try '--help'.\n";
        assert_eq!(one_line(message), "unexpected argument '--x' found tip: did you mean '--y' (see --help)");
    }
}
