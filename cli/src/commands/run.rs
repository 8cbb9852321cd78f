//! `remuda run`: one command in a fresh sandbox.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{IsTerminal as _, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use broker_schema::{Blob, Command, PoolId, RunId, Step, StepKind};

use crate::connect;
use crate::ending;
use crate::failure::{Failure, exit};
use crate::globals::Globals;
use crate::live;
use crate::out;
use crate::task_file::millis;

const EXAMPLES: &str = "\
Examples:
  remuda run -- python3 -c 'print(6 * 7)'
  remuda run --timeout 5m -e SEED=7 -f ./test.py:test.py -- python3 test.py
  echo hello | remuda run -- wc -c";

/// Runs a command in a fresh sandbox, its output and exit status ours.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The pool whose sandbox it gets
    #[arg(
        long,
        value_name = "POOL",
        default_value = "default",
        env = "REMUDA_POOL"
    )]
    pool: PoolId,
    /// The run that the result is kept under [default: one of its own]
    #[arg(long, value_name = "RUN")]
    run: Option<RunId>,
    /// How long it may take [default: 30s]
    #[arg(long, value_name = "DURATION", value_parser = parse_timeout)]
    timeout: Option<u64>,
    /// An environment variable, may be given several times
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = parse_env)]
    env: Vec<(String, String)>,
    /// A file of this machine to write into the sandbox first, may be given several times
    #[arg(short, long, value_name = "LOCAL:PATH", value_parser = parse_file)]
    file: Vec<(PathBuf, String)>,
    /// Where the command starts [default: /workspace]
    #[arg(long, value_name = "FOLDER")]
    work_dir: Option<String>,
    /// Bytes kept of standard output and of standard error each [default: 8 MiB]
    #[arg(long, value_name = "BYTES")]
    output_limit: Option<u64>,
    /// Do not pass standard input on
    #[arg(long)]
    no_stdin: bool,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// Standard input and files travel in the request, which has at most 4 MiB.
const MOST_INPUT_BYTES: u64 = 3 << 20;

pub(super) fn parse_timeout(text: &str) -> Result<u64, String> {
    millis("", text).map_err(|problem| problem.message)
}

fn parse_env(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("expected NAME=VALUE".to_owned()),
    }
}

fn parse_file(text: &str) -> Result<(PathBuf, String), String> {
    match text.split_once(':') {
        Some((local, path)) if !local.is_empty() && !path.is_empty() => {
            Ok((local.into(), path.to_owned()))
        }
        _ => Err("expected LOCAL:PATH".to_owned()),
    }
}

pub(crate) async fn run(args: Args, globals: &Globals) -> Result<u8, Failure> {
    execute(args, globals).await.map_err(|failure| {
        // 1 is what a command may exit with.
        let status = match failure.status() {
            exit::FAILED => exit::NOT_THE_COMMANDS,
            other => other,
        };
        failure.exit(status)
    })
}

async fn execute(args: Args, globals: &Globals) -> Result<u8, Failure> {
    let run = args.run.clone().map_or_else(connect::fresh_run, Ok)?;
    let client = connect::client(globals, run).await?;
    let mut steps = Vec::with_capacity(args.file.len() + 1);
    for (local, path) in &args.file {
        steps.push(Step::write(path.clone(), read_file(local)?));
    }
    let command_step = steps.len();
    steps.push(Step {
        name: String::new(),
        action: StepKind::Command(Command {
            argv: args
                .command
                .iter()
                .map(|arg| arg.as_bytes().into())
                .collect(),
            stdin: stdin(args.no_stdin)?,
            work_dir: args.work_dir,
            output_limit: args.output_limit,
            ..Command::default()
        }),
    });
    let mut request = client.task(&args.pool, steps);
    request.timeout_ms = args.timeout;
    request.env = environment(args.env);
    let terminal = live::follow(&client, request, true).await?;
    for text in [ending::tell_dropped(&terminal), ending::tell(&terminal)]
        .into_iter()
        .flatten()
    {
        out::note(text);
    }
    Ok(ending::status(&terminal, command_step))
}

fn environment(pairs: Vec<(String, String)>) -> BTreeMap<String, Blob> {
    pairs
        .into_iter()
        .map(|(name, value)| (name, Blob(value.into_bytes())))
        .collect()
}

fn stdin(not: bool) -> Result<Blob, Failure> {
    let stdin = std::io::stdin();
    if not || stdin.is_terminal() {
        return Ok(Blob::default());
    }
    read_bounded("standard input", stdin)
}

fn read_file(path: &Path) -> Result<Blob, Failure> {
    let name = path.display().to_string();
    let file = std::fs::File::open(path)
        .map_err(|error| Failure::because(format_args!("{name} cannot be read"), &error))?;
    read_bounded(&name, file)
}

fn read_bounded(name: &str, source: impl std::io::Read) -> Result<Blob, Failure> {
    let mut bytes = Vec::new();
    source
        .take(MOST_INPUT_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Failure::because(format_args!("{name} cannot be read"), &error))?;
    if bytes.len() as u64 > MOST_INPUT_BYTES {
        return Err(Failure::new(format!(
            "{name} has more than {MOST_INPUT_BYTES} bytes, which is what a request can carry"
        ))
        .code(broker_schema::ErrorCode::RequestTooLarge)
        .mend("let the command fetch it, or put it into the pool's image"));
    }
    Ok(Blob(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs() {
        assert_eq!(parse_env("A=b=c"), Ok(("A".into(), "b=c".into())));
        assert_eq!(parse_env("A="), Ok(("A".into(), String::new())));
        assert!(parse_env("A").is_err());
        assert!(parse_env("=b").is_err());
        assert_eq!(parse_file("a/b:c:d"), Ok(("a/b".into(), "c:d".into())));
        assert!(parse_file("a").is_err());
        assert!(parse_file("a:").is_err());
    }

    #[test]
    fn timeouts() {
        assert_eq!(parse_timeout("30s"), Ok(30_000));
        assert_eq!(
            parse_timeout("0s"),
            Err("is zero, leave it out for the default".into())
        );
    }

    #[test]
    fn too_much_input_is_refused_by_name() {
        let most = MOST_INPUT_BYTES as usize;
        assert_eq!(read_bounded("x", &vec![1; most][..]).unwrap().len(), most);
        let error = read_bounded("x", &vec![1; most + 1][..]).unwrap_err();
        assert!(
            error.to_string().starts_with("error: x has more than"),
            "{error}"
        );
    }
}
