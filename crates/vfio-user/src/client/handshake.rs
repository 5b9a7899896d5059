//! Connecting: the socket, the version, the twin socket, and the device that was found.

use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::net::{self, sockopt};

use super::connection::{Client, Negotiated};
use super::dma;
use super::options::{ClientOptions, OnConnect};
use super::request::own_lack;
use crate::codec::{
    Command, Kind, MAX_DATA_XFER_SIZE, MAX_MSG_FDS, MAX_VERSION_DATA, TwinSocket, VersionCapabilities,
    VersionPayload,
};
use crate::conn::{Conn, ConnError, SocketMessage, SocketRequest, address, deadline};
use crate::error::{ClientError, chain};

/// The version of the protocol that is proposed. libvfio-user is at 0.2; nothing here depends on the minor number.
pub(crate) const VERSION: (u16, u16) = (0, 2);
/// Pause between attempts to connect. There is no event to wait for: the socket may not exist yet.
const RETRY: Duration = Duration::from_millis(10);
/// How long a server that lost step has at least for listening again.
const LISTENS_AGAIN: Duration = Duration::from_secs(1);

impl Client {
    /// Connects to the server that listens on `path`, negotiates, and treats the device as `on_connect` says.
    ///
    /// # Errors
    /// Nobody listened in time, the negotiation failed, or the device could not be recovered.
    pub fn connect(path: impl AsRef<Path>, options: ClientOptions) -> Result<Self, ClientError> {
        let path = path.as_ref();
        let mut client = from_parts(open(path, &options)?, &options, false)?;
        let asked = match options.on_connect {
            OnConnect::Recover => client.recover_at_connect(),
            // Changes nothing, and is asked now because the answer may cost the connection.
            OnConnect::Leave => client.migration_flags().map(drop),
        };
        match asked {
            // The server did not survive the question, or lost step over it. Start over, with what it knows for sure.
            Err(lost @ (ClientError::ConnectionLost { .. } | ClientError::Protocol { .. }))
                if !client.is_alive() =>
            {
                drop(client);
                // One that lost step may have to end before it listens again.
                let connect_timeout = options.connect_timeout.max(LISTENS_AGAIN);
                let options = ClientOptions { connect_timeout, ..options };
                let again = open(path, &options).and_then(|stream| from_parts(stream, &options, true));
                again.map_err(|error| took_one_only(lost, &error))
            }
            // A silly answer is for whoever asks in earnest. None at all would only be waited for once more.
            Err(ClientError::Protocol { .. } | ClientError::Refused { .. })
                if options.on_connect == OnConnect::Leave && client.is_alive() =>
            {
                Ok(client)
            }
            asked => asked.map(|()| client),
        }
    }

    /// As [`connect`](Self::connect), over a stream that is connected already.
    pub fn from_stream(stream: UnixStream, options: ClientOptions) -> Result<Self, ClientError> {
        let mut client = from_parts(stream, &options, false)?;
        if options.on_connect == OnConnect::Recover {
            client.recover_at_connect()?;
        }
        Ok(client)
    }
}

/// The error for a server that is lost over the first question and cannot be reached again: neither alone says what it is.
fn took_one_only(lost: ClientError, again: &ClientError) -> ClientError {
    let why = match lost {
        ClientError::ConnectionLost { why } => why,
        other => chain(&other),
    };
    let again = chain(again);
    let why = format!(
        "it answered, left or lost step at a command that it may not know ({why}), and takes no second connection ({again})"
    );
    ClientError::ConnectionLost { why }
}

/// Connects; fails with [`ErrorKind::TimedOut`] when the server's queue has no place for `patience`.
fn connect(path: &Path, patience: Duration) -> std::io::Result<UnixStream> {
    let socket =
        net::socket_with(net::AddressFamily::UNIX, net::SocketType::STREAM, net::SocketFlags::CLOEXEC, None)?;
    // connect(2) waits as long as a send may (unix(7), SO_SNDTIMEO). No time at all would mean for ever.
    let patience = patience.max(RETRY);
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(patience))?;
    match net::connect(&socket, &address(path)?) {
        Err(Errno::AGAIN) => return Err(ErrorKind::TimedOut.into()),
        result => result?,
    }
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, None)?;
    Ok(socket.into())
}

/// Connects, trying again while nobody listens yet.
fn open(path: &Path, options: &ClientOptions) -> Result<UnixStream, ClientError> {
    let deadline = deadline(options.connect_timeout);
    loop {
        match connect(path, options.timeout) {
            Ok(stream) => return Ok(stream),
            // So many wait already that there is no place in the queue.
            Err(error) if error.kind() == ErrorKind::TimedOut => {
                return Err(ClientError::Timeout {
                    command: Command::VERSION,
                    after: options.timeout,
                    sent: true,
                });
            }
            Err(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused)
                    && Instant::now() < deadline =>
            {
                std::thread::sleep(RETRY);
            }
            Err(source) => {
                let doing = format!("cannot connect to the vfio-user server at {}", path.display());
                return Err(ClientError::Io { doing, source });
            }
        }
    }
}

