//! `mainstay chat`: a conversation in the terminal, or line by line from a pipe.

use std::io::{IsTerminal, Write, stdin, stdout};
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use rustyline::error::ReadlineError;
use serde_json::{Map, Value, json};
use tokio::runtime::Runtime;

use crate::client::{Client, RemoteArgs, Route, SamplingArgs};
use crate::local::Connection;
use crate::options::ModelArgs;
use crate::sessions::{self, Resumed};
use crate::store::DirArgs;
use crate::{data_dir, exit};

const HELP: &str = "\
/reset  forget the conversation; with --session, begin a new session and leave the old one as it is
/help   show this
/quit   leave (as does Ctrl-D)
Ctrl-C stops an answer.";
const HISTORY_FILE: &str = "chat-history";
const HISTORY_LINES_MAX: usize = 1000;

/// Options of `mainstay chat`.
#[derive(Args, Clone, Debug)]
pub(crate) struct ChatArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// What stands before the conversation.
    #[arg(long, env = "MAINSTAY_SYSTEM", value_name = "TEXT")]
    system: Option<String>,
    /// Go on with the session of this name or id, or begin one of this name: it outlives the chat.
    #[arg(long, env = "MAINSTAY_SESSION", value_name = "NAME")]
    session: Option<String>,
    #[command(flatten)]
    dir: DirArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    remote: RemoteArgs,
}

/// What a line of input asks for.
#[derive(Debug, PartialEq, Eq)]
enum Input<'a> {
    Nothing,
    Reset,
    Help,
    Quit,
    Unknown(&'a str),
    Say(&'a str),
}

impl<'a> Input<'a> {
    fn parse(line: &'a str) -> Self {
        match line.trim() {
            "" => Input::Nothing,
            "/reset" => Input::Reset,
            "/help" | "/?" => Input::Help,
            "/quit" | "/exit" => Input::Quit,
            command if command.starts_with('/') => Input::Unknown(command),
            text => Input::Say(text),
        }
    }
}

/// The messages so far, as they are sent.
struct Conversation {
    system: Option<String>,
    messages: Vec<Value>,
}

impl Conversation {
    fn new(system: Option<String>) -> Self {
        let mut conversation = Self { system, messages: Vec::new() };
        conversation.reset();
        conversation
    }

    fn reset(&mut self) {
        self.messages.clear();
        self.messages.extend(self.system.iter().map(|text| json!({"role": "system", "content": text})));
    }

    fn push(&mut self, role: &str, text: &str) {
        self.messages.push(json!({"role": role, "content": text}));
    }
}

/// Talks until the input ends.
pub(crate) fn run(args: ChatArgs) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let is_kept_here = args.session.is_some() && args.remote.url.is_none();
    let store = is_kept_here.then(|| sessions::open_store(&args.dir)).transpose()?;
    let mut connection = runtime.block_on(Connection::open(&args.remote, &args.model, store))?;
    let session = args.session.as_deref().map(|name| runtime.block_on(enter(&connection.client, name)));
    let session = session.transpose()?;
    if let (Some(session), None) = (&session, &args.model.model) {
        connection.client.set_model(&session.model);
    }
    let chat = Chat {
        client: &connection.client,
        runtime: &runtime,
        sampling: args.sampling,
        conversation: Conversation::new(args.system),
        session,
    };
    let result = if stdin().is_terminal() {
        let device = connection.device.as_deref().map(|d| format!(" ({d})")).unwrap_or_default();
        eprintln!("{}{device}; /help for help", connection.client.model());
        chat.talk_in_terminal(args.dir.data_dir)
    } else {
        chat.answer_pipe()
    };
    let closed = runtime.block_on(connection.close());
    runtime.shutdown_background();
    result.and(closed)
}

/// The session of this name, and how far it is.
async fn enter(client: &Client, name: &str) -> Result<Resumed> {
    match sessions::resume(&client.api, name).await? {
        Some(session) => {
            let turns = if session.turns == 1 { "turn" } else { "turns" };
            eprintln!("session {name} ({}): {} {turns} resumed", session.id, session.turns);
            Ok(session)
        }
        None if name.starts_with("sess_") => {
            Err(exit::Usage(format!("--session {name}: there is no such session")).into())
        }
        None => {
            let session = sessions::begin(&client.api, Some(name), client.model()).await?;
            eprintln!("session {name} ({}): begun", session.id);
            Ok(session)
        }
    }
}

struct Chat<'a> {
    client: &'a Client,
    runtime: &'a Runtime,
    sampling: SamplingArgs,
    conversation: Conversation,
    /// What remembers the conversation, if the server does: only what is new is sent then.
    session: Option<Resumed>,
}

