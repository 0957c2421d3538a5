"""Read TensorBoard's event files by their published formats, without its library.

A file is a sequence of records (length, its checksum, data, its checksum); the data are protocol
buffers: Event {wall_time = 1, step = 2, summary = 5 {value = 1 {tag = 1, simple_value = 2}}}.
"""

import struct


def read(path):
    """Return [(step, tag, value)] of all scalars, in their order."""
    found = []
    for event in _events(path):
        for value in [x for key, x in fields(event.get(5, b"")) if key == 1]:
            parts = dict(fields(value))
            if 2 in parts:
                found.append((event.get(2, 0), parts[1].decode(), struct.unpack("<f", parts[2])[0]))
    return found


def restarts(path):
    """Return the steps from which a file says that it starts again: session_log = 7."""
    return [event.get(2, 0) for event in _events(path) if 7 in event]


def _events(path):
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack_from("<Q", data)
        yield dict(fields(data[12 : 12 + length]))
        data = data[12 + length + 4 :]


def fields(data):
    """Yield (number, value) of a message: integers, and the bytes of all else."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(kind) or varint()
        yield key >> 3, data[at : at + size]
        at += size
