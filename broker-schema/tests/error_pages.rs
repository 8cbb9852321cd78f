//! Every code has its page, and every page its code.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use broker_schema::ErrorCode;

#[test]
fn every_code_has_its_page() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/errors");
    let pages: BTreeSet<String> = fs::read_dir(&folder)
        .unwrap()
        .filter_map(|entry| {
            entry
                .unwrap()
                .file_name()
                .to_str()?
                .strip_suffix(".md")
                .map(Into::into)
        })
        .filter(|name| name != "README")
        .collect();
    let codes: BTreeSet<String> = ErrorCode::ALL.iter().map(ToString::to_string).collect();
    assert_eq!(pages, codes);
    let index = fs::read_to_string(folder.join("README.md")).unwrap();
    for code in codes {
        assert!(
            index.contains(&format!("[{code}]({code}.md)")),
            "{code} is not in the index"
        );
    }
}
