//! A line that a client sends, read strictly: what two readers could take for two requests is none.

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use vfio_migration_compat::{Numbers, read_json};

use super::protocol::ControlRequest;
use super::refused::Refused;

/// Reads a line. The `id` comes back as it was sent, digit for digit, whatever it is and whatever the rest of the line is worth:
/// the client that wrote it waits for an answer of that id.
pub(super) fn read(line: &[u8]) -> (Option<Box<RawValue>>, Result<ControlRequest, Refused>) {
    let id = id(line);
    match read_json(line, "not a request", Numbers::Any) {
        Ok(Value::Object(mut members)) => {
            members.remove("id");
            (id, request(members))
        }
        Ok(_) => (None, not_a_request("it is no object")),
        Err(error) => (id, Err(Refused::new(NOT_FOUND, error.to_string()))),
    }
}

/// The `id` of a line that is JSON; of one that has two, none.
fn id(line: &[u8]) -> Option<Box<RawValue>> {
    #[derive(Deserialize)]
    struct Members {
        #[serde(default, deserialize_with = "raw")]
        id: Option<Box<RawValue>>,
    }
    // An `Option` would take null for none.
    fn raw<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<Box<RawValue>>, D::Error> {
        Box::deserialize(from).map(Some)
    }
    // A list would do for members in their order.
    let object = line.trim_ascii_start().starts_with(b"{");
    serde_json::from_slice(line).ok().filter(|_| object).and_then(|members: Members| members.id)
}

/// The class of a line that is no request.
const NOT_FOUND: &str = "CommandNotFound";

fn not_a_request<T>(why: impl std::fmt::Display) -> Result<T, Refused> {
    Err(Refused::new(NOT_FOUND, format!("not a request: {why}")))
}

fn request(members: Map<String, Value>) -> Result<ControlRequest, Refused> {
    // A list would do for arguments in their order.
    if !matches!(members.get("arguments"), None | Some(Value::Null | Value::Object(_))) {
        return Err(Refused::generic("bad arguments: they are no object"));
    }
    serde_json::from_value(Value::Object(members)).or_else(not_a_request)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::protocol::ControlVerb;

    #[test]
    fn what_could_be_read_in_two_ways_is_no_request() {
        for (line, says, id) in [
            (r#"{"execute":"query","execute":"quit","id":1}"#, "at execute: named twice", Some("1")),
            (
                r#"{"execute":"quit","arguments":{"force":false,"force":true}}"#,
                "at arguments.force: named twice",
                None,
            ),
            (r#"{"execute":"quit","arguments":{},"arguments":{}}"#, "at arguments: named twice", None),
            (r#"{"execute":"query","id":{"a":1,"a":2}}"#, "at id.a: named twice", Some(r#"{"a":1,"a":2}"#)),
            (r#"{"execute":"query","id":1,"id":2}"#, "at id: named twice", None),
            (r#"{"execute":"query","id":1,"i\u0064":1}"#, "at id: named twice", None),
            (r#"{"execute":"query","id":1e400}"#, "number out of range", Some("1e400")),
            (r#"[{"a":1,"a":2}]"#, "named twice", None),
            (r#"{"execute":"query","arguments":[]}"#, "they are no object", None),
            (r#"{"execute":"query","arguments":"x","id":null}"#, "they are no object", Some("null")),
            (r#"{"execute":"query","arguments":0}"#, "they are no object", None),
            (r#"["query"]"#, "it is no object", None),
            (r#"["query",{}]"#, "it is no object", None),
            (r#""query""#, "it is no object", None),
            ("null", "it is no object", None),
            ("\u{feff}{\"execute\":\"query\"}", "byte order mark", None),
            (r#"{"execute":"query"} {"execute":"quit"}"#, "trailing characters", None),
            (r#"{"execute":"fly","id":7}"#, "unknown variant `fly`", Some("7")),
            (r#"{"execute":"query","exec":1}"#, "unknown field `exec`", None),
            (r#"{"arguments":{}}"#, "missing field `execute`", None),
            ("", "not a request", None),
        ] {
            let (found, request) = read(line.as_bytes());
            let refused = request.expect_err(line);
            assert!(refused.desc.contains(says), "{line}: {}", refused.desc);
            assert_eq!(found.as_deref().map(RawValue::get), id, "{line}");
        }
    }

    #[test]
    fn null_is_as_if_it_was_left_out_and_an_id_is_of_any_type() {
        for line in [
            r#"{"execute":"query","id":ID}"#,
            r#"{"execute":"query","arguments":null,"id":ID}"#,
            r#"{"execute":"query","arguments":{},"id":ID}"#,
        ] {
            for id in [
                "1.5",
                "-1",
                "\"x\"",
                "[1,2]",
                "{\"a\":null}",
                "true",
                "null",
                "18446744073709551617",
                "123456789012345678901234567890",
                "0.1000000000000000055511151231257827",
                "1e2",
                "-0",
                "1.0",
                "\"\\u0061\"",
                "{\"b\": 1, \"a\": 2}",
            ] {
                let (found, request) = read(line.replace("ID", id).as_bytes());
                assert_eq!(found.as_deref().map(RawValue::get), Some(id));
                assert_eq!(request.expect(line).execute, ControlVerb::Query);
            }
        }
    }
}
