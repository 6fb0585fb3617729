"""Profiles: what is known in advance of a model's keys and values. Version 1 holds their means.

A profile is a GGUF file (architecture "seqkv-profile"); per layer with attention it has the tensors
  blk.%d.k_mean  f32 [n_head_kv, head_dim_k]  mean of R(-t) k over a text, k after RoPE at position t
  blk.%d.v_mean  f32 [n_head_kv, head_dim_v]  mean of v
(numpy order). It is tied to one model file by `seqkv.profile.model_id`, and never used with another.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__, llama
from .dropin import KvOptions
from .errors import ModelError, ProfileError, UsageError
from .gguf_meta import fingerprint, read_header

ARCHITECTURE = "seqkv-profile"
VERSION = 1
DEFAULT_TOKENS = 1024
_BATCH = 128
_MIN_TOKENS = 64


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


@dataclass(frozen=True)
class Means:
    """Measured means of one layer."""

    layer: int
    k: np.ndarray
    """f32 (n_head_kv, head_dim_k)"""
    v: np.ndarray
    """f32 (n_head_kv, head_dim_v)"""


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

    return Path(platformdirs.user_cache_dir("seqkv-edge", appauthor=False)) / "profiles"


def beside(model: Path) -> Path:
    """The profile that may lie next to a model: x.gguf -> x.seqkv.gguf."""
    return model.with_name(model.name.removesuffix(".gguf") + ".seqkv.gguf")


def find(model: Path, model_id: str) -> Path | None:
    """The profile of a model: next to it, shipped with the package, or in the cache; checked. None if there is none.

    Raises ProfileError when one is there and wrong.
    """
    shipped = Path(__file__).parent / "models" / f"{model_id}.gguf"
    for candidate in (beside(model), shipped, cache_dir() / f"{model_id}.gguf"):
        if candidate.is_file():
            check(candidate, model_id)
            return candidate
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
            profile = find(path, model_id) or _make_cached(model, path, model_id, options.n_sink)
        else:
            profile = Path(options.profile)
            check(profile, model_id)
    llama.configure(model, profile, model_id, options.n_sink, options.n_window)
    return profile


def _make_cached(model: int, path: Path, model_id: str, n_sink: int) -> Path:
    target = cache_dir() / f"{model_id}.gguf"
    means, n_tokens, digest = measure(model, default_text(), n_tokens=DEFAULT_TOKENS, n_sink=n_sink)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(target, path, model_id, means, n_tokens=n_tokens, n_sink=n_sink, text_sha256=digest)
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
        write(target, path, model_id, means, n_tokens=n_tokens, n_sink=n_sink, text_sha256=digest)
    return target


def make(model: int, path: Path, target: Path, *, text: str | None = None, n_tokens: int, n_sink: int) -> ProfileInfo:
    """Measure a profile on `text` (default: the built-in one) and write it. Raises ModelError, OSError."""
    means, seen, digest = measure(model, default_text() if text is None else text, n_tokens=n_tokens, n_sink=n_sink)
    model_id = fingerprint(path)
    write(target, path, model_id, means, n_tokens=seen, n_sink=n_sink, text_sha256=digest)
    return check(target, model_id)


def default_text() -> str:
    """Technical English at hand everywhere: Python's own language documentation."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("profile of this model (once), tokens", total=total)
        yield lambda n: progress.advance(task, n)


