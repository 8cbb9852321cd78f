//! Whatever can be said survives the way over the wire, and whatever cannot
//! be read is refused without a panic.

#![expect(clippy::unwrap_used, reason = "a test")]

use broker_schema::codec::{Format, decode, encode};
use broker_schema::*;
use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;

fn token() -> impl Strategy<Value = String> {
    "[A-Za-z0-9_-]{1,64}"
}

fn blob() -> impl Strategy<Value = Blob> {
    prop_oneof![
        vec(any::<u8>(), 0..200).prop_map(Blob),
        ".{0,50}".prop_map(|s| Blob(s.into_bytes()))
    ]
}

fn action() -> impl Strategy<Value = StepKind> {
    prop_oneof![
        (
            vec(blob(), 0..4),
            btree_map(".{0,8}", blob(), 0..3),
            option::of(".{0,20}"),
            blob(),
            option::of(any::<u64>()),
            option::of(any::<u64>()),
        )
            .prop_map(|(argv, env, work_dir, stdin, timeout_ms, output_limit)| {
                StepKind::Command(Command {
                    argv,
                    env,
                    work_dir,
                    stdin,
                    timeout_ms,
                    output_limit,
                })
            }),
        (".{0,20}", blob(), option::of(any::<u32>())).prop_map(|(path, content, mode)| {
            StepKind::FilePatch(FilePatch {
                path,
                content,
                mode,
            })
        }),
        (".{0,20}", any::<u64>(), option::of(any::<u64>())).prop_map(|(path, offset, limit)| {
            StepKind::FileRead(FileRead {
                path,
                offset,
                limit,
            })
        }),
    ]
}

prop_compose! {
    fn request()(
        tenant in token(),
        run in token(),
        pool in token(),
        steps in vec((".{0,10}", action()), 0..4),
        env in btree_map(".{0,8}", blob(), 0..3),
        timeout_ms in option::of(any::<u64>()),
        deadline in option::of(any::<u64>().prop_map(Timestamp)),
        retries in any::<u8>(),
        keep in option::of((any::<u64>(), any::<u64>())),
    ) -> TaskRequest {
        let mut request = TaskRequest::new(
            tenant.parse().unwrap(),
            run.parse().unwrap(),
            pool.parse().unwrap(),
            steps.into_iter().map(|(name, action)| Step { name, action }).collect(),
        );
        request.env = env;
        request.timeout_ms = timeout_ms;
        request.deadline = deadline;
        request.retries = retries;
        request.keep_alive = keep.map(|(idle_timeout_ms, max_life_ms)| SessionOptions {
            idle_timeout_ms,
            max_life_ms,
        });
        request
    }
}

proptest! {
    #[test]
    fn requests_survive_both_formats(request in request()) {
        for format in [Format::MessagePack, Format::Json] {
            let bytes = encode(&request, format).unwrap();
            prop_assert_eq!(&decode::<TaskRequest>(&bytes, format).unwrap(), &request);
        }
    }

    #[test]
    fn cut_or_changed_bytes_never_panic(
        request in request(),
        cut in any::<prop::sample::Index>(),
        change in any::<(prop::sample::Index, u8)>(),
    ) {
        let mut bytes = encode(&request, Format::MessagePack).unwrap();
        let at = change.0.index(bytes.len());
        bytes[at] ^= change.1;
        let _ = decode::<TaskRequest>(&bytes, Format::MessagePack);
        bytes.truncate(cut.index(bytes.len()));
        prop_assert!(decode::<TaskRequest>(&bytes, Format::MessagePack).is_err());
    }

    #[test]
    fn validation_never_panics_and_always_names_a_field(request in request()) {
        if let Err(Invalid(found)) = request.validate(&RequestLimits::default()) {
            prop_assert!(!found.is_empty());
            prop_assert!(found.iter().all(|info| info.field.is_some()));
        }
    }

    #[test]
    fn subjects_parse_back(tenant in token(), run in token()) {
        let subjects = Subjects::default();
        let (tenant, run, task): (TenantId, RunId, _) =
            (tenant.parse().unwrap(), run.parse().unwrap(), TaskId::new());
        prop_assert_eq!(
            subjects.parse(&subjects.terminal(&tenant, &run, task)),
            Some(ParsedSubject::Terminal { tenant, run, task })
        );
    }

    #[test]
    fn no_text_panics_the_subject_parser(text in ".{0,100}") {
        let _ = Subjects::default().parse(&text);
        let _ = Subjects::default().parse(&format!("remuda.{text}"));
    }
}