/// Whether more input is wanted.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    Line,
    Leave,
}

impl Chat<'_> {
    fn talk_in_terminal(mut self, data_dir: Option<PathBuf>) -> Result<()> {
        let config = rustyline::Config::builder().max_history_size(HISTORY_LINES_MAX)?.build();
        let mut editor = rustyline::DefaultEditor::with_config(config)?;
        let history = data_dir::resolve(data_dir.as_deref()).filter(|dir| match data_dir::prepare(dir) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!("{error:#}; the input history is not kept");
                false
            }
        });
        let history = history.map(|dir| dir.join(HISTORY_FILE));
        if let Some(file) = history.as_ref().filter(|f| f.exists()) {
            editor.load_history(file)?;
        }
        loop {
            match editor.readline("> ") {
                Ok(line) => {
                    editor.add_history_entry(line.as_str())?;
                    match self.take(&line) {
                        Ok(Next::Line) => {}
                        Ok(Next::Leave) => break,
                        Err(error) => eprintln!("{error:#}"),
                    }
                }
                Err(ReadlineError::Interrupted) => eprintln!("(Ctrl-D leaves)"),
                Err(ReadlineError::Eof) => break,
                Err(error) => return Err(error.into()),
            }
        }
        if let Some(file) = &history {
            editor.save_history(file)?;
        }
        Ok(())
    }

    fn answer_pipe(mut self) -> Result<()> {
        for line in stdin().lines() {
            if self.take(&line?)? == Next::Leave {
                break;
            }
        }
        Ok(())
    }

    fn take(&mut self, line: &str) -> Result<Next> {
        match Input::parse(line) {
            Input::Nothing => {}
            Input::Reset => self.reset()?,
            Input::Help => eprintln!("{HELP}"),
            Input::Quit => return Ok(Next::Leave),
            Input::Unknown(command) => eprintln!("{command}: no such command; /help lists them"),
            Input::Say(text) => self.say(text)?,
        }
        Ok(Next::Line)
    }

    fn reset(&mut self) -> Result<()> {
        self.conversation.reset();
        if let Some(old) = &self.session {
            let new = self.runtime.block_on(sessions::begin(&self.client.api, None, self.client.model()))?;
            eprintln!("a new session, {}; {} stays as it is", new.id, old.id);
            self.session = Some(new);
        }
        Ok(())
    }

    /// What a turn sends: everything so far, or to a session what it does not have yet.
    fn body(&self) -> Map<String, Value> {
        let mut body = self.sampling.fields();
        let mut messages = self.conversation.messages.as_slice();
        if let Some(session) = &self.session {
            let known = if session.turns == 0 { 0 } else { messages.len().saturating_sub(1) };
            messages = &messages[known..];
            body.insert("session_id".into(), json!(session.id));
            body.insert("session_mode".into(), json!("append"));
        }
        body.insert("messages".into(), json!(messages));
        body
    }

    /// Sends one turn. What came of a stopped answer stays in the conversation; a turn that failed is forgotten.
    fn say(&mut self, text: &str) -> Result<()> {
        self.conversation.push("user", text);
        let body = self.body();
        let mut answer = String::new();
        let mut out = stdout();
        let shown = self.client.stream(Route::Chat, body, |piece| {
            answer.push_str(piece);
            out.write_all(piece.as_bytes())?;
            Ok(out.flush()?)
        });
        let ended = self.runtime.block_on(async {
            tokio::select! {
                ended = shown => ended,
                () = stopped() => Ok(()),
            }
        });
        if answer.is_empty() && ended.is_err() {
            self.conversation.messages.pop();
            return ended;
        }
        println!();
        self.conversation.push("assistant", &answer);
        if let Some(session) = &mut self.session {
            session.turns += 1;
        }
        ended
    }
}

/// Ctrl-C in a terminal; with a pipe it ends the program as usual.
async fn stopped() {
    if !stdin().is_terminal() || tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_told_from_talk() {
        assert_eq!(Input::parse("  \n"), Input::Nothing);
        assert_eq!(Input::parse(" /reset "), Input::Reset);
        assert_eq!(Input::parse("/quit"), Input::Quit);
        assert_eq!(Input::parse("/help"), Input::Help);
        assert_eq!(Input::parse("/restet"), Input::Unknown("/restet"));
        assert_eq!(Input::parse("hello /reset"), Input::Say("hello /reset"));
    }

    #[test]
    fn reset_keeps_the_system_message() {
        let mut conversation = Conversation::new(Some("Be brief.".into()));
        conversation.push("user", "hi");
        conversation.reset();
        assert_eq!(conversation.messages, [json!({"role": "system", "content": "Be brief."})]);
    }
}
