//! The models that a server is to have: MODEL arguments, and tables `[[models]]` of the options file.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use clap::parser::ValueSource;
use clap::{Args, Command, FromArgMatches, ValueEnum};
use mainstay_server::{FormatChoice, ListedAdapter, ReasoningFormat, ToolFormat};
use toml::{Table, Value};

use crate::exit::{self, Usage};
use crate::options::{EngineArgs, HubArgs};
use crate::source::Source;

/// The tables of the options file that are no option.
pub(crate) const KEY: &str = "models";

/// Keys of a table beside the options of an engine.
const OWN_KEYS: [&str; 5] = ["name", "model", "load", "pinned", "lora"];

/// When a model is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Load {
    /// Before the server is ready.
    Start,
    /// When it is asked for.
    Demand,
}

/// How a model is run, and how its answers are read.
#[derive(Args, Clone, Debug)]
pub(crate) struct HowArgs {
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    /// How the model writes calls of functions (hermes, llama3-json, mistral, harmony, gemma, json), or none to give
    /// them out as text; found from its template without it.
    #[arg(long, env = "MAINSTAY_TOOL_PARSER", value_name = "FORMAT", help_heading = "Server")]
    tool_parser: Option<ToolFormat>,
    /// How the model writes what it thinks (think, mistral, harmony), or none to leave it in the text; found from its
    /// template without it.
    #[arg(long, env = "MAINSTAY_REASONING_PARSER", value_name = "FORMAT", help_heading = "Server")]
    reasoning_parser: Option<ReasoningFormat>,
}

impl HowArgs {
    pub(crate) fn format(&self) -> FormatChoice {
        FormatChoice { reasoning: self.reasoning_parser, tools: self.tool_parser }
    }
}

/// One model of the list.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) name: String,
    pub(crate) source: Source,
    pub(crate) how: HowArgs,
    pub(crate) load: Load,
    /// Once loaded, it stays.
    pub(crate) is_pinned: bool,
    pub(crate) adapters: Vec<ListedAdapter>,
}

/// Which models a server is to have.
#[derive(Args, Clone, Debug)]
pub(crate) struct RosterArgs {
    /// Models to serve, as MODEL or NAME=MODEL: a directory in Hugging Face layout, a .gguf file, or a hub id
    /// org/name[:FILE.gguf][@revision].
    /// The small built-in model without any. Tables [[models]] of the options file say more.
    #[arg(id = "model", env = "MAINSTAY_MODEL", value_name = "MODEL")]
    models: Vec<String>,
    /// When models are loaded.
    #[arg(long, env = "MAINSTAY_LOAD", value_enum, default_value = "start", help_heading = "Server")]
    load: Load,
    /// Name of the model in the API, where there is one.
    #[arg(long, env = "MAINSTAY_SERVED_MODEL_NAME", value_name = "NAME", help_heading = "Server")]
    served_model_name: Option<String>,
    /// LoRA adapters of the first model, as PEFT writes them; each is served as a model of its name. May be repeated or
    /// separated by commas. Tables [[models]] name those of others by the key lora.
    #[arg(
        long,
        env = "MAINSTAY_LORA_MODULES",
        value_name = "NAME=DIR",
        value_delimiter = ',',
        help_heading = "Server"
    )]
    lora_modules: Vec<String>,
    /// A directory below which the operator's requests may load adapters while the server runs.
    #[arg(
        long,
        env = "MAINSTAY_LORA_DIR",
        value_name = "DIR",
        value_delimiter = ',',
        help_heading = "Server"
    )]
    pub(crate) lora_dir: Vec<PathBuf>,
    #[command(flatten)]
    hub: HubArgs,
    #[command(flatten)]
    pub(crate) how: HowArgs,
}

