"""Reads what wandb wrote while it was offline."""

import struct
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record


def records(file: Path) -> list[Record]:
    """Records of a .wandb file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    data, position, found, part = file.read_bytes(), 7, [], b""
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(Record.FromString(part))
            part = b""
    return found
