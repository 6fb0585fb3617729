"""The scalar codec: bytes, round trips, statistics, attention."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from seqkv_edge import SeqkvError, codec

ROOT = Path(__file__).resolve().parents[1]
BITS = (2, 3, 4)
# mean squared error of the Lloyd-Max quantizers of the unit Gaussian (Max 1960, table I)
MAX_MSE = {2: 0.1175, 3: 0.03454, 4: 0.009497}


def make_tables():
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "tools" / "make_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_what_their_script_writes():
    assert (ROOT / "native" / "tables.h").read_text() == make_tables().render()


@pytest.mark.parametrize("bits", BITS)
def test_codebook_is_lloyd_max(bits):
    """Each level is the centroid of its cell, by numeric integration, and the error is the published one."""
    half = np.array(make_tables().lloyd_max(bits))
    levels = np.concatenate([-half[::-1], half])
    x = np.linspace(-10, 10, 2_000_001)
    p = np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
    cell = np.searchsorted((levels[1:] + levels[:-1]) / 2, x)
    centroids = np.bincount(cell, p * x) / np.bincount(cell, p)
    np.testing.assert_allclose(levels, centroids, atol=2e-5)
    assert np.sum(p * (x - levels[cell]) ** 2) * (x[1] - x[0]) == pytest.approx(MAX_MSE[bits], rel=2e-3)


@pytest.mark.parametrize("bits, size", [(2, 17), (3, 25), (4, 33)])
def test_block_bytes(bits, size):
    assert codec.block_bytes(bits) == size
    assert codec.bound(bits, 256) == 4 * size


def layout(bits: int, gain: int, codes: np.ndarray) -> bytes:
    """A block written from format.md, independently of the C."""
    i = np.arange(64)
    if bits == 4:
        qs = np.zeros(32, dtype=np.uint8)
        np.bitwise_or.at(qs, i % 32, (codes << 4 * (i // 32)).astype(np.uint8))
        return bytes([gain]) + qs.tobytes()
    qs, qh = np.zeros(16, dtype=np.uint8), np.zeros(8, dtype=np.uint8)
    np.bitwise_or.at(qs, i % 16, ((codes & 3) << 2 * (i // 16)).astype(np.uint8))
    np.bitwise_or.at(qh, i % 8, ((codes >> 2) << (i // 8)).astype(np.uint8))
    return bytes([gain]) + qs.tobytes() + (qh.tobytes() if bits == 3 else b"")


@pytest.mark.parametrize("bits", BITS)
@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_every_byte_is_as_the_format_says(bits, data):
    codes = data.draw(hnp.arrays(np.uint8, 64, elements=st.integers(0, 2**bits - 1)))
    gain = data.draw(st.integers(0, 255))
    block = np.frombuffer(layout(bits, gain, codes), dtype=np.uint8)
    got_codes, got_gains = codec.unpack(bits, block)
    np.testing.assert_array_equal(got_codes, codes)
    assert got_gains.tolist() == [gain]
    half = make_tables().lloyd_max(bits)
    levels = np.array([-x for x in reversed(half)] + half)
    expected = (0.0 if gain == 0 else 2.0 ** ((gain - 132) / 10)) * levels[codes]
    np.testing.assert_allclose(codec.dequantize(bits, block), expected, rtol=1e-6, atol=0)


def golden_input() -> np.ndarray:
    return np.array([np.sin(0.7 * i) * (1 + i % 5) for i in range(64)], dtype=np.float32)


@pytest.mark.parametrize("bits", BITS)
def test_golden_bytes(bits):
    expected = (ROOT / "tests" / "golden" / f"seqkv{bits}.hex").read_text().strip()
    assert codec.quantize(bits, golden_input()).tobytes().hex() == expected


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_gaussian_error_is_near_the_codebooks(bits, scale):
    x = np.random.default_rng(bits).normal(size=(500, 64)).astype(np.float32) * scale
    y = codec.dequantize(bits, codec.quantize(bits, x))
    # unbiased: the projection on x keeps its length, up to the rounding of the gain byte (10 steps an octave)
    ratio = np.sum(x * y, axis=1) / np.sum(x * x, axis=1)
    assert abs(ratio.mean() - 1) < 0.004
    assert np.all(np.abs(ratio - 1) < 2 ** (0.5 / 10) - 1 + 1e-4)
    # the unbiased gain costs mse/(1 - mse); gain rounding adds 4e-4, block-wise scales take some away
    mse = np.mean((x - y) ** 2) / np.mean(x**2)
    assert mse < MAX_MSE[bits] / (1 - MAX_MSE[bits]) + 1e-3


@pytest.mark.parametrize("bits", BITS)
@given(x=hnp.arrays(np.float32, 128, elements=st.floats(width=32, allow_nan=True, allow_infinity=True)))
@settings(max_examples=100, deadline=None)
def test_any_floats_encode(bits, x):
    blocks = codec.quantize(bits, x)
    y = codec.dequantize(bits, blocks)
    assert np.all(np.isfinite(y))
    np.testing.assert_array_equal(blocks, codec.quantize(bits, np.where(np.isfinite(x), x, 0)))


@pytest.mark.parametrize("bits", BITS)
def test_zero_and_range(bits):
    assert not codec.quantize(bits, np.zeros(64)).any()
    big = codec.dequantize(bits, codec.quantize(bits, np.full(64, 1e30)))
    assert np.all(big > 1000) and np.all(np.isfinite(big))  # saturates at the last gain


@given(hnp.arrays(np.uint8, 50))
@settings(max_examples=50, deadline=None)
def test_any_bytes_decode(blocks):
    assert np.all(np.isfinite(codec.dequantize(3, blocks)))


def test_bad_lengths_are_refused():
    for n in (0, -64, 63, 65):
        with pytest.raises(SeqkvError):
            codec.bound(3, n)
    with pytest.raises(SeqkvError):
        codec.bound(5, 64)
    with pytest.raises(SeqkvError):
        codec.dequantize(3, np.zeros(26, dtype=np.uint8))
    from seqkv_edge._codec import ffi, lib

    buf, x = ffi.new("uint8_t[24]"), ffi.new("float[64]")
    assert lib.seqkv_quantize(3, x, 64, buf, 24) == lib.SEQKV_ELENGTH
    assert lib.seqkv_dequantize(3, buf, 24, x, 64) == lib.SEQKV_ELENGTH


@pytest.mark.parametrize("n", [16, 64, 128, 256])
def test_hadamard(n):
    i = np.arange(n)
    h = np.where(np.array([[bin(a & b).count("1") for b in i] for a in i]) % 2, -1.0, 1.0) / np.sqrt(n)
    x = np.random.default_rng(0).normal(size=n).astype(np.float32)
    np.testing.assert_allclose(codec.fwht(x), h @ x, atol=1e-5)
    np.testing.assert_allclose(codec.fwht(codec.fwht(x)), x, atol=1e-5)


@pytest.mark.parametrize("neox", [False, True])
@pytest.mark.parametrize("n_rot", [32, 64])
def test_rotation_is_complex_multiplication(neox, n_rot):
    freq = 10000.0 ** (-2 * np.arange(n_rot // 2) / n_rot)
    x = np.random.default_rng(1).normal(size=64).astype(np.float32)
    y = codec.rotate(x, codec.rotation(freq, 17), neox=neox)
    a, b = (slice(0, n_rot // 2), slice(n_rot // 2, n_rot)) if neox else (slice(0, n_rot, 2), slice(1, n_rot, 2))
    z = (x[a] + 1j * x[b]) * np.exp(17j * freq)
    np.testing.assert_allclose(y[a] + 1j * y[b], z, atol=1e-5)
    np.testing.assert_array_equal(y[n_rot:], x[n_rot:])
    np.testing.assert_allclose(codec.rotate(y, codec.rotation(freq, 17), neox=neox, inverse=True), x, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("neox", [False, True])
def test_key_and_value_round_trip(bits, head_dim, neox):
    """Only the residual is coded: what the mean predicts comes back exactly, whatever the offset."""
    rng = np.random.default_rng(head_dim + bits)
    freq = 10000.0 ** (-2 * np.arange(head_dim // 2) / head_dim)
    mean = rng.normal(size=head_dim).astype(np.float32) * 50
    for offset in (0, 1, 63):
        cs = codec.rotation(freq, offset)
        noise = rng.normal(size=head_dim).astype(np.float32)
        k = codec.rotate(mean, cs, neox=neox) + noise
        got = codec.decode_key(bits, codec.encode_key(bits, k, mean, cs, neox=neox), mean, cs, neox=neox)
        assert np.mean((got - k) ** 2) < 2.5 * MAX_MSE[bits]  # of unit noise, although the key is 50 times larger
        plain = codec.decode_key(bits, codec.encode_key(bits, k, None, cs, neox=neox), None, cs, neox=neox)
        assert np.mean((plain - k) ** 2) > 50 * np.mean((got - k) ** 2)
    v = mean + noise
    assert np.mean((codec.decode_value(bits, codec.encode_value(bits, v, mean), mean) - v) ** 2) < 2.5 * MAX_MSE[bits]
    exact = codec.decode_key(bits, codec.encode_key(bits, codec.rotate(mean, cs, neox=neox), mean, cs, neox=neox), mean, cs, neox=neox)
    np.testing.assert_allclose(exact, codec.rotate(mean, cs, neox=neox), atol=1e-3)


@pytest.mark.parametrize("softcap, sink, masked", [(0.0, None, False), (30.0, None, True), (0.0, 1.5, True)])
def test_attention_against_numpy(softcap, sink, masked):
    rng = np.random.default_rng(3)
    q, k, v = rng.normal(size=64), rng.normal(size=(200, 64)), rng.normal(size=(200, 128))
    mask = np.where(rng.random(200) < 0.5, -np.inf, 0.0) if masked else None
    s = k.astype(np.float32).astype(float) @ q.astype(np.float32).astype(float) * 0.3
    if softcap:
        s = softcap * np.tanh(s / softcap)
    p = np.exp(s + (0 if mask is None else mask))
    expected = p @ v.astype(np.float32) / (p.sum() + (np.exp(sink) if sink is not None else 0))
    got = codec.attention(q, k, v, mask, scale=0.3, softcap=softcap, sink=sink)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_attention_to_nothing_is_zero():
    out = codec.attention(np.ones(64), np.ones((3, 64)), np.ones((3, 64)), np.full(3, -np.inf), scale=1.0)
    np.testing.assert_array_equal(out, 0)
