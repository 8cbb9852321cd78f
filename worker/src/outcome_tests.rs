use super::*;

fn exited(code: i32) -> StepEnd {
    StepEnd::Exited {
        exit: ExitStatus::code(code),
        timed_out: None,
        oom: OomKills::default(),
        spawn_error: String::new(),
        stalled: false,
    }
}

fn timed_out(limit: Limit, stalled: bool) -> StepEnd {
    StepEnd::Exited {
        exit: ExitStatus {
            code: 137,
            signal: Some(9),
        },
        timed_out: Some(limit),
        oom: OomKills::default(),
        spawn_error: String::new(),
        stalled,
    }
}

fn oom(code: i32) -> StepEnd {
    StepEnd::Exited {
        exit: ExitStatus::code(code),
        timed_out: None,
        oom: kills(2),
        spawn_error: String::new(),
        stalled: false,
    }
}

fn kills(count: u64) -> OomKills {
    OomKills {
        count,
        at_limit: true,
    }
}

/// The kernel killed something in a sandbox that was below its limit.
fn host_oom() -> StepEnd {
    StepEnd::Exited {
        exit: ExitStatus::code(137),
        timed_out: None,
        oom: OomKills {
            count: 1,
            at_limit: false,
        },
        spawn_error: String::new(),
        stalled: false,
    }
}

fn broken(count: u64) -> StepEnd {
    StepEnd::Broken {
        why: "closed".to_owned(),
        oom: kills(count),
    }
}

fn refused(code: ErrorCode) -> StepEnd {
    StepEnd::Refused(ErrorInfo::new(code, "no"))
}

/// In short: outcome and attribution, `back`, or `quiet`.
fn short(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Finish(found) => format!(
            "{} {}{}",
            found.outcome,
            found.attribution.as_str(),
            if found.usable { "" } else { " unusable" }
        ),
        Verdict::HandBack(_) => "back".to_owned(),
        Verdict::Quiet => "quiet".to_owned(),
    }
}

#[test]
fn every_end_has_one_outcome_and_one_culprit() {
    use ErrorCode::{InvalidField, NoSpace};
    // ends -> alone, in a session
    let cases: Vec<(Vec<StepEnd>, &str, &str)> = vec![
        (vec![], "succeeded policy", "succeeded policy"),
        (
            vec![exited(0), StepEnd::FileDone],
            "succeeded policy",
            "succeeded policy",
        ),
        (vec![oom(0)], "succeeded policy", "succeeded policy"),
        (vec![exited(0), exited(3)], "failed policy", "failed policy"),
        (vec![exited(3), exited(0)], "failed policy", "failed policy"),
        (vec![oom(137)], "oom_killed policy", "oom_killed policy"),
        (vec![host_oom()], "back", "oom_killed infrastructure"),
        (
            vec![timed_out(Limit::Step, false)],
            "timed_out policy",
            "timed_out policy",
        ),
        (
            vec![timed_out(Limit::Task, false)],
            "timed_out policy",
            "timed_out policy",
        ),
        (
            vec![timed_out(Limit::Deadline, false)],
            "expired user",
            "expired user",
        ),
        (
            vec![timed_out(Limit::Step, true)],
            "back",
            "timed_out infrastructure",
        ),
        (
            vec![StepEnd::NoTime(Limit::Task)],
            "timed_out policy",
            "timed_out policy",
        ),
        (
            vec![StepEnd::NoTime(Limit::Deadline)],
            "expired user",
            "expired user",
        ),
        (
            vec![StepEnd::Unresponsive(Limit::Task)],
            "timed_out policy unusable",
            "timed_out policy unusable",
        ),
        (vec![refused(NoSpace)], "failed policy", "failed policy"),
        (
            vec![refused(InvalidField)],
            "rejected user",
            "rejected user",
        ),
        (
            vec![broken(0)],
            "back",
            "sandbox_lost infrastructure unusable",
        ),
        (
            vec![broken(1)],
            "oom_killed policy unusable",
            "oom_killed policy unusable",
        ),
        (
            vec![StepEnd::Unable("fork".to_owned())],
            "back",
            "sandbox_lost infrastructure unusable",
        ),
        (
            vec![StepEnd::Stale],
            "back",
            "sandbox_lost infrastructure unusable",
        ),
    ];
    for (ends, alone, in_session) in cases {
        assert_eq!(short(&judge(&ends, None, false)), alone, "{ends:?}");
        assert_eq!(short(&judge(&ends, None, true)), in_session, "{ends:?}");
    }
}

