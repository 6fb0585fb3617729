"""The patched llama.cpp libraries: loading, C functions, type names, and the log.

llama-cpp-python holds the library handle and the prototypes of llama.h; this module adds those of llama-seqkv.h.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import lib_dir
from .errors import LibraryError, ModelError, ProfileError, UsageError

BINDING_VERSION = "0.3.36"
"""version of llama-cpp-python whose ctypes structs mirror the libraries"""

OUR_TYPES = ("seqkv2", "seqkv3", "seqkv4")
FLOAT_TYPES = ("f32", "f16", "bf16")
QUANTIZED_TYPES = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
"""what llama.cpp itself accepts for its cache"""
KV_TYPES = OUR_TYPES + FLOAT_TYPES + QUANTIZED_TYPES

_REBUILD = "reinstall seqkv-edge to build them (pip install .)"


@dataclass(frozen=True)
class KvSpec:
    """Types of the K and V caches, by name."""

    k: str
    v: str

    @staticmethod
    def parse(text: str) -> KvSpec:
        """`TYPE` or `KTYPE:VTYPE`. Raises UsageError for an unknown name."""
        names = text.strip().split(":")
        if len(names) > 2 or not all(names):
            raise UsageError(f"KV spec {text!r} is not TYPE or KTYPE:VTYPE")
        for name in names:
            if name not in KV_TYPES:
                raise UsageError(f"unknown KV type {name!r}: use one of {', '.join(KV_TYPES)}")
        return KvSpec(names[0], names[-1])

    @property
    def ours(self) -> bool:
        """whether one of the two is a seqkv type"""
        return self.k in OUR_TYPES or self.v in OUR_TYPES

    @property
    def needs_flash_attn(self) -> bool:
        """whether llama.cpp refuses V without flash attention"""
        return self.v in QUANTIZED_TYPES

    def __str__(self) -> str:
        return self.k if self.k == self.v else f"{self.k}:{self.v}"


class SeqkvParams(ctypes.Structure):
    """struct llama_seqkv_params"""

    _fields_ = [
        ("profile", ctypes.c_char_p),
        ("model_id", ctypes.c_char_p),
        ("n_sink", ctypes.c_int32),
        ("n_window", ctypes.c_int32),
        ("any_type", ctypes.c_bool),
    ]


class SeqkvRows(ctypes.Structure):
    """struct llama_seqkv_rows"""

    _fields_ = [
        ("il", ctypes.c_int32),
        ("n_tokens", ctypes.c_int32),
        ("n_head", ctypes.c_int32),
        ("n_head_kv", ctypes.c_int32),
        ("dk", ctypes.c_int32),
        ("dv", ctypes.c_int32),
        ("q", ctypes.POINTER(ctypes.c_float)),
        ("k", ctypes.POINTER(ctypes.c_float)),
        ("v", ctypes.POINTER(ctypes.c_float)),
        ("x2", ctypes.POINTER(ctypes.c_float)),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


RowsFunction = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.POINTER(SeqkvRows))
"""llama_seqkv_rows_t; an exception in it is lost, so it must catch everything"""

_P = ctypes.c_void_p
_FLOATS = ctypes.POINTER(ctypes.c_float)
_INTS = ctypes.POINTER(ctypes.c_int32)
_PROTOTYPES: dict[str, tuple[list[Any], Any]] = {
    "llama_seqkv_default_params": ([], SeqkvParams),
    "llama_seqkv_configure": ([_P, ctypes.POINTER(SeqkvParams), ctypes.c_char_p, ctypes.c_size_t], ctypes.c_int32),
    "llama_seqkv_check": ([_P, ctypes.c_int32, ctypes.c_int32, ctypes.c_char_p, ctypes.c_size_t], ctypes.c_int32),
    "llama_seqkv_type": ([ctypes.c_char_p], ctypes.c_int32),
    "llama_seqkv_type_name": ([ctypes.c_int32], ctypes.c_char_p),
    "llama_seqkv_type_bits": ([ctypes.c_int32], ctypes.c_double),
    "llama_seqkv_kv_bytes": ([_P], ctypes.c_size_t),
    "llama_seqkv_kv_bytes_used": ([_P], ctypes.c_size_t),
    "llama_seqkv_compute_bytes": ([_P], ctypes.c_size_t),
    "llama_seqkv_profile_bytes": ([_P], ctypes.c_size_t),
    "llama_seqkv_bits": ([_P], ctypes.c_double),
    "llama_seqkv_rope": ([_P, ctypes.c_int32, _FLOATS, ctypes.c_int32, _INTS], ctypes.c_int32),
    "llama_seqkv_range_get": (
        [_P, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, ctypes.c_bool, _P, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t],
        ctypes.c_int64,
    ),
    "llama_seqkv_collector_init": ([_P, RowsFunction, _P], _P),
    "llama_seqkv_collector_free": ([_P], None),
    "llama_seqkv_collector_n_layer": ([_P], ctypes.c_int32),
    "llama_seqkv_collect": ([_P, ctypes.c_bool, _P], ctypes.c_bool),
    "llama_seqkv_collector_finish": ([_P, ctypes.c_char_p, ctypes.c_size_t], ctypes.c_int32),
}


class LogTail:
    """llama.cpp's log: kept here instead of printed, so that its last errors can explain a failure."""

    def __init__(self, echo: bool = False) -> None:
        self.echo = echo
        self._errors: deque[str] = deque(maxlen=8)
        self._line = ""
        self._level = 0

    def write(self, level: int, text: bytes | None, _user: Any) -> None:
        """ggml_log_callback; level 5 continues the previous line, 4 is an error."""
        chunk = (text or b"").decode("utf-8", "replace")
        if self.echo:
            sys.stderr.write(chunk)
        if level != 5:
            self._line, self._level = "", level
        self._line += chunk
        if self._line.endswith("\n"):
            if self._level == 4 and self._line.strip():
                self._errors.append(self._line.strip())
            self._line = ""

    def clear(self) -> None:
        self._errors.clear()

    def reason(self) -> str:
        """The first error since `clear`, without the C function's name; "" if none."""
        if not self._errors:
            return ""
        head, sep, rest = self._errors[0].partition(": ")
        return rest if sep and " " not in head else self._errors[0]


