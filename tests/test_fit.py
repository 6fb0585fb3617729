"""Memory arithmetic, from metadata alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from seqkv_edge import fit
from seqkv_edge.errors import UsageError
from seqkv_edge.gguf_meta import read_model
from seqkv_edge.llama import KvSpec

BARE = fit.Settings(n_sink=0, n_window=0, profile=False)
BITS = {"f16": 16.0, "q8_0": 8.5, "q4_0": 4.5, "seqkv4": 4.125, "seqkv3": 3.125, "seqkv2": 2.125}.__getitem__


def spec(text: str) -> KvSpec:
    return KvSpec.parse(text)


@pytest.mark.parametrize(
    ("text", "n"),
    [("8G", 8 << 30), ("512M", 512 << 20), ("1.5GiB", 3 << 29), ("64kb", 64 << 10), ("1000", 1000), (" 2 T ", 2 << 40)],
)
def test_sizes(text, n):
    assert fit.parse_size(text) == n


@pytest.mark.parametrize("text", ["", "G", "8X", "-1G", "0", "8G8", "1e9", "nan"])
def test_bad_sizes(text):
    with pytest.raises(UsageError):
        fit.parse_size(text)


def test_f16_bytes(make_gguf):
    meta = read_model(make_gguf())
    # 4 layers x (128 + 128) values x 2 bytes
    assert fit.kv_bytes(meta, spec("f16"), 1024, BITS) == 1024 * 4 * 256 * 2
    assert fit.kv_bytes(meta, spec("f16"), 1, BITS) == fit.kv_bytes(meta, spec("f16"), 256, BITS)
    assert fit.kv_bytes(meta, spec("f16:q8_0"), 1024, BITS) == 1024 * 4 * 128 * (16 + 8.5) / 8


def test_exact_window_is_counted(make_gguf):
    meta = read_model(make_gguf())
    blocks = 1024 * 4 * 256 * 3.125 / 8
    window = (4 + 64) * 4 * 256 * 2
    assert fit.kv_bytes(meta, spec("seqkv3"), 1024, BITS, fit.Settings(profile=False)) == blocks + window
    assert fit.kv_bytes(meta, spec("seqkv3"), 1024, BITS, BARE) == blocks


def test_profile_is_counted(make_gguf):
    """2 KV heads of 64: keys in blocks of 26 bytes, values of 25, and the tables of 4 layers."""
    meta = read_model(make_gguf())
    blocks = 1024 * 4 * 2 * (26 + 25)
    tables = 4 * 2 * (2 * 64 * 64 + 64 * 64 + 2 * 64) * 2
    assert fit.kv_bytes(meta, spec("seqkv3"), 1024, BITS, replace(BARE, profile=True)) == blocks + tables
    assert fit.kv_bytes(meta, spec("f16:seqkv3"), 1024, BITS, replace(BARE, profile=True)) == 1024 * 4 * 2 * (128 + 25) + tables
    for kv in ("f16", "q8_0"):
        assert fit.kv_bytes(meta, spec(kv), 1024, BITS) == fit.kv_bytes(meta, spec(kv), 1024, BITS, BARE)


def test_sliding_window_layers_stay_small_and_f16(make_gguf):
    meta = read_model(make_gguf(arch="gemma2", attention__sliding_window=512))
    swa, full = 2 * (512 + 512) * 256 * 2, 2 * 32768 * 256
    assert fit.kv_bytes(meta, spec("f16"), 32768, BITS) == swa + full * 2
    assert fit.kv_bytes(meta, spec("seqkv2"), 32768, BITS, BARE) == swa + full * 2.125 / 8


def test_rows(make_gguf):
    meta = read_model(make_gguf(context_length=4096))
    kvs = [spec(t) for t in fit.DEFAULT_KV.split(",")]
    rows = fit.fit(meta, kvs, 64 << 20, BITS)
    assert [r.kv for r in rows] == fit.DEFAULT_KV.split(",")
    by_memory = [r.ctx_memory for r in rows]
    assert by_memory == sorted(by_memory) and by_memory[0] < by_memory[-1]
    for row in rows:
        assert row.ctx <= row.ctx_trained == 4096
        assert row.beyond_trained == (row.ctx_memory > 4096)
        assert row.total_bytes == row.weights_bytes + row.kv_bytes + row.compute_bytes <= 64 << 20
        need = fit.need(meta, spec(row.kv), row.ctx_memory + 256, BITS)
        assert need.total > 64 << 20


def test_nothing_fits(make_gguf):
    rows = fit.fit(read_model(make_gguf()), [spec("seqkv3")], 1 << 20, BITS)
    assert (rows[0].ctx, rows[0].ctx_memory, rows[0].bits_per_value) == (0, 0, 3.125)


@pytest.mark.parametrize("text", ["", "f17", "f16:", ":f16", "f16:f16:f16", "seqkv5", "Q8_0"])
def test_bad_specs(text):
    with pytest.raises(UsageError):
        KvSpec.parse(text)


def test_specs():
    assert str(spec("seqkv3")) == "seqkv3" and str(spec("seqkv3:q8_0")) == "seqkv3:q8_0"
    assert spec("f16:seqkv2").ours and not spec("q8_0").ours
    assert spec("f16:q4_0").needs_flash_attn and not spec("q4_0:f16").needs_flash_attn
    assert not spec("seqkv3").needs_flash_attn


def test_what_a_gpu_needs_besides(make_gguf):
    """f16 copies of one layer for prefill: of quantized types all of it, of ours some KV heads; f16 itself is read in place."""
    meta = read_model(make_gguf())
    layer, heads, n_ctx = meta.layers[0], meta.heads_kv[0], 1 << 20
    whole = 2 * n_ctx * (layer.k_values + layer.v_values)
    assert fit.gpu_bytes(meta, spec("f16"), n_ctx) == fit.GPU_BASE
    assert fit.gpu_bytes(meta, spec("q4_0"), n_ctx) == fit.GPU_BASE + whole
    assert fit.gpu_bytes(meta, spec("q8_0:f16"), n_ctx) == fit.GPU_BASE + 2 * n_ctx * layer.k_values
    ours = fit.gpu_bytes(meta, spec("seqkv3"), n_ctx) - fit.GPU_BASE
    assert ours % (whole // heads) == 0 and (ours <= fit.GPU_SCRATCH or ours == whole // heads)
    assert fit.gpu_bytes(meta, spec("seqkv3"), 256) == fit.GPU_BASE + whole * 256 // n_ctx  # all heads at once
    settings = fit.Settings(gpu=True)
    more = fit.need(meta, spec("q4_0"), 4096, BITS, settings).total - fit.need(meta, spec("q4_0"), 4096, BITS).total
    assert more == fit.gpu_bytes(meta, spec("q4_0"), 4096)


def test_scratch_is_that_of_the_kernels():
    source = (Path(__file__).resolve().parents[1] / "native/cuda/seqkv-prefill.cu").read_text()
    assert f"SCRATCH = {fit.GPU_SCRATCH >> 20}u << 20;" in source
