//! Which rows does the catalogue of bad inputs have, and is each of them held by something? The catalogue itself is not in this
//! repository; its ids are, here, and wherever a test or a sentence of the documentation holds one.

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
/// Rows about what Towline does not have yet: mapped identities, and a store of several replicas.
const LATER: [&str; 3] = ["AU-15", "ST-05", "ST-06"];

/// Every text that can cite a row: sources, tests, and the documentation; not this file.
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
            } else if [".rs", ".py", ".md"].iter().any(|end| name.ends_with(end)) && name != "catalogue.rs" {
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
    let rows =
        GROUPS.iter().flat_map(|(group, rows)| (1..=*rows).map(move |row| format!("{group}-{row:02}")));
    let rows: Vec<String> = rows.filter(|row| !LATER.contains(&row.as_str())).collect();
    assert_eq!(rows.len(), 141);
    let is_cited = |row: &String| {
        let begins_a_name = format!("fn {}_", row.to_lowercase().replace('-', "_"));
        text.contains(row.as_str()) || text.contains(&begins_a_name)
    };
    let missing: Vec<_> = rows.iter().filter(|row| !is_cited(row)).collect();
    assert!(missing.is_empty(), "cited nowhere: {missing:?}");
}
