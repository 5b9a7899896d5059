//! The negotiation: VERSION, its JSON, and what each end announces.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::header::HEADER_SIZE;
use super::{
    CodecError, DEFAULT_MAX_DATA_XFER_SIZE, DEFAULT_MAX_DMA_MAPS, DEFAULT_MAX_MSG_FDS, DEFAULT_PGSIZES,
    MAX_VERSION_DATA, split,
};

/// The key of the extension among the capabilities. Peers that do not know it ignore it.
const EXTENSION_KEY: &str = "x-vfio-migrate";

/// What the protocol lacks for migration, each part in force only where both ends announce it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Extension {
    /// The states RUNNING_P2P and PRE_COPY_P2P exist, as does the P2P flag.
    pub p2p: bool,
    /// Command [`X_PRECOPY_INFO`](super::Command::X_PRECOPY_INFO).
    pub precopy_info: bool,
    /// Feature [`MIG_DATA_SIZE`](super::Feature::MIG_DATA_SIZE).
    pub data_size: bool,
    /// Command [`X_MANIFEST`](super::Command::X_MANIFEST).
    pub manifest: bool,
}

/// The longest message, header included, to a peer that does not speak the extension. libvfio-user reads a payload
/// with one recv(2), which gives no more than one buffer of the kernel's: 36,544 bytes have been seen.
const LONGEST_PLAIN_MESSAGE: usize = 32 << 10;

impl Extension {
    /// The version of the extension that this crate speaks.
    pub const VERSION: u64 = 1;
    /// Every extension.
    pub const ALL: Self = Self { p2p: true, precopy_info: true, data_size: true, manifest: true };
    /// No extension.
    pub const NONE: Self = Self { p2p: false, precopy_info: false, data_size: false, manifest: false };

    /// The longest payload of one message to a peer that speaks this much of the extension.
    pub(crate) fn longest_payload(self) -> usize {
        match self {
            Self::NONE => LONGEST_PLAIN_MESSAGE - HEADER_SIZE,
            // The negotiated size is one of data; the longest that comes with it is a table of ranges.
            _ => u32::MAX as usize - HEADER_SIZE,
        }
    }

    /// The extensions that both sides announce.
    pub fn and(self, other: Self) -> Self {
        Self {
            p2p: self.p2p && other.p2p,
            precopy_info: self.precopy_info && other.precopy_info,
            data_size: self.data_size && other.data_size,
            manifest: self.manifest && other.manifest,
        }
    }
}

/// The twin socket, as a capability.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TwinSocket {
    /// Whether the sender supports it; in a reply: whether it is in use.
    #[serde(default)]
    pub supported: bool,
    /// In a reply: which of its descriptors is the socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fd_index: Option<u32>,
}

/// Capabilities that one end announces. Values that are absent have their defaults filled in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VersionCapabilities {
    /// Most descriptors that the sender takes in one message.
    pub max_msg_fds: u32,
    /// Most data in one message that the sender takes, in bytes.
    pub max_data_xfer_size: u32,
    /// Most DMA mappings at a time.
    pub max_dma_maps: u32,
    /// Page sizes of DMA mappings, OR-ed.
    pub pgsizes: u64,
    /// How the server's own requests travel.
    pub twin_socket: TwinSocket,
    /// Whether REGION_WRITE_MULTI may be used.
    pub write_multiple: bool,
    /// The extension, of our version; of another version it counts as absent.
    pub extension: Extension,
}

impl Default for VersionCapabilities {
    fn default() -> Self {
        Self {
            max_msg_fds: DEFAULT_MAX_MSG_FDS,
            max_data_xfer_size: DEFAULT_MAX_DATA_XFER_SIZE,
            max_dma_maps: DEFAULT_MAX_DMA_MAPS,
            pgsizes: DEFAULT_PGSIZES,
            twin_socket: TwinSocket::default(),
            write_multiple: false,
            extension: Extension::NONE,
        }
    }
}

/// VERSION, and its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VersionPayload {
    /// Major version of the protocol: 0.
    pub major: u16,
    /// At most what the client proposed, in the reply.
    pub minor: u16,
    /// Capabilities that the sender announces.
    pub capabilities: VersionCapabilities,
}

impl VersionPayload {
    /// Reads the payload. Unknown capabilities are ignored; known ones of a wrong type are not.
    ///
    /// # Errors
    /// The payload is too long or too short, its JSON does not parse, or a number is out of its range.
    pub fn decode(body: &[u8]) -> Result<Self, CodecError> {
        let (major, rest) = split::<2>(body)?;
        let (minor, json) = split::<2>(rest)?;
        if json.len() > MAX_VERSION_DATA {
            return Err(CodecError::Invalid(format!("{} bytes of version data", json.len())));
        }
        // The text ends at its NUL; a peer that forgot it is understood.
        let end = json.iter().position(|byte| *byte == 0).unwrap_or(json.len());
        let json = json.get(..end).unwrap_or_default();
        let capabilities = if json.iter().all(u8::is_ascii_whitespace) {
            VersionCapabilities::default()
        } else {
            let value: Value = serde_json::from_slice(json).map_err(|error| invalid(error.to_string()))?;
            capabilities(&value)?
        };
        Ok(Self { major: u16::from_ne_bytes(*major), minor: u16::from_ne_bytes(*minor), capabilities })
    }

