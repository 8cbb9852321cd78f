//! Percentiles of a finished run.

/// Latencies of one kind, in microseconds.
#[derive(Debug, Default, Clone)]
pub(crate) struct Latencies {
    micros: Vec<u64>,
}

/// What a table shows of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Quantiles {
    pub(crate) p50: u64,
    pub(crate) p90: u64,
    pub(crate) p99: u64,
}

impl Latencies {
    pub(crate) fn add(&mut self, micros: u64) {
        self.micros.push(micros);
    }

    /// None where nothing was measured.
    pub(crate) fn quantiles(&self) -> Option<Quantiles> {
        let mut sorted = self.micros.clone();
        sorted.sort_unstable();
        Some(Quantiles {
            p50: nearest_rank(&sorted, 50)?,
            p90: nearest_rank(&sorted, 90)?,
            p99: nearest_rank(&sorted, 99)?,
        })
    }
}

/// The smallest value that at least `percent` of all values do not exceed.
fn nearest_rank(sorted: &[u64], percent: usize) -> Option<u64> {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied()
}

/// Microseconds for people: `0.42 ms`, `18 ms`, `3.20 s`.
pub(crate) fn human(micros: u64) -> String {
    match micros {
        0..10_000 => format!("{:.2} ms", micros as f64 / 1e3),
        10_000..1_000_000 => format!("{:.0} ms", micros as f64 / 1e3),
        _ => format!("{:.2} s", micros as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: impl IntoIterator<Item = u64>) -> Option<Quantiles> {
        let mut latencies = Latencies::default();
        values.into_iter().for_each(|value| latencies.add(value));
        latencies.quantiles()
    }

    #[test]
    fn nearest_ranks() {
        assert_eq!(of([]), None);
        let one = Quantiles {
            p50: 7,
            p90: 7,
            p99: 7,
        };
        assert_eq!(of([7]), Some(one));
        let hundred = Quantiles {
            p50: 50,
            p90: 90,
            p99: 99,
        };
        assert_eq!(of((1..=100).rev()), Some(hundred));
        let two = Quantiles {
            p50: 1,
            p90: 2,
            p99: 2,
        };
        assert_eq!(of([2, 1]), Some(two));
    }

    #[test]
    fn people_read_units() {
        assert_eq!(human(420), "0.42 ms");
        assert_eq!(human(18_400), "18 ms");
        assert_eq!(human(3_200_000), "3.20 s");
    }
}
