"""How the blocks of a stored frame are written: the levels of a store.

    raw           as they are
    fast, small   coded without loss from the frames before (delta.py); the name goes on with the profile whose predictors do it
    lossyKV       with loss: keys in K bits a value fewer than the cache's, values in V, coded like small; read back they are coded in the
                  cache's bits again. "lossy" alone: such blocks as they are (of an imported session)

A path coder goes along one path of the trie, frame by frame. What it has seen is the context of what comes next: a frame can be
decoded when the frames before it have been, which is the order in which a session is restored anyway. It looks back at WINDOW
frames at most, so that memory is bounded however long a session is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from . import delta
from .codec import dequantize, quantize
from .errors import SeqkvError, StateError
from .state import FRAME, Chunk, Layout

WINDOW = 64
"""frames before a frame that its values may be copied from"""
_TYPE = re.compile(r"seqkv([1-4])(k?)")
_LEVEL = re.compile(r"(fast|small|lossy[0-3]{2})-([0-9a-f]{16})")


class PathCoder(Protocol):
    """Coder of the frames of one path, in order."""

    def encode(self, tokens: Sequence[int], chunk: Chunk) -> bytes:
        """The blocks of the next frame, coded."""
        ...

    def decode(self, tokens: Sequence[int], extra: bytes, coded: bytes) -> bytes:
        """The blocks of the next frame; extra: its chunk's. Raises SeqkvError for bytes that `encode` did not write."""
        ...

    def add(self, tokens: Sequence[int], chunk: Chunk) -> None:
        """The next frame, known without coding."""
        ...


class Raw:
    """Level "raw"."""

    def encode(self, tokens: Sequence[int], chunk: Chunk) -> bytes:
        return chunk.blocks

    def decode(self, tokens: Sequence[int], extra: bytes, coded: bytes) -> bytes:
        return coded

    def add(self, tokens: Sequence[int], chunk: Chunk) -> None:
        pass


def level_name(kind: str, profile_hash: bytes) -> str:
    """Name of a level; profile_hash: blake3 of the profile's file."""
    return f"{kind}-{profile_hash.hex()[:16]}"


def split_level(level: str) -> tuple[str, str] | None:
    """("fast", "small" or "lossyKV", the profile's hash) of a level's name; None: another level."""
    found = _LEVEL.fullmatch(level)
    return (found[1], found[2]) if found else None


def predictors(profile: Path, layout: Layout) -> delta.Coder | None:
    """The coder of a cache with this layout. None: the profile has no predictors, or rows are not all of graded and uniform seqkv
    types, as they are in a cache with a profile. Raises ProfileError for a damaged profile."""
    bits = []
    for types, plan in ((layout.k, "k"), (layout.v, "")):
        found = [_TYPE.fullmatch(t.type) for t in types]
        if not all(m and m[2] == plan for m in found):
            return None
        bits.append([int(m[1]) for m in found if m])
    base = delta.read(profile, "seqkv3")  # the nominal type does not matter: bits are those of the rows
    if base is None or len(base.layers) != len(layout.k):
        return None
    coder = delta.Coder(base.layers, *bits, base.index)
    rows = [layer.rows(k, v) for layer, k, v in zip(coder.layers, *bits)]
    if rows != [(k.row_bytes, v.row_bytes) for k, v in zip(layout.k, layout.v)]:
        return None
    return coder


def is_lossy(level: str | None) -> bool:
    """Whether a frame's blocks are not those that the cache had."""
    return level is not None and level.startswith("lossy")


def path_coder(coder: delta.Coder, kind: str) -> Delta:
    """Of a level's kind, at the root."""
    return Lossy(coder, int(kind[5]), int(kind[6])) if is_lossy(kind) else Delta(coder, "fast" if kind == "fast" else "small")