log = LogTail()


@dataclass(frozen=True)
class Library:
    """The loaded libraries."""

    api: Any
    """module llama_cpp.llama_cpp"""
    handle: ctypes.CDLL
    directory: Path
    patched: bool


@functools.cache
def library() -> Library:
    """Import llama_cpp on the patched libraries. Raises LibraryError."""
    directory = lib_dir()
    if not directory.is_dir():
        raise LibraryError(f"no llama.cpp libraries in {directory}: {_REBUILD}")
    try:
        import llama_cpp
        import llama_cpp.llama_cpp as api
    except FileNotFoundError as error:
        raise LibraryError(f"no llama.cpp libraries in {directory} ({error}): {_REBUILD}") from error
    except (ImportError, RuntimeError, AttributeError) as error:
        raise LibraryError(f"cannot load llama.cpp from {directory}: {error}") from error
    if llama_cpp.__version__ != BINDING_VERSION:
        raise LibraryError(
            f"llama-cpp-python {llama_cpp.__version__} does not fit the libraries: "
            f"pip install llama-cpp-python=={BINDING_VERSION}"
        )
    handle = api._lib
    patched = hasattr(handle, "llama_seqkv_type")
    if patched:
        for name, (arguments, result) in _PROTOTYPES.items():
            try:
                function = getattr(handle, name)
            except AttributeError as error:
                raise LibraryError(f"the libraries in {directory} lack {name}: {_REBUILD}") from error
            function.argtypes, function.restype = arguments, result
    handle.ggml_type_name.argtypes, handle.ggml_type_name.restype = [ctypes.c_int], ctypes.c_char_p
    handle.ggml_type_size.argtypes, handle.ggml_type_size.restype = [ctypes.c_int], ctypes.c_size_t
    handle.ggml_blck_size.argtypes, handle.ggml_blck_size.restype = [ctypes.c_int], ctypes.c_int64
    return Library(api, handle, directory, patched)


def _patched() -> Library:
    loaded = library()
    if not loaded.patched:
        raise LibraryError(f"the llama.cpp libraries in {loaded.directory} are not patched: {_REBUILD}")
    return loaded


_log_callback: Any = None


