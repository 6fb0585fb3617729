"""Fuzz of `session import`: exported sessions with damage whose checksums are right, as an attacker would write them.

    python tests/fuzz/imports.py 60      # seconds; LD_PRELOAD=libasan.so with a codec that is built with sanitizers covers its C too

A file is refused with a StoreError of one line and leaves no session, or it is a session that can be read back whole.
"""

from __future__ import annotations

import json
import random
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from blake3 import blake3

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_store import fill  # noqa: E402

from seqkv_edge import exchange, tokens  # noqa: E402
from seqkv_edge.errors import StoreError  # noqa: E402
from seqkv_edge.store import Store  # noqa: E402

VALUES = (None, True, 0, 1, -1, 63, 64, 65, 1 << 31, 1 << 64, 0.5, float("nan"), 1e400, "", "x", "../x", "00" * 40, [], {}, [[]], "\ud800")


def mutate(random_: random.Random, value: Any) -> Any:
    """A copy with one place changed."""
    if isinstance(value, (dict, list)) and value and random_.random() < 0.9:
        copy = value.copy()
        key = random_.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
        if random_.random() < 0.1:
            del copy[key]
        else:
            copy[key] = mutate(random_, copy[key])
        return copy
    if isinstance(value, str) and value.startswith("{") and random_.random() < 0.9:  # the context
        return json.dumps(mutate(random_, json.loads(value)))
    if isinstance(value, int) and random_.random() < 0.5:
        return value + random_.choice((-64, -1, 1, 64))
    return random_.choice(VALUES)


def damaged(random_: random.Random, data: bytes) -> bytes:
    (n,) = struct.unpack("<I", data[8:12])
    header, body = json.loads(data[12 : 12 + n]), bytearray(data[12 + n + 32 :])
    for _ in range(random_.choice((0, 0, 1, 3))):
        body[random_.randrange(len(body))] = random_.randrange(256)
    if random_.random() < 0.1:
        del body[random_.randrange(len(body)) :]
    for _ in range(random_.choice((0, 1, 1, 2))):
        header = mutate(random_, header)
    with_sums(header, bytes(body))
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    head = data[:8] + struct.pack("<I", len(text)) + text
    return head + blake3(head).digest() + bytes(body)


def with_sums(header: Any, body: bytes) -> None:
    """The header's checksums of what follows it, as far as it says where that is."""
    try:
        at = 4 * header["n_tokens"]
        header["tokens_blake3"] = blake3(body[:at]).hexdigest()
        for part in [*header["frames"], *([header["tail"]] if header["tail"] else [])]:
            part["blake3"] = blake3(body[at : at + part["size"]]).hexdigest()
            at += part["size"]
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError, MemoryError):
        pass


def run(seconds: float, seed: int = 0) -> tuple[int, int]:
    """Files tried, and those that were taken."""
    random_, n, taken, end = random.Random(seed), 0, 0, time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.session"
        with Store(Path(folder) / "from") as store:
            fill(store, "a", [0, 1, 2])
            exchange.export_session(store, "a", file)
        data = file.read_bytes()
        while time.monotonic() < end:
            with Store(Path(folder) / f"to{n // 200}") as store:
                for _ in range(200):
                    file.write_bytes(damaged(random_, data))
                    try:
                        name = exchange.import_session(store, file)
                    except StoreError as error:
                        assert "\n" not in str(error) and not store.sessions(), error
                    else:
                        info = store.session(name)
                        chunks, error = store.restore(store.path_to(info.node))
                        store.read_tail(info)
                        ids = store.tokens(info)
                        assert error is None and len(chunks) == len(ids) // 64 and tokens.decode(tokens.encode(ids)) == ids
                        store.delete(name)
                        taken += 1
                    n += 1
                assert store.verify() == []
    return n, taken


if __name__ == "__main__":
    print("%d files, %d taken" % run(float(sys.argv[1]) if len(sys.argv) > 1 else 10))