class Delta:
    """Levels "fast" and "small"."""

    def __init__(self, coder: delta.Coder, kind: delta.Level) -> None:
        self.coder, self.kind = coder, kind
        self._sizes = [layer.rows(k, v) for layer, k, v in zip(coder.layers, coder.k_bits, coder.v_bits)]
        self._copies = delta.Copies()
        self._n = self._dropped = 0  # tokens in the arrays, and of the path before them
        self._offset = np.zeros(0, np.uint8)
        self._rows = delta.Rows([np.zeros((0, k), np.uint8) for k, _ in self._sizes], [np.zeros((0, v), np.uint8) for _, v in self._sizes])

    def _make_room(self, n: int) -> None:
        """For n more tokens; what is behind the window goes when that halves the arrays."""
        if self._n + n <= len(self._offset):
            return
        keep = min(self._n, FRAME * WINDOW)
        if self._n < 2 * keep:
            keep = self._n
        size = max(2 * keep, keep + n, 4 * FRAME)

        def moved(array: np.ndarray) -> np.ndarray:
            out = np.zeros((size, *array.shape[1:]), np.uint8)
            out[:keep] = array[self._n - keep : self._n]
            return out

        self._offset = moved(self._offset)
        self._rows = delta.Rows(list(map(moved, self._rows.k)), list(map(moved, self._rows.v)))
        self._dropped += self._n - keep
        self._n = keep

    def _frame(self, tokens: Sequence[int], extra: bytes) -> delta.Frame:
        """The next frame, its offsets in place. Not yet of the path: see _done."""
        n = len(tokens)
        if len(extra) < n or max(extra[:n], default=0) >= FRAME:
            raise StateError("a chunk has an offset outside its frame")
        self._make_room(n)
        start = self._n
        self._offset[start : start + n] = np.frombuffer(extra[:n], np.uint8)
        source, match = self._copies.add(tokens)
        first = max(self._dropped, self._dropped + start - FRAME * WINDOW)
        match[source < first] = 0
        source = np.where(match > 0, source - self._dropped, 0).astype(np.int32)
        return delta.Frame(start, self._offset[: start + n].copy(), source, match)

    def _put(self, n: int, blocks: bytes) -> None:
        at = 0
        for i, (k, v) in enumerate(self._sizes):
            for rows, size in ((self._rows.k[i], k), (self._rows.v[i], v)):
                rows[self._n : self._n + n] = np.frombuffer(blocks, np.uint8, n * size, at).reshape(n, size)
                at += n * size
        if at != len(blocks):
            raise StateError(f"a chunk of {n} tokens has {len(blocks):,} bytes of blocks, expected {at:,}")

    def _blocks(self, start: int, n: int) -> bytes:
        return b"".join(rows[start : start + n].tobytes() for pair in zip(self._rows.k, self._rows.v) for rows in pair)

    def add(self, tokens: Sequence[int], chunk: Chunk) -> None:
        self._frame(tokens, chunk.extra)
        self._put(len(tokens), chunk.blocks)
        self._n += len(tokens)

    def encode(self, tokens: Sequence[int], chunk: Chunk) -> bytes:
        frame = self._frame(tokens, chunk.extra)
        self._put(len(tokens), chunk.blocks)
        coded = self.coder.encode(self.kind, frame, self._rows)
        self._n += len(tokens)
        return coded

    def decode(self, tokens: Sequence[int], extra: bytes, coded: bytes) -> bytes:
        return self.decode_run([(tokens, extra, coded)])[0]

    def decode_run(self, frames: Sequence[tuple[Sequence[int], bytes, bytes]], threads: int = 2) -> list[bytes]:
        """Consecutive frames at once, on several threads. Raises SeqkvError; the coder is then of no more use."""
        self._make_room(sum(len(tokens) for tokens, _, _ in frames))
        prepared = []
        for tokens, extra, _ in frames:
            prepared.append(self._frame(tokens, extra))
            self._n += len(tokens)
        self.coder.decode_path([coded for _, _, coded in frames], prepared, self._rows, threads=threads)
        return [self._blocks(frame.start, len(frame.source)) for frame in prepared]

    def stored(self, blocks: bytes) -> bytes:
        """What comes back of a frame's blocks."""
        return blocks


class Lossy(Delta):
    """Levels "lossyKV". Blocks are decoded and quantized in fewer bits (at least 1), and once more when they are read: in the transform
    domain, where a block's error is, so neither the profile's transforms nor positions matter."""

    def __init__(self, coder: delta.Coder, k_fewer: int, v_fewer: int) -> None:
        k_bits, v_bits = ([max(1, b - fewer) for b in bits] for bits, fewer in ((coder.k_bits, k_fewer), (coder.v_bits, v_fewer)))
        super().__init__(delta.Coder(coder.layers, k_bits, v_bits, coder.index), "small")
        self._cache = coder

    def _convert(self, blocks: bytes, source: delta.Coder, target: delta.Coder) -> bytes:
        row_bytes = sum(size for layer, k, v in zip(source.layers, source.k_bits, source.v_bits) for size in layer.rows(k, v))
        n, rest = divmod(len(blocks), row_bytes)
        if rest:
            raise StateError(f"{len(blocks):,} bytes of blocks are not whole rows of {row_bytes}")
        out, at = [], 0
        bits = zip(source.layers, source.k_bits, source.v_bits, target.k_bits, target.v_bits)
        for layer, *kinds in bits:
            for size, old, new, graded in zip(layer.rows(*kinds[:2]), kinds[:2], kinds[2:], (True, False)):
                rows = np.frombuffer(blocks, np.uint8, n * size, at)
                out.append((rows if old == new else quantize(new, dequantize(old, rows, graded=graded), graded=graded)).tobytes())
                at += n * size
        return b"".join(out)

    def _fewer(self, chunk: Chunk) -> Chunk:
        return Chunk(self._convert(chunk.blocks, self._cache, self.coder), chunk.extra)

    def add(self, tokens: Sequence[int], chunk: Chunk) -> None:
        super().add(tokens, self._fewer(chunk))

    def encode(self, tokens: Sequence[int], chunk: Chunk) -> bytes:
        return super().encode(tokens, self._fewer(chunk))

    def decode_run(self, frames: Sequence[tuple[Sequence[int], bytes, bytes]], threads: int = 2) -> list[bytes]:
        return [self._convert(blocks, self.coder, self._cache) for blocks in super().decode_run(frames, threads)]

    def stored(self, blocks: bytes) -> bytes:
        return self._convert(self._convert(blocks, self._cache, self.coder), self.coder, self._cache)


def check_level(level: str) -> bool:
    """Whether this version knows a level."""
    return level in ("raw", "lossy") or split_level(level) is not None


__all__ = ["Delta", "Lossy", "PathCoder", "Raw", "SeqkvError", "check_level", "is_lossy", "level_name", "path_coder", "predictors", "split_level"]
