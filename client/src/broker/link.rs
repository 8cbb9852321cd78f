//! Whether the connection stands, and how often it was made anew.

use std::sync::Mutex;
use std::time::Instant;

use async_nats::Event;
use tokio::sync::watch;

/// The state of one connection. Whatever waits for an answer watches it: the
/// server forgets pulls and pending replies with the connection.
#[derive(Debug)]
pub(crate) struct Link {
    url: String,
    state: watch::Sender<LinkState>,
    lost_at: Mutex<Option<Instant>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LinkState {
    pub(crate) connected: bool,
    /// Grows whenever the connection is made anew.
    pub(crate) generation: u64,
    pub(crate) closed: bool,
}

impl LinkState {
    /// What follows an event, and whether it is worth a line.
    fn after(self, event: &Event) -> Self {
        match event {
            Event::Disconnected => Self {
                connected: false,
                ..self
            },
            Event::Connected if !self.connected => Self {
                connected: true,
                generation: self.generation + 1,
                ..self
            },
            Event::Closed => Self {
                connected: false,
                closed: true,
                ..self
            },
            _ => self,
        }
    }
}

impl Link {
    pub(crate) fn new(url: String) -> Self {
        Self {
            url,
            // The first connection is made before anybody can look.
            state: watch::Sender::new(LinkState {
                connected: true,
                generation: 0,
                closed: false,
            }),
            lost_at: Mutex::new(None),
        }
    }

    pub(crate) fn watch(&self) -> watch::Receiver<LinkState> {
        self.state.subscribe()
    }

    /// Takes note of an event. A loss and a return are logged once each,
    /// however many attempts lie between.
    pub(crate) fn observe(&self, event: &Event) {
        let before = *self.state.borrow();
        let after = before.after(event);
        let mut lost_at = self
            .lost_at
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        match event {
            Event::Disconnected if before.connected => {
                *lost_at = Some(Instant::now());
                tracing::warn!(url = %self.url, "connection to nats-server lost, reconnecting");
            }
            Event::Connected if after.generation > before.generation => {
                let down_ms = lost_at
                    .take()
                    .map_or(0, |at| at.elapsed().as_millis() as u64);
                tracing::info!(url = %self.url, down_ms, "connection to nats-server regained");
            }
            Event::SlowConsumer(subscription) => {
                tracing::warn!(
                    subscription,
                    "messages were dropped, the reader is too slow"
                );
            }
            Event::ServerError(error) => {
                tracing::warn!(url = %self.url, %error, "nats-server reports an error");
            }
            Event::LameDuckMode => {
                tracing::info!(url = %self.url, "nats-server is about to stop");
            }
            // Every failed attempt to reconnect comes as one of these.
            _ => tracing::debug!(url = %self.url, %event, "connection event"),
        }
        drop(lost_at);
        if before != after {
            self.state.send_replace(after);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_is_a_return_after_a_loss() {
        let link = Link::new("nats://x".to_owned());
        let watch = link.watch();
        let steps = [
            (Event::Connected, true, 0),
            (Event::Disconnected, false, 0),
            (Event::Disconnected, false, 0),
            (Event::Connected, true, 1),
            (Event::Connected, true, 1),
            (Event::Closed, false, 1),
        ];
        for (event, connected, generation) in steps {
            link.observe(&event);
            let state = *watch.borrow();
            assert_eq!(
                (state.connected, state.generation),
                (connected, generation),
                "{event}"
            );
        }
        assert!(watch.borrow().closed);
    }
}
