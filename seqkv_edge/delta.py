"""Lossless predictive coding of live blocks: a frame's keys and values, from what is decoded already (native/delta.c).

A `Coder` holds the predictors of a profile. It codes frames of a path, which is a run of tokens with their blocks in
every layer: what was decoded before is the context of what comes next. Two levels:
    small   with the previous layer's keys and values: the layers of a frame depend on each other
    fast    a layer is coded by itself
Integer arithmetic throughout: the same bytes, and the same blocks from them, on every machine.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ._codec import ffi, lib
from .codec import BLOCK, _ptr, _status, block_bytes
from .errors import ProfileError, SeqkvError
from .gguf_meta import read_header

FRAME = 64
VERSION = 1
COPY_CLASSES = 7
MATCHES = (1, 2, 3, 5, 9, 17)
"""lengths of the matches of copy classes 1, 2, ..."""
GAIN_TERMS = 8
MAX_INPUTS = 4096
LEVELS = ("fast", "small")
"""by their number in a coded frame"""

Level = Literal["fast", "small"]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Predictor:
    """Predictor of the keys or the values of a layer at one level; n values in a row. As seqkv_predictor of native/seqkv.h."""

    weight: NDArray[np.int8] | None
    """(n, inputs)"""
    step: NDArray[np.uint16]
    """(n,)"""
    spread: Bytes
    """(n,)"""
    copy: Bytes
    """(COPY_CLASSES,)"""
    copy_error: NDArray[np.int8]
    """(COPY_CLASSES,)"""
    copy_spread: NDArray[np.int8]
    """(COPY_CLASSES,)"""
    gain: NDArray[np.int32]
    """(groups, GAIN_TERMS)"""


@dataclass(frozen=True)
class Layer:
    """Constants of a layer (seqkv_layer) and its predictors."""

    n_head: int
    dk: int
    dv: int
    neox: bool
    rope: NDArray[np.int16]
    """(FRAME, n_rot) 2**14 cos, sin"""
    k_encode: NDArray[np.int16]
    k_decode: NDArray[np.int16]
    """(n_head, dk, dk)"""
    k_shift: Bytes
    """(n_head,)"""
    v_gain: Bytes
    """(n_head,)"""
    predictors: Mapping[str, tuple[Predictor, Predictor]] = field(default_factory=dict)
    """level -> of K, of V"""

    @property
    def n_k(self) -> int:
        return self.n_head * self.dk

    @property
    def n_v(self) -> int:
        return self.n_head * self.dv

    def rows(self, k_bits: int, v_bits: int) -> tuple[int, int]:
        """Bytes of a token's keys and values."""
        return self.n_k // BLOCK * block_bytes(k_bits, graded=True), self.n_v // BLOCK * block_bytes(v_bits)

    def struct(self) -> Any:
        """seqkv_layer *; the arrays must outlive it."""
        return ffi.new("seqkv_layer *", {
            "n_head": self.n_head, "dk": self.dk, "dv": self.dv, "n_rot": self.rope.shape[1], "neox": self.neox,
            "rope": _ptr(self.rope, "int16_t *"), "k_encode": _ptr(self.k_encode, "int16_t *"),
            "k_decode": _ptr(self.k_decode, "int16_t *"), "k_shift": _ptr(self.k_shift, "uint8_t *"),
            "v_gain": _ptr(self.v_gain, "uint8_t *"),
        })  # fmt: skip

    def inputs(self, k_bits: int, v_bits: int, offset: Bytes, k: Bytes, v: Bytes) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
        """What predictions are made from: x (n, n_k) and z (n, n_v) of rows k and v at their offsets."""
        n = len(offset)
        x, z = np.empty((n, self.n_k), np.int16), np.empty((n, self.n_v), np.int16)
        k, v, offset = (np.ascontiguousarray(a, np.uint8) for a in (k, v, offset))
        if k.size != n * self.rows(k_bits, v_bits)[0] or v.size != n * self.rows(k_bits, v_bits)[1]:
            raise SeqkvError(f"delta: {n} rows of {k.size} and {v.size} bytes")
        _status(lib.seqkv_delta_inputs(
            self.struct(), k_bits, v_bits, _ptr(offset, "uint8_t *"), n, _ptr(k, "uint8_t *"), _ptr(v, "uint8_t *"),
            _ptr(x, "int16_t *"), _ptr(z, "int16_t *"),
        ))  # fmt: skip
        return x, z


