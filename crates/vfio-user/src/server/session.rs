//! One client's stay: negotiation, its commands one by one, and what is taken back when it leaves.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::argsz::check_request;
use super::backend::{Backend, IrqRequest, IrqRequestData};
use super::dma::DmaChannel;
use super::options::{LARGEST_MSG_FDS, ServerOptions};
use super::stop::StopHandle;
use crate::codec::{
    Command, DmaAccess, Extension, Kind, MAX_DATA_XFER_SIZE, MAX_LOGGING_RANGES, MAX_VERSION_DATA,
    TwinSocket, VersionCapabilities, VersionPayload,
};
use crate::conn::{Conn, ConnError, SocketMessage, Unfit};
use crate::event::{DropReason, ServerEvent};
use crate::model::{IovaRange, IrqAction};

/// The version that is spoken, see the client.
const VERSION: (u16, u16) = (0, 2);
/// Payload that a command may have beside its data: its head, or a table of ranges.
const MAX_HEAD: usize = 64 + MAX_LOGGING_RANGES * 16;

/// Answer to a command: its payload and descriptors.
#[derive(Debug, Default)]
pub(super) struct Reply {
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<Arc<OwnedFd>>,
}

impl From<Vec<u8>> for Reply {
    fn from(body: Vec<u8>) -> Self {
        Self { body, fds: Vec::new() }
    }
}

/// The terms in force between the two ends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    /// Most data in one message to this server.
    pub(super) max_xfer: usize,
    /// Most migration data in one message: what both take.
    pub(super) max_mig_data: usize,
    /// Most descriptors in one reply.
    pub(super) client_fds: usize,
    pub(super) max_dma_maps: usize,
    /// DMA mappings are aligned to this.
    pub(super) page: u64,
    pub(super) extension: Extension,
}

/// DMA logging as the client asked for it.
#[derive(Clone, Debug)]
pub(super) struct Logging {
    pub(super) asked: u64,
    pub(super) chosen: u64,
    pub(super) ranges: Vec<IovaRange>,
}

pub(super) struct Session<'a> {
    pub(super) backend: &'a dyn Backend,
    pub(super) terms: Terms,
    /// Mappings: first address to length.
    pub(super) maps: BTreeMap<u64, u64>,
    /// Interrupt types that were set up.
    pub(super) irqs: std::collections::BTreeSet<u32>,
    pub(super) logging: Option<Logging>,
    /// A buffer for data on its way out.
    pub(super) scratch: Vec<u8>,
    /// It was said that a command failed for want of something that the system is short of.
    told_shortage: bool,
}

/// A connection to a client that has said nothing yet.
pub(super) fn connection(stream: UnixStream, stop: &StopHandle) -> Result<Conn, ConnError> {
    // Accepted sockets do not inherit O_NONBLOCK on Linux, and all I/O here asks for it per call.
    let max_body = 4 + MAX_VERSION_DATA;
    let conn = Conn::new(stream, max_body, 0, Some(Arc::clone(&stop.event)));
    conn.map_err(|errno| ConnError::system("making an eventfd for it", errno))
}

/// Serves a client, whose first message has come, until it leaves, breaks the protocol, or `stop` is used.
pub(super) fn serve(
    conn: Conn,
    first: &SocketMessage,
    backend: &dyn Backend,
    options: &ServerOptions,
    stop: &StopHandle,
) {
    let conn = Arc::new(conn);
    let (terms, dma) = match negotiate(&conn, first, backend, options, stop) {
        Ok(negotiated) => negotiated,
        Err(error) => {
            conn.end(&error);
            tell_drop(&conn, backend);
            return;
        }
    };
    backend.client_connected(dma.0);
    let mut session = Session {
        backend,
        terms,
        maps: BTreeMap::new(),
        irqs: std::collections::BTreeSet::new(),
        logging: None,
        scratch: Vec::new(),
        told_shortage: false,
    };
    if let Err(error) = session.run(&conn, options) {
        conn.end(&error);
    }
    tell_drop(&conn, backend);
    if let Some(twin) = dma.1 {
        twin.kill("the client left");
    }
    session.take_back();
    backend.client_gone();
}

/// Tells why a client was dropped, if it was.
fn tell_drop(conn: &Conn, backend: &dyn Backend) {
    if let Some(why) = conn.dropped_for() {
        backend.server_event(&ServerEvent::ClientDropped(why));
    }
}

/// The channel for DMA, and the twin socket if that is what it uses.
type Dma = (DmaChannel, Option<Arc<Conn>>);

