//! `remuda bench`: what a fleet costs, beside the floor under it. One JSON line
//! per mode on standard output.

mod fleet;
mod load;
mod memory;
mod modes;
mod report;

use std::future::Future;

use anyhow::{Context as _, ensure};

use crate::failure::Failure;
use crate::globals::Globals;
use crate::out;
use fleet::BenchFleet;
use load::{Budget, Operation, Phase};
use report::Line;

/// Operations kept in flight.
const LEVELS: [usize; 3] = [1, 8, 64];

/// Measures a fleet of its own on this machine, one JSON line per mode.
///
/// The lines have the shape that benchmarks of peers use, so that they can be
/// put side by side in one run: `PEER_BENCH_BUDGET` gives, for 1, 8 and 64 in
/// flight, the most operations and the most seconds.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only these modes
    #[arg(long, value_delimiter = ',', value_enum)]
    modes: Vec<Mode>,
    /// `{"1": [operations, seconds], "8": …, "64": …}`
    #[arg(long, value_name = "JSON", env = "PEER_BENCH_BUDGET")]
    budget: Option<String>,
    /// Bytes of standard output that are streamed, in MiB
    #[arg(long, default_value_t = 256)]
    stream_mib: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Mode {
    /// A bare `/bin/true`: the floor
    Spawn,
    /// A NATS request and its reply: the floor
    Request,
    /// `/bin/true` in a session's sandbox, through durable streams
    Session,
    /// `/bin/true` in a sandbox that nothing used before, through the dispatcher
    OneShot,
    /// A sandbox from nothing to ready, and gone again; no messages
    Create,
    /// Standard output from a sandbox to the client
    Stream,
}

impl Mode {
    const ALL: [Self; 6] = [
        Self::Spawn,
        Self::Request,
        Self::Session,
        Self::OneShot,
        Self::Create,
        Self::Stream,
    ];
}

pub(crate) async fn run(args: Args, globals: &Globals) -> Result<u8, Failure> {
    measure(&args, globals)
        .await
        .map_err(|error| Failure::new(format!("{error:#}")))?;
    Ok(0)
}

async fn measure(args: &Args, globals: &Globals) -> anyhow::Result<()> {
    let budgets = budgets(args.budget.as_deref())?;
    let modes = if args.modes.is_empty() {
        &Mode::ALL[..]
    } else {
        &args.modes
    };
    let fleet = BenchFleet::start(globals).await?;
    fleet.check().await?;
    for mode in modes {
        let line = match mode {
            Mode::Spawn => {
                let phases = levels(&budgets, |_| async { Ok(modes::Spawn) }).await?;
                Line::new("floor: spawn /bin/true", "none", false, &phases)
            }
            Mode::Request => {
                let nats = fleet.nats().to_owned();
                let echo = modes::Request::answer(&nats).await?;
                let phases = levels(&budgets, |_| modes::Request::connect(nats.clone())).await?;
                drop(echo);
                Line::new("floor: NATS request", "none", false, &phases)
            }
            Mode::Session => {
                let (alone, crowded) = budgets.split_at(1);
                let split = modes::Split::default();
                let open = |_| modes::SessionStep::open(fleet.address(), split.clone());
                let mut phases = levels(alone, open).await?;
                let [worker, sandbox] = split.medians();
                phases.extend(levels(crowded, open).await?);
                let mut line = Line::new("session step", "namespaces", false, &phases);
                line.more.insert("in_worker_p50_ms", worker);
                line.more.insert("in_sandbox_p50_ms", sandbox);
                line
            }
            Mode::OneShot => {
                let phases = levels(&budgets, |_| modes::OneShot::connect(fleet.address())).await?;
                Line::new("one-shot, new sandbox", "namespaces", true, &phases)
            }
            Mode::Create => {
                let maker = modes::Maker::start(fleet.data()).await?;
                let (alone, crowded) = budgets.split_at(1);
                let mut phases = levels(alone, |_| maker.operation()).await?;
                let (ready_p50, ready_p90) = maker.ready_ms();
                phases.extend(levels(crowded, |_| maker.operation()).await?);
                let mut line = Line::new("sandbox create and destroy", "namespaces", true, &phases);
                line.more.insert("ready_p50_ms", ready_p50);
                line.more.insert("ready_p90_ms", ready_p90);
                if let Some((sandboxes, kib)) = memory::warm_pss_kib(fleet.worker_pid())? {
                    line.more.insert("warm_sandboxes", sandboxes);
                    line.more.insert("warm_pss_kib", kib);
                }
                line
            }
            Mode::Stream => modes::stream(&fleet, args.stream_mib).await?,
        };
        out::json(&line).map_err(|failure| anyhow::anyhow!("{failure}"))?;
    }
    fleet.stop().await
}

/// One phase for each number in flight.
async fn levels<C, F, O>(
    budgets: &[(usize, Budget)],
    connect: C,
) -> anyhow::Result<Vec<(usize, Phase)>>
where
    C: Fn(usize) -> F,
    F: Future<Output = anyhow::Result<O>> + Send + 'static,
    O: Operation,
{
    let mut phases = Vec::with_capacity(budgets.len());
    for &(in_flight, budget) in budgets {
        phases.push((in_flight, load::measure(&connect, in_flight, budget).await?));
    }
    Ok(phases)
}

fn budgets(text: Option<&str>) -> anyhow::Result<Vec<(usize, Budget)>> {
    let default = |in_flight| match in_flight {
        1 => (300, 6.0),
        8 => (400, 4.0),
        _ => (800, 4.0),
    };
    let given: serde_json::Value = match text {
        Some(text) => serde_json::from_str(text).context("the budget is no JSON")?,
        None => serde_json::Value::Null,
    };
    LEVELS
        .iter()
        .map(|&in_flight| {
            let (operations, seconds) = match &given[in_flight.to_string()] {
                serde_json::Value::Null => default(in_flight),
                pair => serde_json::from_value(pair.clone()).with_context(|| {
                    format!("the budget for {in_flight} in flight is not [operations, seconds]")
                })?,
            };
            ensure!(
                operations > 0 && seconds > 0.0,
                "the budget for {in_flight} in flight is empty"
            );
            Ok((
                in_flight,
                Budget {
                    operations,
                    seconds,
                },
            ))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_may_name_some_levels() {
        let budgets = budgets(Some(r#"{"8": [96, 0.4]}"#)).unwrap();
        assert_eq!(
            budgets[0],
            (
                1,
                Budget {
                    operations: 300,
                    seconds: 6.0
                }
            )
        );
        assert_eq!(
            budgets[1],
            (
                8,
                Budget {
                    operations: 96,
                    seconds: 0.4
                }
            )
        );
        for wrong in ["{", r#"{"1": 5}"#, r#"{"1": [0, 1.0]}"#] {
            assert!(super::budgets(Some(wrong)).is_err(), "{wrong}");
        }
    }
}
