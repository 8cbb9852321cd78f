//! Snippets out of the documentation, so that what it shows is what runs.

use anyhow::Context;

use crate::binaries::workspace;

/// The fenced block of a language that follows a heading in a page.
pub fn snippet(page: &str, heading: &str, language: &str) -> anyhow::Result<String> {
    let path = workspace().join(page);
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}", path.display()))?;
    after(&text, heading, language)
        .with_context(|| format!("{page} has no {language} block after {heading:?}"))
}

fn after(text: &str, heading: &str, language: &str) -> Option<String> {
    let mut lines = text
        .lines()
        .skip_while(|line| line.trim_start_matches('#').trim() != heading);
    lines.next()?;
    let fence = format!("```{language}");
    let block: Vec<&str> = lines
        .take_while(|line| !line.starts_with("## "))
        .skip_while(|line| line.trim() != fence)
        .skip(1)
        .take_while(|line| line.trim() != "```")
        .collect();
    (!block.is_empty()).then(|| block.join("\n") + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_block_of_its_own_section_is_found() {
        let text = "# a\n```sh\none\n```\n## b\ntext\n```sh\ntwo\n\nthree\n```\n## c\n";
        assert_eq!(after(text, "b", "sh").as_deref(), Some("two\n\nthree\n"));
        assert_eq!(after(text, "c", "sh"), None);
        assert_eq!(after(text, "b", "python"), None);
    }
}
