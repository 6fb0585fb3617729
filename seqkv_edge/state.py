"""Saved states of llama.cpp as arrays: cut into frames, and put together again (native/format.md, "Saved state").

A `Piece` is the state of consecutive positions of one sequence, a `Chunk` the same as bytes: what a store keeps of a frame (64
positions), or of the shorter tail of a session. Types are known by name; numeric ids of ggml stay inside `parse` and `build`.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import llama
from .errors import StateError

FRAME = 64
"""positions of a frame"""
MAGIC = 0x32564B53  # "SKV2"
SEQUENCE_MAGIC = 0xAF143CD8
"""first word of what llama_state_seq_get_data writes; the sequence id follows"""
_MAX_LAYERS, _MAX_ROW, _MAX_EXACT = 4096, 1 << 24, 1 << 20

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int32]


@dataclass(frozen=True)
class RowType:
    """One token's K or V of one layer."""

    type: str
    """name of the ggml type"""
    row_bytes: int
    values: int


@dataclass(frozen=True)
class Layout:
    """What the rows of a cache are, layer by layer."""

    k: tuple[RowType, ...]
    v: tuple[RowType, ...]
    header: bytes
    """of a seqkv cache: magic, types, window, model and profile; b"" for other caches"""

    @property
    def row_bytes(self) -> int:
        """bytes of one token in all layers"""
        return sum(t.row_bytes for t in self.k + self.v)

    @property
    def exact_bytes(self) -> int:
        """bytes of one exact row (f16) in all layers"""
        return 2 * sum(t.values for t in self.k + self.v)

    def as_json(self) -> dict[str, Any]:
        return {"header": self.header.hex()} | {
            name: [[t.type, t.row_bytes, t.values] for t in types] for name, types in (("k", self.k), ("v", self.v))
        }

    @staticmethod
    def from_json(data: Any) -> Layout:
        """Raises StateError for anything but what `as_json` gives."""
        try:
            k, v = (tuple(RowType(str(t), int(n), int(m)) for t, n, m in data[name]) for name in "kv")
            header = bytes.fromhex(data["header"])
        except (TypeError, ValueError, KeyError):
            raise StateError("the description of the cache's rows is damaged") from None
        if not 0 < len(k) == len(v) <= _MAX_LAYERS or len(header) > 4096:
            raise StateError("the description of the cache's rows is damaged")
        if not all(0 < t.row_bytes <= _MAX_ROW and 0 < t.values <= _MAX_ROW for t in k + v):
            raise StateError("the description of the cache's rows is damaged")
        return Layout(k, v, header)


@dataclass(frozen=True)
class Exact:
    """Exact rows (f16) held for some positions."""

    positions: Ints  # (m,)
    slots: Ints  # (m,) counted from the sequence's first
    rows: tuple[Bytes, ...]  # per layer (m, bytes)

    @staticmethod
    def none(layout: Layout) -> Exact:
        empty = np.zeros(0, np.int32)
        return Exact(empty, empty, tuple(np.zeros((0, 2 * (k.values + v.values)), np.uint8) for k, v in zip(layout.k, layout.v)))

    def where(self, keep: NDArray[np.bool_]) -> Exact:
        return Exact(self.positions[keep], self.slots[keep], tuple(r[keep] for r in self.rows))


@dataclass(frozen=True)
class Piece:
    """The state of n positions of one sequence."""

    layout: Layout
    positions: Ints  # (n,) ascending
    offsets: Ints  # (n,) 0..63, place in the frame the key was coded in; 0 in caches of other types
    k: tuple[Bytes, ...]  # per layer (n, row_bytes)
    v: tuple[Bytes, ...]
    exact: Exact


@dataclass(frozen=True)
class Chunk:
    """A piece as bytes.

    blocks: for each layer the K rows, then the V rows, (n, row_bytes) each: what an entropy coder codes.
    extra: offsets u8 (n); number of exact rows u32; their positions u32 and slots i32; per layer their f16 rows.
    """

    blocks: bytes
    extra: bytes


