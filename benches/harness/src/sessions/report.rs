//! Figures of sessions as tables for people and as JSON for programs.

use std::fmt::Write;

use mainstay_backend_api::PAGE_TOKENS;
use serde_json::{Value, json};

use super::stats::{median, percentile};
use super::verdict::{is_same, ttft_ms, verdicts};
use super::{Case, Decode, Figures, Forks, Restore, Resume};
use crate::latency::Peaks;

/// Tables and verdicts.
pub fn table(figures: &Figures) -> String {
    let mut text = String::new();
    // writing to a String cannot fail
    let _ = resumes(&mut text, figures)
        .and_then(|()| restores(&mut text, figures))
        .and_then(|()| writes(&mut text, figures))
        .and_then(|()| rest(&mut text, figures));
    for verdict in verdicts(figures) {
        let _ = writeln!(text, "{:<12} {}: {}", verdict.word(), verdict.target, verdict.found);
    }
    folded(&text)
}

/// Columns of a terminal that is not wide.
const COLUMNS: usize = 100;

/// Lines that are longer go on, indented, in the next.
fn folded(text: &str) -> String {
    const INDENT: &str = "    ";
    let mut found = String::with_capacity(text.len());
    for line in text.lines() {
        let mut rest = line.to_owned();
        while rest.chars().count() > COLUMNS {
            let end = rest.char_indices().nth(COLUMNS + 1).map_or(rest.len(), |(at, _)| at);
            let Some(space) = rest[..end].rfind(' ').filter(|&at| at > INDENT.len()) else { break };
            found.push_str(rest[..space].trim_end());
            found.push('\n');
            rest = format!("{INDENT}{}", rest[space..].trim_start());
        }
        found.push_str(&rest);
        found.push('\n');
    }
    found
}

type Written = std::fmt::Result;

fn middle<T>(runs: &[&T], of: impl Fn(&T) -> f64) -> f64 {
    median(&runs.iter().map(|run| of(run)).collect::<Vec<_>>())
}

/// The largest share, or nothing where none was known.
fn worst(shares: impl Iterator<Item = Option<f64>>) -> String {
    let worst = shares.flatten().reduce(f64::max);
    worst.map_or_else(|| "-".to_owned(), |share| format!("{:.0} %", 100.0 * share))
}

fn resumes(text: &mut String, figures: &Figures) -> Written {
    writeln!(
        text,
        "second turn: {} new tokens, {} drawn; penalty = time to the first token without reuse over that with it\n",
        figures.plan.new, figures.plan.answer
    )?;
    writeln!(
        text,
        "{:>8} {:<14} {:>4} {:>12} {:>9} {:>8} {:>8} {:>12} {:>5} {:>8}",
        "tokens", "case", "runs", "TTFT ms", "penalty", "cached", "restored", "restore ms", "same", "foreign"
    )?;
    for &context in &figures.plan.contexts {
        let cold = ttft_ms(figures, Case::Cold, context);
        for case in Case::ALL {
            let of = |run: &&Resume| run.case == case && run.context == context;
            let runs: Vec<&Resume> = figures.resumes.iter().filter(of).collect();
            let ttft = ttft_ms(figures, case, context);
            let same = runs.iter().all(|run| is_same(figures, run));
            writeln!(
                text,
                "{:>8} {:<14} {:>4} {:>12.1} {:>9} {:>8.0} {:>8.0} {:>12.1} {:>5} {:>8}",
                context,
                case.name(),
                runs.len(),
                ttft,
                format!("{:.1}x", cold / ttft),
                middle(&runs, |run| run.cached_tokens as f64),
                middle(&runs, |run| run.restored_tokens as f64),
                middle(&runs, |run| run.restore_ms),
                if same { "yes" } else { "NO" },
                worst(runs.iter().map(|run| run.foreign)),
            )?;
        }
    }
    writeln!(text)
}

