//! Closed load loops: k operations in flight until a number of operations or
//! of seconds is reached, whichever comes first. The drain counts.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::Barrier;
use tokio::task::JoinSet;

/// One kind of operation, connected and ready to be repeated.
pub(super) trait Operation: Send + Sized + 'static {
    /// Does it once; an error counts and is not fatal.
    fn run(&mut self) -> impl Future<Output = anyhow::Result<()>> + Send;

    /// Gives back what connecting took.
    fn close(self) -> impl Future<Output = ()> + Send {
        async {}
    }
}

/// A loop ends at whichever comes first.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Budget {
    pub(super) operations: usize,
    pub(super) seconds: f64,
}

/// What a loop measured.
#[derive(Debug, Default)]
pub(super) struct Phase {
    pub(super) latencies: Vec<Duration>,
    pub(super) errors: usize,
    pub(super) first_error: Option<String>,
    pub(super) wall: Duration,
}

impl Phase {
    /// Successes per second of the whole loop, the drain included.
    pub(super) fn per_second(&self) -> f64 {
        self.latencies.len() as f64 / self.wall.as_secs_f64().max(1e-9)
    }
}

/// Operations that each connection does before the clock starts.
const WARM_UP: usize = 3;

/// Runs `in_flight` connections, each with one operation at a time. The clock
/// starts once every one is connected and warm.
pub(super) async fn measure<C, F, O>(
    connect: C,
    in_flight: usize,
    budget: Budget,
) -> anyhow::Result<Phase>
where
    C: Fn(usize) -> F,
    F: Future<Output = anyhow::Result<O>> + Send + 'static,
    O: Operation,
{
    let mut operations = Vec::with_capacity(in_flight);
    for index in 0..in_flight {
        let mut operation = connect(index).await?;
        for _ in 0..if in_flight == 1 { WARM_UP } else { 1 } {
            operation.run().await?;
        }
        operations.push(operation);
    }

    let issued = Arc::new(AtomicUsize::new(0));
    let start_line = Arc::new(Barrier::new(in_flight + 1));
    let mut loops = JoinSet::new();
    for mut operation in operations {
        let (issued, start_line) = (issued.clone(), start_line.clone());
        loops.spawn(async move {
            start_line.wait().await;
            let began = Instant::now();
            let mut mine = Phase::default();
            while began.elapsed().as_secs_f64() < budget.seconds
                && issued.fetch_add(1, Ordering::Relaxed) < budget.operations
            {
                let one = Instant::now();
                match operation.run().await {
                    Ok(()) => mine.latencies.push(one.elapsed()),
                    Err(error) => {
                        mine.errors += 1;
                        mine.first_error.get_or_insert_with(|| format!("{error:#}"));
                    }
                }
            }
            mine.wall = began.elapsed();
            (mine, operation)
        });
    }
    start_line.wait().await;

    let mut whole = Phase::default();
    let mut finished = Vec::with_capacity(in_flight);
    while let Some(joined) = loops.join_next().await {
        let (part, operation) = joined?;
        whole.latencies.extend(part.latencies);
        whole.errors += part.errors;
        whole.first_error = whole.first_error.or(part.first_error);
        whole.wall = whole.wall.max(part.wall);
        finished.push(operation);
    }
    for operation in finished {
        operation.close().await;
    }
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Count(usize);

    impl Operation for Count {
        async fn run(&mut self) -> anyhow::Result<()> {
            self.0 += 1;
            anyhow::ensure!(self.0 != 4, "the fourth fails");
            tokio::task::yield_now().await;
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_loop_stops_at_its_number_of_operations() {
        let budget = Budget {
            operations: 10,
            seconds: 60.0,
        };
        let phase = measure(|_| async { Ok(Count(0)) }, 1, budget)
            .await
            .unwrap();
        assert_eq!(phase.latencies.len() + phase.errors, 10);
        assert_eq!(phase.errors, 1);
        assert_eq!(phase.first_error.as_deref(), Some("the fourth fails"));
        let phase = measure(|_| async { Ok(Count(100)) }, 8, budget)
            .await
            .unwrap();
        assert_eq!(phase.latencies.len(), 10);
    }
}
