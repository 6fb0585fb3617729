"""Token ids in few bits, without a model: the adaptive coder of native/tokens.c.

Bytes: version 1 (u8), bits of an id (u8), number of ids (u32), blake3 of the ids (8 bytes), the coded ids.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from .errors import DamagedError, StoreError

_HEAD = struct.Struct("<BBI8s")
_VERSION = 1


def digest(tokens: Sequence[int]) -> bytes:
    """8 bytes that tell whether decoded ids are the coded ones."""
    from blake3 import blake3

    return blake3(np.asarray(tokens, dtype="<u4").tobytes()).digest(length=8)


def encode(tokens: Sequence[int]) -> bytes:
    """Coded ids, 0 <= id < 2^32. Raises StoreError for others, or for more than 2^27."""
    from ._codec import ffi, lib

    if len(tokens) > lib.SEQKV_TOKENS_MAX or (len(tokens) and not 0 <= min(tokens) <= max(tokens) < 1 << 32):
        raise StoreError(f"{len(tokens):,} tokens cannot be coded: ids are 0 to 2^32 - 1, and at most {lib.SEQKV_TOKENS_MAX:,} of them")
    ids = np.asarray(tokens, dtype=np.uint32)
    n_bits = max(1, int(max(tokens, default=0)).bit_length())
    work = ffi.new("char[]", lib.seqkv_tokens_work(len(ids), n_bits))
    out = np.empty(lib.seqkv_tokens_bound(len(ids), n_bits), np.uint8)
    pointers = ffi.cast("uint32_t *", ids.ctypes.data), ffi.cast("void *", out.ctypes.data)
    n = lib.seqkv_tokens_encode(pointers[0], len(ids), n_bits, work, len(work), pointers[1], len(out))
    if n < 0:
        raise StoreError(f"tokens cannot be coded: {ffi.string(lib.seqkv_strerror(n)).decode()}")
    return _HEAD.pack(_VERSION, n_bits, len(ids), digest(tokens)) + out[:n].tobytes()


def decode(data: bytes) -> list[int]:
    """The ids of coded bytes. Raises DamagedError unless `encode` wrote them."""
    from ._codec import ffi, lib

    if len(data) < _HEAD.size:
        raise DamagedError("coded tokens are cut short")
    version, n_bits, n, expected = _HEAD.unpack_from(data)
    if version != _VERSION:
        raise StoreError(f"coded tokens have version {version}, this seqkv-edge knows {_VERSION}: upgrade it")
    # an id costs at least n_bits decisions of 2^-13 bits
    if not 1 <= n_bits <= 32 or n > lib.SEQKV_TOKENS_MAX or n * n_bits > (len(data) - _HEAD.size + 1) * 8 << 13:
        raise DamagedError("coded tokens are damaged")
    ids = np.empty(n, np.uint32)
    work = ffi.new("char[]", lib.seqkv_tokens_work(n, n_bits))
    source = ffi.from_buffer(data)[_HEAD.size : len(data)]
    status = lib.seqkv_tokens_decode(source, len(data) - _HEAD.size, n_bits, work, len(work), ffi.cast("uint32_t *", ids.ctypes.data), n)
    found = ids.tolist()
    if status < 0 or digest(found) != expected:
        raise DamagedError("coded tokens are damaged")
    return found
