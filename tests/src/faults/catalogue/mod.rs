//! The faults: what each does, what it needs of the host, and what it is
//! forgiven.

mod clients;
mod fleet;
mod nats;
mod network;
mod redis;
mod resources;
mod soak;

use futures::future::BoxFuture;

use super::namespace;
use super::scene::Scene;
use super::shape::Shape;

/// Strikes, and returns when everything is whole again.
pub(crate) type Strike = for<'a> fn(&'a mut Scene) -> BoxFuture<'a, anyhow::Result<()>>;

/// One fault.
#[derive(Clone, Copy)]
pub(crate) struct Fault {
    /// Its number in the plan.
    pub(crate) number: u8,
    pub(crate) name: &'static str,
    /// What it does.
    pub(crate) what: &'static str,
    /// What is looked at beside the invariants.
    pub(crate) checks: &'static str,
    pub(crate) needs: &'static [Need],
    pub(crate) shape: fn(&mut Shape, bool),
    pub(crate) strike: Strike,
    /// How long it is, and how long in full.
    pub(crate) lengths: Lengths,
    pub(crate) forgiven: Forgiven,
    /// One of the bounded selection.
    pub(crate) ci: bool,
}

impl std::fmt::Debug for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.number, self.name)
    }
}

/// How long a fault lasts or how much of it there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lengths {
    pub(crate) short: &'static str,
    /// Nothing where the short one is all there is.
    pub(crate) full: Option<&'static str>,
}

impl Lengths {
    pub(crate) const fn one(short: &'static str) -> Self {
        Self { short, full: None }
    }

    pub(crate) const fn two(short: &'static str, full: &'static str) -> Self {
        Self {
            short,
            full: Some(full),
        }
    }

    pub(crate) fn told(&self, full: bool) -> &'static str {
        self.full.filter(|_| full).unwrap_or(self.short)
    }
}

/// What a fault takes with it by its nature, which is then no violation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is forgiven or not")]
pub(crate) struct Forgiven {
    /// Sessions whose sandbox is gone.
    pub(crate) sessions: bool,
    /// Tasks that the infrastructure failed as often as it may.
    pub(crate) dead_letters: bool,
    /// Tasks that nobody could be given, before their attempts are used up.
    pub(crate) undelivered: bool,
    /// What the storage held: terminals that were read before may be gone.
    pub(crate) storage: bool,
}

const NOTHING: Forgiven = Forgiven {
    sessions: false,
    dead_letters: false,
    undelivered: false,
    storage: false,
};
const SESSIONS: Forgiven = Forgiven {
    sessions: true,
    ..NOTHING
};
const STORAGE: Forgiven = Forgiven {
    storage: true,
    ..SESSIONS
};
const REPEATED_DEATHS: Forgiven = Forgiven {
    dead_letters: true,
    ..SESSIONS
};

const UNDELIVERED: Forgiven = Forgiven {
    undelivered: true,
    ..REPEATED_DEATHS
};

/// Something that not every host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// Network namespaces, and a packet filter in them.
    Namespaces,
    /// A clock that can be shifted.
    Clock,
    /// Older versions of nats-server.
    OldNats,
    /// The memory control group, as root.
    MemoryGroup,
    /// A small file system of one's own.
    Mounts,
    /// `prlimit`.
    Prlimit,
}

impl Need {
    /// Why it is not there.
    pub(crate) fn lacking(self) -> Option<String> {
        let root = nix::unistd::geteuid().is_root();
        match self {
            Self::Namespaces => namespace::lacking(),
            Self::Clock => super::clock::lacking(),
            Self::OldNats => super::versions::lacking(),
            Self::MemoryGroup => super::pressure::lacking(),
            Self::Mounts => (!root).then(|| "mounting needs root".to_owned()),
            Self::Prlimit => {
                let found = namespace::which("prlimit");
                found.is_none().then(|| "no prlimit in PATH".to_owned())
            }
        }
    }
}

impl Fault {
    /// Why it cannot be done here.
    pub(crate) fn lacking(&self) -> Option<String> {
        self.needs.iter().find_map(|need| need.lacking())
    }
}

/// All faults in the order of their numbers.
pub(crate) fn all() -> Vec<Fault> {
    let mut all: Vec<Fault> = [
        nats::FAULTS,
        redis::FAULTS,
        fleet::FAULTS,
        network::FAULTS,
        clients::FAULTS,
        resources::FAULTS,
        soak::FAULTS,
    ]
    .concat();
    all.sort_by_key(|fault| fault.number);
    all
}

/// The faults that a selection names, by number or name.
pub(crate) fn select(only: &[String], ci: bool) -> Result<Vec<Fault>, String> {
    let all = all();
    for name in only {
        if !all.iter().any(|fault| fault.is(name)) {
            return Err(format!(
                "no fault is called {name:?}: give a number from 1 to {} or a name of `--list`",
                all.len()
            ));
        }
    }
    Ok(all
        .into_iter()
        .filter(|fault| only.is_empty() || only.iter().any(|name| fault.is(name)))
        .filter(|fault| !ci || fault.ci)
        .collect())
}

impl Fault {
    fn is(&self, name: &str) -> bool {
        self.name == name || name.parse() == Ok(self.number)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_plan_is_whole() {
        let all = all();
        let numbers: Vec<u8> = all.iter().map(|fault| fault.number).collect();
        assert_eq!(numbers, (1..=35).collect::<Vec<u8>>());
        let names: BTreeSet<_> = all.iter().map(|fault| fault.name).collect();
        assert_eq!(names.len(), all.len());
    }

    #[test]
    fn faults_are_named_by_number_or_name() {
        let chosen = |only: &[&str], ci| {
            let only: Vec<String> = only.iter().map(|name| (*name).to_owned()).collect();
            select(&only, ci)
                .map(|faults| faults.iter().map(|fault| fault.number).collect::<Vec<_>>())
        };
        assert_eq!(chosen(&["9", "nats-kill"], false), Ok(vec![1, 9]));
        assert!(
            chosen(&["nats-kil"], false)
                .unwrap_err()
                .contains("nats-kil")
        );
        assert!(chosen(&["36"], false).is_err());
        let ci = chosen(&[], true).unwrap();
        assert!(ci.len() >= 5 && ci.len() < 35, "{ci:?}");
    }
}
