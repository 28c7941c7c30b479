//! Sizes and smells of the sources, checked as text: what neither the compiler nor clippy looks at.

use std::fs;
use std::path::{Path, PathBuf};

/// A source file aims at 300 lines.
const FILE_LINES_MAX: usize = 800;
/// A function aims at 70 lines.
const FUNCTION_LINES_MAX: usize = 100;

/// Folders that hold nothing of our writing, generated data, or files that tests read.
const SKIPPED: [&str; 4] = ["target", "fixtures", "runs", "__pycache__"];
/// Kinds of files that are read as text.
const TEXT_ENDINGS: [&str; 7] = ["rs", "toml", "md", "py", "sh", "jinja", "yml"];

/// Names that say nothing about what a file holds.
const EMPTY_NAMES: [&str; 9] = ["ctx", "mgr", "util", "utils", "misc", "common", "helper", "helpers", "v2"];

/// Where memory is handled by hand; everything else is safe Rust.
const UNSAFE_PATHS: [&str; 7] = [
    "kernels/",
    "backends/cpu/src/pool.rs",
    "backends/cpu/src/arena.rs",
    "backends/cpu/tests/allocation.rs",
    "engine/store/src/aligned.rs",
    "models/src/weights.rs",
    "models/tests/hostile.rs",
];

// split so that this file does not find itself
const LEFTOVERS: [&str; 4] =
    [concat!("dbg", "!("), concat!("FIX", "ME"), concat!("todo", "!("), concat!("unimpl", "emented!(")];
const ALLOW: [&str; 2] = [concat!("#[al", "low("), concat!("#![al", "low(")];
const MACHINE_PATHS: [&str; 2] = [concat!("/wo", "rk/"), concat!("/ro", "ot/")];
const UNSAFE: &str = concat!("uns", "afe");
const UNWRAP: &str = concat!(".unw", "rap()");

/// All problems of one file; `path` is relative to the root, with forward slashes.
fn problems(path: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut report = |line: usize, what: String| found.push(format!("{path}:{line}: {what}"));
    for name in path.split(['/', '.']).filter(|n| EMPTY_NAMES.contains(n)) {
        report(0, format!("the name `{name}` says nothing"));
    }
    for (i, line) in text.lines().enumerate() {
        for word in MACHINE_PATHS.iter().filter(|w| line.contains(**w)) {
            report(i + 1, format!("names a path of one machine: {word}"));
        }
    }
    if path.ends_with(".rs") {
        rust_problems(path, text, &mut report);
    }
    found
}

fn rust_problems(path: &str, text: &str, report: &mut impl FnMut(usize, String)) {
    let lines: Vec<&str> = text.lines().collect();
    if lines.len() > FILE_LINES_MAX {
        report(lines.len(), format!("{} lines, {FILE_LINES_MAX} at most", lines.len()));
    }
    if !lines.first().is_some_and(|l| l.starts_with("//! ")) {
        report(1, "the first line should say with `//! ` what the file owns".into());
    }
    for (first, last) in functions(&lines) {
        if last - first + 1 > FUNCTION_LINES_MAX {
            report(
                first + 1,
                format!("a function of {} lines, {FUNCTION_LINES_MAX} at most", last - first + 1),
            );
        }
    }
    let may_be_unsafe = UNSAFE_PATHS.iter().any(|p| path.starts_with(p));
    let of_tests =
        path.ends_with("tests.rs") || path.split('/').any(|part| part == "tests" || part == "benches");
    let tests_begin = match of_tests {
        true => 0,
        false => lines.iter().position(|l| l.trim() == "#[cfg(test)]").unwrap_or(lines.len()),
    };
    for (i, line) in lines.iter().enumerate() {
        for word in LEFTOVERS.iter().chain(&ALLOW).filter(|w| line.contains(**w)) {
            report(i + 1, format!("`{word}` is left"));
        }
        let code = line.split("//").next().unwrap_or_default();
        if !may_be_unsafe && has_word(code, UNSAFE) {
            report(i + 1, format!("{UNSAFE} code is for {UNSAFE_PATHS:?}"));
        }
        if i < tests_begin && code.contains(UNWRAP) {
            report(i + 1, format!("`{UNWRAP}` outside tests"));
        }
        if is_banner(line) {
            report(i + 1, "a banner".into());
        }
    }
}

/// First and last line of every function, counting on rustfmt: the closing brace stands under the `fn` line.
fn functions(lines: &[&str]) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    for (first, line) in lines.iter().enumerate() {
        let indent = line.len() - line.trim_start().len();
        // a declaration ends with `;`, a body on one line with `}`
        let opens =
            lines[first..].iter().find(|l| l.ends_with(['{', ';', '}'])).is_some_and(|l| l.ends_with('{'));
        if !opens || !starts_function(line.trim_start()) {
            continue;
        }
        let end = format!("{}}}", " ".repeat(indent));
        if let Some(len) = lines[first..].iter().position(|l| **l == end) {
            found.push((first, first + len));
        }
    }
    found
}

fn starts_function(code: &str) -> bool {
    let mut rest = code;
    loop {
        if rest.starts_with("fn ") {
            return true;
        }
        let Some((word, after)) = rest.split_once(' ') else { return false };
        let qualifies =
            ["const", "async", "extern", "\"C\"", UNSAFE].contains(&word) || word.starts_with("pub");
        if !qualifies {
            return false;
        }
        rest = after;
    }
}

