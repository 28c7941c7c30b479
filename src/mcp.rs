//! MCP servers that responses may reach: `--mcp-server NAME=URL`, and tables `[mcp.servers.NAME]` of the options file.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use mainstay_server::McpServer;
use toml::{Table, Value};

use crate::exit::Usage;

/// The table of the options file that is no option.
pub(crate) const KEY: &str = "mcp";

const KEYS: &str = "url, headers, authorization, authorization_env, timeout_s, allowed_tools, require_approval, \
                    allow_private";

/// The operator's list. A server of the command line takes the place of one of the same name in the file.
///
/// # Errors
/// What is wrong, naming the option or the key.
pub(crate) fn servers(file: Option<&Path>, words: &[String]) -> Result<Vec<McpServer>> {
    let named = words.iter().filter(|word| !word.is_empty()).map(|word| {
        let wrong = || anyhow!(Usage(format!("--mcp-server: expected NAME=URL, found `{word}`")));
        let (name, url) = word.split_once('=').ok_or_else(wrong)?;
        let server = McpServer::new(name, url).map_err(|e| Usage(format!("--mcp-server {name}: {e}")))?;
        Ok((name.to_owned(), server))
    });
    let mut servers = named.collect::<Result<Vec<_>>>()?;
    if let Some(path) = file {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let table: Table = text.parse().with_context(|| path.display().to_string())?;
        let found = of_file(&table).map_err(|e| Usage(format!("{}: {e:#}", path.display())))?;
        let is_new = |name: &String| !servers.iter().any(|(own, _)| own == name);
        let found: Vec<_> = found.into_iter().filter(|(name, _)| is_new(name)).collect();
        servers.extend(found);
    }
    Ok(servers.into_iter().map(|(_, server)| server).collect())
}

fn of_file(file: &Table) -> Result<Vec<(String, McpServer)>> {
    let Some(mcp) = file.get(KEY) else { return Ok(Vec::new()) };
    let mcp = table(mcp, KEY)?;
    if let Some(other) = mcp.keys().find(|key| *key != "servers") {
        bail!("unknown key `mcp.{other}` (known: servers)");
    }
    let Some(servers) = mcp.get("servers") else { return Ok(Vec::new()) };
    let read = |(name, entry): (&String, &Value)| {
        let path = format!("mcp.servers.{name}");
        let server = server(name, table(entry, &path)?).with_context(|| format!("key `{path}`"))?;
        Ok((name.clone(), server))
    };
    table(servers, "mcp.servers")?.iter().map(read).collect()
}

fn server(name: &str, entry: &Table) -> Result<McpServer> {
    let url = entry.get("url").and_then(Value::as_str).context("`url` is missing")?;
    let mut server = McpServer::new(name, url)?;
    for (key, value) in entry {
        server = match key.as_str() {
            "url" => server,
            "headers" => {
                let headers = table(value, "headers")?;
                let set = |server: McpServer, (name, value): (&String, &Value)| {
                    Ok::<_, anyhow::Error>(server.header(name, text(value, name)?)?)
                };
                headers.iter().try_fold(server, set)?
            }
            "authorization" => server.authorization(Some(text(value, key)?.to_owned())),
            "authorization_env" => {
                let variable = text(value, key)?;
                let token = std::env::var(variable).with_context(|| format!("the variable {variable}"))?;
                server.authorization(Some(token))
            }
            "timeout_s" => {
                let seconds = value.as_float().or_else(|| value.as_integer().map(|whole| whole as f64));
                let timeout = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
                let timeout = timeout.filter(|timeout| !timeout.is_zero());
                server.timeout(timeout.with_context(|| wrong(key, "seconds above 0", value))?)
            }
            "allowed_tools" => {
                let names = value.as_array().with_context(|| wrong(key, "an array of names", value))?;
                let names: Result<Vec<_>> =
                    names.iter().map(|name| text(name, key).map(str::to_owned)).collect();
                server.allowed_tools(Some(names?))
            }
            "require_approval" => match value.as_str() {
                Some("always") => server.needs_approval(true),
                Some("never") => server.needs_approval(false),
                _ => bail!(wrong(key, "always or never", value)),
            },
            "allow_private" => {
                server.allows_private(value.as_bool().with_context(|| wrong(key, "true or false", value))?)
            }
            other => bail!("unknown key `{other}` (known: {KEYS})"),
        };
    }
    Ok(server)
}

fn wrong(key: &str, expected: &str, value: &Value) -> String {
    format!("`{key}`: expected {expected}, found {value}")
}

/// The value itself is not repeated: it may be a secret.
fn text<'a>(value: &'a Value, key: &str) -> Result<&'a str> {
    value.as_str().with_context(|| format!("`{key}`: expected a string, found {}", value.type_str()))
}

fn table<'a>(value: &'a Value, key: &str) -> Result<&'a Table> {
    value.as_table().with_context(|| format!("`{key}`: expected a table, found {}", value.type_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Result<Vec<String>> {
        Ok(of_file(&text.parse().unwrap())?.into_iter().map(|(name, _)| name).collect())
    }

    #[test]
    fn tables_are_servers() {
        let all = "[mcp.servers.docs]\nurl = \"https://a.example/mcp\"\ntimeout_s = 5\nallowed_tools = [\"a\"]\n\
                   require_approval = \"never\"\nallow_private = true\nauthorization = \"t\"\n\
                   headers = { x-team = \"a\" }\n[mcp.servers.other]\nurl = \"http://b.example\"\n";
        assert_eq!(names(all).unwrap(), ["docs", "other"]);
        assert!(names("port = 9").unwrap().is_empty());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, expected) in [
            ("mcp = 3", "`mcp`"),
            ("[mcp]\nserver = 3", "mcp.server"),
            ("[mcp.servers.a]\ntimeout_s = 3", "`url`"),
            ("[mcp.servers.a]\nurl = \"nowhere\"", "nowhere"),
            ("[mcp.servers.a]\nurl = \"http://a\"\ntimeout = 3", "`timeout`"),
            ("[mcp.servers.a]\nurl = \"http://a\"\ntimeout_s = 0", "`timeout_s`"),
            ("[mcp.servers.a]\nurl = \"http://a\"\nrequire_approval = true", "`require_approval`"),
            ("[mcp.servers.a]\nurl = \"http://a\"\nheaders = { host = \"b\" }", "host"),
            (
                "[mcp.servers.a]\nurl = \"http://a\"\nauthorization_env = \"MAINSTAY_TEST_UNSET\"",
                "MAINSTAY_TEST_UNSET",
            ),
        ] {
            let message = format!("{:#}", names(text).unwrap_err());
            assert!(message.contains(expected), "{text}: {message}");
        }
    }

    #[test]
    fn words_are_servers() {
        let words =
            |words: &[&str]| servers(None, &words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>());
        assert_eq!(words(&["docs=https://a.example/mcp?x=y", ""]).unwrap().len(), 1);
        for wrong in ["docs", "docs=nowhere", "=http://a"] {
            assert!(words(&[wrong]).unwrap_err().is::<Usage>(), "{wrong}");
        }
    }
}