#[test]
fn an_interruption_decides_over_what_it_left_half_done() {
    let half = [exited(0), broken(0)];
    for (interrupt, alone, in_session) in [
        (
            Interrupt::Cancelled(CancelCause::Run),
            "cancelled user",
            "cancelled user",
        ),
        (Interrupt::LeaseOverdue, "quiet", "quiet"),
        (
            Interrupt::LeaseLost,
            "back",
            "sandbox_lost infrastructure unusable",
        ),
        (
            Interrupt::Shutdown,
            "back",
            "sandbox_lost infrastructure unusable",
        ),
    ] {
        assert_eq!(short(&judge(&half, Some(interrupt), false)), alone);
        assert_eq!(short(&judge(&half, Some(interrupt), true)), in_session);
    }
}

#[test]
fn the_evidence_names_the_step_and_the_reason() {
    let Verdict::Finish(found) = judge(&[exited(0), oom(137)], None, false) else {
        panic!("it is a result");
    };
    assert!(found.evidence.contains("step 1"), "{}", found.evidence);
    assert!(found.evidence.contains("grew by 2"), "{}", found.evidence);
    let missing = StepEnd::Exited {
        exit: ExitStatus::code(127),
        timed_out: None,
        oom: OomKills::default(),
        spawn_error: "nosuch: not found".to_owned(),
        stalled: false,
    };
    let Verdict::Finish(found) = judge(&[missing], None, false) else {
        panic!("it is a result");
    };
    assert!(found.evidence.contains("nosuch"), "{}", found.evidence);
    let error = found.error.unwrap();
    assert_eq!(error.code, ErrorCode::FileNotFound);
    assert_eq!(error.message, "nosuch: not found");
    let denied = not_started(ExitStatus::code(126), "/etc: not permitted").unwrap();
    assert_eq!(denied.code, ErrorCode::PermissionDenied);
    assert_eq!(not_started(ExitStatus::code(127), ""), None);
}

#[test]
fn the_least_time_counts_and_says_whose_it_is() {
    let s = Duration::from_secs;
    for (step, task, deadline, time, limit) in [
        (None, s(30), None, s(30), Limit::Task),
        (Some(s(5)), s(30), None, s(5), Limit::Step),
        (Some(s(50)), s(30), None, s(30), Limit::Task),
        (Some(s(5)), s(30), Some(s(2)), s(2), Limit::Deadline),
        (None, s(30), Some(s(60)), s(30), Limit::Task),
        (None, s(30), Some(s(0)), s(0), Limit::Deadline),
    ] {
        assert_eq!(budget(step, task, deadline), Budget { time, limit });
    }
}

#[test]
fn a_refusal_is_the_infrastructures_only_where_nothing_ran_before() {
    assert_eq!(refusal("stale_epoch", "", false), StepEnd::Stale);
    for (code, wanted) in [
        ("not_found", ErrorCode::FileNotFound),
        ("no_space", ErrorCode::NoSpace),
        ("work_dir_missing", ErrorCode::WorkDirMissing),
        ("invalid_argument", ErrorCode::InvalidField),
    ] {
        for pristine in [true, false] {
            match refusal(code, "m", pristine) {
                StepEnd::Refused(info) => assert_eq!(info.code, wanted),
                other => panic!("{other:?}"),
            }
        }
    }
    assert!(matches!(
        refusal("spawn_failed", "m", true),
        StepEnd::Unable(_)
    ));
    assert!(matches!(
        refusal("spawn_failed", "m", false),
        StepEnd::Refused(_)
    ));
    assert!(matches!(
        refusal("whatever", "m", false),
        StepEnd::Refused(_)
    ));
}

#[test]
fn only_a_steps_own_time_out_lets_the_task_go_on() {
    assert!(!timed_out(Limit::Step, false).is_final());
    assert!(timed_out(Limit::Task, false).is_final());
    assert!(timed_out(Limit::Deadline, false).is_final());
    assert!(!exited(1).is_final());
    assert!(broken(0).is_final());
}
