//! `vfio-migrate`: live migration for guests that own VFIO devices, for operators and for authors of drivers and
//! device servers. `vfio-migrate --help` says what it does.
#![forbid(unsafe_code)]

mod args;
mod control;
mod demo;
mod exit;
mod follow;
mod generated;
mod interrupt;
mod move_options;
mod output;
mod probe;
mod subject;
mod target;
mod units;
mod verbs;
mod verdict;
mod vm;
mod words;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use args::{Cli, Verb};
use exit::{Exit, Failure};
use interrupt::Interrupt;

fn main() -> ExitCode {
    let cli = Cli::parse();
    listen_to_log(cli.verbose);
    let json = cli.verb.json();
    let exit = match run(cli.verb) {
        Ok(exit) => exit,
        Err(failure) => {
            output::say(format_args!("vfio-migrate: {failure}"));
            if json {
                // If stdout is what failed, the exit code has to do.
                let _ = output::print_json(&failure.report());
            }
            failure.exit
        }
    };
    ExitCode::from(exit as u8)
}

fn run(verb: Verb) -> Result<Exit, Failure> {
    match verb {
        Verb::Demo(options) => demo::run(&options, &Interrupt::listen()?),
        Verb::Device(options) => verbs::device::run(&options),
        Verb::Vm(options) => vm::run(&options, &Interrupt::listen()?),
        Verb::Migrate(options) => verbs::moves::migrate(&options, &Interrupt::listen()?),
        Verb::Rehearse(options) => verbs::moves::rehearse(&options, &Interrupt::listen()?),
        Verb::Describe(options) => verbs::describe::run(&options),
        Verb::Check(options) => verbs::check::run(&options),
        Verb::Explain(options) => verbs::explain::run(&options),
        Verb::Save(options) => match (&options.control, &options.device) {
            (Some(control), None) => verbs::moves::save(&options, control, &Interrupt::listen()?),
            (None, Some(device)) => verbs::device_file::save(&options, device, &Interrupt::listen()?),
            _ => Err(Failure::new(Exit::Usage, "one of --control and --device says what is to be saved")),
        },
        Verb::Restore(options) => verbs::device_file::restore(&options, &Interrupt::listen()?),
        Verb::Status(options) => verbs::moves::status(&options, &Interrupt::listen()?),
        Verb::Cancel(target) => verbs::moves::cancel(&target),
        Verb::Continue(target) => verbs::moves::go_on(&target),
        Verb::Stop(target) => verbs::moves::stop(&target),
        Verb::Cont(target) => verbs::moves::cont(&target),
        Verb::Quit(target) => verbs::moves::quit(&target),
        Verb::Incoming(options) => verbs::moves::incoming(&options),
        Verb::Set(options) => verbs::moves::set(&options),
        Verb::Devices(options) => verbs::devices::run(&options),
        Verb::Doctor(options) => verbs::doctor::run(&options),
        Verb::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "vfio-migrate", &mut script);
            output::print(script)?;
            Ok(Exit::Done)
        }
        Verb::Generate { dir } => generated::generate(&dir),
    }
}

fn listen_to_log(verbose: u8) {
    let default = match verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
}