fn restores(text: &mut String, figures: &Figures) -> Written {
    writeln!(
        text,
        "{:>8} {:>9} {:>13} {:>9} {:>10} {:>12} {:>12} {:>9} {:>7}",
        "tokens",
        "MB",
        "restore GB/s",
        "copy ms",
        "read ms",
        "O_DIRECT x1",
        "O_DIRECT x4",
        "by page",
        "share"
    )?;
    for &context in &figures.plan.contexts {
        let runs: Vec<&Restore> = figures.restores.iter().filter(|run| run.context == context).collect();
        writeln!(
            text,
            "{:>8} {:>9.0} {:>13.2} {:>9.1} {:>10.1} {:>12.2} {:>12.2} {:>9.2} {:>7}",
            context,
            middle(&runs, |run| run.bytes as f64 / 1e6),
            middle(&runs, |run| run.rate() / 1e9),
            middle(&runs, |run| run.copy_ms),
            middle(&runs, |run| run.read_ms),
            middle(&runs, |run| run.direct.one / 1e9),
            middle(&runs, |run| run.direct.four / 1e9),
            middle(&runs, |run| run.direct.pages / 1e9),
            format!("{:.0} %", 100.0 * middle(&runs, Restore::share)),
        )?;
    }
    writeln!(
        text,
        "(copy: to the device, part of the restore; read: the store alone, proven; rates in GB/s; O_DIRECT by 1 and 4 threads \
         4 MiB at a time, and as the store reads; share: of the best of these)\n"
    )
}

fn writes(text: &mut String, figures: &Figures) -> Written {
    let found = &figures.write_behind;
    let speed = |runs: &[Decode]| median(&runs.iter().map(|run| run.tokens_per_s).collect::<Vec<_>>());
    let runs = || found.stored.iter().chain(&found.dropped);
    let (stored, dropped) = found.p99_ms();
    writeln!(
        text,
        "decode of {} tokens, {} pairs: {:.2} tokens/s stored, {:.2} dropped, ratio {:.4}; p99 between tokens {:.1} ms, \
         {:.1} ms; foreign at most {}",
        figures.plan.decode,
        found.stored.len(),
        speed(&found.stored),
        speed(&found.dropped),
        found.ratio(),
        stored,
        dropped,
        worst(runs().map(|run| run.foreign)),
    )?;
    for (context, first) in figures.firsts.iter().filter(|(_, first)| first.restored_tokens == 0) {
        let turns = figures.resumes.iter().filter(|run| run.context == *context);
        let second: Vec<f64> = turns.filter_map(|run| run.written_bytes).map(|bytes| bytes as f64).collect();
        let per_token = figures.page_bytes as f64 / PAGE_TOKENS as f64;
        writeln!(
            text,
            "written at {context} tokens: {:.1} MB by the first turn ({:.2} x its keys and values), {:.1} MB by the second",
            first.written_bytes as f64 / 1e6,
            first.written_bytes as f64 / (per_token * *context as f64),
            median(&second) / 1e6,
        )?;
    }
    Ok(())
}

fn rest(text: &mut String, figures: &Figures) -> Written {
    for run in &figures.moves {
        writeln!(
            text,
            "move of {} tokens: {:.1} MB, out in {:.0} ms, in in {:.0} ms",
            run.context,
            run.bytes as f64 / 1e6,
            run.export_ms,
            run.import_ms
        )?;
    }
    for forks in &figures.forks {
        writeln!(
            text,
            "forks of {} tokens: {:.4} ms each, {} bytes of pages; {} that went on: {:.3} of as many copies, {:.1} % of \
             prompts cached",
            forks.context,
            forks.fork_ms,
            forks.fork_bytes,
            forks.continued,
            forks.ratio(),
            100.0 * cached(forks),
        )?;
    }
    let found = &figures.recovery;
    writeln!(
        text,
        "open after a kill: {:.0} ms, {} of {} sessions with {} turns, {} of {} pages\n",
        found.open_ms, found.sessions.1, found.sessions.0, found.turns, found.pages.1, found.pages.0
    )
}

fn cached(forks: &Forks) -> f64 {
    forks.cached_tokens.0 as f64 / forks.cached_tokens.1.max(1) as f64
}

