//! The files that are generated from the code and checked in: man pages, completions, schemas, and the page that lists them.

use std::path::Path;

use clap_complete::{Generator, Shell};

use crate::completions;
use crate::exit::{CliError, Exit};
use crate::words::write_regular;
use crate::{manual, schemas};

/// Writes `man/`, `completions/`, `docs/schemas/` and `docs/json.md` under `top`.
pub(crate) fn generate(top: &Path) -> Result<Exit, CliError> {
    let doing =
        |error: std::io::Error| CliError::caused(&format!("cannot write under {}", top.display()), &error);
    let (scripts, docs) = (top.join("completions"), top.join("docs"));
    for dir in [&scripts, &docs.join("schemas")] {
        std::fs::create_dir_all(dir).map_err(doing)?;
    }
    manual::write(&top.join("man"))?;
    for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
        let file = scripts.join(shell.file_name("vfio-migrate"));
        write_regular(&file, completions::script(shell).as_bytes())?;
    }
    write_regular(&docs.join("json.md"), schemas::page().as_bytes())?;
    for (name, schema) in schemas::by_name() {
        let mut text = serde_json::to_string_pretty(&schema)
            .map_err(|error| CliError::caused(&format!("cannot write the schema of {name}"), &error))?;
        text.push('\n');
        write_regular(&docs.join(format!("schemas/{name}.json")), text.as_bytes())?;
    }
    Ok(Exit::Done)
}