fn negotiate(
    conn: &Arc<Conn>,
    message: &SocketMessage,
    backend: &dyn Backend,
    options: &ServerOptions,
    stop: &StopHandle,
) -> Result<(Terms, Dma), ConnError> {
    let limit = options.message_timeout;
    let answer = |errno: Errno| {
        let kind = Kind::Error(errno.raw_os_error().unsigned_abs());
        let _ = conn.reply(&message.header, kind, &[], &[], limit);
    };
    let refuse = |errno: Errno, why: String| {
        answer(errno);
        ConnError::Violation(why)
    };
    const TWIN: &str = "making a twin socket for it";
    if message.header.command != Command::VERSION || message.unfit.is_some() {
        return Err(refuse(Errno::INVAL, format!("{} before VERSION", message.header.command)));
    }
    let theirs = VersionPayload::decode(&message.body)
        .map_err(|error| refuse(Errno::INVAL, format!("VERSION: {error}")))?;
    if theirs.major != VERSION.0 {
        return Err(refuse(Errno::OPNOTSUPP, format!("version {}.{}", theirs.major, theirs.minor)));
    }
    if theirs.capabilities.max_data_xfer_size == 0 {
        return Err(refuse(Errno::INVAL, "max_data_xfer_size is 0".into()));
    }
    let pair = if options.twin_socket && theirs.capabilities.twin_socket.supported {
        let pair = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        let pair = pair.inspect_err(|errno| answer(*errno));
        Some(pair.map_err(|errno| ConnError::system(TWIN, errno))?)
    } else {
        None
    };
    let taken_fds = options.max_msg_fds.min(LARGEST_MSG_FDS);
    let ours = VersionCapabilities {
        // Some clients refuse a server that announces more than they would.
        max_msg_fds: taken_fds.min(theirs.capabilities.max_msg_fds),
        max_data_xfer_size: options.max_data_xfer_size.clamp(1, MAX_DATA_XFER_SIZE),
        max_dma_maps: options.max_dma_maps,
        pgsizes: options.pgsizes,
        twin_socket: TwinSocket { supported: pair.is_some(), fd_index: pair.as_ref().map(|_| 0) },
        write_multiple: true,
        // What the client did not announce it would not understand.
        extension: backend.extension().and(theirs.capabilities.extension),
    };
    let mut body = Vec::new();
    let minor = theirs.minor.min(VERSION.1);
    VersionPayload { major: VERSION.0, minor, capabilities: ours }.encode(&mut body);
    let (near, far) = pair.unzip();
    let fds: Vec<BorrowedFd<'_>> = far.iter().map(AsFd::as_fd).collect();
    let max_xfer = to_usize(ours.max_data_xfer_size);
    conn.set_limits(max_xfer.saturating_add(MAX_HEAD), taken_fds);
    conn.reply(&message.header, Kind::Reply, &body, &fds, limit)?;
    let client_xfer = theirs.capabilities.max_data_xfer_size;
    let twin = near.map(|fd| Conn::new(UnixStream::from(fd), 0, 0, Some(Arc::clone(&stop.event))));
    let twin = twin.transpose().map_err(|errno| ConnError::system(TWIN, errno))?;
    let twin = twin.map(Arc::new);
    let dma_conn = twin.as_ref().unwrap_or(conn);
    let longest = theirs.capabilities.extension.longest_payload().saturating_sub(DmaAccess::SIZE);
    let piece = to_usize(client_xfer.min(MAX_DATA_XFER_SIZE)).min(longest);
    let dma = DmaChannel::new(Arc::clone(dma_conn), piece, limit);
    let terms = Terms {
        max_xfer,
        max_mig_data: max_xfer.min(to_usize(client_xfer)),
        client_fds: to_usize(theirs.capabilities.max_msg_fds),
        max_dma_maps: to_usize(ours.max_dma_maps),
        page: if ours.pgsizes == 0 { 1 } else { 1 << ours.pgsizes.trailing_zeros() },
        extension: ours.extension,
    };
    Ok((terms, (dma, twin)))
}