fn from_parts(stream: UnixStream, options: &ClientOptions, basics_only: bool) -> Result<Client, ClientError> {
    let begun = Instant::now();
    let io = |doing: &str| {
        let doing = doing.to_owned();
        move |source: std::io::Error| ClientError::Io { doing, source }
    };
    let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    let stop = Arc::new(stop.map_err(|errno| io("cannot make an eventfd")(errno.into()))?);
    let max_xfer = options.max_data_xfer_size.clamp(1, MAX_DATA_XFER_SIZE);
    let max_body = dma::HEAD.saturating_add(usize::try_from(max_xfer).unwrap_or(usize::MAX));
    // The twin socket comes as a descriptor, so there is always room for one.
    let max_fds = options.max_msg_fds.clamp(1, MAX_MSG_FDS);
    let conn = Conn::new(stream, max_body, max_fds, Some(Arc::clone(&stop)));
    let conn = Arc::new(conn.map_err(|errno| io("cannot set up the connection")(errno.into()))?);

    let ours = VersionCapabilities {
        max_msg_fds: max_fds,
        max_data_xfer_size: max_xfer,
        twin_socket: TwinSocket { supported: options.twin_socket, fd_index: None },
        write_multiple: true,
        extension: options.extension,
        ..VersionCapabilities::default()
    };
    let (theirs, twin) = negotiate(&conn, &ours, options)?;
    let negotiated = Negotiated {
        version: (theirs.major, theirs.minor),
        max_msg_fds: theirs.capabilities.max_msg_fds,
        max_data_xfer_size: theirs.capabilities.max_data_xfer_size.min(max_xfer),
        max_dma_maps: theirs.capabilities.max_dma_maps,
        pgsizes: theirs.capabilities.pgsizes,
        twin_socket: twin.is_some(),
        write_multiple: theirs.capabilities.write_multiple,
        extension: ours.extension.and(theirs.capabilities.extension),
    };
    if negotiated.max_data_xfer_size == 0 {
        return Err(protocol("max_data_xfer_size is 0"));
    }
    // Who serves the server: a thread on the twin socket, or beside the requests on the one socket there is. Without a
    // handler the twin socket still needs somebody to refuse.
    let serving = match twin {
        Some(fd) => {
            let twin = dma::twin(fd, max_body, Arc::clone(&stop));
            Some(twin.map_err(|errno| io("cannot set up the twin socket")(errno.into()))?)
        }
        None => options.dma.is_some().then(|| Arc::clone(&conn)),
    };
    let thread = serving
        .clone()
        .map(|serving| dma::spawn(serving, options.dma.clone(), max_xfer, options.timeout))
        .transpose()
        .map_err(io("cannot start the DMA thread"))?;
    Ok(Client {
        conn,
        serving,
        timeout: options.timeout,
        questions: Arc::default(),
        transition_timeout: options.transition_timeout,
        all_until: Mutex::new(options.limit_all.and_then(|limit| Some((begun.checked_add(limit)?, limit)))),
        negotiated,
        announced_xfer: max_xfer,
        dma: options.dma.clone(),
        maps: std::sync::atomic::AtomicU32::new(0),
        basics_only,
        found: None,
        requests: std::sync::atomic::AtomicU64::new(0),
        stop,
        thread,
    })
}

fn negotiate(
    conn: &Conn,
    ours: &VersionCapabilities,
    options: &ClientOptions,
) -> Result<(VersionPayload, Option<std::os::fd::OwnedFd>), ClientError> {
    let mut body = Vec::new();
    VersionPayload { major: VERSION.0, minor: VERSION.1, capabilities: *ours }.encode(&mut body);
    let request = SocketRequest {
        command: Command::VERSION,
        parts: &[&body],
        fds: &[],
        max_reply: 4 + MAX_VERSION_DATA,
        limit: options.timeout,
        until: None,
        after_reply: false,
    };
    let reply = conn.exchange(&request, None).map_err(|error| match error {
        ConnError::Timeout => {
            ClientError::Timeout { command: Command::VERSION, after: options.timeout, sent: true }
        }
        ConnError::Violation(what) => protocol(what),
        other => ClientError::ConnectionLost { why: other.why() },
    })?;
    if let Kind::Error(errno) = reply.header.kind {
        let errno = i32::try_from(errno).ok().filter(|errno| (1..4096).contains(errno));
        let errno = errno.map(rustix::io::Errno::from_raw_os_error);
        return Err(ClientError::Refused { command: Command::VERSION, errno });
    }
    own_lack(&reply)?;
    let theirs = VersionPayload::decode(&reply.body).map_err(|error| protocol(error.to_string()))?;
    if theirs.major != VERSION.0 || theirs.minor > VERSION.1 {
        let what =
            format!("version {}.{} in reply to {}.{}", theirs.major, theirs.minor, VERSION.0, VERSION.1);
        return Err(protocol(what));
    }
    let twin = twin_socket(reply, &theirs, ours)?;
    Ok((theirs, twin))
}

/// The descriptor of the twin socket, if there is one.
fn twin_socket(
    mut reply: SocketMessage,
    theirs: &VersionPayload,
    ours: &VersionCapabilities,
) -> Result<Option<std::os::fd::OwnedFd>, ClientError> {
    let twin = theirs.capabilities.twin_socket;
    if !twin.supported || !ours.twin_socket.supported {
        return Ok(None);
    }
    // Announced but not there: commands would go where nobody hears them.
    let index = twin.fd_index.and_then(|index| usize::try_from(index).ok());
    match index.filter(|index| *index < reply.fds.len()) {
        Some(index) => Ok(Some(reply.fds.swap_remove(index))),
        None => Err(protocol("a twin socket without its descriptor")),
    }
}

fn protocol(what: impl Into<String>) -> ClientError {
    ClientError::Protocol { command: Command::VERSION, what: what.into() }
}
