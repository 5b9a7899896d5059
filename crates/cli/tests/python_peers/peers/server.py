"""A vfio-user server: a PCI function whose migration state is bytes that follow from a seed.

Says `state SHA256` when it listens, and `loaded SHA256` each time that it left RESUMING with a whole state. Each option of
a deviation is one that is met in a server that exists."""

import argparse
import errno
import hashlib
import json
import mmap
import os
import random
import select
import socket
import struct

from connection import Client
from protocol import *

PARSER = argparse.ArgumentParser()
PARSER.add_argument("socket")
PARSER.add_argument("--state", type=int, default=65536)
PARSER.add_argument("--seed", type=int, default=1)
PARSER.add_argument("--max-msg-fds", type=int, default=1)
PARSER.add_argument("--one-recv", action="store_true", help="reads a body by one recv")
PARSER.add_argument("--pad-reads", action="store_true", help="pads MIG_DATA_READ to what was asked for")
PARSER.add_argument("--loses-step", action="store_true", help="knows 1-5, 7-10, 13, and does not drain the others")
PARSER.add_argument("--no-region-in-stop-copy", action="store_true")
PARSER.add_argument("--reset-keeps-state", action="store_true")
PARSER.add_argument("--dma", type=lambda word: int(word, 0), help="guest address that a running device counts up at")
PARSER.add_argument("--hides-dirty", action="store_true", help="does not log what it writes")
PARSER.add_argument("--like", metavar="SOCKET", help="has the config space, regions and interrupts of this server's device")
PARSER.add_argument("--any-state", action="store_true", help="takes a state of any length, and gives it back as it came")
PARSER.add_argument("--spoils", action="store_true", help="gives back a state in which one byte is another")
PARSER.add_argument("--ioeventfds-48", action="store_true", help="has a doorbell, in an entry of 48 bytes")
PARSER.add_argument("--refuses-when-stopped", action="store_true",
                    help="in STOP and STOP_COPY takes REGION_READ and _WRITE, DEVICE_FEATURE and MIG_DATA_READ alone")
ARGS = PARSER.parse_args()

# Of a longer message one recv gets, now and then, no more than this: here, always.
ONE_RECV = 36544
BARS = {0: 4096}
MOST = 1 << 28
ARCS = {(RUNNING, STOP), (STOP, RUNNING), (STOP, STOP_COPY), (STOP_COPY, STOP), (STOP, RESUMING), (RESUMING, STOP),
        (RUNNING, PRE_COPY), (PRE_COPY, RUNNING), (PRE_COPY, STOP_COPY)}


class Refused(Exception):
    pass


def say(word, state):
    print(word, hashlib.sha256(state).hexdigest(), flush=True)


