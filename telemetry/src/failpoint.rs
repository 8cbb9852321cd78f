//! Points at which a test may end a process or break a rule on purpose.
//!
//! Only with the feature `failpoints`, which a release build refuses; without it every function
//! here is nothing. `docs/faults.md` says how points are set.

mod names;

#[cfg(feature = "failpoints")]
mod active;

#[cfg(feature = "failpoints")]
pub(crate) use active::set_up;
pub use names::{dispatcher, known, sidecar, worker};

#[cfg(all(feature = "failpoints", not(debug_assertions)))]
compile_error!("the feature `failpoints` breaks promises on purpose: debug builds alone have it");

/// A step on a task's way, at which the process may be told to die or to stop.
#[inline]
pub fn step(name: &str) {
    #[cfg(feature = "failpoints")]
    active::step(name);
    #[cfg(not(feature = "failpoints"))]
    let _ = name;
}

/// Whether something is to go wrong here.
#[inline]
pub fn is_on(name: &str) -> bool {
    #[cfg(feature = "failpoints")]
    let on = active::is_on(name);
    #[cfg(not(feature = "failpoints"))]
    let on = {
        let _ = name;
        false
    };
    on
}

/// What sidecars are to be told of their points, as `name=actions;…`; empty for nothing.
pub fn of_sidecars() -> String {
    #[cfg(feature = "failpoints")]
    let points = active::of_sidecars();
    #[cfg(not(feature = "failpoints"))]
    let points = String::new();
    points
}