fn has_word(text: &str, word: &str) -> bool {
    let inside = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word)
        .any(|(at, _)| !text[..at].ends_with(inside) && !text[at + word.len()..].starts_with(inside))
}

/// A comment that draws: a run of four equal punctuation marks at its start, or box characters.
fn is_banner(line: &str) -> bool {
    let Some(body) = line.trim_start().strip_prefix("//") else { return false };
    let body = body.trim_start_matches(['/', '!']).trim_start();
    let drawn = ["====", "----", "####", "****", "~~~~", "____"].iter().any(|run| body.starts_with(run));
    drawn || body.chars().any(|c| ('\u{2500}'..='\u{259f}').contains(&c))
}

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    let entries = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    for entry in entries {
        let path = entry.expect("a folder's entries can be read").path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_owned();
        let ours = !SKIPPED.contains(&name.as_str()) && (!name.starts_with('.') || name == ".ci");
        if path.is_dir() && ours {
            sources(&path, found);
        } else if path.is_file() {
            let ending = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
            if TEXT_ENDINGS.contains(&ending) || path.ends_with(".ci/run") {
                found.push(path);
            }
        }
    }
}

#[test]
fn every_file_is_tidy() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    sources(root, &mut files);
    assert!(files.len() > 40, "only {} files found below {}", files.len(), root.display());
    let mut found = Vec::new();
    for file in files {
        let path =
            file.strip_prefix(root).expect("it lies below the root").to_string_lossy().replace('\\', "/");
        let text = fs::read_to_string(&file).unwrap_or_else(|e| panic!("{path}: {e}"));
        found.extend(problems(&path, &text));
    }
    assert!(found.is_empty(), "{} problems:\n{}", found.len(), found.join("\n"));
}

/// The problems of a sample with a good first line.
fn sample(path: &str, body: &str) -> Vec<String> {
    problems(path, &format!("//! A sample.\n{body}"))
}

#[test]
fn a_tidy_file_has_no_problem() {
    let body = "use std::fs;\n\n/// Reads.\npub fn read() -> String {\n    String::new()\n}\n";
    assert_eq!(sample("models/src/read.rs", body), Vec::<String>::new());
}

#[test]
fn planted_smells_are_found() {
    let smells = [
        ("src/a.rs", format!("fn f() {{ {}x); }}\n", LEFTOVERS[0])),
        ("src/a.rs", format!("// {}: later\n", LEFTOVERS[1])),
        ("src/a.rs", format!("fn f() {{ {}) }}\n", LEFTOVERS[2])),
        ("src/a.rs", format!("fn f() {{ {}) }}\n", LEFTOVERS[3])),
        ("src/a.rs", format!("{}dead_code)]\nfn f() {{}}\n", ALLOW[0])),
        ("src/a.rs", format!("fn f() {{ {UNSAFE} {{}} }}\n")),
        ("src/a.rs", format!("fn f() {{ g(){UNWRAP}; }}\n#[cfg(test)]\n")),
        ("src/a.rs", "// ==== part ====\n".into()),
        ("src/a.rs", "// \u{2500}\u{2500} part\n".into()),
        ("src/a.rs", format!("const P: &str = \"{}x\";\n", MACHINE_PATHS[0])),
        ("docs/a.md", format!("see {}x\n", MACHINE_PATHS[1])),
        ("src/utils.rs", String::new()),
        ("server/src/common/a.rs", String::new()),
    ];
    for (path, body) in smells {
        assert_eq!(sample(path, &body).len(), 1, "{path}: {body}");
    }
    assert_eq!(problems("src/a.rs", "fn f() {}\n").len(), 1, "no module comment");
}

#[test]
fn places_of_exceptions_are_respected() {
    let body = format!("fn f() {{ {UNSAFE} {{}} }}\n");
    assert_eq!(sample("kernels/cpu/src/a.rs", &body), Vec::<String>::new());
    let body = format!("#[cfg(test)]\nmod tests {{ fn f() {{ g(){UNWRAP}; }} }}\n");
    assert_eq!(sample("src/a.rs", &body), Vec::<String>::new());
    assert_eq!(
        sample("models/src/a_tests.rs", &format!("fn f() {{ g(){UNWRAP}; }}\n")),
        Vec::<String>::new()
    );
    assert_eq!(sample("tests/a.rs", &format!("fn f() {{ g(){UNWRAP}; }}\n")), Vec::<String>::new());
    let word = format!("#![expect({UNSAFE}_code)] // {UNSAFE} in a comment\n");
    assert_eq!(sample("src/a.rs", &word), Vec::<String>::new());
}

#[test]
fn long_files_and_functions_are_found() {
    let lines = |n: usize| "    x();\n".repeat(n);
    let long = |n: usize| format!("impl A {{\n    pub(crate) async fn f() {{\n{}    }}\n}}\n", lines(n));
    assert_eq!(sample("src/a.rs", &long(FUNCTION_LINES_MAX - 2)), Vec::<String>::new());
    assert_eq!(sample("src/a.rs", &long(FUNCTION_LINES_MAX - 1)).len(), 1);
    let declared =
        format!("trait A {{\n    fn f(\n    );\n    fn g() {{}}\n{}    }}\n}}\n", lines(FUNCTION_LINES_MAX));
    assert_eq!(sample("src/a.rs", &declared), Vec::<String>::new());
    assert_eq!(sample("src/a.rs", &"\n".repeat(FILE_LINES_MAX - 1)), Vec::<String>::new());
    assert_eq!(sample("src/a.rs", &"\n".repeat(FILE_LINES_MAX)).len(), 1);
}
