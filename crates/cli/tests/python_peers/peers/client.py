"""A vfio-user client that saves a device's state into a file, or loads it from one. Ends with 0 if all went as it should."""

import argparse
import struct

from connection import Client
from protocol import *

PARSER = argparse.ArgumentParser()
PARSER.add_argument("socket")
PARSER.add_argument("verb", choices=["save", "load"])
PARSER.add_argument("file")
PARSER.add_argument("--max-msg-fds", type=int, default=1)
PARSER.add_argument("--precopy", action="store_true")
PARSER.add_argument("--piece", type=int, default=32768)
ARGS = PARSER.parse_args()


class Saver(Client):
    def go(self, state):
        body = struct.pack("=IIII", 16, STATE | SET, state, 0xffffffff)
        assert self.ask(FEATURE, body) == body
        now = self.ask(FEATURE, struct.pack("=II", 16, STATE | GET))
        assert struct.unpack_from("=I", now, 8)[0] == state, now

    def read(self):
        reply = self.ask(DATA_READ, struct.pack("=II", 8 + ARGS.piece, ARGS.piece))
        size = struct.unpack_from("=II", reply)[1]
        assert len(reply) == 8 + size
        return reply[8:]

    def write(self, data):
        assert self.ask(DATA_WRITE, struct.pack("=II", 8 + len(data), len(data)) + data) == b""


def save(client, file):
    if ARGS.precopy:
        client.go(PRE_COPY)
        while data := client.read():
            file.write(data)
    client.go(STOP_COPY)
    while data := client.read():
        file.write(data)
    client.go(STOP)
    client.go(RUNNING)


def load(client, file):
    client.go(RESUMING)
    while data := file.read(ARGS.piece):
        client.write(data)
    client.go(STOP)
    client.go(RUNNING)


with open(ARGS.file, "wb" if ARGS.verb == "save" else "rb") as opened:
    (save if ARGS.verb == "save" else load)(Saver(ARGS.socket, ARGS.max_msg_fds), opened)
