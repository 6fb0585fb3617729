"""Profiles: what is known in advance of a model's keys and values (design.py), as a file.

A profile is a GGUF file (architecture "seqkv-profile"); per layer with full attention it has the tensors (numpy order)
  blk.%d.k_mean    f32 [n_head_kv, dk]      mean of R(-t) k over a text, k after RoPE at position t
  blk.%d.k_encode  f16 [n_head_kv, dk, dk]  transform of the keys of a frame
  blk.%d.v_mean    f32 [n_head_kv, dv]      mean of v
  blk.%d.v_scale   f32 [n_head_kv, dv]      scale of v before its Hadamard transform
and per type the bits of every layer's keys and values: seqkv.profile.seqkv3.k_bits, .v_bits (0: no such layer).
It is tied to one model file by `seqkv.profile.model_id`, and never used with another.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from . import __version__, llama
from .capture import N_WINDOW, Rows, capture, estimate_seconds
from .design import LayerDesign, Statistics, add, design, plan_bits
from .dropin import KvOptions
from .errors import ModelError, ProfileError, UsageError
from .gguf_meta import fingerprint, read_header, read_model

ARCHITECTURE = "seqkv-profile"
VERSION = 2
DEFAULT_TOKENS = 4096
_MIN_TOKENS = 256
_N_SINK, _N_WINDOW = 4, 64  # of the exact window that a profile is made for
_QUALITY_TOKENS = 512


@dataclass(frozen=True)
class ProfileInfo:
    """Metadata of a profile."""

    path: Path
    model_id: str
    model_arch: str
    model_name: str
    n_layer: int
    n_tokens: int
    n_sink: int
    text_sha256: str
    quality: dict[str, float] = field(default_factory=dict)
    """mean KLD of each type against the f16 cache, measured on the text behind the calibration's"""


def read_info(path: Path) -> ProfileInfo:
    """Metadata of a profile. Raises ProfileError: unreadable, not a profile, unknown version."""
    try:
        fields = read_header(path).fields
    except ModelError as error:
        raise ProfileError(f"profile: {error}") from None
    if fields.get("general.architecture") != ARCHITECTURE:
        raise ProfileError(f"{path} is a GGUF file but not a seqkv profile: make one with 'calibrate -o FILE'")
    version = fields.get("seqkv.profile.version")
    if version != VERSION:
        raise ProfileError(f"{path} has profile version {version!r}, expected {VERSION}: remake it with 'calibrate'")

    def get(name: str, kind: type) -> Any:
        value = fields.get(f"seqkv.profile.{name}")
        if not isinstance(value, kind):
            raise ProfileError(f"{path} is damaged: seqkv.profile.{name} is {value!r}")
        return value

    return ProfileInfo(
        path, get("model_id", str), get("model_arch", str), get("model_name", str), get("n_layer", int),
        get("n_tokens", int), get("n_sink", int), get("text_sha256", str),
        {name: get(f"{name}.kld", float) for name in llama.OUR_TYPES if f"seqkv.profile.{name}.kld" in fields},
    )  # fmt: skip


def check(path: Path, model_id: str) -> ProfileInfo:
    """Raises ProfileError unless `path` is a profile of the model `model_id`."""
    info = read_info(path)
    if info.model_id != model_id:
        raise ProfileError(
            f"profile {path} belongs to another model ({info.model_name}, id {info.model_id[:8]}, "
            f"expected {model_id[:8]}): remove it, or make one with 'calibrate'"
        )
    return info


