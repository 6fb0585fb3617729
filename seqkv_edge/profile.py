"""Profiles: what is known in advance of a model's keys and values (design.py), as a file.

A profile is a GGUF file (architecture "seqkv-profile"); per layer with full attention it has the tensors (numpy order)
  blk.%d.k_mean    f32 [n_head_kv, dk]      mean of R(-t) k over a text, k after RoPE at position t
  blk.%d.k_encode  f16 [n_head_kv, dk, dk]  transform of the keys of a frame
  blk.%d.v_mean    f32 [n_head_kv, dv]      mean of v
  blk.%d.v_scale   f32 [n_head_kv, dv]      scale of v before its Hadamard transform
predictors of the lossless coder of stored frames (delta.py), which may be missing,
and per type the bits of every layer's keys and values: seqkv.profile.seqkv3.k_bits, .v_bits (0: no such layer).
It is tied to one model file by `seqkv.profile.model_id`, and never used with another.
"""

from __future__ import annotations

import atexit
import errno
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__, delta, llama
from .design import LayerDesign, plan_bits
from .dropin import KvOptions
from .errors import ModelError, ProfileError, UsageError
from .gguf_meta import PROFILE_ARCHITECTURE, fingerprint, read_header, read_model

VERSION = 2
N_SINK, N_WINDOW = 4, 64
"""exact window that profiles are made for"""
PATIENCE = 180.0
"""seconds that predictors of an automatic profile may take; SmolLM2's take 30 on two cores"""
SHARE = 0.03
"""of the model file's bytes that they may take; SmolLM2's take .011"""


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
    if fields.get("general.architecture") != PROFILE_ARCHITECTURE:
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
            if options.predictors and profile.parent == cache_dir() and not has_predictors(profile):
                _add_cached_predictors(model, path, profile)
        else:
            profile = Path(options.profile)
            check(profile, model_id)
    llama.configure(model, profile, model_id, options.n_sink, options.n_window)
    return profile


def _make_cached(model: int, path: Path, model_id: str) -> Path:
    from .calibrate import default_text, measure

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


def _add_cached_predictors(model: int, path: Path, profile: Path) -> None:
    """Add predictors to a profile that was made on first use, unless that takes long or ctrl-C ends it: says why, and goes on without."""
    from .calibrate import DEFAULT_TOKENS, add_predictors, estimate_predictors
    from .predictor import expected_bytes

    try:
        n_bytes, n_model = expected_bytes(read_designs(profile)[0]), sum(part.stat().st_size for part in read_model(path).parts)
        if n_bytes > SHARE * n_model:
            reason = f"predictors would take {n_bytes / n_model:.0%} of the model's size, 'calibrate --predictors' makes them all the same"
        elif (seconds := estimate_predictors(model, DEFAULT_TOKENS)) > PATIENCE:  # half of the tokens that 'calibrate' takes: 1 % more bytes
            reason = f"fitting predictors takes about {seconds / 60:.0f} min on this machine, 'calibrate --predictors' does it"
        else:
            print(f"seqkv: fitting what sessions of {path.name} are coded with, once: about {seconds:.0f} s (ctrl-C: without)", file=sys.stderr)
            add_predictors(model, path, profile, n_tokens=DEFAULT_TOKENS)
            return
    except KeyboardInterrupt:
        reason = "interrupted"
    except ModelError as error:
        reason = str(error)
    except OSError as error:
        reason = f"{profile} cannot be written ({error.strerror or error})"
    print(f"seqkv: sessions of {path.name} are stored without coding: {reason}", file=sys.stderr)


@dataclass(frozen=True)
class Measured:
    """What a profile is written from."""

    layers: list[LayerDesign]
    n_tokens: int
    text_sha256: str
    quality: dict[str, float] = field(default_factory=dict)
    """as in `ProfileInfo`; empty: not measured"""