class _Reader:
    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self.data, self.at = memoryview(data), 0

    def take(self, n: int) -> memoryview:
        if n < 0 or self.at + n > len(self.data):
            raise StateError("a saved state is cut short")
        self.at += n
        return self.data[self.at - n : self.at]

    def numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))

    def array(self, dtype: type, *shape: int) -> NDArray[Any]:
        n = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
        return np.frombuffer(self.take(n), dtype).reshape(shape)


@functools.cache
def _types() -> dict[str, int]:
    """All types of the loaded library: names to ids."""
    loaded = llama.library()
    found = {}
    for i in range(int(loaded.api.GGML_TYPE_COUNT)):
        name = loaded.handle.ggml_type_name(i)
        if name and loaded.handle.ggml_type_size(i):
            found[name.decode()] = i
    for name in (f"seqkv{bits}{plan}" for bits in range(1, 5) for plan in ("", "k")) if loaded.patched else ():
        found[name] = int(loaded.handle.llama_seqkv_type(name.encode()))
    return {name: i for name, i in found.items() if i >= 0}


def _row_type(type_: int, row_bytes: int) -> RowType:
    handle = llama.library().handle
    name = next((n for n, i in _types().items() if i == type_), None)
    if name is None:
        raise StateError(f"a saved state has rows of an unknown type ({type_})")
    size, block = int(handle.ggml_type_size(type_)), int(handle.ggml_blck_size(type_))
    if row_bytes <= 0 or row_bytes % size or row_bytes > _MAX_ROW:
        raise StateError(f"a saved state has rows of {row_bytes} bytes, not of whole {name} blocks")
    return RowType(name, row_bytes, row_bytes // size * block)


def _header(reader: _Reader) -> bytes:
    """The seqkv header at the reader's place; b"" if there is none."""
    start = reader.at
    if len(reader.data) - start < 4 or struct.unpack("<I", reader.data[start : start + 4])[0] != MAGIC:
        return b""
    reader.take(4)
    for form in ("s", "s", "ii", "s", "QQ"):
        if form == "s":
            (n,) = reader.numbers("I")
            if n > 64:
                raise StateError("a saved state has a name of more than 64 characters")
            reader.take(n)
        else:
            reader.numbers(form)
    return bytes(reader.data[start : reader.at])


def parse(data: bytes | bytearray | memoryview) -> Piece:
    """The state of one sequence that llama_state_seq_get_data or llama_seqkv_range_get wrote, sorted by position.

    Arrays are views of `data` where it is in order. Raises StateError: cut short, no cells, or a cache whose values are stored
    transposed (made without flash attention).
    """
    reader = _Reader(data)
    if len(reader.data) >= 8 and reader.numbers("Ii")[0] != SEQUENCE_MAGIC:
        reader.at = 0
    header = _header(reader)
    ext = bool(header)
    (n_stream,) = reader.numbers("I")
    counts: list[int] = []
    piece: Piece | None = None
    if not 0 < n_stream <= 256:
        raise StateError("a saved state has an impossible number of streams")
    for _ in range(n_stream):
        (n,) = reader.numbers("I")
        counts.append(n)
        if n == 0:
            continue
        if piece is not None:
            raise StateError("a saved state has cells in more than one stream: it is not of one sequence")
        cells = reader.array(np.int32, n, 6 if ext else 3)  # pos, n_seq, [x, y, tok], seq
        if not (cells[:, 1] == 1).all():
            raise StateError("a saved state has cells of several sequences")
        positions, offsets = cells[:, 0], cells[:, 2] if ext else np.zeros(n, np.int32)
        v_trans, n_layer = reader.numbers("II")
        if v_trans:
            raise StateError("this cache keeps its values transposed: make the context with flash attention to store its sessions")
        if not 0 < n_layer <= _MAX_LAYERS:
            raise StateError("a saved state has an impossible number of layers")
        types: list[list[RowType]] = [[], []]
        rows: list[list[Bytes]] = [[], []]
        for part in range(2):
            for _layer in range(n_layer):
                type_, row_bytes = reader.numbers("iQ")
                types[part].append(_row_type(type_, row_bytes))
                rows[part].append(reader.array(np.uint8, n, row_bytes))
        layout = Layout(tuple(types[0]), tuple(types[1]), header)
        exact, index = Exact.none(layout), np.zeros(0, np.int64)
        if ext:
            (m,) = reader.numbers("I")
            if m > n:
                raise StateError("a saved state has more exact rows than cells")
            pairs = reader.array(np.int32, m, 2)
            index = pairs[:, 0].astype(np.int64)
            if m and not (0 <= index.min() and index.max() < n):
                raise StateError("a saved state has an exact row of no cell")
            widths = (2 * (k.values + v.values) for k, v in zip(layout.k, layout.v))
            exact = Exact(positions[index], pairs[:, 1], tuple(reader.array(np.uint8, m, w) for w in widths))
        order = np.argsort(positions, kind="stable")
        if (order != np.arange(n)).any():
            positions, offsets = positions[order], offsets[order]
            rows = [[r[order] for r in part] for part in rows]
        piece = Piece(layout, positions, offsets, tuple(rows[0]), tuple(rows[1]), exact)
    if piece is None:
        raise StateError("a saved state holds no tokens")
    if reader.at != len(reader.data):
        raise StateError("a saved state has more parts than one KV cache with full attention")
    return piece


def part(piece: Piece, first: int, end: int) -> Piece:
    """Rows first..end-1 of a piece, without exact rows."""
    rows = slice(first, end)
    k, v = (tuple(r[rows] for r in rows_of) for rows_of in (piece.k, piece.v))
    return Piece(piece.layout, piece.positions[rows], piece.offsets[rows], k, v, Exact.none(piece.layout))


def to_chunk(piece: Piece, keep_exact: bool = True) -> Chunk:
    """The bytes of a piece. keep_exact: False leaves the exact rows out."""
    exact = piece.exact if keep_exact else Exact.none(piece.layout)
    blocks = b"".join(rows.tobytes() for pair in zip(piece.k, piece.v) for rows in pair)
    m = len(exact.positions)
    parts = [piece.offsets.astype(np.uint8).tobytes(), struct.pack("<I", m), exact.positions.astype("<u4").tobytes()]
    parts += [exact.slots.astype("<i4").tobytes(), *(rows.tobytes() for rows in exact.rows)]
    return Chunk(blocks, b"".join(parts))


def check_chunk(chunk: Chunk, layout: Layout, n: int) -> Exact:
    """The exact rows of a chunk of n positions. Raises StateError unless its sizes and offsets are possible."""
    if len(chunk.blocks) != n * layout.row_bytes:
        raise StateError(f"a chunk of {n} tokens has {len(chunk.blocks):,} bytes of blocks, expected {n * layout.row_bytes:,}")
    reader = _Reader(chunk.extra)
    offsets = reader.array(np.uint8, n)
    if n and int(offsets.max()) >= FRAME:
        raise StateError("a chunk has an offset outside its frame")
    (m,) = reader.numbers("I")
    if m > _MAX_EXACT or len(chunk.extra) != n + 4 + m * (8 + layout.exact_bytes):
        raise StateError("a chunk has exact rows of the wrong size")
    positions, slots = reader.array(np.int32, m), reader.array(np.int32, m)
    widths = (2 * (k.values + v.values) for k, v in zip(layout.k, layout.v))
    return Exact(positions, slots, tuple(reader.array(np.uint8, m, w) for w in widths))


def build(layout: Layout, chunks: Sequence[tuple[Chunk, int]], tokens: Sequence[int], exact: Exact | None = None) -> bytearray:
    """A state of positions 0..n-1 that llama_state_seq_set_data reads, from chunks and their numbers of positions, in order.

    exact: the exact rows to give back; None: those of the chunks. Raises StateError for impossible chunks.
    """
    found = [check_chunk(chunk, layout, n) for chunk, n in chunks]
    n = sum(count for _, count in chunks)
    if n != len(tokens) or not n:
        raise StateError(f"{len(tokens)} tokens for a state of {n} positions")
    if exact is None:
        exact = Exact(
            np.concatenate([e.positions for e in found]), np.concatenate([e.slots for e in found]),
            tuple(np.concatenate([e.rows[i] for e in found]) for i in range(len(layout.k))),
        )  # fmt: skip
    exact = exact.where((exact.positions >= 0) & (exact.positions < n))
    _, first = np.unique(exact.positions, return_index=True)
    exact = exact.where(np.isin(np.arange(len(exact.positions)), first))

    ext = bool(layout.header)
    cells = np.zeros((n, 6 if ext else 3), np.int32)
    cells[:, 0], cells[:, 1] = np.arange(n), 1
    if ext:
        cells[:, 2] = np.concatenate([np.frombuffer(chunk.extra[:count], np.uint8) for chunk, count in chunks])
        cells[:, 4] = np.asarray(tokens, np.int32)
    ids = _types()
    missing = {t.type for t in layout.k + layout.v} - ids.keys()
    if missing:
        raise StateError(f"these libraries do not know the type {missing.pop()}")
    head = struct.pack("<Ii", SEQUENCE_MAGIC, 0) + layout.header + struct.pack("<II", 1, n) + cells.tobytes() + struct.pack("<II", 0, len(layout.k))
    m = len(exact.positions)
    size = len(head) + 12 * 2 * len(layout.k) + n * layout.row_bytes + (4 + m * (8 + layout.exact_bytes) if ext else 0)
    out = bytearray(size)
    out[: len(head)] = head
    at = len(head)
    view = memoryview(out)
    starts = np.cumsum([0] + [t.row_bytes for pair in zip(layout.k, layout.v) for t in pair])
    for part, types in enumerate((layout.k, layout.v)):
        for layer, t in enumerate(types):
            struct.pack_into("<iQ", out, at, ids[t.type], t.row_bytes)
            at += 12
            start = int(starts[2 * layer + part])
            for chunk, count in chunks:
                size = count * t.row_bytes
                view[at : at + size] = memoryview(chunk.blocks)[count * start : count * start + size]
                at += size
    if ext:
        tail = [struct.pack("<I", m), np.stack([exact.positions, exact.slots], 1).astype("<i4").tobytes()]
        data = b"".join(tail + [rows.tobytes() for rows in exact.rows])
        view[at : at + len(data)] = data
        at += len(data)
    assert at == len(out)
    return out


# --- a live context ---


def read_range(context: int, first: int, end: int, *, exact: bool) -> Piece:
    """The state of positions first..end-1 of sequence 0 of a llama_context. Raises StateError with the library's reason."""
    function = llama.library().handle.llama_seqkv_range_get
    err = ctypes.create_string_buffer(512)

    def call(buffer: Any, size: int) -> int:
        n = int(function(context, 0, first, end, exact, buffer, size, err, len(err)))
        if n < 0:
            raise StateError(f"this context's sessions cannot be stored: {err.value.decode('utf-8', 'replace')} (chat without --session)")
        return n

    size = call(None, 0)
    data = np.empty(size, np.uint8)
    if call(data.ctypes.data, size) != size:
        raise StateError("the cache changed while it was read")
    return parse(memoryview(data))


def rope_digest(context: int, n_layer: int) -> bytes:
    """A hash of the RoPE in use by a llama_context, scaling included: keys depend on it."""
    from blake3 import blake3

    digest = blake3()
    function: Callable[..., int] = llama.library().handle.llama_seqkv_rope
    freq = (ctypes.c_float * 1024)()
    neox = ctypes.c_int32(0)
    for layer in range(n_layer):
        n = min(1024, max(0, int(function(context, layer, freq, 1024, ctypes.byref(neox)))))
        digest.update(struct.pack("<ii", n, neox.value) + bytes(memoryview(freq).cast("B")[: 4 * n]))
    return digest.digest()