def cache_dir() -> Path:
    """Where profiles made on first use are kept."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("seqkv-edge", appauthor=False)) / f"profiles-v{VERSION}"


def beside(model: Path) -> Path:
    """The profile that may lie next to a model: x.gguf -> x.seqkv.gguf."""
    return model.with_name(model.name.removesuffix(".gguf") + ".seqkv.gguf")


def find(model: Path, model_id: str) -> Path | None:
    """The profile of a model: next to it, in the cache, or shipped with the package; checked. None if there is none.

    Raises ProfileError when one is there and wrong.
    """
    for candidate in (beside(model), cache_dir() / f"{model_id}.gguf"):
        if candidate.is_file():
            check(candidate, model_id)
            return candidate
    for shipped in sorted((Path(__file__).parent / "models").glob("*.seqkv.gguf")):
        if read_info(shipped).model_id == model_id:
            return shipped
    return None


def prepare(model: int, path: Path | None, type_k: int, type_v: int, options: KvOptions) -> Path | None:
    """Check the types, find or make the profile, and configure `model` (a llama_model pointer) for its next contexts.

    Returns the profile in use. Raises ModelError (types), ProfileError.
    """
    llama.check(model, type_k, type_v)
    model_id: str | None = None
    profile: Path | None = None
    if options.profile is not None:
        if path is None:
            raise UsageError("a profile needs the path of the model's file")
        model_id = fingerprint(path)
        if options.profile == "auto":
            profile = find(path, model_id) or _make_cached(model, path, model_id)
        else:
            profile = Path(options.profile)
            check(profile, model_id)
    llama.configure(model, profile, model_id, options.n_sink, options.n_window)
    return profile


def _make_cached(model: int, path: Path, model_id: str) -> Path:
    target = cache_dir() / f"{model_id}.gguf"
    print(f"seqkv: {path.name} has no profile yet: making one, once, into {target.parent}", file=sys.stderr)
    made = measure(model, path, default_text())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(target, path, model_id, made)
    except OSError as error:
        handle, name = tempfile.mkstemp(suffix=".seqkv.gguf")
        os.close(handle)
        atexit.register(lambda: Path(name).unlink(missing_ok=True))
        warnings.warn(
            f"the profile cannot be kept in {target.parent} ({error.strerror or error}): it is made again each time",
            RuntimeWarning,
            stacklevel=2,
        )
        target = Path(name)
        write(target, path, model_id, made)
    return target


def make(model: int, path: Path, target: Path, *, text: str | None = None, n_tokens: int = DEFAULT_TOKENS) -> ProfileInfo:
    """Measure a profile on `text` (default: the built-in one) and write it. Raises ModelError, OSError."""
    model_id = fingerprint(path)
    write(target, path, model_id, measure(model, path, default_text() if text is None else text, n_tokens=n_tokens))
    return check(target, model_id)


def default_text() -> str:
    """Technical English at hand everywhere: Python's own language documentation."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


@dataclass(frozen=True)
class Measured:
    """What a profile is written from."""

    layers: list[LayerDesign]
    n_tokens: int
    text_sha256: str
    quality: dict[str, float] = field(default_factory=dict)


def measure(model: int, path: Path, text: str, *, n_tokens: int = DEFAULT_TOKENS, quality: bool = True) -> Measured:
    """Run the loaded model (a llama_model pointer, from the file `path`) over the first n_tokens tokens of `text`.

    Memory: one layer's rows of a window of capture.N_WINDOW tokens, and the sums of all layers. With `quality`, the types are
    then tried on the 512 tokens that follow. Raises ModelError when the text is too short or the model fails.
    """
    tokens = _tokenize(model, text, n_tokens + _QUALITY_TOKENS)
    n = min(n_tokens, len(tokens))
    if n < _MIN_TOKENS:
        raise ModelError(f"the text gives {n} tokens, a profile needs at least {_MIN_TOKENS}: use a longer text")
    windows = [tokens[start : min(start + N_WINDOW, n)] for start in range(0, n, N_WINDOW)]
    outputs = _OutputMetrics(path)
    layers: dict[int, Statistics] = {}

    def on_layer(rows: Rows) -> None:
        stats = layers.setdefault(rows.layer, Statistics())
        add(stats, rows, outputs.of(rows), n_sink=_N_SINK, n_window=_N_WINDOW)

    # one thread for numpy: its others would wait in loops, on the cores that the model's threads wait for in loops
    with threadpool_limits(1):
        capture(model, windows, on_layer, title="profile of this model (once)")
    try:
        designs = [design(layer, stats) for layer, stats in sorted(layers.items())]
    except (ValueError, np.linalg.LinAlgError) as error:
        raise ModelError(f"no profile can be made of this model: {error}; use --no-profile") from None
    made = Measured(designs, n, hashlib.sha256(text.encode("utf-8")).hexdigest())
    rest = tokens[n : n + _QUALITY_TOKENS]
    if not quality or len(rest) < _QUALITY_TOKENS:
        return made
    return Measured(designs, n, made.text_sha256, _quality(model, path, made, rest))


