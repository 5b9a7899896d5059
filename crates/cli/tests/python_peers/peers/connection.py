"""The client's end of a vfio-user socket: one request after the other."""

import json
import os
import socket
import struct
import sys

from protocol import *


class Client:
    def __init__(self, path, max_msg_fds=1):
        self.stream = socket.socket(socket.AF_UNIX)
        self.stream.connect(path)
        self.number = 0
        caps = {"max_msg_fds": max_msg_fds, "max_data_xfer_size": LONGEST}
        ask = struct.pack("=HH", 0, 1) + json.dumps({"capabilities": caps}).encode() + b"\0"
        theirs = json.loads(self.ask(VERSION, ask)[4:].rstrip(b"\0"))["capabilities"]
        assert theirs["max_msg_fds"] <= max_msg_fds, theirs

    def ask(self, command, body):
        self.number = (self.number + 1) & 0xffff
        self.stream.sendall(HEADER.pack(self.number, command, HEADER.size + len(body), 0, 0) + body)
        (number, its, size, flags, code), fds = receive_header(self.stream)
        close_all(fds)
        reply = receive(self.stream, size - HEADER.size)
        assert (number, its) == (self.number, command), (number, its)
        if flags & ERROR:
            sys.exit(f"command {command}: {os.strerror(code)}")
        return reply

    def layout(self):
        """Sizes of its regions, flags and counts of its interrupts, and its config space."""
        _, _, regions, irqs = struct.unpack("=IIII", self.ask(GET_INFO, struct.pack("=IIII", 16, 0, 0, 0)))
        sizes = []
        for index in range(regions):
            info = self.ask(GET_REGION_INFO, struct.pack("=IIIIQQ", 32, 0, index, 0, 0, 0))
            sizes.append(struct.unpack_from("=Q", info, 16)[0])
        counts = [
            struct.unpack("=IIII", self.ask(GET_IRQ_INFO, struct.pack("=IIII", 16, 0, index, 0)))[1::2]
            for index in range(irqs)
        ]
        config = self.ask(REGION_READ, struct.pack("=QII", 0, CONFIG, sizes[CONFIG]))[16:]
        return sizes, counts, config
