//! Harm to what nats-server keeps on its disk, done while it is down.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::random::Random;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Damage {
    /// The end is missing.
    Truncate,
    /// One bit is another.
    FlipBit,
}

/// Harms the last block of one stream; what was done.
pub(crate) fn harm_a_last_block(
    jetstream: &Path,
    damage: Damage,
    random: &mut Random,
) -> anyhow::Result<String> {
    let blocks = last_blocks(jetstream)?;
    let path = blocks
        .get(random.index(blocks.len()))
        .with_context(|| format!("no stream under {} has a block", jetstream.display()))?;
    let mut bytes =
        std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let length = bytes.len() as u64;
    let done = harm(&mut bytes, damage, random);
    std::fs::write(path, &bytes).with_context(|| format!("cannot write {}", path.display()))?;
    let shown = path.strip_prefix(jetstream).unwrap_or(path).display();
    Ok(format!("{shown} of {length} bytes: {done}"))
}

fn harm(bytes: &mut Vec<u8>, damage: Damage, random: &mut Random) -> String {
    let length = bytes.len() as u64;
    match damage {
        Damage::Truncate => {
            let cut = random.between(1, length.clamp(1, 512));
            bytes.truncate((length - cut.min(length)) as usize);
            format!("{cut} bytes cut off")
        }
        Damage::FlipBit => {
            // In what was written last.
            let last = length.clamp(1, 4096);
            let at = length.saturating_sub(1 + random.below(last)) as usize;
            let bit = random.below(8);
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << bit;
            }
            format!("bit {bit} of byte {at} flipped")
        }
    }
}

/// The newest block of each stream that has something in it, in order.
fn last_blocks(jetstream: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut newest = std::collections::BTreeMap::new();
    let mut folders = vec![jetstream.to_path_buf()];
    while let Some(folder) = folders.pop() {
        let entries = std::fs::read_dir(&folder)
            .with_context(|| format!("cannot list {}", folder.display()))?;
        for entry in entries {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let number = path
                .file_name()
                .and_then(|name| name.to_str())
                .and_then(|name| name.strip_suffix(".blk"))
                .and_then(|name| name.parse::<u64>().ok());
            let filled = path.metadata().is_ok_and(|meta| meta.len() > 0);
            if let Some(number) = number
                && filled
            {
                let known = newest
                    .entry(folder.clone())
                    .or_insert_with(|| (number, path.clone()));
                if known.0 < number {
                    *known = (number, path);
                }
            }
        }
    }
    Ok(newest.into_values().map(|(_, path)| path).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_block_alone_is_harmed() {
        let folder = tempfile::tempdir().unwrap();
        let blocks = folder.path().join("streams/S/msgs");
        std::fs::create_dir_all(&blocks).unwrap();
        for number in [2, 10, 9] {
            std::fs::write(blocks.join(format!("{number}.blk")), [0; 100]).unwrap();
        }
        std::fs::write(blocks.join("index.db"), [0; 100]).unwrap();
        let mut random = Random::new(1);
        for damage in [Damage::FlipBit, Damage::Truncate] {
            harm_a_last_block(folder.path(), damage, &mut random).unwrap();
        }
        let read = |name: &str| std::fs::read(blocks.join(name)).unwrap();
        for whole in ["2.blk", "9.blk", "index.db"] {
            assert_eq!(read(whole), [0; 100], "{whole}");
        }
        assert!(read("10.blk").len() < 100);
    }

    #[test]
    fn one_bit_is_flipped() {
        let mut bytes = vec![0; 5000];
        harm(&mut bytes, Damage::FlipBit, &mut Random::new(5));
        let ones: u32 = bytes.iter().map(|byte| byte.count_ones()).sum();
        assert_eq!(ones, 1);
    }
}
