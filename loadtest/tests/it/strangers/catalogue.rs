//! Is each row of the catalogue of bad inputs (docs/requirements.md) held by a test, or decided by a sentence of the documentation?
//! `.ci/ids` checks the other direction, and every other id.

use std::path::{Path, PathBuf};

/// The groups of rows, and how many each has.
const GROUPS: [(&str, u32); 12] = [
    ("H1", 21),
    ("H2", 18),
    ("UP", 9),
    ("AU", 15),
    ("PA", 10),
    ("TU", 15),
    ("MX", 13),
    ("EN", 10),
    ("AD", 8),
    ("CF", 9),
    ("ST", 7),
    ("AG", 9),
];

/// Every text that can cite a row: sources, tests, and the documentation; not the catalogue itself.
fn texts() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut folders: Vec<_> =
        ["proto", "certs", "gateway", "agent", "loadtest", "docs"].map(|name| root.join(name)).into();
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() && name != "target" {
                folders.push(path);
            } else if [".rs", ".py", ".md"].iter().any(|end| name.ends_with(end)) && name != "requirements.md"
            {
                files.push(path);
            }
        }
    }
    files
}

/// Goal: every row of the catalogue is cited by a test, or by the sentence that decides it.
#[test]
fn every_row_of_the_catalogue_is_cited() {
    let text: String = texts().iter().map(|path| std::fs::read_to_string(path).unwrap()).collect();
    let catalogue =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/requirements.md"))
            .unwrap();
    // Rows about what Towline does not have yet, such as mapped identities, wait behind this heading.
    let (now, later) = catalogue.split_once("## Not cited yet").unwrap();
    let rows =
        GROUPS.iter().flat_map(|(group, rows)| (1..=*rows).map(move |row| format!("{group}-{row:02}")));
    let in_table = |table: &str, row: &String| table.contains(&format!("\n| {row} |"));
    let (rows, waiting): (Vec<String>, Vec<String>) = rows.partition(|row| in_table(now, row));
    assert!(waiting.iter().all(|row| in_table(later, row)), "no row for one of {waiting:?}");
    assert_eq!(rows.len(), 141);
    let is_cited = |row: &String| {
        let begins_a_name = format!("fn {}_", row.to_lowercase().replace('-', "_"));
        text.contains(row.as_str()) || text.contains(&begins_a_name)
    };
    let missing: Vec<_> = rows.iter().filter(|row| !is_cited(row)).collect();
    assert!(missing.is_empty(), "cited nowhere: {missing:?}");
}