def read_designs(path: Path) -> tuple[list[LayerDesign], tuple[dict[int, int], dict[int, int]]]:
    """What a profile says of every layer, and the layers' bits of keys and values for seqkv3. Raises ProfileError."""
    from gguf import GGUFReader

    info = read_info(path)
    reader = GGUFReader(path)
    found = {t.name: np.array(t.data) for t in reader.tensors}
    nan = float("nan")
    try:
        designs = [
            LayerDesign(il, *(found[f"blk.{il}.{name}"] for name in ("k_mean", "k_encode", "v_mean", "v_scale")), nan, nan)
            for il in range(info.n_layer) if f"blk.{il}.k_encode" in found
        ]  # fmt: skip
        bits = [reader.fields[f"seqkv.profile.seqkv3.{kind}_bits"].contents() for kind in ("k", "v")]
        keys, values = ({d.layer: int(of[d.layer]) for d in designs} for of in bits)
    except (KeyError, IndexError) as error:
        raise ProfileError(f"{path} is damaged: {error} is missing") from None
    return designs, (keys, values)


def has_predictors(path: Path) -> bool:
    """Whether a profile has what stored frames are coded with. Raises ProfileError."""
    try:
        return "seqkv.delta.version" in read_header(path).fields
    except ModelError as error:
        raise ProfileError(f"profile: {error}") from None


def add_predictors(path: Path, layers: Mapping[int, delta.Layer]) -> None:
    """Rewrite a profile with the predictors of the lossless coder (native/format.md), in place of those that it may have.

    Atomically. Nothing that a cache is written with changes, so states and the profile's hash stay good. Raises OSError.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(handle)
    try:
        writer = GGUFWriter(name, PROFILE_ARCHITECTURE)
        for key, value in reader.fields.items():
            if not key.startswith(("GGUF.", "seqkv.delta.")) and key != "general.architecture":
                kind = value.types[0]
                writer.add_key_value(key, value.contents(), kind, value.types[-1] if kind == GGUFValueType.ARRAY else None)
        writer.add_uint32("seqkv.delta.version", delta.VERSION)
        for tensor in reader.tensors:
            if not tensor.name.startswith("delta.") and ".delta_" not in tensor.name:
                writer.add_tensor(tensor.name, np.array(tensor.data))
        for tensor_name, data in delta.tensors(layers).items():
            writer.add_tensor(tensor_name, data)
        _finish(writer, name, path)
    except BaseException as error:
        _undo(name, error)
        raise


def write(target: Path, model: Path, model_id: str, made: Measured) -> None:
    """Write a profile atomically (a temporary file beside `target`, then rename). Raises OSError, ModelError."""
    from gguf import GGUFWriter

    meta = read_model(model)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".tmp")
    os.close(handle)
    try:
        writer = GGUFWriter(name, PROFILE_ARCHITECTURE)
        writer.add_string("general.name", f"{meta.name} (seqkv profile)")
        writer.add_uint32("seqkv.profile.version", VERSION)
        writer.add_string("seqkv.profile.model_id", model_id)
        writer.add_string("seqkv.profile.model_arch", meta.arch)
        writer.add_string("seqkv.profile.model_name", meta.name)
        writer.add_uint32("seqkv.profile.n_layer", meta.n_layer)
        writer.add_string("seqkv.profile.text_sha256", made.text_sha256)
        writer.add_uint32("seqkv.profile.n_tokens", made.n_tokens)
        writer.add_uint32("seqkv.profile.n_sink", N_SINK)
        writer.add_uint32("seqkv.profile.n_window", N_WINDOW)
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
        _finish(writer, name, target)
    except BaseException as error:
        _undo(name, error)
        raise


def _finish(writer: Any, name: str, target: Path) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open(name, "rb+") as file:
        os.fsync(file.fileno())
    os.chmod(name, 0o644)
    os.replace(name, target)


def _undo(name: str, error: BaseException) -> None:
    Path(name).unlink(missing_ok=True)
    if isinstance(error, OSError) and error.errno is None:  # of numpy: "8192 requested and 48 written"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
