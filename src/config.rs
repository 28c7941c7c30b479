//! The options file: every long option of the command line is a key of it.
//!
//! A file's values become the defaults of the matching options, so that the order flag, environment, file, built-in
//! default and all checks of values are the command line's own. The tables `mcp` and `models` are no options; see `mcp.rs`
//! and `roster.rs`.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::Path;

use anyhow::{Context, Result, bail};
use clap::{Arg, Command};

/// Options that make no sense in a file: the file itself and what ends the program at once.
const NOT_IN_FILES: [&str; 3] = ["config", "help", "version"];

/// Reads `path` and makes its values the defaults of `command` and its subcommands.
///
/// # Errors
/// Names the file and, for a key that no command has, the key.
pub(crate) fn apply(path: &Path, command: Command) -> Result<Command> {
    let text = std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
    let file = path.display().to_string();
    let table: toml::Table =
        text.parse().map_err(|e: toml::de::Error| anyhow::anyhow!("{file}: {}", e.message()))?;
    let known = keys(&command);
    let mut command = command;
    for (key, value) in
        table.iter().filter(|(key, _)| ![crate::mcp::KEY, crate::roster::KEY].contains(&key.as_str()))
    {
        let option = key.replace('_', "-");
        if !known.contains(&option) {
            bail!("{file}: unknown key `{key}` (known: {})", join(&known));
        }
        let values = defaults(value).with_context(|| format!("{file}: key `{key}`"))?;
        command = with_default(command, &option, &values);
    }
    Ok(command)
}

/// Gives the option these defaults wherever a command has it.
fn with_default(mut command: Command, option: &str, values: &[OsString]) -> Command {
    let id = command.get_arguments().find(|a| key(a) == Some(option)).map(|a| a.get_id().clone());
    if let Some(id) = id {
        command = command.mut_arg(id, |arg: Arg| arg.default_values(values.to_vec()));
    }
    let names: Vec<String> = command.get_subcommands().map(|s| s.get_name().to_owned()).collect();
    for name in names {
        command = command.mut_subcommand(name, |sub| with_default(sub, option, values));
    }
    command
}

fn keys(command: &Command) -> BTreeSet<String> {
    let own = command.get_arguments().filter_map(key).filter(|key| !NOT_IN_FILES.contains(key));
    own.map(str::to_owned).chain(command.get_subcommands().flat_map(keys)).collect()
}

/// The name of an option in a file: its long name; MODEL, which has none, is `model`.
fn key(arg: &Arg) -> Option<&str> {
    let is_model = arg.is_positional() && arg.get_id() == "model";
    if is_model { Some("model") } else { arg.get_long() }
}

/// A TOML value as the words of a command line.
fn defaults(value: &toml::Value) -> Result<Vec<OsString>> {
    let word = |v: &toml::Value| match v {
        toml::Value::String(s) => Ok(OsString::from(s)),
        toml::Value::Integer(i) => Ok(i.to_string().into()),
        toml::Value::Float(f) => Ok(f.to_string().into()),
        toml::Value::Boolean(b) => Ok(b.to_string().into()),
        other => bail!("expected a string, a number, true or false, found {}", other.type_str()),
    };
    match value {
        toml::Value::Array(items) => items.iter().map(word).collect(),
        one => Ok(vec![word(one)?]),
    }
}

fn join(keys: &BTreeSet<String>) -> String {
    keys.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use clap::{ArgAction, builder::BoolishValueParser, value_parser};

    use super::*;

    fn command() -> Command {
        let port = Arg::new("port").long("port").default_value("8080").value_parser(value_parser!(u16));
        let open = Arg::new("insecure").long("insecure").action(ArgAction::SetTrue);
        let open = open.value_parser(BoolishValueParser::new());
        let key = Arg::new("api_key").long("api-key").action(ArgAction::Append);
        let serve = Command::new("serve").args([port, open, key]);
        let depth = Arg::new("depth").long("depth").value_delimiter(',').default_value("0");
        let bench = Command::new("bench").subcommand(Command::new("latency").arg(depth));
        Command::new("mainstay").subcommands([serve, bench])
    }

    fn file(name: &str, text: &str) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("mainstay-config-{}-{name}.toml", std::process::id()));
        std::fs::write(&path, text).expect("the temporary directory takes a file");
        path
    }

    #[test]
    fn file_replaces_defaults_and_flags_replace_the_file() {
        let path = file("values", "port = 9\ninsecure = true\napi_key = [\"a\", \"b\"]\n");
        let parse = |words: &[&str]| {
            let command = apply(&path, command()).unwrap();
            let matches = command.try_get_matches_from(words).unwrap();
            let serve = matches.subcommand_matches("serve").unwrap().clone();
            let keys: Vec<String> = serve.get_many("api_key").unwrap().cloned().collect();
            (*serve.get_one::<u16>("port").unwrap(), serve.get_flag("insecure"), keys)
        };
        assert_eq!(parse(&["mainstay", "serve"]), (9, true, vec!["a".into(), "b".into()]));
        let flags = ["mainstay", "serve", "--port", "10", "--api-key", "c"];
        assert_eq!(parse(&flags), (10, true, vec!["c".into()]));
    }

    #[test]
    fn commands_of_commands_are_reached() {
        let command = apply(&file("inner", "depth = [1, 2]\n"), command()).unwrap();
        let matches = command.try_get_matches_from(["mainstay", "bench", "latency"]).unwrap();
        let latency = matches.subcommand_matches("bench").unwrap().subcommand_matches("latency").unwrap();
        let depths: Vec<&String> = latency.get_many("depth").unwrap().collect();
        assert_eq!(depths, ["1", "2"]);
    }

    #[test]
    fn unknown_key_is_named() {
        let path = file("unknown", "prot = 9\n");
        let message = format!("{:#}", apply(&path, command()).unwrap_err());
        assert!(message.contains("`prot`") && message.contains("unknown.toml"), "{message}");
    }

    #[test]
    fn tables_are_refused() {
        let path = file("table", "[port]\nnumber = 9\n");
        let message = format!("{:#}", apply(&path, command()).unwrap_err());
        assert!(message.contains("`port`") && message.contains("table"), "{message}");
    }

    #[test]
    fn values_are_checked_like_flags() {
        let path = file("value", "port = \"many\"\n");
        let result = apply(&path, command()).unwrap().try_get_matches_from(["mainstay", "serve"]);
        assert!(result.unwrap_err().to_string().contains("many"));
    }
}
