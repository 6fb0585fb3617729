"""How much memory a model and its context need, from the metadata alone; the `fit` command."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass

from .errors import UsageError
from .gguf_meta import LayerKv, ModelMeta
from .llama import OUR_TYPES, KvSpec

BitsOf = Callable[[str], float]
"""bits per value of a type name"""
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_BLOCK = 64  # values of a block of the seqkv types, and positions of a frame
CTX_STEP = 256
"""llama.cpp rounds contexts up to this"""
GPU_SCRATCH = 256 << 20
"""bytes of native/cuda/seqkv-prefill.cu"""
GPU_BASE = 192 << 20
"""bytes that contexts took on a GPU beyond the rest of the estimate (an H200, docs/measurements.md)"""
DEFAULT_KV = "f16,q8_0,q4_0,seqkv4,seqkv3,seqkv2"


@dataclass(frozen=True)
class Settings:
    """What of a context's settings decides its size beside types and length."""

    n_sink: int = 4
    n_window: int = 64
    n_ubatch: int = 512
    profile: bool = True
    """the seqkv types have a profile, as they do by default"""
    gpu: bool = False
    """the memory is an NVIDIA GPU's: `gpu_bytes` are needed too"""


DEFAULT = Settings()


@dataclass(frozen=True)
class Need:
    """Bytes that one configuration takes."""

    weights: int
    kv: int
    compute: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compute


@dataclass(frozen=True)
class FitRow:
    """Largest context of one KV type; `--json` prints these fields."""

    kv: str
    bits_per_value: float
    """exact window included, at the context `ctx` (f16 layers too); the type's own when nothing fits"""
    ctx: int
    """tokens, a multiple of 256; 0 when not even 256 fit"""
    ctx_trained: int
    """tokens the model was trained for"""
    beyond_trained: bool
    """more would fit than the model was trained for; `ctx` is capped at `ctx_trained`"""
    ctx_memory: int
    """tokens that the memory alone would allow"""
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    total_bytes: int


