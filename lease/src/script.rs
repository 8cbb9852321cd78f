//! The scripts, and the one way to run them.

use redis::Script;

/// Every script with the prelude before it.
#[derive(Debug)]
pub(crate) struct Scripts {
    pub(crate) incarnation: Script,
    pub(crate) install_incarnation: Script,
    pub(crate) heartbeat: Script,
    pub(crate) set_draining: Script,
    pub(crate) deregister: Script,
    pub(crate) workers: Script,
    pub(crate) set_pools: Script,
    pub(crate) set_targets: Script,
    pub(crate) offer: Script,
    pub(crate) withdraw: Script,
    pub(crate) warm_counts: Script,
    pub(crate) claim: Script,
    pub(crate) unclaim: Script,
    pub(crate) renew: Script,
    pub(crate) assign: Script,
    pub(crate) finish: Script,
    pub(crate) cancel: Script,
    pub(crate) reap: Script,
    pub(crate) refusals: Script,
    pub(crate) remove_later: Script,
    pub(crate) due_removals: Script,
    pub(crate) removed: Script,
    pub(crate) bury: Script,
    pub(crate) leases: Script,
    pub(crate) stop: Script,
    pub(crate) vote: Script,
    pub(crate) pool_use: Script,
    pub(crate) tenant_use: Script,
    pub(crate) set_credit: Script,
    pub(crate) lead: Script,
    pub(crate) step_down: Script,
    pub(crate) leaders: Script,
    pub(crate) held: Script,
    pub(crate) declare_dead: Script,
    pub(crate) schema: Script,
}

/// A script that a Redis without room refuses as a whole: without the first line it would stop at
/// the first command that needs room, halfway.
macro_rules! script {
    ($name:literal) => {
        script!("#!lua\n", $name)
    };
    ($first:literal, $name:literal) => {
        Script::new(concat!(
            $first,
            include_str!("scripts/prelude.lua"),
            include_str!(concat!("scripts/", $name, ".lua"))
        ))
    };
}

/// One that looks, keeps or gives back what was granted before, and runs without room too: a full
/// Redis grants nothing and loses nothing.
macro_rules! keeping {
    ($name:literal) => {
        script!("#!lua flags=allow-oom\n", $name)
    };
}

impl Scripts {
    pub(crate) fn new() -> Self {
        Self {
            incarnation: keeping!("incarnation"),
            install_incarnation: script!("install_incarnation"),
            heartbeat: keeping!("heartbeat"),
            set_draining: keeping!("set_draining"),
            deregister: keeping!("deregister"),
            workers: keeping!("workers"),
            set_pools: script!("set_pools"),
            set_targets: script!("set_targets"),
            offer: script!("offer"),
            withdraw: keeping!("withdraw"),
            warm_counts: keeping!("warm_counts"),
            claim: script!("claim"),
            unclaim: keeping!("unclaim"),
            renew: keeping!("renew"),
            assign: script!("assign"),
            finish: keeping!("finish"),
            cancel: script!("cancel"),
            reap: keeping!("reap"),
            refusals: keeping!("refusals"),
            remove_later: script!("remove_later"),
            due_removals: keeping!("due_removals"),
            removed: keeping!("removed"),
            bury: keeping!("bury"),
            leases: keeping!("leases"),
            stop: script!("stop"),
            vote: script!("vote"),
            pool_use: keeping!("pool_use"),
            tenant_use: keeping!("tenant_use"),
            set_credit: script!("set_credit"),
            lead: keeping!("lead"),
            step_down: keeping!("step_down"),
            leaders: keeping!("leaders"),
            held: keeping!("held"),
            declare_dead: keeping!("declare_dead"),
            schema: keeping!("schema"),
        }
    }
}