def rope_table(freq: NDArray[np.float64]) -> NDArray[np.int16]:
    """(FRAME, 2*len(freq)) 2**14 (cos, sin) of the offsets."""
    angle = np.multiply.outer(np.arange(FRAME), np.asarray(freq, np.float64))
    return np.rint(np.stack([np.cos(angle), np.sin(angle)], axis=-1).reshape(FRAME, -1) * (1 << 14)).astype(np.int16)


def make_layer(k_encode: NDArray, dv: int, rope: NDArray[np.int16], neox: bool, v_gain: Bytes) -> Layer:
    """A layer without predictors; k_encode (n_head, dk, dk): E of the profile. Raises ProfileError."""
    enc = np.ascontiguousarray(k_encode, np.float32)
    n_head, dk, _ = enc.shape
    e, d = (np.empty(enc.shape, np.int16) for _ in range(2))
    shift, work = np.empty(n_head, np.uint8), np.empty(2 * dk * dk)
    for h in range(n_head):
        status = lib.seqkv_delta_transform(
            _ptr(enc[h], "float *"), dk, rope.shape[1], neox, _ptr(e[h], "int16_t *"), _ptr(d[h], "int16_t *"),
            _ptr(shift[h:], "uint8_t *"), _ptr(work, "double *"),
        )  # fmt: skip
        if status < 0:
            raise ProfileError(f"the profile's transform of head {h} cannot be used to predict")
    return Layer(n_head, dk, dv, neox, np.ascontiguousarray(rope), e, d, shift, np.ascontiguousarray(v_gain, np.uint8))


class Copies:
    """Finds, for each token of a frame, the token of an earlier frame of its path that ends the longest match with its own past."""

    def __init__(self) -> None:
        self._tokens = b""  # the last that a match may begin with, 4 bytes each: pieces of bytes are quicker keys than tuples
        self._n = 0
        self._last: list[dict[bytes, int]] = [{} for _ in MATCHES]

    def add(self, tokens: Sequence[int]) -> tuple[NDArray[np.int32], Bytes]:
        """Append a frame. Returns source and match (n,) as in seqkv_frame; of several sources the latest is taken."""
        n, before = len(tokens), len(self._tokens) // 4
        data = self._tokens + np.asarray(tokens, np.int64).astype("<u4").tobytes()
        source, match = [0] * n, [0] * n
        for c, (m, known) in enumerate(zip(MATCHES, self._last), 1):
            first = max(0, m - 1 - before)  # the first token that has m tokens with itself
            ends = range(4 * (before + first + 1), len(data) + 1, 4)
            keys = [data[end - 4 * m : end] for end in ends]
            for i, found in enumerate(map(known.get, keys), first):
                if found is not None:
                    source[i], match[i] = found, c
            known.update(zip(keys, range(self._n + first, self._n + n)))
        self._tokens, self._n = data[-4 * (MATCHES[-1] - 1) :], self._n + n
        return np.array(source, np.int32), np.array(match, np.uint8)


@dataclass(frozen=True)
class Rows:
    """Blocks of a path: for every coded layer, in the coder's order, (n_tokens, row) uint8, contiguous. A decoder fills them."""

    k: Sequence[Bytes]
    v: Sequence[Bytes]


@dataclass(frozen=True)
class Frame:
    """Which tokens of a path to code, and their copies. Offsets are those of the whole path up to the end of the frame."""

    start: int
    offset: Bytes
    """(start + n,)"""
    source: NDArray[np.int32]
    """(n,)"""
    match: Bytes
    """(n,)"""

    def __post_init__(self) -> None:
        n = len(self.source)
        if not (1 <= n <= FRAME and self.start >= 0 and len(self.match) == n and len(self.offset) == self.start + n):
            raise SeqkvError(f"delta: a frame of {n} tokens at {self.start} with {len(self.match)} matches and {len(self.offset)} offsets")
        for name, kind in (("offset", np.uint8), ("source", np.int32), ("match", np.uint8)):
            array = getattr(self, name)
            if array.dtype != kind or not array.flags.c_contiguous:
                object.__setattr__(self, name, np.ascontiguousarray(array, kind))


