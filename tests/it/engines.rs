//! The README's table of engines: each of its cells names a test, and each test is there.

use std::path::Path;

/// The cells of a table's line.
fn cells(line: &str) -> Vec<&str> {
    line.trim_matches('|').split('|').map(str::trim).collect()
}

/// Judges a cell: `[word](tests/it/FILE.rs "module::test")`, or a plain word that says why not.
fn judge(cell: &str) -> Result<bool, String> {
    let Some(rest) = cell.strip_prefix('[') else {
        return if cell.is_empty() || cell.contains("](") { Err("no cell is empty".into()) } else { Ok(false) };
    };
    let parts = rest.split_once("](").and_then(|(_, rest)| rest.strip_suffix("\")")?.split_once(" \""));
    let (file, test) = parts.ok_or("a link is [word](FILE \"module::test\")")?;
    let (module, name) = test.split_once("::").ok_or("a test is module::test")?;
    if !file.ends_with(&format!("/{module}.rs")) {
        return Err(format!("{module} is not in {file}"));
    }
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file))
        .map_err(|error| format!("{file}: {error}"))?;
    let mut lines = text.lines();
    let found = lines.position(|line| {
        let line = line.strip_prefix("async ").unwrap_or(line);
        line.strip_prefix("fn ").is_some_and(|rest| rest.starts_with(&format!("{name}(")))
    });
    let at = found.ok_or_else(|| format!("there is no {test}"))?;
    let before = text.lines().nth(at.wrapping_sub(1)).unwrap_or_default();
    if before.starts_with("#[") && before.contains("test") { Ok(true) } else { Err(format!("{test} is no test")) }
}

#[test]
fn each_cell_of_the_table_of_engines_is_backed_by_a_test() {
    let readme = include_str!("../../README.md");
    let section = readme.split("\n## Engines\n").nth(1).expect("it is there");
    let section = section.split("\n## ").next().expect("it ends somewhere");
    let lines: Vec<&str> = section.lines().filter(|line| line.starts_with('|')).collect();
    let mut links = 0;
    let mut columns = 0;
    for line in &lines {
        let cells = cells(line);
        if cells.first().is_some_and(|first| first.starts_with("---")) {
            continue;
        }
        // A table begins with its names.
        if cells.last() == Some(&"cluster") {
            columns = cells.len();
            continue;
        }
        assert_eq!(cells.len(), columns, "{line}");
        for cell in &cells[1..] {
            match judge(cell) {
                Ok(link) => links += usize::from(link),
                Err(why) => panic!("{cell}: {why}"),
            }
        }
    }
    assert!(lines.len() >= 8 && links >= 20, "{} lines, {links} links", lines.len());
}

#[test]
fn a_cell_without_its_test_is_noticed() {
    let sound = r#"[yes](tests/it/engines.rs "engines::a_cell_without_its_test_is_noticed")"#;
    assert_eq!(judge(sound), Ok(true));
    assert_eq!(judge("no"), Ok(false));
    for broken in [
        "",
        r#"[yes](tests/it/engines.rs "engines::no_such_test")"#,
        r#"[yes](tests/it/engines.rs "engines::judge")"#,
        r#"[yes](tests/it/wal.rs "engines::a_cell_without_its_test_is_noticed")"#,
        r#"[yes](tests/it/nowhere.rs "nowhere::a_cell_without_its_test_is_noticed")"#,
        "[yes](tests/it/engines.rs)",
    ] {
        assert!(judge(broken).is_err(), "{broken}");
    }
}