@functools.cache
def quiet() -> None:
    """Send llama.cpp's log to `log` for the rest of the process (the command line does; the drop-in does not)."""
    global _log_callback
    api = library().api
    _log_callback = api.llama_log_callback(log.write)
    api.llama_log_set(_log_callback, ctypes.c_void_p(0))


@functools.cache
def type_id(name: str) -> int:
    """ggml type id of a KV type. Raises UsageError for an unknown name, LibraryError for ours if not patched."""
    if name not in KV_TYPES:
        raise UsageError(f"unknown KV type {name!r}: use one of {', '.join(KV_TYPES)}")
    loaded = _patched() if name in OUR_TYPES else library()
    if loaded.patched:
        found = int(loaded.handle.llama_seqkv_type(name.encode()))
        if found < 0:
            raise LibraryError(f"the libraries in {loaded.directory} do not know the type {name}: {_REBUILD}")
        return found
    for i in range(int(loaded.api.GGML_TYPE_COUNT)):
        if loaded.handle.ggml_type_name(i) == name.encode():
            return i
    raise LibraryError(f"the libraries in {loaded.directory} do not know the type {name}")


def is_ours(type_: int) -> bool:
    """Whether a ggml type id is a seqkv type."""
    return library().patched and type_ in _our_ids()


@functools.cache
def _our_ids() -> frozenset[int]:
    return frozenset(type_id(name) for name in OUR_TYPES)


def type_bits(name: str) -> float:
    """Bits per value of a KV type, from sizeof of its block."""
    i, handle = type_id(name), library().handle
    if library().patched:
        return float(handle.llama_seqkv_type_bits(i))
    return 8.0 * float(handle.ggml_type_size(i)) / float(handle.ggml_blck_size(i))


def check(model: int, type_k: int, type_v: int) -> None:
    """Raises ModelError with the reason when `model` cannot use these cache types."""
    err = ctypes.create_string_buffer(512)
    if _patched().handle.llama_seqkv_check(model, type_k, type_v, err, len(err)) < 0:
        raise ModelError(_text(err, "this model cannot use the seqkv types"))


def configure(
    model: int, profile: Path | None, model_id: str | None, n_sink: int, n_window: int, any_type: bool = False
) -> None:
    """Set what contexts created later on `model` use. Raises ProfileError with the reason.

    any_type: contexts of llama.cpp's quantized types use the seqkv cache and its exact window too.
    """
    params = SeqkvParams(
        None if profile is None else str(profile).encode(),
        None if model_id is None else model_id.encode(),
        n_sink,
        n_window,
        any_type,
    )
    err = ctypes.create_string_buffer(512)
    if _patched().handle.llama_seqkv_configure(model, ctypes.byref(params), err, len(err)) < 0:
        raise ProfileError(_text(err, "the model could not be configured"))


def fill(batch: Any, tokens: Sequence[int], position: int, first_logits: int) -> None:
    """Put tokens of sequence 0 at position, position + 1, ... into a llama_batch, with logits for tokens[first_logits:]."""
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position + i, 1
        batch.seq_id[i][0] = 0
        batch.logits[i] = i >= first_logits


def kv_bytes(ctx: int) -> int | None:
    """Bytes of all KV buffers of a context, exact window and tables included; None on unpatched libraries."""
    return int(library().handle.llama_seqkv_kv_bytes(ctx)) if library().patched else None


def bits(context: int) -> float | None:
    """Bits per value of the blocks of a context's seqkv cache, window and tables not counted. None: another cache."""
    handle = library().handle
    return (float(handle.llama_seqkv_bits(context)) or None) if library().patched else None


def kv_bytes_used(ctx: int) -> int | None:
    """Bytes of the cells in use, exact window included; None on unpatched libraries."""
    return int(library().handle.llama_seqkv_kv_bytes_used(ctx)) if library().patched else None


def compute_bytes(ctx: int) -> int | None:
    """Bytes of the compute buffers; None on unpatched libraries."""
    return int(library().handle.llama_seqkv_compute_bytes(ctx)) if library().patched else None


def _text(buffer: ctypes.Array[ctypes.c_char], otherwise: str) -> str:
    return bytes(buffer.value).decode("utf-8", "replace").replace("\n", " ").strip() or otherwise
