//! `vfio-migrate`: live migration for guests that own VFIO devices, for operators and for authors of drivers and
//! device servers. `vfio-migrate --help` says what it does.
#![forbid(unsafe_code)]

mod accounts;
mod address;
mod args;
mod bandwidth;
mod check_id;
mod completions;
mod control;
mod demo;
mod exit;
mod expect_file;
mod follow;
mod generated;
mod history;
mod incoming_options;
mod inherited;
mod interrupt;
mod manual;
mod move_options;
mod output;
mod peer_options;
mod probe;
mod progress_display;
mod schemas;
mod side;
mod signals;
mod socket_clients;
mod table;
mod target;
mod tls_options;
mod undecided;
mod units;
mod verbs;
mod verdict;
mod vm;
mod words;

use std::ffi::OsStr;
use std::process::ExitCode;

use clap::Parser;

use args::{Cli, CliVerb};
use exit::{CliError, Exit};
use interrupt::UserInterrupt;
use vfio_migration_types::printable;

fn main() -> ExitCode {
    let settled = signals::settle();
    inherited::record();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return misused(error),
    };
    init_logging(cli.verbose);
    let json = cli.verb.json();
    let exit = match settled.and_then(|()| run(cli.verb, json)) {
        Ok(exit) => exit,
        Err(failure) => {
            output::eprintln_line(format_args!("vfio-migrate: {failure}"));
            if json {
                // If stdout is what failed, the exit code has to do.
                let _ = output::print_json(&failure.report());
            }
            failure.exit
        }
    };
    ExitCode::from(exit as u8)
}

/// Says that the command line makes no sense, and why, or prints the help that it asks for.
fn misused(error: clap::Error) -> ExitCode {
    if !error.use_stderr() {
        error.exit();
    }
    // The error quotes the words as they came: names of files, as a shell's `*` gives them. Of printable words it is the same.
    let words = std::env::args_os().map(|word| printable(&word.to_string_lossy()).into_owned());
    let error = Cli::try_parse_from(words).err().unwrap_or(error);
    let text = error.render().to_string();
    output::eprint_lines(&text);
    // What verb it would have been is not known, but every verb's option for JSON has this name.
    // It takes no value, and who gives it one wants it all the same.
    let asks = |word: &OsStr| word == "--json" || word.as_encoded_bytes().starts_with(b"--json=");
    if std::env::args_os().skip(1).take_while(|word| word != "--").any(|word| asks(&word)) {
        let why = text.split("\n\n").next().unwrap_or_default();
        let why = why.trim_start_matches("error: ").split_whitespace().collect::<Vec<_>>().join(" ");
        let _ = output::print_json(&CliError::new(Exit::Usage, why).report());
    }
    ExitCode::from(Exit::Usage as u8)
}

fn run(verb: CliVerb, json: bool) -> Result<Exit, CliError> {
    match verb {
        CliVerb::Demo(options) => demo::run(&options, &UserInterrupt::listen(json)?),
        CliVerb::Device(options) => verbs::device::run(&options, &UserInterrupt::listen(json)?),
        CliVerb::Vm(options) => vm::run(&options, &UserInterrupt::listen(json)?),
        CliVerb::Migrate(options) => verbs::moves::migrate(&options, &UserInterrupt::listen(json)?),
        CliVerb::Rehearse(options) => verbs::moves::rehearse(&options, &UserInterrupt::listen(json)?),
        CliVerb::Describe(options) => verbs::describe::run(&options),
        CliVerb::Check(options) => verbs::check::run(&options),
        CliVerb::Explain(options) => verbs::explain::run(&options),
        CliVerb::Save(options) => match (&options.control, &options.device) {
            (Some(control), None) => verbs::moves::save(&options, control, &UserInterrupt::listen(json)?),
            (None, Some(device)) => verbs::device_file::save(&options, device, &UserInterrupt::listen(json)?),
            _ => Err(CliError::new(Exit::Usage, "one of --control and --device says what is to be saved")),
        },
        CliVerb::Restore(options) => verbs::device_file::restore(&options, &UserInterrupt::listen(json)?),
        CliVerb::Status(options) => match (&options.control, &options.state_dir) {
            (Some(control), None) => verbs::moves::status(&options, control, &UserInterrupt::listen(json)?),
            (None, Some(dir)) => verbs::state_dir::status(dir, options.json),
            _ => Err(CliError::new(Exit::Usage, "one of --control and --state-dir says what is to be shown")),
        },
        CliVerb::History(options) => verbs::history::run(&options),
        CliVerb::Cancel(target) => verbs::moves::cancel(&target),
        CliVerb::Continue(target) => verbs::moves::continue_migration(&target),
        CliVerb::Stop(target) => verbs::moves::stop(&target),
        CliVerb::Cont(target) => verbs::moves::cont(&target),
        CliVerb::Quit(options) => verbs::moves::quit(&options),
        CliVerb::Incoming(options) => verbs::moves::incoming(&options),
        CliVerb::Set(options) => verbs::moves::set(&options),
        CliVerb::Devices(options) => verbs::devices::run(&options),
        CliVerb::Doctor(options) => verbs::doctor::run(&options),
        CliVerb::Tls(options) => verbs::tls::run(&options),
        CliVerb::Completions { shell } => {
            output::print(completions::script(shell))?;
            Ok(Exit::Done)
        }
        CliVerb::Man { dir } => {
            manual::write(&dir)?;
            Ok(Exit::Done)
        }
        CliVerb::Generate { dir } => generated::generate(&dir),
    }
}

fn init_logging(verbose: u8) {
    let default = match verbose {
        // Sessions are told by default: a line when one begins, and one when it ends.
        0 => "warn,session=info",
        1 => "info",
        _ => "debug",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(output::LogWriter)
        .with_ansi(false)
        .with_target(false)
        .init();
}
