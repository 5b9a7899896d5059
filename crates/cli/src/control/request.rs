//! A line that a client sends, read strictly: what two readers could take for two requests is none.

use serde_json::{Map, Value};
use vfio_migration_compat::{Numbers, read_json};

use super::protocol::ControlRequest;
use super::refused::Refused;

/// Reads a line. The `id` comes back whatever it is and whatever the rest of the line is worth.
pub(super) fn read(line: &[u8]) -> (Option<Value>, Result<ControlRequest, Refused>) {
    match read_json(line, "not a request", Numbers::Any) {
        Ok(Value::Object(mut members)) => (members.remove("id"), request(members)),
        Ok(_) => (None, not_a_request("it is no object")),
        // JSON all the same, it may be: the client that wrote it waits for an answer of that id.
        Err(error) => {
            let id = serde_json::from_slice(line)
                .ok()
                .and_then(|mut line: Value| line.as_object_mut()?.remove("id"));
            (id, Err(Refused::new(NOT_FOUND, error.to_string())))
        }
    }
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
    use serde_json::json;

    use super::*;
    use crate::control::protocol::ControlVerb;

    #[test]
    fn what_could_be_read_in_two_ways_is_no_request() {
        for (line, says, id) in [
            (r#"{"execute":"query","execute":"quit","id":1}"#, "at execute: named twice", Some(json!(1))),
            (
                r#"{"execute":"quit","arguments":{"force":false,"force":true}}"#,
                "at arguments.force: named twice",
                None,
            ),
            (r#"{"execute":"quit","arguments":{},"arguments":{}}"#, "at arguments: named twice", None),
            (r#"{"execute":"query","id":{"a":1,"a":2}}"#, "at id.a: named twice", Some(json!({"a": 2}))),
            (r#"{"execute":"query","arguments":[]}"#, "they are no object", None),
            (r#"{"execute":"query","arguments":"x","id":null}"#, "they are no object", Some(Value::Null)),
            (r#"{"execute":"query","arguments":0}"#, "they are no object", None),
            (r#"["query"]"#, "it is no object", None),
            (r#"["query",{}]"#, "it is no object", None),
            (r#""query""#, "it is no object", None),
            ("null", "it is no object", None),
            ("\u{feff}{\"execute\":\"query\"}", "byte order mark", None),
            (r#"{"execute":"query"} {"execute":"quit"}"#, "trailing characters", None),
            (r#"{"execute":"fly","id":7}"#, "unknown variant `fly`", Some(json!(7))),
            (r#"{"execute":"query","exec":1}"#, "unknown field `exec`", None),
            (r#"{"arguments":{}}"#, "missing field `execute`", None),
            ("", "not a request", None),
        ] {
            let (found, request) = read(line.as_bytes());
            let refused = request.expect_err(line);
            assert!(refused.desc.contains(says), "{line}: {}", refused.desc);
            assert_eq!(found, id, "{line}");
        }
    }

    #[test]
    fn null_is_as_if_it_was_left_out_and_an_id_is_of_any_type() {
        for line in [
            r#"{"execute":"query","id":ID}"#,
            r#"{"execute":"query","arguments":null,"id":ID}"#,
            r#"{"execute":"query","arguments":{},"id":ID}"#,
        ] {
            for id in ["1.5", "-1", "\"x\"", "[1,2]", "{\"a\":null}", "true", "null"] {
                let (found, request) = read(line.replace("ID", id).as_bytes());
                assert_eq!(found.map(|id| id.to_string()).as_deref(), Some(id));
                assert_eq!(request.expect(line).execute, ControlVerb::Query);
            }
        }
    }
}