impl RosterArgs {
    /// The list: what stands on the command line, then what stands in the file.
    ///
    /// # Errors
    /// [`Usage`], naming the argument or the key.
    pub(crate) fn models(&self, file: Option<&Path>) -> Result<Vec<Wanted>> {
        let mut all = self.models.iter().map(|word| self.named(word)).collect::<Result<Vec<_>>>()?;
        if let Some(path) = file {
            let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
            let table: Table = text.parse().with_context(|| path.display().to_string())?;
            let found = self.of_file(&table).map_err(|e| Usage(format!("{}: {e:#}", path.display())))?;
            all.extend(found);
        }
        if all.is_empty() {
            all.push(self.wanted(None, Source::Embedded)?);
        }
        if let Some(name) = &self.served_model_name {
            match all.as_mut_slice() {
                [only] => only.name.clone_from(name),
                more => {
                    let what = "--served-model-name: expected one model, found";
                    return Err(Usage(format!("{what} {} (give NAME=MODEL)", more.len())).into());
                }
            }
        }
        for word in &self.lora_modules {
            let wrong = || Usage(format!("--lora-modules: expected NAME=DIR, found `{word}`"));
            let (name, path) = word.split_once('=').filter(|(name, _)| !name.is_empty()).ok_or_else(wrong)?;
            all[0].adapters.push(ListedAdapter { id: name.to_owned(), path: path.into() });
        }
        for model in &mut all {
            model.how.engine.takes_adapters = !model.adapters.is_empty() || !self.lora_dir.is_empty();
        }
        let adapters =
            |model: &'_ Wanted| model.adapters.iter().map(|own| own.id.clone()).collect::<Vec<_>>();
        let names: Vec<String> =
            all.iter().flat_map(|model| std::iter::once(model.name.clone()).chain(adapters(model))).collect();
        if let Some(twice) =
            names.iter().enumerate().find_map(|(at, name)| names[..at].contains(name).then_some(name))
        {
            return Err(Usage(format!("two models have the name `{twice}` (give NAME=MODEL)")).into());
        }
        Ok(all)
    }

    fn wanted(&self, name: Option<&str>, source: Source) -> Result<Wanted> {
        let name = name.map_or_else(|| source.name(), str::to_owned);
        let source = source.told(&self.hub)?;
        Ok(Wanted {
            name,
            source,
            how: self.how.clone(),
            load: self.load,
            is_pinned: false,
            adapters: Vec::new(),
        })
    }

    /// `NAME=MODEL` or `MODEL`. A path with `=` in it that exists is one.
    fn named(&self, word: &str) -> Result<Wanted> {
        match word.split_once('=').filter(|(name, _)| !name.is_empty() && !Path::new(word).exists()) {
            Some((name, model)) => self.wanted(Some(name), Source::parse(Some(model))?),
            None => self.wanted(None, Source::parse(Some(word))?),
        }
    }

    fn of_file(&self, file: &Table) -> Result<Vec<Wanted>> {
        let Some(models) = file.get(KEY) else { return Ok(Vec::new()) };
        let expected = || anyhow!("key `{KEY}`: expected tables [[{KEY}]], found {}", models.type_str());
        let models = models.as_array().ok_or_else(expected)?;
        let read = |(at, model): (usize, &Value)| {
            let table = model.as_table().ok_or_else(expected)?;
            self.of_table(table).with_context(|| format!("[[{KEY}]] {}", at + 1))
        };
        models.iter().enumerate().map(read).collect()
    }

    /// What the table does not say is as the command line says it for all models.
    fn of_table(&self, table: &Table) -> Result<Wanted> {
        let text = |key: &str| match table.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.as_str())),
            Some(other) => bail!("`{key}`: expected a string, found {}", other.type_str()),
        };
        let source = Source::parse(text("model")?)?;
        let mut wanted = self.wanted(text("name")?, source)?;
        if let Some(load) = text("load")? {
            let wrong = |_| anyhow!("`load`: expected start or demand, found `{load}`");
            wanted.load = Load::from_str(load, false).map_err(wrong)?;
        }
        if let Some(pinned) = table.get("pinned") {
            let wrong = || anyhow!("`pinned`: expected true or false, found {pinned}");
            wanted.is_pinned = pinned.as_bool().ok_or_else(wrong)?;
        }
        let lora = match table.get("lora") {
            None => &Table::new(),
            Some(Value::Table(lora)) => lora,
            Some(other) => {
                bail!("`lora`: expected a table of names and directories, found {}", other.type_str())
            }
        };
        for (name, path) in lora {
            let path = path
                .as_str()
                .with_context(|| format!("`lora.{name}`: expected a directory, found {path}"))?;
            wanted.adapters.push(ListedAdapter { id: name.clone(), path: path.into() });
        }
        let options = table.iter().filter(|(key, _)| !OWN_KEYS.contains(&key.as_str()));
        let words = options.map(|(key, value)| {
            let value = match value {
                Value::String(text) => text.clone(),
                Value::Integer(_) | Value::Float(_) | Value::Boolean(_) => value.to_string(),
                other => {
                    bail!("`{key}`: expected a string, a number, true or false, found {}", other.type_str())
                }
            };
            Ok(format!("--{}={value}", key.replace('_', "-")))
        });
        change(&mut wanted.how, words.collect::<Result<Vec<_>>>()?)?;
        Ok(wanted)
    }
}

