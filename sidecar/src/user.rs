//! Acting on files as the sandbox's user. The sidecar keeps no capability to
//! pass over file permissions; it takes the user's file-system ids instead.

use std::marker::PhantomData;

use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};

use crate::args::Ids;
use crate::tree;

/// The user's file-system ids for as long as this lives. Must not be held
/// across an await: the ids are the thread's, and there is one thread.
#[derive(Debug)]
pub(crate) struct AsUser {
    own: Option<Ids>,
    not_send: PhantomData<*const ()>,
}

impl AsUser {
    /// Takes the ids on, where there is a user other than the sidecar's own.
    pub(crate) fn enter(user: Option<Ids>) -> Self {
        let own = user.map(|user| {
            // The group first: without CAP_SETGID in effect it could not change.
            let gid = setfsgid(Gid::from_raw(user.gid)).as_raw();
            let uid = setfsuid(Uid::from_raw(user.uid)).as_raw();
            Ids { uid, gid }
        });
        Self {
            own,
            not_send: PhantomData,
        }
    }
}

impl Drop for AsUser {
    fn drop(&mut self) {
        if let Some(own) = self.own {
            setfsuid(Uid::from_raw(own.uid));
            setfsgid(Gid::from_raw(own.gid));
            renew_death_signal();
        }
    }
}

/// The kernel takes the death signal away with every change of file-system ids. Without it a
/// sandbox whose sidecar hangs would outlive the worker that it belongs to.
fn renew_death_signal() {
    if tree::is_init() {
        // It was allowed once; where it is not any more, the end of the socket is left.
        let _ = prctl::set_pdeathsig(Signal::SIGKILL);
    }
}