def estimate(model: int, path: Path, n_tokens: int) -> float:
    """Expected seconds of `measure`, from short trials. Raises ModelError."""
    meta = read_model(path)
    forward = estimate_seconds(model, N_WINDOW) * n_tokens / N_WINDOW
    shapes: dict[tuple[int, int], int] = {}
    for layer, heads in zip(meta.layers, meta.heads_kv):
        if layer.k_values and not layer.window and heads:
            key = (layer.k_values // heads, layer.v_values // heads)
            shapes[key] = shapes.get(key, 0) + 1
    random = np.random.default_rng(0)
    trial = min(N_WINDOW, n_tokens)
    seconds = 0.0
    for (dk, dv), count in shapes.items():  # the sums of one query head
        q, k, v = (random.standard_normal((trial, 1, d), np.float32) for d in (dk, dk, dv))
        rows = Rows(0, q, k, v, None, dk**-0.5, 0.0, np.ones(dk // 2), True)
        start = time.perf_counter()
        with threadpool_limits(1):
            add(Statistics(), rows, None, n_sink=_N_SINK, n_window=_N_WINDOW)
        seconds += (time.perf_counter() - start) * count * meta.n_head * n_tokens / trial
    return forward * (1 + 4 * _QUALITY_TOKENS / n_tokens) + seconds


def _tokenize(model: int, text: str, most: int) -> list[int]:
    api = llama.library().api
    data = text.encode("utf-8")[: most * 32]
    capacity = len(data) + 16
    buffer = (api.llama_token * capacity)()
    n = api.llama_tokenize(api.llama_model_get_vocab(model), data, len(data), buffer, capacity, True, False)
    return list(buffer[: max(0, min(n, most))])


class _OutputMetrics:
    """W_o,h^T W_o,h of a layer's query heads, from the model's file."""

    def __init__(self, path: Path) -> None:
        self._tensors = {t.name: (part, t) for part in read_model(path).parts for t in read_header(part).tensors}
        self._layer, self._grams = -1, np.zeros(0)

    def of(self, rows: Rows) -> np.ndarray | None:
        """f32 (n_head, dv, dv); None where the weights have another form."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        found = self._tensors.get(f"blk.{rows.layer}.attn_output.weight")
        heads, dv = rows.q.shape[1], rows.v.shape[2]
        if found is None or found[1].n_bytes is None or len(found[1].shape) != 2 or found[1].shape[0] != heads * dv:
            return None
        part, tensor = found
        data = np.memmap(part, np.uint8, "r", tensor.offset, (tensor.shape[1], tensor.n_bytes // tensor.shape[1]))
        try:
            weight = dequantize(data, GGMLQuantizationType(tensor.type))  # (n_embd, n_head*dv)
        except (NotImplementedError, ValueError):
            return None
        columns = np.ascontiguousarray(weight.reshape(-1, heads, dv).transpose(1, 0, 2), np.float32)
        return columns.transpose(0, 2, 1) @ columns


def _quality(model: int, path: Path, made: Measured, tokens: list[int]) -> dict[str, float]:
    """Mean KLD of every type against f16 over the second half of `tokens`, with the profile in use."""
    from .bench import compare

    handle, name = tempfile.mkstemp(suffix=".seqkv.gguf")
    os.close(handle)
    try:
        write(Path(name), path, "", made)
        llama.configure(model, Path(name), None, _N_SINK, _N_WINDOW)
        half = len(tokens) // 2
        base = _logits(model, "f16", tokens, half)
        targets = np.array(tokens[half + 1 :])
        return {
            kv: float(compare(base, _logits(model, kv, tokens, half), targets).kld.mean()) for kv in llama.OUR_TYPES
        }
    finally:
        Path(name).unlink(missing_ok=True)


def _logits(model: int, kv: str, tokens: list[int], first: int) -> np.ndarray:
    """f32 (len(tokens) - 1 - first, n_vocab): logits behind tokens[first:-1], all in one batch."""
    api = llama.library().api
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = len(tokens)
    params.type_k = params.type_v = llama.type_id(kv)
    params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.n_threads = params.n_threads_batch = os.cpu_count() or 1
    llama.log.clear()
    init = api.llama_init_from_model  # the unwrapped function: the wrapper would look for a profile
    ctx = getattr(init, "__wrapped__", init)(model, params)
    if not ctx:
        raise ModelError(f"no context with a {kv} cache: {llama.log.reason() or 'no reason given'}")
    batch = api.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, first <= i < len(tokens) - 1
            batch.seq_id[i][0] = 0
        if status := api.llama_decode(ctx, batch):
            raise ModelError(f"the model failed with a {kv} cache (llama_decode returned {status}): {llama.log.reason()}")
        n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        return np.ctypeslib.as_array(api.llama_get_logits(ctx), (len(tokens) - 1 - first, n_vocab)).copy()
    finally:
        api.llama_batch_free(batch)
        api.llama_free(ctx)


def write(target: Path, model: Path, model_id: str, made: Measured) -> None:
    """Write a profile atomically (a temporary file beside `target`, then rename). Raises OSError, ModelError."""
    from gguf import GGUFWriter

    meta = read_model(model)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".tmp")
    os.close(handle)
    try:
        writer = GGUFWriter(name, ARCHITECTURE)
        writer.add_string("general.name", f"{meta.name} (seqkv profile)")
        writer.add_uint32("seqkv.profile.version", VERSION)
        writer.add_string("seqkv.profile.model_id", model_id)
        writer.add_string("seqkv.profile.model_arch", meta.arch)
        writer.add_string("seqkv.profile.model_name", meta.name)
        writer.add_uint32("seqkv.profile.n_layer", meta.n_layer)
        writer.add_string("seqkv.profile.text_sha256", made.text_sha256)
        writer.add_uint32("seqkv.profile.n_tokens", made.n_tokens)
        writer.add_uint32("seqkv.profile.n_sink", _N_SINK)
        writer.add_uint32("seqkv.profile.n_window", _N_WINDOW)
        writer.add_string("seqkv.profile.generator", f"seqkv_edge {__version__}")
        for name_kv in llama.OUR_TYPES:
            for kind, bits in zip("kv", plan_bits(made.layers, int(name_kv[-1]))):
                writer.add_array(f"seqkv.profile.{name_kv}.{kind}_bits", [bits.get(il, 0) for il in range(meta.n_layer)])
            if name_kv in made.quality:
                writer.add_float32(f"seqkv.profile.{name_kv}.kld", made.quality[name_kv])
        for layer in made.layers:
            writer.add_tensor(f"blk.{layer.layer}.k_mean", layer.k_mean)
            writer.add_tensor(f"blk.{layer.layer}.k_encode", layer.k_encode)
            writer.add_tensor(f"blk.{layer.layer}.v_mean", layer.v_mean)
            writer.add_tensor(f"blk.{layer.layer}.v_scale", layer.v_scale)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
