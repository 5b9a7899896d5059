"""vfio-user as its specification has it: headers, commands, states. Standard library only, and nothing of the project."""

import array
import os
import socket
import struct

HEADER = struct.Struct("=HHIII")  # message id, command, size with header, flags, errno
REPLY, ERROR = 0x1, 0x20
(VERSION, DMA_MAP, DMA_UNMAP, GET_INFO, GET_REGION_INFO, GET_REGION_IO_FDS, GET_IRQ_INFO, SET_IRQS, REGION_READ,
 REGION_WRITE, DMA_READ, DMA_WRITE, RESET) = range(1, 14)
FEATURE, DATA_READ, DATA_WRITE = 16, 17, 18
GET, SET, PROBE = 1 << 16, 1 << 17, 1 << 18
MIGRATION, STATE, LOG_START, LOG_STOP, LOG_REPORT = 1, 2, 6, 7, 8
ERR, STOP, RUNNING, STOP_COPY, RESUMING, _, PRE_COPY = range(7)
CONFIG = 7  # region index of config space
LONGEST = 1 << 20


class Closed(Exception):
    """The other end is gone."""


def receive(stream, size):
    """Exactly `size` bytes."""
    parts, left = [], size
    while left:
        part = stream.recv(left)
        if not part:
            raise Closed
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def receive_header(stream):
    """A header, and the descriptors that came with it."""
    room = socket.CMSG_SPACE(64 * 4)
    raw, ancillary, _, _ = stream.recvmsg(HEADER.size, room, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % 4])
    if not raw:
        raise Closed
    return HEADER.unpack(raw + receive(stream, HEADER.size - len(raw))), list(fds)


def close_all(fds):
    for fd in fds:
        os.close(fd)
