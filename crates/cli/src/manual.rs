//! The files that are generated from the code and checked in: man pages, completions, schemas.

use std::path::Path;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::args::Cli;
use crate::exit::{Exit, Failure};

/// Writes `man/`, `completions/` and `docs/schemas/` under `top`.
pub(crate) fn generate(top: &Path) -> Result<Exit, Failure> {
    let doing =
        |error: std::io::Error| Failure::caused(&format!("cannot write under {}", top.display()), &error);
    let (man, completions, schemas) = (top.join("man"), top.join("completions"), top.join("docs/schemas"));
    for dir in [&man, &completions, &schemas] {
        std::fs::create_dir_all(dir).map_err(doing)?;
    }
    clap_mangen::generate_to(Cli::command(), &man).map_err(doing)?;
    for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
        clap_complete::generate_to(shell, &mut Cli::command(), "vfio-migrate", &completions)
            .map_err(doing)?;
    }
    for (name, schema) in crate::schema::all() {
        let mut text = serde_json::to_string_pretty(&schema)
            .map_err(|error| Failure::caused(&format!("cannot write the schema of {name}"), &error))?;
        text.push('\n');
        std::fs::write(schemas.join(format!("{name}.json")), text).map_err(doing)?;
    }
    Ok(Exit::Done)
}
