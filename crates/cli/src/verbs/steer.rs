//! Verbs that are one request each: `cancel`, `continue`, `set`, `stop`, `cont`, `quit`, `incoming`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::args::moves::{Incoming, Set};
use crate::control::client::ClientError;
use crate::control::protocol::{IncomingArguments, ParameterArguments, Verb};
use crate::exit::{Exit, Failure};
use crate::output::{print, print_json};
use crate::target::Target;
use crate::units::milliseconds;
use crate::words::uri;

/// What the verbs that only ask a `vm` for something print with `--json`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct Acknowledged {
    /// The request was taken.
    pub(crate) ok: bool,
}

pub(crate) fn cancel(target: &Target) -> Result<Exit, Failure> {
    request(target, Verb::MigrateCancel, Value::Null, "cancelling; the guest goes on where it is")
}

pub(crate) fn go_on(target: &Target) -> Result<Exit, Failure> {
    request(target, Verb::MigrateContinue, Value::Null, "the migration goes on")
}

pub(crate) fn set(options: &Set) -> Result<Exit, Failure> {
    let arguments = ParameterArguments {
        downtime_limit: options.downtime_limit.map(milliseconds),
        max_bandwidth: options.bandwidth,
    };
    request(&options.target, Verb::MigrateSetParameters, json!(arguments), "set")
}

pub(crate) fn stop(target: &Target) -> Result<Exit, Failure> {
    request(target, Verb::Stop, Value::Null, "the guest stands still")
}

pub(crate) fn cont(target: &Target) -> Result<Exit, Failure> {
    request(target, Verb::Cont, Value::Null, "the guest runs")
}

pub(crate) fn quit(target: &Target) -> Result<Exit, Failure> {
    request(target, Verb::Quit, Value::Null, "the process ends")
}

pub(crate) fn incoming(options: &Incoming) -> Result<Exit, Failure> {
    uri(&options.uri)?;
    let arguments = IncomingArguments { uri: options.uri.clone() };
    request(&options.target, Verb::MigrateIncoming, json!(arguments), "it waits for a guest")
}

fn request(target: &Target, verb: Verb, arguments: Value, done: &str) -> Result<Exit, Failure> {
    match target.connect()?.call(verb, arguments) {
        Ok(_) => {}
        // The process may be gone before its answer is read.
        Err(ClientError::Closed) if verb == Verb::Quit => {}
        Err(error) => return Err(error.failure("refused")),
    }
    if target.json {
        print_json(&Acknowledged { ok: true })?;
    } else {
        print(format!("{done}\n"))?;
    }
    Ok(Exit::Done)
}
