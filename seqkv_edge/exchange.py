"""One session as a single file, to take to another machine.

Bytes, integers little-endian: magic "seqkvse1", length of the header (u32), header (JSON), blake3 of magic to header (32 bytes),
token ids (u32 each), chunks of the frames in order, chunk of the tail. The header has the length and blake3 of each.

An imported frame is private: other sessions never find it by its tokens, since only its maker knows that it belongs to them.
"""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

from .coders import is_lossy
from .conversation import check_conversation
from .engine import temporary_beside
from .errors import SeqkvError, StateError, StoreError
from .state import FRAME
from .store import Identity, Store, Surprisal, blake3_of, check_name, pack_chunk, pack_tokens, unpack_chunk, unpack_tokens

MAGIC = b"seqkvse1"
_MAX_HEADER = 1 << 26


def export_session(store: Store, name: str, path: Path) -> int:
    """Write a session to `path`, atomically. Returns the bytes. Damaged chunks are left out: their tokens are in the file.

    Raises StoreError.
    """
    info = store.session(name)
    identity = store.context_of(info.context)
    tokens = store.tokens(info)
    nodes = store.path_to(info.node)
    chunks, _ = store.restore([n for n in nodes if n.level is not None][: next((i for i, n in enumerate(nodes) if n.level is None), len(nodes))])
    parts = [pack_chunk(chunk, "raw", identity, node.tokens) for chunk, node in zip(chunks, nodes)]
    frames = [
        {"size": len(p), "blake3": blake3_of(p).hex(), "bits": n.surprisal.bits, "n_bits": n.surprisal.n, "lossy": is_lossy(n.level)}
        for p, n in zip(parts, nodes)
    ]
    tail = store.read_tail(info) if info.coder is None and len(chunks) == len(nodes) else None
    packed_tail = b"" if tail is None else pack_chunk(tail, "raw", identity, info.tail_tokens)
    ids = pack_tokens(tokens)
    header = json.dumps({
        "name": name, "context": identity.as_json(), "data": info.data, "n_tokens": len(tokens), "tokens_blake3": blake3_of(ids).hex(),
        "frames": frames, "tail": None if tail is None else {"size": len(packed_tail), "blake3": blake3_of(packed_tail).hex()},
    }).encode()  # fmt: skip
    if len(header) > _MAX_HEADER:
        raise StoreError(f"session {name!r} is too long for one file ({len(header):,} bytes of text)")
    head = MAGIC + struct.pack("<I", len(header)) + header
    temporary = temporary_beside(path)
    try:
        with temporary.open("wb") as file:
            for part in (head, blake3_of(head), ids, *parts, packed_tail):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from None
    return path.stat().st_size


def import_session(store: Store, path: Path, name: str | None = None) -> str:
    """Add the session of a file under its own name or another. Returns the name. Raises StoreError, and adds nothing then
    but frames that `gc` removes."""
    try:
        with path.open("rb") as file:
            return _import(store, file, path, name)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror or error}") from None


def _import(store: Store, file: BinaryIO, path: Path, name: str | None) -> str:
    bad = StoreError(f"{path} is not an exported session, or is damaged: export it again")
    left = os.fstat(file.fileno()).st_size

    def take(n: Any) -> bytes:
        nonlocal left
        if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= left:  # nothing is allocated before this
            raise bad
        left -= n
        data = file.read(n)
        if len(data) != n:
            raise bad
        return data

    head = take(12)
    (n_header,) = struct.unpack("<I", head[8:])
    if head[:8] != MAGIC or n_header > _MAX_HEADER:
        raise bad
    head += take(n_header)
    if blake3_of(head) != take(32):
        raise bad
    try:
        header = json.loads(head[12:])
        if not isinstance(header, dict):
            raise bad
        identity, data, frames, tail = Identity.from_json(header["context"]), header["data"], header["frames"], header["tail"]
        n_tokens = header["n_tokens"]
        if not isinstance(data, dict) or not isinstance(frames, list) or not isinstance(n_tokens, int) or not isinstance(header["name"], str):
            raise bad
        if "messages" in data and check_conversation(data) is None:
            raise bad
        if len(frames) * FRAME > n_tokens or n_tokens > left // 4:
            raise bad
        ids = take(4 * n_tokens)
        if blake3_of(ids).hex() != header["tokens_blake3"]:
            raise bad
        tokens = unpack_tokens(ids)
        name = check_name(header["name"] if name is None else name)
        if store.find(name) is not None:
            raise StoreError(f"there is a session {name!r} already: import under another name with --name")
        context, parent = store.context(identity), None
        for i, frame in enumerate(frames):
            part = take(frame["size"])
            if blake3_of(part).hex() != frame["blake3"]:
                raise bad
            frame_tokens = tokens[FRAME * i : FRAME * (i + 1)]
            chunk = unpack_chunk(part, "raw", identity, frame_tokens)
            surprisal = Surprisal(float(frame["bits"]), int(frame["n_bits"]))
            if not (math.isfinite(surprisal.bits) and 0 <= surprisal.n <= FRAME):
                raise bad
            same = store.find_same(context, parent, frame_tokens, chunk)
            level = "lossy" if frame.get("lossy") else "raw"
            parent = same or store.put(context, parent, frame_tokens, chunk, surprisal=surprisal, private=b"imported", level=level)
        rest, end = tokens[FRAME * len(frames) :], None
        if tail is not None:
            part = take(tail["size"])
            if blake3_of(part).hex() != tail["blake3"] or len(rest) >= FRAME:
                raise bad
            end = unpack_chunk(part, "raw", identity, rest)
        if left:
            raise bad
        store.save(name, context, parent, rest, end, data)
    except StoreError:
        raise
    except (SeqkvError, StateError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise bad from None
    return name
