//! Text tables for people: columns as wide as their widest cell.

use std::fmt::{self, Write as _};

/// How a column's cells stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Align {
    Left,
    Right,
}

/// Rows under a header. Cells are printed as they are, control characters out.
#[derive(Debug)]
pub(crate) struct Table {
    align: Vec<Align>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new<const N: usize>(columns: [(&str, Align); N]) -> Self {
        Self {
            align: columns.iter().map(|(_, align)| *align).collect(),
            rows: vec![columns.iter().map(|(name, _)| (*name).to_owned()).collect()],
        }
    }

    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        debug_assert_eq!(N, self.align.len(), "one cell for each column");
        // Names come from requests; a terminal must not take orders from them.
        let clean = cells.map(|cell| cell.chars().filter(|c| !c.is_control()).collect());
        self.rows.push(Vec::from(clean));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rows.len() == 1
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut widths = vec![0; self.align.len()];
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        for (index, row) in self.rows.iter().enumerate() {
            let mut text = String::new();
            for ((cell, width), align) in row.iter().zip(&widths).zip(&self.align) {
                if !text.is_empty() {
                    text.push_str("  ");
                }
                match align {
                    Align::Left => write!(text, "{cell:<width$}")?,
                    Align::Right => write!(text, "{cell:>width$}")?,
                }
            }
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{}", text.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new([("NAME", Align::Left), ("WARM", Align::Right)]);
        assert!(table.is_empty());
        table.row(["default".into(), "12".into()]);
        table.row(["a\u{1b}[2J".into(), "3".into()]);
        assert!(!table.is_empty());
        assert_eq!(
            table.to_string(),
            "NAME     WARM\ndefault    12\na[2J        3"
        );
    }
}