def measure(model: int, text: str, *, n_tokens: int, n_sink: int) -> tuple[list[Means], int, str]:
    """Means over the first n_tokens tokens of `text`, the first n_sink left out.

    Runs the loaded model on a temporary f16 context. Returns the means per layer, the tokens seen, and the sha256 of
    the whole text. Raises ModelError when the text is too short or the model fails.
    """
    lib = llama.library()
    api, handle = lib.api, lib.handle
    vocab = api.llama_model_get_vocab(model)
    data = text.encode("utf-8")[: n_tokens * 32]
    capacity = len(data) + 16
    buffer = (api.llama_token * capacity)()
    n = api.llama_tokenize(vocab, data, len(data), buffer, capacity, True, False)
    n = min(n, n_tokens)
    if n < _MIN_TOKENS:
        raise ModelError(f"the text gives {max(n, 0)} tokens, a profile needs at least {_MIN_TOKENS}")
    collector = handle.llama_seqkv_collector_init(model, n_sink)
    if not collector:
        raise ModelError("this model has no attention layer that a profile could describe")
    ctx = None
    try:
        params = api.llama_context_default_params()
        params.n_ctx = n
        params.n_batch = params.n_ubatch = min(n, _BATCH)
        params.type_k = params.type_v = llama.type_id("f16")
        params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.n_threads = params.n_threads_batch = os.cpu_count() or 1
        address = ctypes.cast(handle.llama_seqkv_collect, ctypes.c_void_p).value
        assert address is not None
        params.cb_eval = api.ggml_backend_sched_eval_callback(address)
        params.cb_eval_user_data = collector
        ctx = api.llama_init_from_model(model, params)
        if not ctx or handle.llama_seqkv_collector_bind(collector, ctx) < 0:
            raise ModelError(f"cannot run the model to make its profile: {llama.log.reason() or 'no context'}")
        with _progress(n) as advance:
            for start in range(0, n, _BATCH):
                count = min(_BATCH, n - start)
                chunk = (api.llama_token * count)(*buffer[start : start + count])
                status = api.llama_decode(ctx, api.llama_batch_get_one(chunk, count))
                if status != 0:
                    raise ModelError(f"the model failed while making its profile (llama_decode returned {status})")
                advance(count)
        api.llama_synchronize(ctx)
        means = _read_means(handle, collector, int(api.llama_model_n_layer(model)))
    finally:
        if ctx:
            api.llama_free(ctx)
        handle.llama_seqkv_collector_free(collector)
    if not means:
        raise ModelError("no layer of this model could be measured for a profile: use --no-profile")
    return means, n, hashlib.sha256(text.encode("utf-8")).hexdigest()


def _read_means(handle: ctypes.CDLL, collector: int, n_layer: int) -> list[Means]:
    """Means of the layers that have attention; n_head_kv is found from the collector's own counts."""
    result = []
    capacity = 1 << 16
    k, v = (ctypes.c_float * capacity)(), (ctypes.c_float * capacity)()
    for il in range(n_layer):
        n_k, n_v = ctypes.c_int32(capacity), ctypes.c_int32(capacity)
        seen = handle.llama_seqkv_collector_layer(collector, il, k, v, ctypes.byref(n_k), ctypes.byref(n_v))
        if seen <= 0:
            continue
        if not (0 < n_k.value <= capacity and 0 < n_v.value <= capacity):
            raise ModelError(f"layer {il} has {n_k.value} key values per token, more than a profile can hold")
        result.append(Means(il, np.array(k[: n_k.value], np.float32), np.array(v[: n_v.value], np.float32)))
    if any(not (np.isfinite(m.k).all() and np.isfinite(m.v).all()) for m in result):
        raise ModelError("the model gives non-finite keys or values on the profile's text")
    return result


def write(
    target: Path, model: Path, model_id: str, means: list[Means], *, n_tokens: int, n_sink: int, text_sha256: str
) -> None:
    """Write a profile atomically (a temporary file beside `target`, then rename). Raises OSError, ModelError."""
    from gguf import GGUFWriter

    from .gguf_meta import ModelMeta

    meta = ModelMeta(read_header(model))
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
        writer.add_string("seqkv.profile.text_sha256", text_sha256)
        writer.add_uint32("seqkv.profile.n_tokens", n_tokens)
        writer.add_uint32("seqkv.profile.n_sink", n_sink)
        writer.add_string("seqkv.profile.generator", f"seqkv_edge {__version__}")
        for layer in means:
            heads = meta.heads_kv[layer.layer]
            writer.add_tensor(f"blk.{layer.layer}.k_mean", layer.k.reshape(heads, -1))
            writer.add_tensor(f"blk.{layer.layer}.v_mean", layer.v.reshape(heads, -1))
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
