//! The layers of the crate: a module imports only from the layers above its own in the list, never from one below.

use std::fs;
use std::path::{Path, PathBuf};

/// Modules in layer order. Modules of one layer may see each other, except those that stand apart.
const LAYERS: [&[&str]; 6] = [
    &["error", "dtype", "layout", "view", "ids", "range", "shapes", "problem"],
    &["spec"],
    &["cpu", "cuda"],
    &["dispatch", "op"],
    &["candle", "dlpack"],
    &["py"],
];

fn layer(module: &str) -> usize {
    LAYERS.iter().position(|modules| modules.contains(&module)).unwrap_or_else(|| panic!("{module} has no layer"))
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let nested = entries.flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] });
    nested.filter(|path| path.extension().is_some_and(|extension| extension == "rs")).collect()
}

/// Names that follow `crate::` in code (not in comments).
fn imports(text: &str) -> Vec<String> {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let name = |rest: &str| rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    code.flat_map(|line| line.split("crate::").skip(1).map(name)).filter(|name| !name.is_empty()).collect()
}

#[test]
fn no_module_imports_from_a_layer_below() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut checked = 0;
    for path in sources(&root) {
        let inside = path.strip_prefix(&root).unwrap();
        let module = inside.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
        if module == "lib" {
            continue;
        }
        for import in imports(&fs::read_to_string(&path).unwrap()) {
            let known = LAYERS.iter().any(|modules| modules.contains(&import.as_str()));
            if known {
                assert!(layer(&import) <= layer(module), "{} imports crate::{import}", inside.display());
                let apart = ["cpu", "cuda"].contains(&import.as_str()) && ["cpu", "cuda"].contains(&module);
                assert!(!apart || import == module, "{} imports crate::{import}", inside.display());
                checked += 1;
            }
        }
    }
    assert!(checked > 50, "only {checked} imports were found: the test reads the wrong place");
}

#[test]
fn the_numeric_core_names_no_python() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for path in sources(&root) {
        let inside = path.strip_prefix(&root).unwrap();
        if !inside.starts_with("py") && !inside.starts_with("dlpack") {
            let text = fs::read_to_string(&path).unwrap();
            assert!(!text.contains("pyo3"), "{} names pyo3", inside.display());
        }
    }
}
