//! `remuda up`: a whole fleet on this machine.

use std::path::PathBuf;

use broker_schema::PoolId;
use broker_schema::pool::PoolSpec;
use serde::Deserialize;
use serde_json::Value;

use crate::failure::Failure;
use crate::fleet::{default_data, default_prefix};
use crate::globals::Globals;
use crate::task_file;
use crate::up::{self, Plan};

/// Starts nats-server and redis-server (where --nats and --redis name none),
/// dispatcher and worker, and stops them all with one Ctrl-C.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Everything that survives a restart [default: ~/.local/state/remuda]
    #[arg(long, value_name = "FOLDER", env = "REMUDA_DATA")]
    data: Option<PathBuf>,
    /// YAML or JSON: pools, and more configuration of dispatcher and worker
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The pool to keep, beside those of --config
    #[arg(long, value_name = "NAME")]
    pool: Option<PoolId>,
    /// Idle sandboxes that the pool keeps ready
    #[arg(long, value_name = "N")]
    warm: Option<u32>,
    /// Sandboxes of the pool that may exist at once
    #[arg(long, value_name = "N")]
    max: Option<u32>,
}

const DEFAULT_POOL: &str = "default";

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Config {
    pools: Vec<PoolSpec>,
    dispatcher: Value,
    worker: Value,
}

pub(crate) async fn run(args: Args, globals: &Globals) -> Result<u8, Failure> {
    let data = args.data.clone().or_else(default_data).ok_or_else(|| {
        Failure::usage("there is no home folder to keep the data in").mend("give --data FOLDER")
    })?;
    let config = match &args.config {
        Some(path) => read_config(path)?,
        None => Config::default(),
    };
    let plan = Plan {
        data,
        nats: globals.nats.clone(),
        redis: globals.redis.clone(),
        prefix: globals.prefix.clone().unwrap_or_else(default_prefix),
        pools: pools(config.pools, &args)?,
        dispatcher: config.dispatcher,
        worker: config.worker,
    };
    Box::pin(up::run(plan)).await
}

fn read_config(path: &PathBuf) -> Result<Config, Failure> {
    let file = path.display().to_string();
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::because(format_args!("{file} cannot be read"), &error))?;
    task_file::single(&file, &text).map_err(|error| Failure::chain(&error))
}

/// The pools of the file, and the one of the command line over them.
fn pools(mut pools: Vec<PoolSpec>, args: &Args) -> Result<Vec<PoolSpec>, Failure> {
    let named = args.pool.is_some() || args.warm.is_some() || args.max.is_some();
    if pools.is_empty() || named {
        let name = match &args.pool {
            Some(name) => name.clone(),
            None => PoolId::new(DEFAULT_POOL).map_err(|error| Failure::chain(&error))?,
        };
        let index = pools.iter().position(|pool| pool.name == name);
        let index = index.unwrap_or_else(|| {
            pools.push(PoolSpec::named(name));
            pools.len() - 1
        });
        let pool = &mut pools[index];
        pool.warm = args.warm.unwrap_or(pool.warm);
        pool.max = args.max.unwrap_or_else(|| pool.max.max(pool.warm));
    }
    match pools
        .iter()
        .find(|pool| pool.warm > pool.max || pool.max == 0)
    {
        Some(pool) => Err(Failure::usage(format!(
            "pool {} is to keep {} warm and may have {} at most",
            pool.name, pool.warm, pool.max
        ))
        .mend("give --max at least 1 and at least --warm")),
        None => Ok(pools),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(pool: Option<&str>, warm: Option<u32>, max: Option<u32>) -> Args {
        Args {
            data: None,
            config: None,
            pool: pool.map(|name| name.parse().unwrap()),
            warm,
            max,
        }
    }

    fn shape(pools: &[PoolSpec]) -> Vec<(&str, u32, u32)> {
        pools
            .iter()
            .map(|pool| (pool.name.as_str(), pool.warm, pool.max))
            .collect()
    }

    #[test]
    fn the_command_line_lies_over_the_file() {
        let none = pools(vec![], &args(None, None, None)).unwrap();
        assert_eq!(shape(&none), [("default", 4, 64)]);
        let many = pools(vec![], &args(None, Some(100), None)).unwrap();
        assert_eq!(shape(&many), [("default", 100, 100)]);
        let file = || vec![PoolSpec::named("py".parse().unwrap())];
        let kept = pools(file(), &args(None, None, None)).unwrap();
        assert_eq!(shape(&kept), [("py", 4, 64)]);
        let over = pools(file(), &args(Some("py"), Some(2), Some(3))).unwrap();
        assert_eq!(shape(&over), [("py", 2, 3)]);
        let both = pools(file(), &args(Some("x"), None, None)).unwrap();
        assert_eq!(shape(&both), [("py", 4, 64), ("x", 4, 64)]);
    }

    #[test]
    fn the_pools_of_the_operations_page_are_pools() {
        let page = include_str!("../../../docs/operations.md");
        let text = page.split("```yaml\n").nth(1).unwrap();
        let text = text.split("```").next().unwrap();
        let config: Config = task_file::single("operations.md", text).unwrap();
        assert_eq!(shape(&config.pools), [("default", 16, 64)]);
    }

    #[test]
    fn more_warm_than_may_be_is_refused() {
        let error = pools(vec![], &args(None, Some(3), Some(2))).unwrap_err();
        assert!(
            error.to_string().contains("keep 3 warm and may have 2"),
            "{error}"
        );
    }
}
