"""Reads the header of a GGUF file: metadata, tensor list, what the KV cache needs to know, and the fingerprint.

The file is not trusted: every length is checked against what is left of the file before anything is read or
allocated, and the promised tensor data must be there. Raises ModelError with one line.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import ModelError

MAGIC = b"GGUF"
PROFILE_ARCHITECTURE = "seqkv-profile"

_MAX_STRING = 1 << 20  # longer strings are skipped, not kept
_MAX_ARRAY = 1 << 14  # longer arrays are skipped, not kept
_MAX_KEY = 65535
_MAX_DIMS = 4
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""gguf value type -> struct format"""


@dataclass(frozen=True)
class Skipped:
    """A value too large to keep."""

    n: int
    """elements of an array, bytes of a string"""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    """ggml order: shape[0] is contiguous"""
    type: int
    offset: int
    """from the start of the file, in bytes"""
    n_bytes: int | None
    """None when this version of the gguf package does not know the type"""


@dataclass(frozen=True)
class GgufHeader:
    """Header of one GGUF file."""

    path: Path
    file_size: int
    data_start: int
    """offset of the tensor data, in bytes"""
    fields: dict[str, Any]
    """scalars, strings, lists; `Skipped` for what is too large to keep"""
    tensors: tuple[TensorInfo, ...]


class _Cursor:
    """Bounds-checked little-endian reader."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.pos, self.size = data, path, 0, len(data)

    def need(self, n: int) -> None:
        if n > self.size - self.pos:
            raise ModelError(
                f"{self.path} is truncated or damaged: its header needs {n:,} bytes at offset {self.pos:,}, "
                f"the file has {self.size:,}; download it again"
            )

    def scalar(self, fmt: str) -> Any:
        n = struct.calcsize("<" + fmt)
        self.need(n)
        (value,) = struct.unpack_from("<" + fmt, self.data, self.pos)
        self.pos += n
        return value

    def raw(self, n: int) -> bytes:
        self.need(n)
        value = self.data[self.pos : self.pos + n]
        self.pos += n
        return value

    def string(self, limit: int = _MAX_STRING) -> str | Skipped:
        n = self.scalar("Q")
        self.need(n)
        if n > limit:
            self.pos += n
            return Skipped(n)
        return self.raw(n).decode("utf-8", "replace")

    def array(self) -> list[Any] | Skipped:
        kind, n = self.scalar("I"), self.scalar("Q")
        if kind == _STRING:
            self.need(8 * n)
            if n <= _MAX_ARRAY:
                return [self.string() for _ in range(n)]
            unpack, pos, size = struct.Struct("<Q").unpack_from, self.pos, self.size
            for _ in range(n):
                if size - pos < 8:
                    self.pos = pos
                    self.need(8)
                (length,) = unpack(self.data, pos)
                pos += 8
                if length > size - pos:
                    self.pos = pos
                    self.need(length)
                pos += length
            self.pos = pos
            return Skipped(n)
        if kind not in _SCALARS:
            raise ModelError(f"{self.path} is damaged: array of unknown type {kind} in its header")
        n_bytes = n * struct.calcsize("<" + _SCALARS[kind])
        self.need(n_bytes)
        if n > _MAX_ARRAY:
            self.pos += n_bytes
            return Skipped(n)
        return list(struct.unpack(f"<{n}{_SCALARS[kind]}", self.raw(n_bytes)))

    def value(self) -> Any:
        kind = self.scalar("I")
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise ModelError(f"{self.path} is damaged: value of unknown type {kind} in its header")
        return self.scalar(_SCALARS[kind])


def _tensor_bytes(shape: tuple[int, ...], type_: int) -> int | None:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(type_)]
    except (ValueError, KeyError):
        return None
    n = 1
    for d in shape:
        n *= d
    return n // block * size


def read_header(path: Path | str) -> GgufHeader:
    """Read and check the header of a GGUF file. Raises ModelError: missing, not a GGUF, truncated, damaged."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(4)
            if start != MAGIC:
                what = "an empty file" if not start else f"a file that starts with {start!r}"
                raise ModelError(f"{path} is not a GGUF file (expected it to start with b'GGUF', found {what})")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data, path))
    except FileNotFoundError:
        raise ModelError(f"no file {path}: give the path of a GGUF model") from None
    except IsADirectoryError:
        raise ModelError(f"{path} is a directory: give the path of a GGUF file") from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from None


