//! A daemon's pages, as Prometheus reads them.

use anyhow::{Context, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::fleet::Fleet;

impl Fleet {
    /// What a part (`dispatcher`, `worker`) has counted under a name, all labels that begin like
    /// `labels` (`code="id_conflict"`; empty for all) together; 0 where there is nothing.
    pub async fn counted(&self, part: &str, name: &str, labels: &str) -> anyhow::Result<f64> {
        let record = self.record_now()?;
        let url = record["metrics"][part].as_str();
        let page = get(url.with_context(|| format!("no {part} serves metrics"))?).await?;
        Ok(sum(&page, name, labels))
    }
}

fn sum(page: &str, name: &str, labels: &str) -> f64 {
    page.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.rsplit_once(' '))
        .filter(|(series, _)| {
            let (found, of) = series.split_once('{').unwrap_or((series, ""));
            // A counter's name ends in _total.
            found.strip_suffix("_total").unwrap_or(found) == name && of.contains(labels)
        })
        .filter_map(|(_, value)| value.parse::<f64>().ok())
        .sum()
}

async fn get(url: &str) -> anyhow::Result<String> {
    let (host, path) = url
        .strip_prefix("http://")
        .and_then(|rest| rest.split_once('/'))
        .with_context(|| format!("{url} is no address"))?;
    let mut socket = tokio::net::TcpStream::connect(host).await?;
    let request = format!("GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await?;
    ensure!(answer.starts_with("HTTP/1.1 200"), "{url} answers {answer}");
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_of_one_name_are_added() {
        let page = "# HELP a_b_total x\na_b_total{code=\"x\"} 2\na_b_total{code=\"y\"} 3\nc 4\n";
        assert!((sum(page, "a_b", "") - 5.0).abs() < f64::EPSILON);
        assert!((sum(page, "a_b", "code=\"y\"") - 3.0).abs() < f64::EPSILON);
        assert!((sum(page, "c", "") - 4.0).abs() < f64::EPSILON);
        assert!(sum(page, "d", "").abs() < f64::EPSILON);
    }
}
