"""The codec of the seqkv types on NumPy arrays: the scalar C of native/, through cffi.

It is the oracle of every faster kernel, and what tests and offline tools use. Bits is 2, 3 or 4 throughout;
head_dim is 64, 128 or 256. See native/seqkv.h for the notation and native/format.md for the bytes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._codec import ffi, lib
from .errors import SeqkvError

BLOCK = 64
"""Values in a block, and positions in a frame."""

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def _status(result: int) -> int:
    if result < 0:
        raise SeqkvError(f"codec: {ffi.string(lib.seqkv_strerror(result)).decode()}")
    return result


def _floats(x: ArrayLike) -> Floats:
    return np.ascontiguousarray(x, dtype=np.float32)


def _ptr(x: NDArray | None, ctype: str):
    return ffi.NULL if x is None else ffi.cast(ctype, x.ctypes.data)


def block_bytes(bits: int) -> int:
    """Bytes of a block of 64 values."""
    return bound(bits, BLOCK)


def bound(bits: int, n: int) -> int:
    """Bytes of n values, n a positive multiple of 64."""
    return _status(lib.seqkv_bound(bits, n))


def quantize(bits: int, x: ArrayLike) -> Bytes:
    """Blocks of x (..., n): (..., bytes) uint8. Non-finite values count as 0."""
    x = _floats(x)
    rows = x.reshape(-1, x.shape[-1])
    out = np.empty((len(rows), bound(bits, x.shape[-1])), dtype=np.uint8)
    for row, dst in zip(rows, out):
        _status(lib.seqkv_quantize(bits, _ptr(row, "float *"), row.size, _ptr(dst, "void *"), dst.size))
    return out.reshape(*x.shape[:-1], -1)


def dequantize(bits: int, blocks: ArrayLike) -> Floats:
    """Values of blocks (..., bytes): (..., n) float32. Any bytes are valid blocks."""
    blocks = np.ascontiguousarray(blocks, dtype=np.uint8)
    n = blocks.shape[-1] // block_bytes(bits) * BLOCK
    rows = blocks.reshape(-1, blocks.shape[-1])
    if n == 0 or bound(bits, n) != blocks.shape[-1]:
        raise SeqkvError(f"codec: {blocks.shape[-1]} bytes are not whole blocks of {block_bytes(bits)}")
    out = np.empty((len(rows), n), dtype=np.float32)
    for row, dst in zip(rows, out):
        _status(lib.seqkv_dequantize(bits, _ptr(row, "void *"), row.size, _ptr(dst, "float *"), n))
    return out.reshape(*blocks.shape[:-1], n)


def unpack(bits: int, blocks: ArrayLike) -> tuple[Bytes, Bytes]:
    """Codes (n,) 0..2**bits-1 and gain bytes (n/64,) of blocks (bytes,)."""
    blocks = np.ascontiguousarray(blocks, dtype=np.uint8)
    n = blocks.size // block_bytes(bits) * BLOCK
    codes, gains = np.empty(n, dtype=np.uint8), np.empty(n // BLOCK, dtype=np.uint8)
    _status(
        lib.seqkv_unpack(
            bits, _ptr(blocks, "void *"), blocks.size, _ptr(codes, "uint8_t *"), _ptr(gains, "uint8_t *"), n
        )
    )
    return codes, gains


def fwht(x: ArrayLike) -> Floats:
    """Orthonormal Walsh-Hadamard transform of x (n,), n a power of two."""
    x = _floats(x).copy()
    if x.ndim != 1 or x.size == 0 or x.size & (x.size - 1):
        raise SeqkvError(f"codec: the length of a Hadamard transform must be a power of two, not {x.shape}")
    lib.seqkv_fwht(_ptr(x, "float *"), x.size)
    return x


def rotation(freq: ArrayLike, position: float) -> Floats:
    """R(position) as cos, sin of each pair (2*len(freq),), computed in float64."""
    angle = np.asarray(freq, dtype=np.float64) * position
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1).reshape(-1).astype(np.float32)


def rotate(x: ArrayLike, cs: ArrayLike, *, neox: bool, inverse: bool = False) -> Floats:
    """R x, or its inverse, of a head vector x (head_dim,); cs from `rotation`."""
    x, cs = _floats(x).copy(), _floats(cs)
    if cs.size > x.size:
        raise SeqkvError(f"codec: {cs.size} rotated dimensions in a head of {x.size}")
    lib.seqkv_rotate(_ptr(x, "float *"), _ptr(cs, "float *"), cs.size, neox, inverse)
    return x


def _head(x: Floats, mean: Floats | None) -> int:
    if x.shape not in ((64,), (128,), (256,)) or (mean is not None and mean.shape != x.shape):
        raise SeqkvError(f"codec: a head vector has 64, 128 or 256 values and a mean of the same length, not {x.shape}")
    return x.size


def encode_key(bits: int, k_frame: ArrayLike, mean: ArrayLike | None, cs_off: ArrayLike, *, neox: bool) -> Bytes:
    """Blocks of one key head vector in the frame of its origin; cs_off = rotation(freq, offset)."""
    k, cs, mu = _floats(k_frame), _floats(cs_off), None if mean is None else _floats(mean)
    out = np.empty(bound(bits, _head(k, mu)), dtype=np.uint8)
    lib.seqkv_encode_key(
        bits, _ptr(k, "float *"), k.size, _ptr(mu, "float *"), _ptr(cs, "float *"), cs.size, neox, _ptr(out, "void *")
    )
    return out


def decode_key(bits: int, blocks: ArrayLike, mean: ArrayLike | None, cs_off: ArrayLike, *, neox: bool) -> Floats:
    """k_frame (head_dim,) of its blocks."""
    b, cs, mu = np.ascontiguousarray(blocks, dtype=np.uint8), _floats(cs_off), None if mean is None else _floats(mean)
    out = np.empty(b.size // block_bytes(bits) * BLOCK, dtype=np.float32)
    lib.seqkv_decode_key(
        bits,
        _ptr(b, "void *"),
        _head(out, mu),
        _ptr(mu, "float *"),
        _ptr(cs, "float *"),
        cs.size,
        neox,
        _ptr(out, "float *"),
    )
    return out


def encode_value(bits: int, v: ArrayLike, mean: ArrayLike | None) -> Bytes:
    """Blocks of one value head vector."""
    x, mu = _floats(v), None if mean is None else _floats(mean)
    out = np.empty(bound(bits, _head(x, mu)), dtype=np.uint8)
    lib.seqkv_encode_value(bits, _ptr(x, "float *"), x.size, _ptr(mu, "float *"), _ptr(out, "void *"))
    return out


def decode_value(bits: int, blocks: ArrayLike, mean: ArrayLike | None) -> Floats:
    """v (head_dim,) of its blocks."""
    b, mu = np.ascontiguousarray(blocks, dtype=np.uint8), None if mean is None else _floats(mean)
    out = np.empty(b.size // block_bytes(bits) * BLOCK, dtype=np.float32)
    lib.seqkv_decode_value(bits, _ptr(b, "void *"), _head(out, mu), _ptr(mu, "float *"), _ptr(out, "float *"))
    return out


def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    sink: float | None = None,
) -> Floats:
    """Softmax attention of one query q (dk,) over k (n, dk) and v (n, dv): (dv,). mask (n,): 0 or -inf."""
    q, k, v = _floats(q), _floats(k), _floats(v)
    m = None if mask is None else _floats(mask)
    if (
        k.ndim != 2
        or v.ndim != 2
        or q.shape != k.shape[1:]
        or len(k) != len(v)
        or v.shape[1] > 256
        or (m is not None and m.shape != (len(k),))
    ):
        raise SeqkvError(f"codec: attention of q {q.shape} over k {k.shape} and v {v.shape}")
    s = None if sink is None else np.array([sink], dtype=np.float32)
    out = np.empty(v.shape[1], dtype=np.float32)
    lib.seqkv_attention(
        _ptr(q, "float *"),
        _ptr(k, "float *"),
        _ptr(v, "float *"),
        _ptr(m, "float *"),
        len(k),
        q.size,
        out.size,
        scale,
        softcap,
        _ptr(s, "float *"),
        _ptr(out, "float *"),
    )
    return out
