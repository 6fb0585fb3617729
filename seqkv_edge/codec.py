"""The codec of the seqkv types on NumPy arrays: the scalar C of native/, through cffi.

It is the oracle of every faster kernel, and what tests and offline tools use. Bits is 1, 2, 3 or 4 throughout, graded
selects the plan of the blocks, and head_dim is 64, 128 or 256; other values raise SeqkvError. See native/seqkv.h for
the notation and native/format.md for the bytes.
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


def block_bytes(bits: int, *, graded: bool = False) -> int:
    """Bytes of a block of 64 values."""
    return bound(bits, BLOCK, graded=graded)


def bound(bits: int, n: int, *, graded: bool = False) -> int:
    """Bytes of n values, n a positive multiple of 64."""
    return _status(lib.seqkv_bound(bits, graded, n))


def _n_values(bits: int, n_bytes: int, graded: bool) -> int:
    size = block_bytes(bits, graded=graded)
    if n_bytes == 0 or n_bytes % size:
        raise SeqkvError(f"codec: {n_bytes} bytes are not whole blocks of {size}")
    return n_bytes // size * BLOCK


def quantize(bits: int, x: ArrayLike, *, graded: bool = False) -> Bytes:
    """Blocks of x (..., n), n a multiple of 64: (..., bytes) uint8. Non-finite values count as 0."""
    x = _floats(x)
    out = np.empty((*x.shape[:-1], bound(bits, x.shape[-1], graded=graded)), dtype=np.uint8)
    if out.size:
        _status(lib.seqkv_quantize(bits, graded, _ptr(x, "float *"), x.size, _ptr(out, "void *"), out.size))
    return out


def dequantize(bits: int, blocks: ArrayLike, *, graded: bool = False) -> Floats:
    """Values of blocks (..., bytes): (..., n) float32. Any bytes are valid blocks."""
    blocks = np.ascontiguousarray(blocks, dtype=np.uint8)
    out = np.empty((*blocks.shape[:-1], _n_values(bits, blocks.shape[-1], graded)), dtype=np.float32)
    if out.size:
        _status(lib.seqkv_dequantize(bits, graded, _ptr(blocks, "void *"), blocks.size, _ptr(out, "float *"), out.size))
    return out


def unpack(bits: int, blocks: ArrayLike, *, graded: bool = False) -> tuple[Bytes, Bytes]:
    """Codes (n,) uint8 and gains as stored (n/64, 3) uint8 of blocks (bytes,). Bit 0 of a code is the trellis path."""
    blocks = np.ascontiguousarray(blocks, dtype=np.uint8)
    n = _n_values(bits, blocks.size, graded)
    codes, gains = np.empty(n, dtype=np.uint8), np.empty((n // BLOCK, 3), dtype=np.uint8)
    pointers = (_ptr(blocks, "void *"), blocks.size, _ptr(codes, "uint8_t *"), _ptr(gains, "uint8_t *"))
    _status(lib.seqkv_unpack(bits, graded, *pointers, n))
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


def _head_dim(x: Floats, matrix: Floats | None, *vectors: Floats | None) -> int:
    """head_dim of a head vector x (head_dim,), with a (head_dim, head_dim) matrix and vectors of its length."""
    if x.shape not in ((64,), (128,), (256,)):
        raise SeqkvError(f"codec: a head vector has 64, 128 or 256 values, not {x.shape}")
    if matrix is not None and matrix.shape != (x.size, x.size):
        raise SeqkvError(f"codec: the transform of a head of {x.size} is {matrix.shape}, not square of its size")
    if any(v is not None and v.shape != x.shape for v in vectors):
        raise SeqkvError(f"codec: constants of a head of {x.size} have its length, not {[v.shape for v in vectors if v is not None]}")
    return x.size


def _optional(x: ArrayLike | None) -> Floats | None:
    return None if x is None else _floats(x)


def encode_key(
    bits: int, k_frame: ArrayLike, enc: ArrayLike | None = None, pred: ArrayLike | None = None, *, graded: bool = False
) -> Bytes:
    """Blocks of one key head vector (head_dim,) in the frame of its origin.

    enc: E (head_dim, head_dim), None: the Hadamard transform. pred: E R(offset) mean (head_dim,), None: 0.
    """
    k, e, p = _floats(k_frame), _optional(enc), _optional(pred)
    n = _head_dim(k, e, p)
    out = np.empty(bound(bits, n, graded=graded), dtype=np.uint8)
    lib.seqkv_encode_key(bits, graded, _ptr(k, "float *"), n, _ptr(e, "float *"), _ptr(p, "float *"), _ptr(out, "void *"))
    return out


def decode_key(
    bits: int, blocks: ArrayLike, dec: ArrayLike | None = None, pred: ArrayLike | None = None, *, graded: bool = False
) -> Floats:
    """k_frame (head_dim,) of its blocks. dec: D, the inverse of enc."""
    b, d, p = np.ascontiguousarray(blocks, dtype=np.uint8), _optional(dec), _optional(pred)
    out = np.empty(_n_values(bits, b.size, graded), dtype=np.float32)
    n = _head_dim(out, d, p)
    lib.seqkv_decode_key(bits, graded, _ptr(b, "void *"), n, _ptr(d, "float *"), _ptr(p, "float *"), _ptr(out, "float *"))
    return out


def encode_value(bits: int, v: ArrayLike, mean: ArrayLike | None = None, scale: ArrayLike | None = None) -> Bytes:
    """Blocks of one value head vector (head_dim,). mean, scale (head_dim,); None: 0 and 1."""
    x, m, s = _floats(v), _optional(mean), _optional(scale)
    n = _head_dim(x, None, m, s)
    out = np.empty(bound(bits, n), dtype=np.uint8)
    lib.seqkv_encode_value(bits, _ptr(x, "float *"), n, _ptr(m, "float *"), _ptr(s, "float *"), _ptr(out, "void *"))
    return out


def decode_value(bits: int, blocks: ArrayLike, mean: ArrayLike | None = None, scale: ArrayLike | None = None) -> Floats:
    """v (head_dim,) of its blocks."""
    b, m, s = np.ascontiguousarray(blocks, dtype=np.uint8), _optional(mean), _optional(scale)
    out = np.empty(_n_values(bits, b.size, False), dtype=np.float32)
    n = _head_dim(out, None, m, s)
    lib.seqkv_decode_value(bits, _ptr(b, "void *"), n, _ptr(m, "float *"), _ptr(s, "float *"), _ptr(out, "float *"))
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
