//! Completion scripts of the shells.

use clap::{Command, CommandFactory};
use clap_complete::Shell;

use crate::args::Cli;

/// Name of the command, as it is typed.
const NAME: &str = "vfio-migrate";

/// The script for a shell. It offers what `--help` shows: no hidden verb, no hidden option.
pub(crate) fn script(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut visible(&Cli::command()), NAME, &mut script);
    let script = String::from_utf8_lossy(&script).into_owned();
    match shell {
        // Half of the labels that clap_complete 4.6 gives to verbs take the hyphen in the command's name for a verb's
        // beginning, so that no case of the script is ever reached.
        Shell::Bash => script.replace("vfio__subcmd__migrate", "vfio__migrate"),
        _ => script,
    }
}

/// The command without what is hidden: `clap_complete` offers that too.
fn visible(command: &Command) -> Command {
    let mut shown = Command::new(command.get_name().to_owned())
        .disable_help_subcommand(command.is_disable_help_subcommand_set());
    if let Some(about) = command.get_about() {
        shown = shown.about(about.clone());
    }
    if let Some(version) = command.get_version() {
        shown = shown.version(version.to_owned()).propagate_version(command.is_propagate_version_set());
    }
    shown
        .args(command.get_arguments().filter(|argument| !argument.is_hide_set()).cloned())
        .subcommands(command.get_subcommands().filter(|verb| !verb.is_hide_set()).map(visible))
}