def frames(tokens: Sequence[int], offset: Bytes, start: int = 0) -> list[Frame]:
    """Frames of a path from token `start` on, a multiple of 64; the last may be shorter. offset (n_tokens,): of every cell."""
    if start % FRAME or len(offset) != len(tokens):
        raise SeqkvError(f"delta: frames of {len(tokens)} tokens with {len(offset)} offsets from {start} on")
    copies, out = Copies(), []
    for at in range(0, len(tokens), FRAME):
        source, match = copies.add(tokens[at : at + FRAME])
        if at >= start:
            out.append(Frame(at, offset[: at + len(source)], source, match))
    return out


class Coder:
    """Coder of the frames of a model's cache with given bits; may be used by several threads at once.

    layers   those with a seqkv cache, in order; k_bits, v_bits: their bits in the cache
    index    their numbers in the model (default: 0, 1, ...)
    """

    def __init__(self, layers: Sequence[Layer], k_bits: Sequence[int], v_bits: Sequence[int], index: Sequence[int] | None = None) -> None:
        if not len(layers) == len(k_bits) == len(v_bits) > 0:
            raise SeqkvError("delta: one number of bits for the keys and one for the values of every layer")
        for layer, *bits in zip(layers, k_bits, v_bits):
            layer.rows(*bits)  # raises SeqkvError
        self.index = tuple(range(len(layers)) if index is None else index)
        self.layers, self.k_bits, self.v_bits = tuple(layers), tuple(k_bits), tuple(v_bits)
        self._layer = [layer.struct() for layer in layers]
        self._predictor = {level: [[self._struct(p) for p in layer.predictors[level]] for layer in layers] for level in LEVELS}
        self._local = threading.local()
        self._n_work = max(self._work(level, i) for level in LEVELS for i in range(len(layers)))

    @staticmethod
    def _struct(p: Predictor) -> Any:
        return ffi.new("seqkv_predictor *", {
            "weight": _ptr(p.weight, "int8_t *"), "step": _ptr(p.step, "uint16_t *"), "spread": _ptr(p.spread, "uint8_t *"),
            "copy": _ptr(p.copy, "uint8_t *"), "copy_error": _ptr(p.copy_error, "int8_t *"), "copy_spread": _ptr(p.copy_spread, "int8_t *"), "gain": _ptr(p.gain, "int32_t *"),
        })  # fmt: skip

    def _prev(self, level: str, i: int) -> Any:
        return self._layer[i - 1] if level == "small" and i > 0 else ffi.NULL

    def _work(self, level: str, i: int) -> int:
        return _status(lib.seqkv_delta_work(self._layer[i], self._prev(level, i)))

    def _buffers(self) -> tuple[NDArray[np.int64], Bytes]:
        """Work and output of the calling thread."""
        if not hasattr(self._local, "buffers"):
            bound = max(_status(lib.seqkv_delta_bound(layer, FRAME)) for layer in self._layer)
            self._local.buffers = np.empty(self._n_work // 8 + 1, np.int64), np.empty(bound, np.uint8)
        return self._local.buffers

    def _frame(self, level: str, i: int, frame: Frame, rows: Rows) -> tuple[Any, Bytes, Bytes]:
        """seqkv_frame, and the frame's part of the layer's rows."""
        start, end = frame.start, frame.start + len(frame.source)
        before = max(i - 1, 0)
        for j in {i, before}:
            for array, row in zip((rows.k[j], rows.v[j]), self.layers[j].rows(self.k_bits[j], self.v_bits[j])):
                if array.dtype != np.uint8 or array.ndim != 2 or array.shape[1] != row or len(array) < end or not array.flags.c_contiguous:
                    raise SeqkvError(f"delta: rows {array.shape} of layer {j}, not {end} of {row} bytes")
        return ffi.new("seqkv_frame *", {
            "n_past": start, "n": end - start, "k_bits": self.k_bits[i], "v_bits": self.v_bits[i],
            "prev_k_bits": self.k_bits[before], "prev_v_bits": self.v_bits[before],
            "offset": _ptr(frame.offset, "uint8_t *"), "source": _ptr(frame.source, "int32_t *"), "match": _ptr(frame.match, "uint8_t *"),
            "k_past": _ptr(rows.k[i], "uint8_t *"), "v_past": _ptr(rows.v[i], "uint8_t *"),
            "prev_k": _ptr(rows.k[before], "uint8_t *"), "prev_v": _ptr(rows.v[before], "uint8_t *"),
        }), rows.k[i][start:end], rows.v[i][start:end]  # fmt: skip

    def encode_layer(self, level: Level, i: int, frame: Frame, rows: Rows) -> bytes:
        """One layer of a frame whose rows are known. Raises SeqkvError."""
        work, out = self._buffers()
        c_frame, k, v = self._frame(level, i, frame, rows)
        size = _status(lib.seqkv_delta_encode(
            self._layer[i], self._prev(level, i), *self._predictor[level][i], c_frame, _ptr(k, "uint8_t *"), _ptr(v, "uint8_t *"),
            _ptr(out, "uint8_t *"), out.size, _ptr(work, "void *"), work.nbytes,
        ))  # fmt: skip
        return out[:size].tobytes()

    def decode_layer(self, level: Level, i: int, frame: Frame, rows: Rows, data: bytes | memoryview) -> None:
        """The inverse: writes the frame's rows of layer i. At `small` those of layer i - 1 must be there. Raises SeqkvError."""
        work, _ = self._buffers()
        c_frame, k, v = self._frame(level, i, frame, rows)
        if not (k.flags.writeable and v.flags.writeable):
            raise SeqkvError("delta: rows to decode into are read-only")
        _status(lib.seqkv_delta_decode(
            self._layer[i], self._prev(level, i), *self._predictor[level][i], c_frame, _ptr(k, "uint8_t *"), _ptr(v, "uint8_t *"),
            ffi.from_buffer("uint8_t[]", data), len(data), _ptr(work, "void *"), work.nbytes,
        ))  # fmt: skip

    def encode(self, level: Level, frame: Frame, rows: Rows) -> bytes:
        """A coded frame (native/format.md). Raises SeqkvError."""
        parts = [self.encode_layer(level, i, frame, rows) for i in range(len(self.layers))]
        head = struct.pack(f"<BB{len(parts)}I", LEVELS.index(level), len(frame.source) - 1, *map(len, parts))
        return head + b"".join(parts)

    def split(self, data: bytes) -> tuple[Level, int, list[memoryview]]:
        """Level, number of tokens and the layers' bytes of a coded frame. Raises SeqkvError."""
        n = len(self.layers)
        head = 2 + 4 * n
        if len(data) < head:
            raise SeqkvError(f"delta: a coded frame of {len(data)} bytes is shorter than its head")
        level, last, *sizes = struct.unpack_from(f"<BB{n}I", data)
        if level >= len(LEVELS) or last >= FRAME or head + sum(sizes) != len(data):
            raise SeqkvError("delta: the head of a coded frame is damaged")
        ends = head + np.cumsum([0, *sizes])
        view = memoryview(data)
        return LEVELS[level], last + 1, [view[a:b] for a, b in zip(ends, ends[1:])]

    def decode(self, data: bytes, frame: Frame, rows: Rows) -> None:
        """The inverse of `encode`: writes the frame's rows; those before it must be there. Raises SeqkvError."""
        self.decode_path([data], [frame], rows, threads=1)

    def decode_path(self, data: Sequence[bytes], frames: Sequence[Frame], rows: Rows, *, threads: int = 2) -> None:
        """Decode consecutive frames of a path, on several threads.

        Layer i of a frame waits for layer i of the frame before, which it may copy from. Raises SeqkvError.
        """
        coded = [self.split(d) for d in data]
        if any(n != len(frame.source) for (_, n, _), frame in zip(coded, frames)) or len(coded) != len(frames):
            raise SeqkvError("delta: the coded frames have other numbers of tokens")
        ready = [0] * len(frames)  # layers that are there
        changed = threading.Condition()
        failed = False

        def decode(f: int) -> None:
            nonlocal failed
            level, _, parts = coded[f]
            try:
                for i, part in enumerate(parts):
                    with changed:
                        changed.wait_for(lambda: failed or f == 0 or ready[f - 1] > i)
                        if failed:
                            return
                    self.decode_layer(level, i, frames[f], rows, part)
                    with changed:
                        ready[f] = i + 1
                        changed.notify_all()
            except BaseException:
                with changed:
                    failed = True
                    changed.notify_all()
                raise

        if threads <= 1 or len(frames) == 1:
            for f in range(len(frames)):
                decode(f)
            return
        with ThreadPoolExecutor(threads) as pool:  # tasks start in order, so the one that others wait for always runs
            for done in [pool.submit(decode, f) for f in range(len(frames))]:
                done.result()


# -- tensors of a profile


def weights_to_bytes(weight: NDArray[np.int8]) -> Bytes:
    """Weights at the cost of their frequencies."""
    w = np.ascontiguousarray(weight, np.int8)
    out, work = np.empty(_status(lib.seqkv_weights_bound(w.size)), np.uint8), np.empty(w.size, np.uint32)
    pointers = (_ptr(w, "int8_t *"), w.size, _ptr(out, "uint8_t *"), out.size, _ptr(work, "uint32_t *"))
    return out[: _status(lib.seqkv_weights_encode(*pointers))].copy()


def weights_from_bytes(data: Bytes, shape: tuple[int, ...]) -> NDArray[np.int8]:
    """The inverse. Raises SeqkvError for bytes that do not hold weights of that shape."""
    data = np.ascontiguousarray(data, np.uint8)
    out = np.empty(shape, np.int8)
    _status(lib.seqkv_weights_decode(_ptr(data, "uint8_t *"), data.size, _ptr(out, "int8_t *"), out.size))
    return out


def tensors(layers: Mapping[int, Layer]) -> dict[str, NDArray]:
    """What a profile stores of the layers {index in the model: layer}."""
    out: dict[str, NDArray] = {}
    ropes: list[NDArray[np.int16]] = []
    index = []
    for layer in layers.values():
        at = next((i for i, r in enumerate(ropes) if r.shape == layer.rope.shape and np.array_equal(r, layer.rope)), len(ropes))
        if at == len(ropes):
            ropes.append(layer.rope)
        index.append((at, int(layer.neox)))
    for i, rope in enumerate(ropes):
        if rope.size:
            out[f"delta.rope.{i}"] = rope
    for (il, layer), (rope_at, neox) in zip(layers.items(), index):
        fast, small = layer.predictors["fast"], layer.predictors["small"]
        four = (*fast, *small)
        out[f"blk.{il}.delta_layer"] = np.array([rope_at, neox, *layer.v_gain], np.int16)
        for name, p in zip(("fast_k", "fast_v", "k", "v"), four):
            if p.weight is not None:
                out[f"blk.{il}.delta_{name}"] = weights_to_bytes(p.weight).view(np.int8)
        out[f"blk.{il}.delta_step"] = np.concatenate([p.step for p in four]).view(np.int16)
        out[f"blk.{il}.delta_spread"] = np.concatenate([p.spread for p in four]).view(np.int8)
        out[f"blk.{il}.delta_copy"] = np.concatenate([np.stack([p.copy.view(np.int8), p.copy_error, p.copy_spread]) for p in four])
        out[f"blk.{il}.delta_gain"] = np.concatenate([p.gain for p in four])
    return out


_TYPES = {0: np.float32, 1: np.float16, 24: np.int8, 25: np.int16, 26: np.int32}


def read(path: FilePath, kv: str, kv_v: str | None = None) -> Coder | None:
    """The coder of a profile for a cache with keys of the type kv ("seqkv3") and values of kv_v (default: the same).

    None: the profile has no predictors. Raises ProfileError.
    """
    header = read_header(path)
    version = header.fields.get("seqkv.delta.version")
    if version is None:
        return None
    if version != VERSION:
        raise ProfileError(f"{path} has predictors of version {version!r}, expected {VERSION}: remake it with 'calibrate'")
    found = {t.name: t for t in header.tensors}

    def tensor(name: str, shape: tuple[int, ...] | None = None) -> NDArray:
        t = found.get(name)
        if t is None or t.type not in _TYPES or t.n_bytes is None:
            raise ProfileError(f"{path} is damaged: no tensor {name}")
        dtype = np.dtype(_TYPES[t.type])
        array = np.fromfile(path, dtype, t.n_bytes // dtype.itemsize, offset=t.offset)
        if array.nbytes != t.n_bytes or (shape is not None and tuple(reversed(t.shape)) != shape):
            raise ProfileError(f"{path} is damaged: tensor {name} has the shape {t.shape}")
        return array.reshape(tuple(reversed(t.shape)))

    types = (kv, kv_v or kv)
    bits = [header.fields.get(f"seqkv.profile.{name}.{kind}_bits") for name, kind in zip(types, "kv")]
    n_layer = header.fields.get("seqkv.profile.n_layer")
    if not isinstance(n_layer, int) or any(b is not None and (not isinstance(b, list) or len(b) != n_layer) for b in bits):
        raise ProfileError(f"{path} is damaged: the bits of {types} are {bits}")
    layers: list[Layer] = []
    index, k_bits, v_bits = [], [], []
    for il in range(n_layer):
        if f"blk.{il}.k_encode" not in found:
            continue
        enc, scale = tensor(f"blk.{il}.k_encode"), tensor(f"blk.{il}.v_scale")
        if enc.ndim != 3 or enc.shape[1] != enc.shape[2] or scale.ndim != 2 or len(scale) != len(enc):
            raise ProfileError(f"{path} is damaged: k_encode of layer {il} has the shape {enc.shape}")
        layers.append(_read_layer(tensor, il, enc, scale.shape[1], layers[-1] if layers else None, found))
        index.append(il)
        for out, name, of_layer in zip((k_bits, v_bits), types, bits):
            out.append(int(name[-1]) if of_layer is None else int(of_layer[il]))
    try:
        return Coder(layers, k_bits, v_bits, index)
    except SeqkvError as error:
        raise ProfileError(f"{path} is damaged: {error}") from None


def _read_layer(tensor: Any, il: int, enc: NDArray, dv: int, prev: Layer | None, found: Mapping[str, Any]) -> Layer:
    n_head, dk, _ = enc.shape
    head = tensor(f"blk.{il}.delta_layer", (2 + n_head,))
    name = f"delta.rope.{head[0]}"
    rope = tensor(name) if name in found else np.zeros((FRAME, 0), np.int16)
    if rope.dtype != np.int16 or rope.ndim != 2 or len(rope) != FRAME or rope.shape[1] > dk:
        raise ProfileError(f"the profile's table {name} has the shape {rope.shape}")
    layer = make_layer(enc, dv, rope, bool(head[1]), head[2:].astype(np.uint8))
    n_k, n_v = n_head * dk, n_head * dv
    n_prev = prev.n_k + prev.n_v if prev else 0
    sizes, groups = (n_k, n_v, n_k, n_v), (n_k // BLOCK * 3, n_v // BLOCK) * 2
    inputs = (0, n_k, n_prev, n_prev + n_k)
    step = np.split(tensor(f"blk.{il}.delta_step", (sum(sizes),)).view(np.uint16), np.cumsum(sizes)[:-1])
    spread = np.split(tensor(f"blk.{il}.delta_spread", (sum(sizes),)).view(np.uint8), np.cumsum(sizes)[:-1])
    copy = tensor(f"blk.{il}.delta_copy", (12, COPY_CLASSES))
    gain = np.split(tensor(f"blk.{il}.delta_gain", (sum(groups), GAIN_TERMS)), np.cumsum(groups)[:-1])
    if step[0].dtype != np.uint16 or spread[0].dtype != np.uint8 or copy.dtype != np.int8 or gain[0].dtype != np.int32:
        raise ProfileError(f"the predictors of layer {il} have other types")
    four = []
    for j, kind in enumerate(("fast_k", "fast_v", "k", "v")):
        weight = None
        if f"blk.{il}.delta_{kind}" in found and inputs[j]:
            try:
                weight = weights_from_bytes(tensor(f"blk.{il}.delta_{kind}").view(np.uint8), (sizes[j], inputs[j]))
            except SeqkvError as error:
                raise ProfileError(f"the weights of layer {il} are damaged: {error}") from None
        shares = np.minimum(copy[3 * j].view(np.uint8), 128)
        rest = (step[j], spread[j], shares, copy[3 * j + 1], copy[3 * j + 2], gain[j])
        four.append(Predictor(weight, *map(np.ascontiguousarray, rest)))
    return replace(layer, predictors={"fast": (four[0], four[1]), "small": (four[2], four[3])})