impl Session<'_> {
    fn run(&mut self, conn: &Conn, options: &ServerOptions) -> Result<(), ConnError> {
        let limit = options.message_timeout;
        loop {
            let begun = conn.next_command(limit);
            let mut message = begun.map_err(|error| {
                error.or_late(|| DropReason::Late(format!("a command was not whole within {limit:?}")))
            })?;
            let header = message.header;
            let no_reply = |error: ConnError| {
                error.or_late(|| {
                    let command = header.command;
                    DropReason::Late(format!("it did not take the reply to {command} within {limit:?}"))
                })
            };
            match self.execute(&mut message) {
                Ok(reply) => {
                    let fds: Vec<BorrowedFd<'_>> = reply.fds.iter().map(|fd| fd.as_fd()).collect();
                    conn.reply(&header, Kind::Reply, &reply.body, &fds, limit).map_err(no_reply)?;
                    self.keep_scratch(reply.body);
                }
                Err(errno) => {
                    self.tell_shortage(header.command, errno);
                    let kind = Kind::Error(errno.raw_os_error().unsigned_abs());
                    conn.reply(&header, kind, &[], &[], limit).map_err(no_reply)?;
                }
            }
            // Descriptors that the command did not take are closed with the message.
            conn.recycle(message);
        }
    }

    /// Tells once of a client that a command failed since the system is short of something.
    fn tell_shortage(&mut self, command: Command, errno: Errno) {
        if !matches!(errno, Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS) || self.told_shortage
        {
            return;
        }
        self.told_shortage = true;
        self.backend.server_event(&ServerEvent::CommandFailed { command, errno });
    }

    fn execute(&mut self, message: &mut SocketMessage) -> Result<Reply, Errno> {
        match message.unfit {
            Some(Unfit::PayloadTooLong | Unfit::ExcessFds) => return Err(Errno::INVAL),
            Some(Unfit::NoRoomForFds) => return Err(Errno::MFILE),
            None => {}
        }
        let fds = std::mem::take(&mut message.fds);
        let command = message.header.command;
        let takes_fds = matches!(command, Command::DMA_MAP | Command::DEVICE_SET_IRQS);
        if !takes_fds && !fds.is_empty() {
            return Err(Errno::INVAL);
        }
        let body = &message.body;
        if !self.knows(command) {
            return Err(Errno::OPNOTSUPP);
        }
        check_request(command, body)?;
        match command {
            // Negotiation happens once.
            Command::VERSION => Err(Errno::INVAL),
            Command::DMA_MAP => self.dma_map(body, fds),
            Command::DMA_UNMAP => self.dma_unmap(body),
            Command::DEVICE_GET_INFO => self.device_info(body),
            Command::DEVICE_GET_REGION_INFO => self.region_info(body),
            Command::DEVICE_GET_REGION_IO_FDS => self.region_io_fds(body),
            Command::DEVICE_GET_IRQ_INFO => self.irq_info(body),
            Command::DEVICE_SET_IRQS => self.set_irqs(body, fds),
            Command::REGION_READ => self.region_read(body),
            Command::REGION_WRITE => self.region_write(body),
            Command::REGION_WRITE_MULTI => self.region_write_multi(body),
            Command::DEVICE_RESET => self.reset(body),
            Command::DEVICE_FEATURE => self.feature(body),
            Command::MIG_DATA_READ => self.mig_data_read(body),
            Command::MIG_DATA_WRITE => self.mig_data_write(body),
            Command::X_PRECOPY_INFO => self.precopy_info(body),
            Command::X_MANIFEST => self.manifest(body),
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    /// Whether a command, if it is one of the extension's, is in force.
    fn knows(&self, command: Command) -> bool {
        match command {
            Command::X_PRECOPY_INFO => self.terms.extension.precopy_info,
            Command::X_MANIFEST => self.terms.extension.manifest,
            _ => true,
        }
    }

    /// Takes back what the client gave: its memory and its eventfds, and the log that only it could read. A device that
    /// refuses is left to its own [`Backend::client_gone`].
    fn take_back(&mut self) {
        for (iova, len) in std::mem::take(&mut self.maps) {
            let _ = self.backend.dma_unmap(iova, len);
        }
        for index in std::mem::take(&mut self.irqs) {
            let _ = self.backend.set_irqs(IrqRequest {
                index,
                start: 0,
                count: 0,
                action: IrqAction::Trigger,
                data: IrqRequestData::None,
            });
        }
        if self.logging.take().is_some() {
            let _ = self.backend.dma_logging_stop();
        }
    }

    /// An empty buffer with room from an earlier reply.
    pub(super) fn take_scratch(&mut self) -> Vec<u8> {
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.clear();
        scratch
    }

    fn keep_scratch(&mut self, body: Vec<u8>) {
        if body.capacity() > self.scratch.capacity() {
            self.scratch = body;
        }
    }
}

/// A 32-bit number as a length; this crate is for 64-bit hosts, elsewhere it saturates.
pub(super) fn to_usize(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