    /// Appends the payload to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let c = &self.capabilities;
        let mut caps = Map::new();
        caps.insert("max_msg_fds".into(), c.max_msg_fds.into());
        caps.insert("max_data_xfer_size".into(), c.max_data_xfer_size.into());
        caps.insert("max_dma_maps".into(), c.max_dma_maps.into());
        caps.insert("pgsizes".into(), c.pgsizes.into());
        if c.twin_socket.supported {
            caps.insert("twin_socket".into(), serde_json::json!(c.twin_socket));
        }
        caps.insert("write_multiple".into(), c.write_multiple.into());
        if c.extension != Extension::NONE {
            let Extension { p2p, precopy_info, data_size, manifest } = c.extension;
            caps.insert(
                EXTENSION_KEY.into(),
                serde_json::json!({
                    "version": Extension::VERSION,
                    "p2p": p2p,
                    "precopy_info": precopy_info,
                    "data_size": data_size,
                    "manifest": manifest,
                }),
            );
        }
        out.extend_from_slice(&self.major.to_ne_bytes());
        out.extend_from_slice(&self.minor.to_ne_bytes());
        out.extend_from_slice(serde_json::json!({ "capabilities": caps }).to_string().as_bytes());
        out.push(0);
    }
}

fn invalid(what: impl Into<String>) -> CodecError {
    CodecError::Invalid(what.into())
}

/// A value of a wrong type, in words. It is quoted where it cannot be long, nor hold a text of the peer's, which may end on a
/// terminal.
fn wrong(key: &str, value: &Value) -> String {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => format!("{key} is {value}"),
        Value::String(_) => format!("{key} is a text"),
        Value::Array(_) => format!("{key} is an array"),
        Value::Object(_) => format!("{key} has a member of a wrong type"),
    }
}

fn capabilities(version: &Value) -> Result<VersionCapabilities, CodecError> {
    let version = version.as_object().ok_or_else(|| invalid("version data that is no object"))?;
    let empty = Map::new();
    let caps = match version.get("capabilities") {
        None | Some(Value::Null) => &empty,
        Some(caps) => caps.as_object().ok_or_else(|| invalid("capabilities that are no object"))?,
    };
    let default = VersionCapabilities::default();
    let twin_socket = match caps.get("twin_socket") {
        None | Some(Value::Null) => TwinSocket::default(),
        Some(value) => TwinSocket::deserialize(value).map_err(|_| invalid(wrong("twin_socket", value)))?,
    };
    Ok(VersionCapabilities {
        max_msg_fds: number(caps, "max_msg_fds", default.max_msg_fds)?,
        max_data_xfer_size: number(caps, "max_data_xfer_size", default.max_data_xfer_size)?,
        max_dma_maps: number(caps, "max_dma_maps", default.max_dma_maps)?,
        pgsizes: number(caps, "pgsizes", default.pgsizes)?,
        twin_socket,
        write_multiple: boolean(caps, "write_multiple")?,
        extension: extension(caps)?,
    })
}

/// A number; one that is larger than the type holds means "no limit of mine" and is cut to the type's largest.
fn number<T: TryFrom<u64> + Bounded>(
    caps: &Map<String, Value>,
    key: &str,
    default: T,
) -> Result<T, CodecError> {
    match caps.get(key) {
        None | Some(Value::Null) => Ok(default),
        Some(value) => {
            let value = value.as_u64().ok_or_else(|| invalid(wrong(key, value)))?;
            Ok(T::try_from(value).unwrap_or(T::LARGEST))
        }
    }
}

trait Bounded {
    const LARGEST: Self;
}

impl Bounded for u32 {
    const LARGEST: Self = Self::MAX;
}

impl Bounded for u64 {
    const LARGEST: Self = Self::MAX;
}

fn boolean(object: &Map<String, Value>, key: &str) -> Result<bool, CodecError> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(value) => value.as_bool().ok_or_else(|| invalid(wrong(key, value))),
    }
}

fn extension(caps: &Map<String, Value>) -> Result<Extension, CodecError> {
    let Some(object) = caps.get(EXTENSION_KEY).and_then(Value::as_object) else {
        return Ok(Extension::NONE);
    };
    if object.get("version").and_then(Value::as_u64) != Some(Extension::VERSION) {
        return Ok(Extension::NONE);
    }
    Ok(Extension {
        p2p: boolean(object, "p2p")?,
        precopy_info: boolean(object, "precopy_info")?,
        data_size: boolean(object, "data_size")?,
        manifest: boolean(object, "manifest")?,
    })
}
