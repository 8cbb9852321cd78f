//! Many tasks from a file of JSON lines: what a line may say, what a result
//! line says, and what they add up to.

pub(crate) mod input;
pub(crate) mod line;
pub(crate) mod progress;
pub(crate) mod record;
pub(crate) mod summary;
