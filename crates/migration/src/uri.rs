//! Addresses of the other side: `unix:PATH`, `tcp:HOST:PORT`, `fd:N`.

use std::fmt;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

/// The address of a migration's other side, or of a listening socket.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Uri {
    /// `unix:PATH`: a stream socket in the file system.
    Unix(PathBuf),
    /// `tcp:HOST:PORT`; an IPv6 address is in brackets: `tcp:[::1]:4444`. Port 0 to listen on any free port.
    Tcp {
        /// Name or address, without brackets.
        host: String,
        /// Number of the port.
        port: u16,
    },
    /// `fd:N`: a connected stream socket that this process already holds. The session works on a duplicate and shuts the
    /// connection down at its end; the number stays its owner's to close.
    Fd(RawFd),
}

/// A text that is no migration address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is no migration address: {why} (want unix:PATH, tcp:HOST:PORT, tcp:[IPV6]:PORT or fd:N)")]
pub struct UriError {
    text: String,
    why: &'static str,
}

/// Longest path of a unix socket: `sun_path` of `sockaddr_un` less its final zero.
const LONGEST_UNIX_PATH: usize = 107;

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        let refuse = |why| UriError { text: text.chars().take(200).collect(), why };
        let (scheme, rest) = text.split_once(':').ok_or_else(|| refuse("it has no scheme"))?;
        match scheme {
            "unix" if rest.is_empty() => Err(refuse("the path is empty")),
            "unix" if rest.len() > LONGEST_UNIX_PATH => Err(refuse("the path is longer than 107 bytes")),
            "unix" if rest.contains('\0') => Err(refuse("the path holds a zero byte")),
            "unix" => Ok(Self::Unix(rest.into())),
            "tcp" => {
                let (host, port) = rest.rsplit_once(':').ok_or_else(|| refuse("the port is missing"))?;
                let port = port.parse().map_err(|_| refuse("the port is not a number from 0 to 65535"))?;
                let host = match host.strip_prefix('[') {
                    Some(inner) => {
                        let inner =
                            inner.strip_suffix(']').ok_or_else(|| refuse("the bracket is not closed"))?;
                        inner
                            .parse::<std::net::Ipv6Addr>()
                            .map_err(|_| refuse("no IPv6 address in the brackets"))?;
                        inner
                    }
                    None if host.contains(':') => return Err(refuse("an IPv6 address needs brackets")),
                    None => host,
                };
                if host.is_empty() {
                    return Err(refuse("the host is empty"));
                }
                Ok(Self::Tcp { host: host.to_owned(), port })
            }
            "fd" => {
                let number: RawFd = rest.parse().map_err(|_| refuse("the descriptor is not a number"))?;
                if number < 0 {
                    return Err(refuse("the descriptor is negative"));
                }
                Ok(Self::Fd(number))
            }
            _ => Err(refuse("the scheme is unknown")),
        }
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Fd(number) => write!(f, "fd:{number}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_reads_back() {
        for text in
            ["unix:/run/a b.sock", "tcp:host.example:0", "tcp:10.0.0.1:4444", "tcp:[::1]:65535", "fd:17"]
        {
            let uri: Uri = text.parse().unwrap();
            assert_eq!(uri.to_string(), text);
        }
    }

    #[test]
    fn nonsense_is_refused_with_its_reason() {
        for (text, why) in [
            ("", "no scheme"),
            ("/run/x", "no scheme"),
            ("unix:", "empty"),
            ("tcp:host", "port is missing"),
            ("tcp:host:99999", "0 to 65535"),
            ("tcp::1", "host is empty"),
            ("tcp:::1:4", "brackets"),
            ("tcp:[::1:4", "not closed"),
            ("tcp:[x]:4", "IPv6"),
            ("fd:-1", "negative"),
            ("fd:x", "not a number"),
            ("exec:cat", "unknown"),
        ] {
            let error = text.parse::<Uri>().unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
        assert!(format!("unix:{}", "x".repeat(108)).parse::<Uri>().is_err());
    }
}
