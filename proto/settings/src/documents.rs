//! The keys and samples in documents, for tests that compare them with a schema.

use serde_json::Value;

/// The keys of a program in the tables of a Markdown page: the code of a row's first cell, where one of the next two cells begins
/// with the program's name, or with `both`.
#[must_use]
pub fn documented(page: &str, program: &str) -> Vec<String> {
    let rows = page.lines().filter_map(|line| line.strip_prefix('|'));
    rows.filter_map(|row| {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let of = |cell: &&&str| cell.starts_with(program) || cell.starts_with("both");
        cells.iter().skip(1).take(2).find(of)?;
        Some(code(cells.first()?))
    })
    .flatten()
    .collect()
}

/// What stands between backquotes and looks like a key.
fn code(cell: &str) -> Vec<String> {
    let key = |text: &&str| text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '[' | ']'));
    cell.split('`').skip(1).step_by(2).filter(key).map(ToOwned::to_owned).collect()
}

/// Whether a schema has a key, such as `targets[].tls.ca`.
#[must_use]
pub fn has_key(schema: &Value, key: &str) -> bool {
    let found = key.split('.').try_fold(schema, |section, part| {
        let (name, list) = part.strip_suffix("[]").map_or((part, false), |name| (name, true));
        let property = section.get("properties")?.get(name)?;
        if list { property.get("items") } else { Some(property) }
    });
    found.is_some()
}

/// The blocks of YAML of a Markdown page.
#[must_use]
pub fn yaml_blocks(page: &str) -> Vec<String> {
    let blocks = page.split("```yaml\n").skip(1);
    blocks.filter_map(|block| block.split("```").next()).map(ToOwned::to_owned).collect()
}

/// The text of a file that a ConfigMap holds, such as `gateway.yaml`.
#[must_use]
pub fn in_config_map(manifest: &str, file: &str) -> Option<String> {
    let (_, rest) = manifest.split_once(&format!("  {file}: |\n"))?;
    let lines = rest.lines().take_while(|line| line.is_empty() || line.starts_with("    "));
    Some(lines.map(|line| format!("{}\n", line.get(4..).unwrap_or_default())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_and_blocks_are_found() {
        let page = "| key | program | what |\n|---|---|---|\n| `a.b`, `c[].d` | gateway | `e` |\n| `f` | agent | x |\n\n```yaml\na: 1\n```\n";
        assert_eq!(documented(page, "gateway"), ["a.b", "c[].d"]);
        assert_eq!(yaml_blocks(page), ["a: 1\n"]);
        let schema = serde_json::json!({"properties": {"c": {"items": {"properties": {"d": {}}}}}});
        assert!(has_key(&schema, "c[].d") && !has_key(&schema, "c.d") && !has_key(&schema, "a"));
        assert_eq!(
            in_config_map("data:\n  x.yaml: |\n    a: 1\n    b:\n      c: 2\n---\n", "x.yaml").unwrap(),
            "a: 1\nb:\n  c: 2\n"
        );
    }
}