class Device:
    def __init__(self):
        self.bytes = random.Random(ARGS.seed).randbytes(ARGS.state)
        self.state, self.sent, self.loading = RUNNING, 0, None
        self.ram, self.at, self.count, self.dirty = None, 0, 0, False
        self.irqs = [(0, 0)] * 5
        if ARGS.like:
            sizes, self.irqs, config = Client(ARGS.like).layout()
            self.regions = [bytearray(size) for size in sizes]
            self.regions[CONFIG][:] = config
        else:
            self.regions = [bytearray(BARS.get(index, 0)) for index in range(9)]
            self.regions[CONFIG] = bytearray(256)
            struct.pack_into("<HH", self.regions[CONFIG], 0, 0x1234, 0x5678)
            self.regions[CONFIG][8:12] = bytes([1, 0, 0, 0xff])
        self.doorbell = os.eventfd(0, os.EFD_CLOEXEC) if ARGS.ioeventfds_48 else None

    def go(self, to):
        """Walks to a state by the shortest way, which leads through no saving state."""
        while self.state != to:
            here = self.state
            step = to if (here, to) in ARCS else STOP if here != STOP else None
            if step is None or (here, step) not in ARCS or (here, to) == (STOP_COPY, PRE_COPY):
                raise Refused(errno.EINVAL)
            if here == RESUMING:
                if self.loading and not ARGS.any_state and len(self.loading) != ARGS.state:
                    raise Refused(errno.EINVAL)
                if self.loading:
                    self.bytes = bytes(self.loading)
                    say("loaded", self.bytes)
            if step == RESUMING:
                self.loading = bytearray()
            # The specification has one stream for both: what PRE_COPY gave is not given again.
            if step == PRE_COPY or (step == STOP_COPY and here != PRE_COPY):
                self.sent = 0
            # A last write once all of RAM has gone ahead: only the log tells of it.
            if step in (STOP, STOP_COPY):
                self.work()
            if step == STOP_COPY and self.ram:
                print("wrote", self.count, flush=True)
            self.state = step

    def map(self, body, fds):
        _, _, offset, iova, size = struct.unpack_from("=IIQQQ", body)
        if fds and ARGS.dma is not None and iova <= ARGS.dma < iova + size:
            self.ram, self.at = mmap.mmap(fds[0], size, offset=offset), ARGS.dma - iova

    def work(self):
        """One write into guest RAM by a device that runs."""
        if self.ram and self.state in (RUNNING, PRE_COPY):
            if self.loading is not None:
                # The first since it was loaded: what the other device wrote last has to be there.
                print("found", struct.unpack_from("<Q", self.ram, self.at)[0], flush=True)
                self.loading = None
            self.count += 1
            struct.pack_into("<Q", self.ram, self.at, self.count)
            self.dirty = not ARGS.hides_dirty

    def region(self, index):
        return self.regions[index] if index < len(self.regions) else b""

    def write_config(self, at, data):
        config = self.regions[CONFIG]
        for n, byte in enumerate(data, at):
            if n in (4, 5) or 0x0c <= n < 0x0e or n == 0x3c:
                config[n] = byte
        bar = (at - 0x10) // 4
        if 0 <= bar < 6 and at % 4 == 0 and len(data) == 4 and self.regions[bar]:
            kind = config[at] & 0xf
            place = struct.unpack("<I", data)[0] & -len(self.regions[bar]) & 0xffffffff
            struct.pack_into("<I", config, at, place | kind)

    def migrates(self):
        """The state as it is given away."""
        if not ARGS.spoils:
            return self.bytes
        middle = len(self.bytes) // 2
        return self.bytes[:middle] + bytes([self.bytes[middle] ^ 1]) + self.bytes[middle + 1 :]