/// Sets the options that stand among the words, and no other.
fn change(how: &mut HowArgs, words: Vec<String>) -> Result<()> {
    let command =
        HowArgs::augment_args_for_update(Command::new(KEY).no_binary_name(true).disable_help_flag(true));
    let parsed = command.try_get_matches_from(words);
    let mut matches = parsed.map_err(|e| anyhow!("{}", exit::one_line(&e.to_string())))?;
    let ids: Vec<String> = matches.ids().map(|id| id.as_str().to_owned()).collect();
    for id in
        ids.iter().filter(|id| matches.value_source(id) != Some(ValueSource::CommandLine)).collect::<Vec<_>>()
    {
        matches.try_clear_id(id)?;
    }
    how.update_from_arg_matches(&matches)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::options::KvType;

    #[derive(Parser)]
    struct Words {
        #[command(flatten)]
        roster: RosterArgs,
    }

    fn models(words: &[&str], file: &str) -> Result<Vec<Wanted>, String> {
        let words =
            Words::try_parse_from(std::iter::once(&"test").chain(words)).map_err(|e| e.to_string())?;
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let at = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("mainstay-roster-{}-{at}.toml", std::process::id()));
        std::fs::write(&path, file).unwrap();
        let found = words.roster.models(Some(&path)).map_err(|e| format!("{e:#}"));
        std::fs::remove_file(&path).unwrap();
        found
    }

    fn names(found: &[Wanted]) -> Vec<&str> {
        found.iter().map(|model| model.name.as_str()).collect()
    }

    #[test]
    fn words_and_tables_make_the_list() {
        assert_eq!(names(&models(&[], "").unwrap()), ["mainstay-default"]);
        let found =
            models(&["org/a", "b=org/c@v1"], "[[models]]\nname = \"d\"\nmodel = \"org/d\"\n").unwrap();
        assert_eq!(names(&found), ["org/a", "b", "d"]);
        assert!(matches!(&found[1].source, Source::Hub(hub, _) if hub.revision == "v1"));
        let named = models(&["org/a", "--served-model-name", "x"], "").unwrap();
        assert_eq!(names(&named), ["x"]);
    }

    #[test]
    fn a_table_changes_what_it_says_and_nothing_else() {
        let words = ["--kv-type", "bf16", "--context", "64", "--verify-weights", "--load", "demand"];
        let file = "[[models]]\nname = \"a\"\nkv-type = \"f32\"\nkv_memory = \"1M\"\npinned = true\n\
                    [[models]]\nname = \"b\"\nload = \"start\"\n";
        let found = models(&words, file).unwrap();
        let (a, b) = (&found[0], &found[1]);
        assert_eq!((a.how.engine.kv_type, a.how.engine.kv_memory), (KvType::F32, Some(1 << 20)));
        assert_eq!((a.how.engine.context, a.how.engine.verify_weights), (Some(64), true));
        assert_eq!((a.load, a.is_pinned), (Load::Demand, true));
        assert_eq!((b.how.engine.kv_type, b.load, b.is_pinned), (KvType::Bf16, Load::Start, false));
    }

    #[test]
    fn adapters_are_named_like_models() {
        let file = "[[models]]\nname = \"b\"\nlora = { y = \"dir/y\" }\n";
        let found = models(&["org/a", "--lora-modules", "x=dir/x"], file).unwrap();
        let adapters = |model: &Wanted| {
            let shown = model.adapters.iter().map(|own| format!("{} {}", own.id, own.path.display()));
            (shown.collect::<Vec<_>>(), model.how.engine.takes_adapters)
        };
        assert_eq!(adapters(&found[0]), (vec!["x dir/x".to_owned()], true));
        assert_eq!(adapters(&found[1]), (vec!["y dir/y".to_owned()], true));
        assert!(!models(&["org/a"], "").unwrap()[0].how.engine.takes_adapters);
        assert!(models(&["org/a", "--lora-dir", "d"], "").unwrap()[0].how.engine.takes_adapters);
        assert!(models(&["org/a", "--lora-modules", "org/a=dir"], "").unwrap_err().contains("`org/a`"));
        assert!(models(&["org/a", "--lora-modules", "dir"], "").unwrap_err().contains("NAME=DIR"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let refused = |words: &[&str], file: &str| models(words, file).unwrap_err();
        assert!(refused(&["org/a", "org/a"], "").contains("`org/a`"));
        assert!(refused(&["org/a", "org/b", "--served-model-name", "x"], "").contains("found 2"));
        for (file, part) in [
            ("models = 3", "[[models]]"),
            ("[[models]]\nload = \"later\"", "`later`"),
            ("[[models]]\npinned = 1", "`pinned`"),
            ("[[models]]\nkv-tpye = \"f32\"", "--kv-tpye"),
            ("[[models]]\ncontext = \"x\"", "--context"),
            ("[[models]]\nmodel = \"/no/such/dir\"", "no such directory or file"),
        ] {
            let told = refused(&[], file);
            assert!(told.contains(part) && told.contains(".toml"), "{file}: {told}");
        }
    }
}
