//! SHA-256 as lower-case hex: of requests and of output.

use sha2::{Digest as _, Sha256};

/// SHA-256 of `bytes`, as 64 hex digits.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// A digest over bytes that come in pieces.
#[derive(Clone, Default)]
pub struct Running {
    hasher: Sha256,
    any: bool,
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running").finish_non_exhaustive()
    }
}

impl Running {
    pub fn update(&mut self, bytes: &[u8]) {
        self.any |= !bytes.is_empty();
        self.hasher.update(bytes);
    }

    /// Hex, or the empty string for no bytes, as `Output::sha256` has it.
    pub fn finish(self) -> String {
        if self.any {
            hex(&self.hasher.finalize())
        } else {
            String::new()
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|byte| {
            [
                DIGITS[usize::from(byte >> 4)],
                DIGITS[usize::from(byte & 15)],
            ]
        })
        .map(char::from)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_and_the_whole_agree() {
        let mut running = Running::default();
        running.update(b"ab");
        running.update(b"c");
        assert_eq!(running.finish(), sha256_hex(b"abc"));
        assert_eq!(
            sha256_hex(b"abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(Running::default().finish(), "");
    }
}