def _parse(cursor: _Cursor) -> GgufHeader:
    path = cursor.path
    cursor.pos = 4
    version = cursor.scalar("I")
    if version & 0xFFFF == 0:
        raise ModelError(f"{path} is a big-endian GGUF file, which this machine cannot use")
    if version not in (2, 3):
        raise ModelError(f"{path} has GGUF version {version}, expected 2 or 3")
    n_tensors, n_fields = cursor.scalar("Q"), cursor.scalar("Q")
    cursor.need(n_tensors * 24 + n_fields * 13)  # the least that each can take
    fields: dict[str, Any] = {}
    for _ in range(n_fields):
        key = cursor.string(_MAX_KEY)
        if isinstance(key, Skipped) or not key or key in fields:
            raise ModelError(f"{path} is damaged: bad or repeated metadata key {key!r}")
        fields[key] = cursor.value()
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise ModelError(f"{path} is damaged: alignment {alignment!r} is not a power of two")
    raw: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(n_tensors):
        name = cursor.string(_MAX_KEY)
        n_dims = cursor.scalar("I")
        if isinstance(name, Skipped) or n_dims > _MAX_DIMS:
            raise ModelError(f"{path} is damaged: bad tensor entry {name!r}")
        shape = tuple(cursor.scalar("Q") for _ in range(n_dims))
        raw.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
    data_start = (cursor.pos + alignment - 1) // alignment * alignment
    tensors = []
    for name, shape, type_, offset in raw:
        n_bytes = _tensor_bytes(shape, type_)
        if offset % alignment:
            raise ModelError(f"{path} is damaged: tensor {name!r} is not aligned")
        end = data_start + offset + (n_bytes or 0)
        if end > cursor.size:
            raise ModelError(
                f"{path} is truncated: tensor {name!r} ends at byte {end:,}, the file has {cursor.size:,}; "
                "download it again"
            )
        tensors.append(TensorInfo(name, shape, type_, data_start + offset, n_bytes))
    return GgufHeader(path, cursor.size, data_start, fields, tuple(tensors))


_SWA_PERIOD = {
    "afmoe": 4, "cohere2": 4, "cohere2moe": -4, "exaone-moe": 4, "exaone4": 4, "gemma2": 2, "gemma3": 6, "gemma3n": 5,
    "gpt-oss": 2, "llama4": 4, "olmo2": 4, "plamo3": 8, "smallthinker": -4,
}  # fmt: skip
"""llama.cpp's default sliding-window period per architecture (every Nth layer is full); negative: the first is full"""


@dataclass(frozen=True)
class LayerKv:
    """KV cache of one layer, per token."""

    k_values: int
    """n_head_kv * head_dim of keys; 0 when the layer has no cache"""
    v_values: int
    window: int
    """sliding window in tokens, 0 = full attention"""