class Session:
    def __init__(self, stream, device):
        self.stream, self.device = stream, device

    def serve(self):
        while True:
            while ARGS.dma is not None and not select.select([self.stream], [], [], 0.005)[0]:
                self.device.work()
            (number, command, size, flags, _), fds = receive_header(self.stream)
            known = command in (1, 2, 3, 4, 5, 7, 8, 9, 10, 13)
            if ARGS.loses_step and not known:
                self.stream.sendall(HEADER.pack(number, command, HEADER.size, REPLY | ERROR, 0))
                continue
            want = size - HEADER.size
            if want < 0 or want > LONGEST + 64:
                raise Closed
            body = self.stream.recv(min(want, ONE_RECV)) if ARGS.one_recv and want else receive(self.stream, want)
            if command == DMA_MAP:
                self.device.map(body, fds)
            close_all(fds)
            own = []
            try:
                if len(body) < want or len(fds) > ARGS.max_msg_fds:
                    raise Refused(errno.EINVAL)
                reply = self.answer(command, body, own)
                head = HEADER.pack(number, command, HEADER.size + len(reply), REPLY, 0)
            except Refused as why:
                reply, head = b"", HEADER.pack(number, command, HEADER.size, REPLY | ERROR, why.args[0])
            if not flags & 0x10:
                sent = socket.send_fds(self.stream, [head + reply], own) if own else 0
                self.stream.sendall((head + reply)[sent:])

    def answer(self, command, body, fds):
        """The payload of a reply. Descriptors that go with it are put into `fds`."""
        device = self.device
        taken = (REGION_READ, REGION_WRITE, FEATURE, DATA_READ)
        if ARGS.refuses_when_stopped and device.state in (STOP, STOP_COPY) and command not in (VERSION, *taken):
            raise Refused(errno.EINVAL)
        if command == VERSION:
            caps = {"max_msg_fds": ARGS.max_msg_fds, "max_data_xfer_size": LONGEST}
            return body[:4] + json.dumps({"capabilities": caps}).encode() + b"\0"
        if command in (DMA_MAP, SET_IRQS):
            return b""
        if command == DMA_UNMAP:
            return body[:24]
        if command == GET_INFO:
            return struct.pack("=IIII", 16, 3, len(device.regions), len(device.irqs))
        if command == GET_REGION_INFO:
            index = struct.unpack_from("=I", body, 8)[0]
            size = len(device.region(index))
            return struct.pack("=IIIIQQ", 32, 3 if size else 0, index, 0, size, 0)
        if command == GET_REGION_IO_FDS:
            argsz, _, index, _ = struct.unpack_from("=IIII", body)
            if index != 0 or device.doorbell is None:
                return struct.pack("=IIII", 16, 0, index, 0)
            # A file of shadows, whose offset is where the specification has `datamatch`, and that behind it.
            entry = struct.pack("=QQIIIIQQ", 0x100, 4, 0, 0, 1, 0, 0, 0x1234)
            if argsz < 16 + len(entry):
                return struct.pack("=IIII", 16 + len(entry), 0, index, 1)
            fds.append(device.doorbell)
            return struct.pack("=IIII", 16 + len(entry), 0, index, 1) + entry
        if command == GET_IRQ_INFO:
            index = struct.unpack_from("=I", body, 8)[0]
            flags, count = device.irqs[index]
            return struct.pack("=IIII", 16, flags, index, count)
        if command in (REGION_READ, REGION_WRITE):
            return self.region(command, body)
        if command == RESET:
            if not ARGS.reset_keeps_state:
                device.state = RUNNING
            return b""
        if command == FEATURE:
            return self.feature(body)
        if command == DATA_READ:
            size = struct.unpack_from("=II", body)[1]
            if device.state not in (PRE_COPY, STOP_COPY) or size > LONGEST:
                raise Refused(errno.EINVAL)
            data = device.migrates()[device.sent : device.sent + size]
            device.sent += len(data)
            padding = bytes(size - len(data)) if ARGS.pad_reads else b""
            return struct.pack("=II", 8 + len(data), len(data)) + data + padding
        if command == DATA_WRITE:
            size = struct.unpack_from("=II", body)[1]
            most = MOST if ARGS.any_state else ARGS.state
            if device.state != RESUMING or size != len(body) - 8 or len(device.loading) + size > most:
                raise Refused(errno.EINVAL)
            device.loading += body[8:]
            return b""
        raise Refused(errno.EINVAL)

    def region(self, command, body):
        at, index, count = struct.unpack_from("=QII", body)
        region = self.device.region(index)
        if at + count > len(region):
            raise Refused(errno.EINVAL)
        if ARGS.no_region_in_stop_copy and self.device.state == STOP_COPY:
            raise Refused(errno.EINVAL)
        if command == REGION_READ:
            return body[:16] + bytes(region[at : at + count])
        if index == CONFIG:
            self.device.write_config(at, body[16:])
        else:
            region[at : at + count] = body[16:]
        return body[:16]

    def feature(self, body):
        device, flags, data = self.device, struct.unpack_from("=I", body, 4)[0], body[8:]
        feature, op = flags & 0xffff, flags & ~0xffff
        if op & PROBE:
            if feature not in (MIGRATION, STATE, LOG_START, LOG_STOP, LOG_REPORT):
                raise Refused(errno.EINVAL)
            return body
        if (feature, op) == (MIGRATION, GET):
            return struct.pack("=IIQ", 16, flags, 5)
        if (feature, op) == (STATE, GET):
            return struct.pack("=IIII", 16, flags, self.device.state, 0xffffffff)
        if (feature, op) == (STATE, SET):
            self.device.go(struct.unpack_from("=I", data)[0])
            return body
        if (feature, op) in ((LOG_START, SET), (LOG_STOP, SET)):
            return body
        if (feature, op) == (LOG_REPORT, GET):
            first, length, page = struct.unpack_from("=QQQ", data)
            bits = bytearray((length + 64 * page - 1) // (64 * page) * 8)
            if device.ram and device.dirty and first <= ARGS.dma < first + length:
                bit, device.dirty = (ARGS.dma - first) // page, False
                bits[bit // 8] |= 1 << bit % 8
            return struct.pack("=II", 8 + 24 + len(bits), flags) + data[:24] + bits
        raise Refused(errno.EINVAL)


def main():
    device = Device()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(ARGS.socket)
    listener.listen()
    say("state", device.bytes)
    while True:
        stream, _ = listener.accept()
        try:
            Session(stream, device).serve()
        except (Closed, ConnectionError):
            stream.close()


main()