/// The same with every run.
pub fn json(figures: &Figures, peaks: &Peaks) -> Value {
    let recovery = &figures.recovery;
    let (stored, dropped) = figures.write_behind.p99_ms();
    let verdicts: Vec<Value> = verdicts(figures)
        .iter()
        .map(|v| json!({"target": v.target, "found": v.found, "verdict": v.word(), "met": v.met}))
        .collect();
    json!({
        "kind": "sessions",
        "read_bytes_per_s": peaks.read_bytes_per_s,
        "fma_flops_per_s": peaks.fma_flops_per_s,
        "plan": plan_json(figures),
        "first_turns": figures.firsts.iter().map(|(context, first)| json!({
            "context": context,
            "ttft_ms": first.ttft_ms,
            "restored_tokens": first.restored_tokens,
            "written_bytes": first.written_bytes,
            "foreign_cpu_share": first.foreign,
        })).collect::<Vec<_>>(),
        "resumes": figures.resumes.iter().map(|run| resume_json(figures, run)).collect::<Vec<_>>(),
        "restores": figures.restores.iter().map(restore_json).collect::<Vec<_>>(),
        "moves": figures.moves.iter().map(|run| json!({
            "context": run.context,
            "bytes": run.bytes,
            "export_ms": run.export_ms,
            "import_ms": run.import_ms,
        })).collect::<Vec<_>>(),
        "forks": figures.forks.iter().map(|forks| json!({
            "context": forks.context,
            "fork_ms_median": forks.fork_ms,
            "fork_bytes": forks.fork_bytes,
            "continued": forks.continued,
            "prefix_bytes": forks.prefix_bytes,
            "stored_bytes": forks.stored_bytes,
            "stored_over_copies": forks.ratio(),
            "cached_share": cached(forks),
        })).collect::<Vec<_>>(),
        "write_behind": {
            "ratio_median": figures.write_behind.ratio(),
            "p99_ms": {"stored": stored, "dropped": dropped},
            "stored": figures.write_behind.stored.iter().map(decode_json).collect::<Vec<_>>(),
            "dropped": figures.write_behind.dropped.iter().map(decode_json).collect::<Vec<_>>(),
        },
        "recovery": {
            "open_ms": recovery.open_ms,
            "sessions_made": recovery.sessions.0,
            "sessions_found": recovery.sessions.1,
            "turns": recovery.turns,
            "pages_made": recovery.pages.0,
            "pages_found": recovery.pages.1,
            "entries": recovery.entries,
        },
        "verdicts": verdicts,
    })
}

fn plan_json(figures: &Figures) -> Value {
    let plan = &figures.plan;
    json!({
        "contexts": plan.contexts,
        "answer": plan.answer,
        "new": plan.new,
        "repeats": plan.repeats,
        "cold_repeats": plan.cold_repeats,
        "decode": plan.decode,
        "pairs": plan.pairs,
        "sessions": plan.sessions,
        "page_bytes": figures.page_bytes,
    })
}

fn resume_json(figures: &Figures, run: &Resume) -> Value {
    json!({
        "case": run.case.name(),
        "context": run.context,
        "ttft_ms": run.ttft_ms,
        "penalty": ttft_ms(figures, Case::Cold, run.context) / run.ttft_ms,
        "cached_tokens": run.cached_tokens,
        "restored_tokens": run.restored_tokens,
        "restore_ms": run.restore_ms,
        "copy_ms": run.copy_ms,
        "kv_state": run.state.name(),
        "same_tokens": is_same(figures, run),
        "written_bytes": run.written_bytes,
        "open_ms": run.open_ms,
        "load_ms": run.load_ms,
        "foreign_cpu_share": run.foreign,
    })
}

fn restore_json(run: &Restore) -> Value {
    json!({
        "context": run.context,
        "bytes": run.bytes,
        "restore_ms": run.restore_ms,
        "copy_ms": run.copy_ms,
        "read_ms": run.read_ms,
        "bytes_per_s": run.rate(),
        "read_bytes_per_s": run.read_rate(),
        "direct_bytes_per_s": {
            "threads_1": run.direct.one, "threads_4": run.direct.four, "pages": run.direct.pages,
        },
        "direct_share": run.share(),
    })
}

fn decode_json(run: &Decode) -> Value {
    json!({
        "tokens_per_s": run.tokens_per_s,
        "p50_ms": percentile(&run.gaps_ms, 0.5),
        "p99_ms": percentile(&run.gaps_ms, 0.99),
        "written_bytes": run.written_bytes,
        "copy_ms": run.copy_ms,
        "foreign_cpu_share": run.foreign,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lines_go_on_at_a_space() {
        let words = ["word"; 60].join(" ");
        let text = folded(&format!("short  line\n{words}\n{}\n", "x".repeat(120)));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!((lines[0], lines[1].len(), lines.len()), ("short  line", 99, 6));
        assert!(lines[2].starts_with("    word") && lines[2].len() <= 100, "{text}");
        assert_eq!(lines[1..5].join(" ").split_whitespace().count(), 60);
        assert_eq!(lines[5].len(), 120, "what has no space stays");
    }
}
