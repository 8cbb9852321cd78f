//! Finds the acknowledgements of published messages in what a nats-server sends.

/// Longest line that the protocol has here: an INFO with everything in it.
const MAX_LINE: usize = 64 * 1024;

/// Takes the server's bytes apart, whatever pieces they come in, and leaves
/// acknowledgements out. Bytes that are not the NATS protocol pass untouched.
#[derive(Debug, Default)]
pub(super) struct PubAcks {
    held: Vec<u8>,
    /// Not what it was taken for: passed on as it is from here on.
    strange: bool,
}

impl PubAcks {
    /// What passes, and how many acknowledgements did not. What is no whole
    /// message yet is kept, and with it the order.
    pub(super) fn pass(&mut self, piece: &[u8], drop_acks: bool) -> (Vec<u8>, u64) {
        // Nothing kept and nothing to drop: a proxy of anything.
        if self.strange || (self.held.is_empty() && !drop_acks && !splits(piece)) {
            return (piece.to_vec(), 0);
        }
        self.held.extend_from_slice(piece);
        let (mut passed, mut dropped, mut at) = (Vec::new(), 0, 0);
        loop {
            match message(&self.held[at..]) {
                Found::Whole { end, ack } => {
                    if ack && drop_acks {
                        dropped += 1;
                    } else {
                        passed.extend_from_slice(&self.held[at..at + end]);
                    }
                    at += end;
                }
                Found::Partial => break,
                Found::Strange => {
                    self.strange = true;
                    passed.extend_from_slice(&self.held[at..]);
                    at = self.held.len();
                    break;
                }
            }
        }
        self.held.drain(..at);
        (passed, dropped)
    }
}

/// Whether a piece ends within a message, so that the next begins in one.
fn splits(piece: &[u8]) -> bool {
    let mut at = 0;
    loop {
        if at == piece.len() {
            return false;
        }
        match message(&piece[at..]) {
            Found::Whole { end, .. } => at += end,
            Found::Partial => return true,
            Found::Strange => return false,
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Found {
    Whole { end: usize, ack: bool },
    Partial,
    Strange,
}

/// The message at the beginning of some bytes.
fn message(bytes: &[u8]) -> Found {
    let Some(line_end) = bytes
        .windows(2)
        .take(MAX_LINE)
        .position(|two| two == b"\r\n")
    else {
        return if bytes.len() > MAX_LINE || !begins(bytes) {
            Found::Strange
        } else {
            Found::Partial
        };
    };
    let line = &bytes[..line_end];
    let after = line_end + 2;
    if !begins(line) {
        return Found::Strange;
    }
    let Ok(text) = std::str::from_utf8(line) else {
        return Found::Strange;
    };
    let mut words = text.split_ascii_whitespace();
    let verb = words.next().unwrap_or_default();
    let words: Vec<&str> = words.collect();
    let number = |word: Option<&&str>| word.and_then(|word| word.parse::<usize>().ok());
    let (headers, size) = match verb {
        "MSG" => (Some(0), number(words.last())),
        "HMSG" => (
            number(words.len().checked_sub(2).and_then(|at| words.get(at))),
            number(words.last()),
        ),
        _ => {
            return Found::Whole {
                end: after,
                ack: false,
            };
        }
    };
    let (Some(headers), Some(size)) = (headers, size) else {
        return Found::Strange;
    };
    let end = after + size + 2;
    if bytes.len() < end || headers > size {
        return if headers > size {
            Found::Strange
        } else {
            Found::Partial
        };
    }
    let payload = &bytes[after + headers..after + size];
    let to_inbox = words
        .first()
        .is_some_and(|subject| subject.starts_with("_INBOX"));
    Found::Whole {
        end,
        ack: to_inbox && is_ack(payload),
    }
}

fn begins(line: &[u8]) -> bool {
    let verbs: [&[u8]; 7] = [
        b"INFO ", b"MSG ", b"HMSG ", b"PING", b"PONG", b"+OK", b"-ERR",
    ];
    verbs.iter().any(|verb| {
        let shared = verb.len().min(line.len());
        line[..shared].eq_ignore_ascii_case(&verb[..shared])
    })
}

/// `{"stream":"X","seq":1}` with `domain` or `duplicate` perhaps, or an error
/// of the same place: answers of the API have a `type` beside.
fn is_ack(payload: &[u8]) -> bool {
    let Ok(serde_json::Value::Object(fields)) = serde_json::from_slice(payload) else {
        return false;
    };
    fields.contains_key("stream") && fields.contains_key("seq") && !fields.contains_key("type")
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACK: &str = r#"{"stream":"S","seq":12}"#;

    fn msg(subject: &str, payload: &str) -> String {
        format!("MSG {subject} 3 {}\r\n{payload}\r\n", payload.len())
    }

    fn hmsg(subject: &str, payload: &str) -> String {
        let headers = "NATS/1.0\r\nA: b\r\n\r\n";
        let total = headers.len() + payload.len();
        format!(
            "HMSG {subject} 3 reply {} {total}\r\n{headers}{payload}\r\n",
            headers.len()
        )
    }

    #[test]
    fn acknowledgements_alone_are_left_out_however_they_come() {
        let kept = [
            "INFO {\"server_id\":\"x\"}\r\n".to_owned(),
            "PING\r\n".to_owned(),
            msg("orders", ACK),
            msg("_INBOX.a.b", r#"{"type":"io.nats","stream":"S","seq":1}"#),
            msg("_INBOX.a.b", "\r\nMSG no\r\n"),
            hmsg("_INBOX.a.b", "text"),
            "+OK\r\n".to_owned(),
        ];
        let mut stream = String::new();
        for message in &kept {
            stream.push_str(message);
            stream.push_str(&msg("_INBOX.a.b", ACK));
            stream.push_str(&hmsg("_INBOX.a.b", ACK));
        }
        for size in [1, 3, 7, 64, stream.len()] {
            let mut filter = PubAcks::default();
            let (mut passed, mut dropped) = (Vec::new(), 0);
            for piece in stream.as_bytes().chunks(size) {
                let (some, few) = filter.pass(piece, true);
                passed.extend(some);
                dropped += few;
            }
            assert_eq!(String::from_utf8(passed).unwrap(), kept.concat(), "{size}");
            assert_eq!(dropped, 2 * kept.len() as u64, "{size}");
        }
    }

    #[test]
    fn dropping_can_begin_and_end_in_the_middle_of_a_message() {
        let stream = [msg("a", "1"), msg("_INBOX.x", ACK), msg("b", "2")].concat();
        for at in 0..stream.len() {
            let mut filter = PubAcks::default();
            let (first, _) = filter.pass(&stream.as_bytes()[..at], false);
            let (second, dropped) = filter.pass(&stream.as_bytes()[at..], true);
            let passed = String::from_utf8([first, second].concat()).unwrap();
            let with = stream.clone();
            let without = [msg("a", "1"), msg("b", "2")].concat();
            let expected = if dropped == 1 { without } else { with };
            assert_eq!(passed, expected, "{at}");
        }
    }

    #[test]
    fn another_protocol_passes_as_it_is() {
        let mut filter = PubAcks::default();
        for piece in [&b"$3\r\nfoo\r\n"[..], b"*1\r\n", b"MSG x"] {
            assert_eq!(filter.pass(piece, true), (piece.to_vec(), 0));
        }
    }
}