@dataclass(frozen=True)
class ModelMeta:
    """What the sizes of a model's caches and buffers follow from."""

    header: GgufHeader

    @property
    def path(self) -> Path:
        return self.header.path

    @cached_property
    def arch(self) -> str:
        arch = self.header.fields.get("general.architecture")
        if not isinstance(arch, str) or not arch:
            raise ModelError(f"{self.path} names no architecture: it is not a language model")
        if arch == PROFILE_ARCHITECTURE:
            raise ModelError(f"{self.path} is a profile, not a model: give the model, and the profile with --profile")
        return arch

    @cached_property
    def name(self) -> str:
        name = self.header.fields.get("general.name")
        return name if isinstance(name, str) else self.path.stem

    def _raw(self, key: str) -> Any:
        return self.header.fields.get(f"{self.arch}.{key}")

    def _int(self, key: str, default: int | None = None, limit: int = 1 << 31) -> int:
        value = self._raw(key)
        if value is None and default is not None:
            return default
        if isinstance(value, list) and value:  # per layer: the largest
            value = max((v for v in value if isinstance(v, int)), default=None)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
            raise ModelError(f"{self.path}: metadata {self.arch}.{key} is {value!r}, expected a number")
        return value

    def _per_layer(self, key: str, default: int | None = None) -> tuple[int, ...]:
        value = self._raw(key)
        if isinstance(value, list):
            if len(value) < self.n_layer or not all(isinstance(v, int) and 0 <= v < 1 << 20 for v in value):
                raise ModelError(f"{self.path}: metadata {self.arch}.{key} does not list {self.n_layer} layers")
            return tuple(int(v) for v in value[: self.n_layer])
        return (self._int(key, default, 1 << 20),) * self.n_layer

    @cached_property
    def n_layer(self) -> int:
        n = self._int("block_count", limit=1 << 14)
        if n == 0:
            raise ModelError(f"{self.path}: the model has no layers")
        return n

    @cached_property
    def n_embd(self) -> int:
        return self._int("embedding_length", limit=1 << 24)

    @cached_property
    def n_ff(self) -> int:
        return self._int("feed_forward_length", 0, limit=1 << 24)

    @cached_property
    def n_ctx_train(self) -> int:
        return self._int("context_length", limit=1 << 31)

    @cached_property
    def n_vocab(self) -> int:
        tokens = self.header.fields.get("tokenizer.ggml.tokens")
        if isinstance(tokens, Skipped):
            return tokens.n
        return len(tokens) if isinstance(tokens, list) else self._int("vocab_size", 0)

    @cached_property
    def n_head(self) -> int:
        return self._int("attention.head_count", limit=1 << 20)

    @cached_property
    def chat_template(self) -> str | None:
        template = self.header.fields.get("tokenizer.chat_template")
        return template if isinstance(template, str) and template.strip() else None

    @cached_property
    def heads_kv(self) -> tuple[int, ...]:
        """KV heads of every layer"""
        return self._per_layer("attention.head_count_kv", self.n_head)

    @cached_property
    def layers(self) -> tuple[LayerKv, ...]:
        """KV cache of every layer. Unknown sliding-window patterns count as full attention (an upper bound)."""
        heads = self._per_layer("attention.head_count")
        heads_kv = self.heads_kv
        head_dim = self.n_embd // max(1, max(heads))
        key = self._int("attention.key_length", head_dim, 1 << 20)
        value = self._int("attention.value_length", head_dim, 1 << 20)
        key_swa = self._int("attention.key_length_swa", key, 1 << 20)
        value_swa = self._int("attention.value_length_swa", value, 1 << 20)
        rank = self._int("attention.kv_lora_rank", 0, 1 << 20)
        window = self._int("attention.sliding_window", 0)
        swa = self._swa_layers() if window else (False,) * self.n_layer
        interval = self._int("full_attention_interval", 0, 1 << 14)
        shared = self._int("attention.shared_kv_layers", 0, 1 << 14)
        result = []
        for i in range(self.n_layer):
            if (interval and (i + 1) % interval) or heads_kv[i] == 0 or i >= self.n_layer - shared > 0:
                result.append(LayerKv(0, 0, 0))
            elif rank and self._raw("attention.key_length_mla") is not None:  # latent cache: one head, V inside K
                result.append(LayerKv(key, 0, 0))
            elif swa[i]:
                result.append(LayerKv(heads_kv[i] * key_swa, heads_kv[i] * value_swa, window))
            else:
                result.append(LayerKv(heads_kv[i] * key, heads_kv[i] * value, 0))
        return tuple(result)

    def _swa_layers(self) -> tuple[bool, ...]:
        pattern = self._raw("attention.sliding_window_pattern")
        if isinstance(pattern, list) and len(pattern) >= self.n_layer:
            return tuple(bool(p) for p in pattern[: self.n_layer])
        period = _SWA_PERIOD.get(self.arch)
        if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern > 0:
            period = -pattern if period is not None and period < 0 else pattern
        if period is None:
            return (False,) * self.n_layer
        if period < 0:
            return tuple(i % -period != 0 for i in range(self.n_layer))
        return tuple(i % period < period - 1 for i in range(self.n_layer))

    @cached_property
    def parts(self) -> tuple[Path, ...]:
        """All files of a model that is split into several; just its own path otherwise."""
        n = self.header.fields.get("split.count", 1)
        match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", self.path.name)
        if not isinstance(n, int) or n <= 1 or not match or int(match[2]) != n or n > 9999:
            return (self.path,)
        return tuple(self.path.with_name(f"{match[1]}-{i:05d}-of-{n:05d}.gguf") for i in range(1, n + 1))

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of tensor data, all parts of a split model together. Raises ModelError when a part is missing."""
        headers = [self.header if p == self.path else read_header(p) for p in self.parts]
        return sum(h.file_size - h.data_start for h in headers)


def read_model(path: Path | str) -> ModelMeta:
    """Header of a language model; checks that its parts are complete. Raises ModelError."""
    meta = ModelMeta(read_header(path))
    if meta.header.fields.get("general.type") not in (None, "model"):
        raise ModelError(f"{path} is a GGUF file of type {meta.header.fields['general.type']!r}, not a model")
    _ = meta.arch, meta.layers, meta.n_ctx_train, meta.weight_bytes
    return meta


def fingerprint(path: Path | str) -> str:
    """Identity of a model file, 32 hex digits.

    blake3 of: file size (u64 little-endian), all bytes before the tensor data, and for every tensor in file order
    4 KiB at its start and 4 KiB from its middle (cut at its end). A split model: all parts one after the other.
    """
    from blake3 import blake3

    digest = blake3()
    meta = ModelMeta(read_header(path))
    for part in meta.parts:
        header = meta.header if part == meta.path else read_header(part)
        digest.update(struct.pack("<Q", header.file_size))
        with part.open("rb") as file:
            digest.update(file.read(header.data_start))
            for tensor in header.tensors:
                n = header.file_size - tensor.offset if tensor.n_bytes is None else tensor.n_bytes
                for start in (0, n // 2):
                    file.seek(tensor.offset + start)
                    digest.update(file.read(min(4096, n - start)))
    return digest.hexdigest(length=16)
