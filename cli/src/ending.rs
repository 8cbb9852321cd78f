//! What a terminal means for the exit status of `remuda run`, and how it is
//! told to a person.

use broker_schema::{Outcome, Output, StepResult, Terminal};

use crate::failure::exit;

/// The status that says how a task of one command ended. `command` is the
/// index of the command's step: a failure before it is not the command's own.
pub(crate) fn status(terminal: &Terminal, command: usize) -> u8 {
    match terminal.outcome {
        Outcome::Succeeded => 0,
        Outcome::Failed => {
            let step = terminal.steps.get(command);
            match step.map(|step| (step.error.is_some(), step.exit.code)) {
                Some((_, code)) if code != 0 => u8::try_from(code).unwrap_or(u8::MAX),
                _ => exit::NOT_THE_COMMANDS,
            }
        }
        Outcome::TimedOut => exit::TIMED_OUT,
        Outcome::OomKilled => exit::OOM_KILLED,
        _ => exit::NOT_THE_COMMANDS,
    }
}

/// What there is to say about an end that the exit status does not say alone.
pub(crate) fn tell(terminal: &Terminal) -> Option<String> {
    let step_error = terminal.steps.iter().find_map(|step| step.error.as_ref());
    let error = terminal.error.as_ref().or(step_error);
    let silent = matches!(terminal.outcome, Outcome::Succeeded | Outcome::Failed);
    let text = match error {
        Some(info) => {
            let field = info.field.as_ref().map(|field| format!("{field}: "));
            let field = field.unwrap_or_default();
            format!(
                "error: {}: {field}{} [{}]",
                terminal.outcome, info.message, info.code
            )
        }
        None if silent => return None,
        None if terminal.evidence.is_empty() => format!("error: {}", terminal.outcome),
        None => format!("error: {}: {}", terminal.outcome, terminal.evidence),
    };
    // Evidence and messages may quote what the sandboxed code said.
    Some(text.chars().filter(|c| !c.is_control()).collect())
}

/// What of the output was beyond the limit, and so was dropped.
pub(crate) fn tell_dropped(terminal: &Terminal) -> Option<String> {
    let sum = |stream: fn(&StepResult) -> &Output| {
        terminal
            .steps
            .iter()
            .map(|step| stream(step).dropped)
            .fold(0, u64::saturating_add)
    };
    let parts: Vec<String> = [
        ("stdout", sum(|step| &step.stdout)),
        ("stderr", sum(|step| &step.stderr)),
    ]
    .into_iter()
    .filter(|(_, dropped)| *dropped > 0)
    .map(|(name, dropped)| format!("the last {dropped} bytes of {name}"))
    .collect();
    (!parts.is_empty()).then(|| {
        format!(
            "note: {} were beyond the output limit and are lost",
            parts.join(" and ")
        )
    })
}

#[cfg(test)]
mod tests {
    use broker_schema::{ErrorCode, ErrorInfo, ExitStatus, PoolId, TaskId, Times, Usage};

    use super::*;

    fn terminal(outcome: Outcome, codes: &[i32]) -> Terminal {
        let pool: PoolId = "p".parse().unwrap();
        Terminal {
            task: TaskId::new(),
            tenant: "t".parse().unwrap(),
            run: "r".parse().unwrap(),
            pool,
            group: None,
            request_digest: String::new(),
            attempt: 1,
            outcome,
            attribution: outcome.default_attribution(),
            evidence: String::new(),
            exit: None,
            error: None,
            steps: codes
                .iter()
                .map(|code| StepResult {
                    exit: ExitStatus::code(*code),
                    ..StepResult::default()
                })
                .collect(),
            frames: 0,
            usage: Usage::default(),
            times: Times::default(),
            sandbox: None,
            kept: false,
        }
    }

    #[test]
    fn statuses() {
        for (outcome, codes, expected) in [
            (Outcome::Succeeded, &[0][..], 0),
            (Outcome::Failed, &[3], 3),
            (Outcome::Failed, &[137], 137),
            (Outcome::Failed, &[1000], 255),
            (Outcome::Failed, &[], 125),
            (Outcome::TimedOut, &[137], 124),
            (Outcome::OomKilled, &[137], 137),
            (Outcome::Rejected, &[], 125),
            (Outcome::Cancelled, &[143], 125),
            (Outcome::SandboxLost, &[], 125),
            (Outcome::DeadLettered, &[], 125),
        ] {
            assert_eq!(status(&terminal(outcome, codes), 0), expected, "{outcome}");
        }
    }

    #[test]
    fn a_file_that_could_not_be_written_is_not_the_commands_doing() {
        assert_eq!(status(&terminal(Outcome::Failed, &[1]), 1), 125);
        assert_eq!(status(&terminal(Outcome::Failed, &[0, 7]), 1), 7);
    }

    #[test]
    fn lost_output_is_told() {
        let mut cut = terminal(Outcome::Succeeded, &[0, 0]);
        assert_eq!(tell_dropped(&cut), None);
        cut.steps[1].stdout.dropped = 7;
        assert_eq!(
            tell_dropped(&cut).as_deref(),
            Some("note: the last 7 bytes of stdout were beyond the output limit and are lost")
        );
    }

    #[test]
    fn what_is_told() {
        assert_eq!(tell(&terminal(Outcome::Succeeded, &[0])), None);
        assert_eq!(tell(&terminal(Outcome::Failed, &[3])), None);
        let mut rejected = terminal(Outcome::Rejected, &[]);
        rejected.error =
            Some(ErrorInfo::new(ErrorCode::UnknownPool, "no pool \"x\"\u{7}").at("pool"));
        assert_eq!(
            tell(&rejected).as_deref(),
            Some("error: rejected: pool: no pool \"x\" [unknown_pool]")
        );
        let mut late = terminal(Outcome::TimedOut, &[]);
        late.evidence = "30000 ms passed".into();
        assert_eq!(
            tell(&late).as_deref(),
            Some("error: timed_out: 30000 ms passed")
        );
    }
}
