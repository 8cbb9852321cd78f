//! `remuda session`: a sandbox kept across tasks.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt as _;

use broker_schema::{
    FrameKind, PoolId, RunId, SandboxRef, SessionOptions, Step, TaskRequest, Terminal,
};
use futures::StreamExt as _;
use remuda_client::{Client, Session, Until};
use serde::{Deserialize, Serialize};

use crate::connect;
use crate::ending;
use crate::failure::{Failure, exit};
use crate::globals::Globals;
use crate::out;

pub(super) const EXAMPLE: &str = "\
Example:
  session=$(remuda session open --idle 10m --life 4h)
  remuda session exec \"$session\" -- sh -c 'echo 1 > kept'
  remuda session exec \"$session\" -- cat kept
  remuda session renew \"$session\"
  remuda session close \"$session\"";

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Leases a sandbox and prints the session that exec and close take
    Open {
        /// The pool whose sandbox it gets
        #[arg(
            long,
            value_name = "POOL",
            default_value = "default",
            env = "REMUDA_POOL"
        )]
        pool: PoolId,
        /// The run that the results are kept under [default: one of its own]
        #[arg(long, value_name = "RUN")]
        run: Option<RunId>,
        /// The session closes after this long without a task [default: 10m]
        #[arg(long, value_name = "DURATION", value_parser = super::run::parse_timeout)]
        idle: Option<u64>,
        /// The session closes this long after it was opened [default: 4h]
        #[arg(long, value_name = "DURATION", value_parser = super::run::parse_timeout)]
        life: Option<u64>,
    },
    /// Runs a command in the session's sandbox
    Exec {
        /// What open printed
        #[arg(value_parser = parse_session)]
        session: SessionRef,
        /// How long it may take [default: 30s]
        #[arg(long, value_name = "DURATION", value_parser = super::run::parse_timeout)]
        timeout: Option<u64>,
        /// The command and its arguments
        #[arg(last = true, required = true, value_name = "CMD")]
        command: Vec<OsString>,
    },
    /// Keeps the session from idling: its idle time begins anew
    Renew {
        /// What open printed
        #[arg(value_parser = parse_session)]
        session: SessionRef,
    },
    /// Ends the session
    Close {
        /// What open printed
        #[arg(value_parser = parse_session)]
        session: SessionRef,
    },
}

/// A session on the command line: one JSON object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SessionRef {
    pool: PoolId,
    run: RunId,
    #[serde(flatten)]
    sandbox: SandboxRef,
}

fn parse_session(text: &str) -> Result<SessionRef, String> {
    serde_json::from_str(text)
        .map_err(|error| format!("{error}; expected the JSON that `remuda session open` prints"))
}

pub(crate) async fn run(command: Command, globals: &Globals) -> Result<u8, Failure> {
    match command {
        Command::Open {
            pool,
            run,
            idle,
            life,
        } => open(globals, pool, run, (idle, life)).await,
        Command::Exec {
            session,
            timeout,
            command,
        } => exec(globals, session, timeout, &command).await,
        Command::Renew { session } => renew(globals, session).await,
        Command::Close { session } => close(globals, session).await,
    }
}

async fn open(
    globals: &Globals,
    pool: PoolId,
    run: Option<RunId>,
    (idle, life): (Option<u64>, Option<u64>),
) -> Result<u8, Failure> {
    let run = run.map_or_else(connect::fresh_run, Ok)?;
    let client = connect::client(globals, run.clone()).await?;
    let defaults = SessionOptions::default();
    let options = SessionOptions {
        idle_timeout_ms: idle.unwrap_or(defaults.idle_timeout_ms),
        max_life_ms: life.unwrap_or(defaults.max_life_ms),
    };
    let session = client
        .open_session(&pool, options)
        .await
        .map_err(|error| connect::failure(&error))?;
    out::json(&SessionRef {
        pool,
        run,
        sandbox: session.sandbox().clone(),
    })?;
    Ok(0)
}

async fn attach(globals: &Globals, session: SessionRef) -> Result<(Client, Session), Failure> {
    let client = connect::client(globals, session.run).await?;
    let session = client.session(session.pool, session.sandbox);
    Ok((client, session))
}

async fn exec(
    globals: &Globals,
    session: SessionRef,
    timeout: Option<u64>,
    command: &[OsString],
) -> Result<u8, Failure> {
    let (client, session) = attach(globals, session).await?;
    let step = Step::command(command.iter().map(|arg| arg.as_bytes()));
    let request = TaskRequest {
        timeout_ms: timeout,
        ..session.task(vec![step])
    };
    let terminal = session
        .run_task(request)
        .await
        .map_err(|error| connect::failure(&error).exit(exit::NOT_THE_COMMANDS))?;
    print(&client, &terminal).await?;
    for text in [ending::tell_dropped(&terminal), ending::tell(&terminal)]
        .into_iter()
        .flatten()
    {
        out::note(text);
    }
    Ok(ending::status(&terminal, 0))
}

/// All of the output: from the terminal where it has it, else from the frames.
async fn print(client: &Client, terminal: &Terminal) -> Result<(), Failure> {
    if terminal.frames == 0 {
        for step in &terminal.steps {
            out::bytes(step.stdout.head.as_slice())?;
            out::error_bytes(step.stderr.head.as_slice())?;
        }
        return Ok(());
    }
    let mut frames = Box::pin(client.output(&terminal.run, terminal.task, None, Until::CaughtUp));
    let mut next = 0;
    while let Some(item) = frames.next().await {
        let (_, frame) = item.map_err(|error| connect::failure(&error))?;
        if !frame.is_of(terminal) || frame.n != next {
            continue;
        }
        next += 1;
        match frame.kind {
            FrameKind::Stdout => out::bytes(frame.data.as_slice())?,
            FrameKind::Stderr => out::error_bytes(frame.data.as_slice())?,
            _ => {}
        }
    }
    if next != terminal.frames {
        return Err(Failure::new(format!(
            "{next} of {} pieces of output could be read",
            terminal.frames
        )));
    }
    Ok(())
}

async fn renew(globals: &Globals, session: SessionRef) -> Result<u8, Failure> {
    let (_client, session) = attach(globals, session).await?;
    let terminal = session
        .renew()
        .await
        .map_err(|error| connect::failure(&error).exit(exit::NOT_THE_COMMANDS))?;
    if let Some(text) = ending::tell(&terminal) {
        out::note(text);
    }
    Ok(ending::status(&terminal, 0))
}

async fn close(globals: &Globals, session: SessionRef) -> Result<u8, Failure> {
    let (_client, session) = attach(globals, session).await?;
    let terminal = session
        .close()
        .await
        .map_err(|error| connect::failure(&error))?;
    out::note(format_args!("session closed: {}", terminal.outcome));
    Ok(0)
}

#[cfg(test)]
mod tests {
    use broker_schema::{Epoch, SandboxId};

    use super::*;

    #[test]
    fn what_open_prints_is_what_exec_takes() {
        let session = SessionRef {
            pool: "p".parse().unwrap(),
            run: "r".parse().unwrap(),
            sandbox: SandboxRef {
                sandbox: SandboxId::new(),
                worker: "w-1".parse().unwrap(),
                epoch: Epoch::new(3, 4),
            },
        };
        let text = serde_json::to_string(&session).unwrap();
        assert_eq!(parse_session(&text), Ok(session));
        let error = parse_session("{}").unwrap_err();
        assert!(error.contains("session open"), "{error}");
    }
}