def parse_size(text: str) -> int:
    """Bytes of "8G", "512M", "1.5GiB" or a plain number; powers of 1024. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*", text.upper())
    if not match or float(match[1]) <= 0:
        raise UsageError(f"{text!r} is not an amount of memory: write for example 8G or 512M")
    return int(float(match[1]) * _UNITS[match[2]])


def format_size(n: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024 or unit == "GiB":
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}" if n >= 10 or unit == "KiB" else f"{n:.2f} {unit}"
        n /= 1024
    raise AssertionError


def pad_ctx(n_ctx: int) -> int:
    """The context llama.cpp makes of n_ctx."""
    return -(-n_ctx // CTX_STEP) * CTX_STEP


def kv_bytes(meta: ModelMeta, kv: KvSpec, n_ctx: int, bits: BitsOf, settings: Settings = DEFAULT) -> int:
    """Bytes of the KV cache for one sequence of n_ctx tokens.

    Sliding-window layers hold window + n_ubatch tokens (llama.cpp's size), in f16 for the seqkv types. The exact window
    of the seqkv types holds n_sink + n_window tokens of both K and V in f16 per layer. With a profile, key blocks of the
    seqkv types are a byte larger, every layer has tables, and its bits are taken for the nominal ones.
    """
    cells = pad_ctx(n_ctx)
    total = 0.0
    for layer, n_head_kv in zip(meta.layers, meta.heads_kv):
        n = min(cells, pad_ctx(layer.window + settings.n_ubatch)) if layer.window else cells
        for name, values, header in ((kv.k, layer.k_values, settings.profile), (kv.v, layer.v_values, False)):
            if name not in OUR_TYPES:
                total += n * values * bits(name) / 8
            elif layer.window:
                total += n * values * 2
            else:
                total += n * values * bits(name) / 8 + (n * values / _BLOCK if header else 0)
        if kv.ours and not layer.window:
            total += (layer.k_values + layer.v_values) * 2 * min(cells, settings.n_sink + settings.n_window)
            total += profile_bytes(layer, n_head_kv) if settings.profile else 0
    return int(total)


def profile_bytes(layer: LayerKv, n_head_kv: int) -> int:
    """Bytes of a profile's tables of one layer: f16, per KV head two matrices (dk, dk), 64 predictions, mean and scale of V."""
    if not layer.k_values:
        return 0
    dk = layer.k_values // n_head_kv
    return 2 * (layer.k_values * (2 * dk + _BLOCK) + 2 * layer.v_values)


def kv_values(meta: ModelMeta, n_ctx: int, n_ubatch: int = 512) -> int:
    """Values (numbers) that the KV cache of n_ctx tokens holds."""
    cells = pad_ctx(n_ctx)
    return sum(
        (min(cells, pad_ctx(layer.window + n_ubatch)) if layer.window else cells) * (layer.k_values + layer.v_values)
        for layer in meta.layers
    )


def compute_bytes(meta: ModelMeta, n_ctx: int, n_ubatch: int = 512) -> int:
    """Estimate of llama.cpp's compute buffers for one ubatch: the larger of its widest activations (logits, or
    feed-forward) in f32 and the attention mask in f16, which do not live at the same time."""
    wide = max(meta.n_vocab + meta.n_embd, 2 * meta.n_ff + 4 * meta.n_embd)
    return n_ubatch * max(4 * wide, 2 * pad_ctx(n_ctx)) + (16 << 20)


def gpu_bytes(meta: ModelMeta, kv: KvSpec, n_ctx: int) -> int:
    """What a GPU needs besides: its kernels' code and small buffers, and f16 copies of one layer's K and V for prefill.

    llama.cpp copies all of a quantized K or V, the seqkv types as many KV heads as GPU_SCRATCH holds, at least one.
    """
    most = 0
    for layer, n_head_kv in zip(meta.layers, meta.heads_kv):
        cells = pad_ctx(n_ctx)
        if not n_head_kv or not cells:
            continue
        if kv.ours and not layer.window:
            head = 2 * cells * (layer.k_values + layer.v_values) // n_head_kv
            most = max(most, head * max(1, min(n_head_kv, GPU_SCRATCH // head)))
        elif not kv.ours:
            copied = sum(values for name, values in ((kv.k, layer.k_values), (kv.v, layer.v_values)) if name != "f16")
            most = max(most, 2 * cells * copied)
    return GPU_BASE + most


def need(meta: ModelMeta, kv: KvSpec, n_ctx: int, bits: BitsOf, settings: Settings = DEFAULT) -> Need:
    """Estimated bytes of a model with one context."""
    compute = compute_bytes(meta, n_ctx, settings.n_ubatch) + (gpu_bytes(meta, kv, n_ctx) if settings.gpu else 0)
    return Need(meta.weight_bytes, kv_bytes(meta, kv, n_ctx, bits, settings), compute)


def largest_ctx(meta: ModelMeta, kv: KvSpec, memory: int, bits: BitsOf, settings: Settings = DEFAULT) -> int:
    """Largest context (multiple of 256, at most 2^30) whose need is at most `memory` bytes; 0 if none."""
    low, high = 0, (1 << 30) // CTX_STEP
    while low < high:
        middle = (low + high + 1) // 2
        if need(meta, kv, middle * CTX_STEP, bits, settings).total <= memory:
            low = middle
        else:
            high = middle - 1
    return low * CTX_STEP


def fit(meta: ModelMeta, kvs: list[KvSpec], memory: int, bits: BitsOf, settings: Settings = DEFAULT) -> list[FitRow]:
    """One row per KV type."""
    rows = []
    for kv in kvs:
        by_memory = largest_ctx(meta, kv, memory, bits, settings)
        ctx = min(by_memory, meta.n_ctx_train)
        amount = need(meta, kv, ctx, bits, settings)
        values = kv_values(meta, ctx, settings.n_ubatch)
        own = (bits(kv.k) + bits(kv.v)) / 2
        rows.append(
            FitRow(
                str(kv), 8 * amount.kv / values if values else own, ctx, meta.n_ctx_train, by_memory > meta.n_ctx_train,
                by_memory, amount.weights, amount.kv, amount.compute, amount.total,
            )
        )  # fmt: skip
    return rows


def as_json(rows: list[FitRow]) -> list[dict[str, object]]:
    return [asdict(row) for row in rows]
