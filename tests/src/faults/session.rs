//! Drives one session: opens it, runs its steps in order, closes it.

use std::time::Duration;

use broker_schema::{Outcome, SessionOptions, Step, TaskRequest};
use remuda_client::{ClientError, Session};

use super::load::{Line, PAUSE, Submitter, passes};
use super::plan::{Expected, PlannedSession};

/// How often a session that could not be opened is tried to be opened.
const OPENINGS: usize = 3;

pub(super) async fn drive(submitter: Submitter, number: usize, planned: PlannedSession) {
    tokio::time::sleep_until(submitter.began + planned.at).await;
    for _ in 0..OPENINGS {
        if let Some(session) = open(&submitter, number).await {
            steps(&submitter, number, &session, &planned.pauses).await;
            return;
        }
    }
}

async fn open(submitter: &Submitter, number: usize) -> Option<Session> {
    let request = TaskRequest {
        keep_alive: Some(SessionOptions::default()),
        ..submitter.client.task(&submitter.pool, Vec::new())
    };
    let line = line(submitter, number, &request, "opening", Vec::new());
    submitter
        .notebook
        .update(line, |seen| seen.expected.code = None);
    loop {
        let opened = submitter.client.submit(request.clone()).await;
        let mut submitted = match opened {
            Ok(submitted) => submitted,
            Err(error) if passes(&error) => {
                tokio::time::sleep(PAUSE).await;
                continue;
            }
            Err(error) => {
                submitter.notebook.failed(line, &error);
                return None;
            }
        };
        submitter.notebook.accepted(line);
        let terminal = loop {
            match submitted.terminal().await {
                Ok(terminal) => break terminal,
                Err(error) if passes(&error) => tokio::time::sleep(PAUSE).await,
                Err(error) => {
                    submitter.notebook.failed(line, &error);
                    return None;
                }
            }
        };
        let sandbox = terminal.sandbox.clone().filter(|_| terminal.kept);
        submitter.notebook.ended(line, terminal);
        return sandbox.map(|sandbox| submitter.client.session(submitter.pool.clone(), sandbox));
    }
}

/// Every step adds a line to a file and prints all of it: a step that ran
/// twice, or not at all, shows in every later one.
async fn steps(submitter: &Submitter, number: usize, session: &Session, pauses: &[Duration]) {
    let mut log = Vec::new();
    for (step, pause) in pauses.iter().enumerate() {
        tokio::time::sleep(*pause).await;
        let script = format!("echo {step} >> log; cat log");
        let request = session.task(vec![Step::command(["sh", "-c", &script])]);
        log.extend_from_slice(format!("{step}\n").as_bytes());
        if !run(
            submitter,
            number,
            session,
            request,
            &format!("step {step}"),
            log.clone(),
        )
        .await
        {
            return;
        }
    }
    let request = TaskRequest {
        close_session: true,
        ..session.task(Vec::new())
    };
    run(submitter, number, session, request, "closing", Vec::new()).await;
}

/// One task of a session; whether the session goes on.
async fn run(
    submitter: &Submitter,
    number: usize,
    session: &Session,
    request: TaskRequest,
    what: &str,
    stdout: Vec<u8>,
) -> bool {
    let line = line(submitter, number, &request, what, stdout);
    // The library publishes and waits at once: what was published counts as
    // accepted unless it says otherwise.
    submitter.notebook.accepted(line);
    loop {
        match session.run_task(request.clone()).await {
            Ok(terminal) => {
                let goes_on = terminal.outcome == Outcome::Succeeded;
                submitter.notebook.ended(line, terminal);
                return goes_on;
            }
            Err(ClientError::Submit { .. }) => {
                let since = submitter.notebook.take_back(line);
                tokio::time::sleep(PAUSE).await;
                submitter
                    .notebook
                    .update(line, |seen| seen.accepted = since);
            }
            Err(error) if passes(&error) => tokio::time::sleep(PAUSE).await,
            Err(error) => {
                submitter.notebook.failed(line, &error);
                return false;
            }
        }
    }
}

fn line(
    submitter: &Submitter,
    number: usize,
    request: &TaskRequest,
    what: &str,
    stdout: Vec<u8>,
) -> Line {
    let expected = Expected {
        outcome: Outcome::Succeeded,
        code: (!stdout.is_empty()).then_some(0),
        stdout,
    };
    let what = format!("session {number}, {what}");
    let line = submitter.notebook.open(request.id, what, expected, 0);
    submitter
        .notebook
        .update(line, |seen| seen.session = Some(number));
    line
}
