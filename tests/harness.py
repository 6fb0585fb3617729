"""Models and contexts through llama_cpp's low-level API, for end-to-end tests of the KV cache.

Runs on the patched libraries, and on upstream's with upstream's types. `Context.decode` returns the logits
of every token it was given, (n_tokens, n_vocab) float32.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

if "LLAMA_CPP_LIB_PATH" not in os.environ:  # set it to test other libraries
    import seqkv_edge  # noqa: F401  selects the patched libraries

from llama_cpp import llama_cpp as api

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
import tiny

_lib = api._lib
PATCHED = hasattr(_lib, "llama_seqkv_type")
SEQKV = ("seqkv4", "seqkv3", "seqkv2")
UPSTREAM_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}
FA_AUTO, FA_OFF, FA_ON = -1, 0, 1

log_lines: list[str] = []  # what the libraries logged, whole lines, since `clear_log`
_log_part = ""


@api.llama_log_callback
def _log(level: int, text: bytes, _user: ctypes.c_void_p) -> None:
    global _log_part
    del level
    _log_part += text.decode("utf-8", "replace")
    *lines, _log_part = _log_part.split("\n")
    log_lines.extend(lines)


def clear_log() -> None:
    api.llama_log_set(_log, ctypes.c_void_p(0))  # again: other tests of the process may have set their own
    log_lines.clear()


clear_log()
api.llama_backend_init()


class SeqkvParams(ctypes.Structure):
    """struct llama_seqkv_params"""

    _fields_ = [
        ("profile", ctypes.c_char_p),
        ("model_id", ctypes.c_char_p),
        ("n_sink", ctypes.c_int32),
        ("n_window", ctypes.c_int32),
        ("any_type", ctypes.c_bool),
    ]


def _function(name: str, result: type | None, *arguments: type) -> ctypes._CFuncPtr:
    f = _lib[name]  # a function object of our own: llama_cpp's may be wrapped
    f.restype, f.argtypes = result, list(arguments)
    return f


# without the drop-in's wrappers, which find and make profiles
_load_model = _function("llama_model_load_from_file", ctypes.c_void_p, ctypes.c_char_p, api.llama_model_params)
_new_context = _function("llama_init_from_model", ctypes.c_void_p, ctypes.c_void_p, api.llama_context_params)

_P, _I32, _SZ, _STR = ctypes.c_void_p, ctypes.c_int32, ctypes.c_size_t, ctypes.c_char_p
if PATCHED:
    seqkv_default_params = _function("llama_seqkv_default_params", SeqkvParams)
    seqkv_configure = _function("llama_seqkv_configure", _I32, _P, ctypes.POINTER(SeqkvParams), _STR, _SZ)
    seqkv_check = _function("llama_seqkv_check", _I32, _P, _I32, _I32, _STR, _SZ)
    seqkv_type = _function("llama_seqkv_type", _I32, _STR)
    seqkv_type_bits = _function("llama_seqkv_type_bits", ctypes.c_double, _I32)
    seqkv_kv_bytes = _function("llama_seqkv_kv_bytes", _SZ, _P)
    seqkv_kv_bytes_used = _function("llama_seqkv_kv_bytes_used", _SZ, _P)
    seqkv_profile_bytes = _function("llama_seqkv_profile_bytes", _SZ, _P)
    seqkv_bits = _function("llama_seqkv_bits", ctypes.c_double, _P)


def type_id(name: str) -> int:
    """ggml type id of a KV type name; KeyError if these libraries do not know it."""
    if name in UPSTREAM_TYPES:
        return UPSTREAM_TYPES[name]
    found = seqkv_type(name.encode()) if PATCHED else -1
    if found < 0:
        raise KeyError(name)
    return found


def split_kv(kv: str) -> tuple[str, str]:
    """KV spec to the names of the types of K and V."""
    k, _, v = kv.partition(":")
    return k, v or k


@dataclass(frozen=True)
class Setup:
    """How a context is made."""

    kv: str = "f16"
    n_ctx: int = 512
    n_batch: int = 512
    n_ubatch: int = 512
    n_seq: int = 1
    unified: bool = False
    flash_attn: int = FA_ON
    n_threads: int = 1
    swa_full: bool = True
    rope_scaling: int = -1  # from the model
    rope_freq_base: float = 0.0
    rope_freq_scale: float = 0.0


class Model:
    """A loaded GGUF file."""

    def __init__(self, path: str | Path, n_gpu_layers: int = 0) -> None:
        self.path = Path(path)
        params = api.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        self.ptr = _load_model(str(path).encode(), params)
        if not self.ptr:
            raise RuntimeError(f"cannot load {path}: {log_lines[-1:]}")
        self.vocab = api.llama_model_get_vocab(self.ptr)
        self.n_vocab = api.llama_vocab_n_tokens(self.vocab)

    def close(self) -> None:
        if self.ptr:
            api.llama_model_free(self.ptr)
            self.ptr = None

    def configure(
        self,
        n_window: int | None = None,
        n_sink: int | None = None,
        profile: Path | None = None,
        model_id: str | None = None,
        any_type: bool = False,
    ) -> tuple[int, str]:
        """Settings of contexts made later; what is not given gets its default. Status and error text."""
        params = seqkv_default_params()
        if n_window is not None:
            params.n_window = n_window
        if n_sink is not None:
            params.n_sink = n_sink
        params.profile = str(profile).encode() if profile else None
        params.model_id = model_id.encode() if model_id else None
        params.any_type = any_type
        err = ctypes.create_string_buffer(512)
        status = seqkv_configure(self.ptr, ctypes.byref(params), err, len(err))
        return status, err.value.decode()

    def check(self, kv: str) -> tuple[int, str]:
        """Can this model use these types: 0, or < 0 and the reason."""
        err = ctypes.create_string_buffer(512)
        k, v = (type_id(name) for name in split_kv(kv))
        return seqkv_check(self.ptr, k, v, err, len(err)), err.value.decode()


class Context:
    """A context of a model; `with` frees it. NoContext if llama.cpp refuses to make it."""

    def __init__(self, model: Model, setup: Setup = Setup(), *, cb_eval: tuple[object, int] | None = None, **changes: object) -> None:
        """cb_eval: an exported function of type ggml_backend_sched_eval_callback and its user data."""
        self.model, self.ptr = model, None
        self.setup = s = replace(setup, **changes)
        p = api.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch, p.n_seq_max = s.n_ctx, s.n_batch, s.n_ubatch, s.n_seq
        p.n_threads = p.n_threads_batch = s.n_threads
        p.flash_attn_type, p.kv_unified, p.swa_full = s.flash_attn, s.unified, s.swa_full
        p.rope_scaling_type = s.rope_scaling
        p.rope_freq_base, p.rope_freq_scale = s.rope_freq_base, s.rope_freq_scale
        p.type_k, p.type_v = (type_id(name) for name in split_kv(s.kv))
        p.no_perf = True
        if cb_eval:
            p.cb_eval = ctypes.cast(cb_eval[0], api.ggml_backend_sched_eval_callback)
            p.cb_eval_user_data = cb_eval[1]
        self.params = p
        self.ptr = _new_context(model.ptr, p)
        if not self.ptr:
            raise NoContext(log_lines[-1] if log_lines else "")
        self.mem = api.llama_get_memory(self.ptr)

    def __enter__(self) -> Context:  # noqa: PYI034
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.ptr:
            api.llama_free(self.ptr)
            self.ptr = None

    # -- decoding

    def decode(
        self,
        tokens: Sequence[int],
        pos: int | Sequence[int] | None = None,
        seq: int | Sequence[int] | Sequence[Sequence[int]] = 0,
        step: int | None = None,
    ) -> np.ndarray:
        """Decode `tokens` in calls of at most `step` tokens; logits of all of them.

        pos: position of the first token, or one per token; None continues the sequence.
        seq: sequence id of all, or one (or several) per token.
        """
        n = len(tokens)
        seqs = [(seq,)] * n if isinstance(seq, int) else [(s,) if isinstance(s, int) else tuple(s) for s in seq]
        if pos is None:
            pos = self.pos_max(seqs[0][0]) + 1
        positions = list(range(pos, pos + n)) if isinstance(pos, int) else list(pos)
        step = min(step or self.setup.n_batch, self.setup.n_batch)
        out = np.empty((n, self.model.n_vocab), dtype=np.float32)
        batch = api.llama_batch_init(min(step, n), 0, max(len(s) for s in seqs))
        try:
            for start in range(0, n, step):
                part = range(start, min(start + step, n))
                batch.n_tokens = len(part)
                for i, j in enumerate(part):
                    batch.token[i] = int(tokens[j])
                    batch.pos[i] = positions[j]
                    batch.n_seq_id[i] = len(seqs[j])
                    for k, s in enumerate(seqs[j]):
                        batch.seq_id[i][k] = s
                    batch.logits[i] = 1
                status = api.llama_decode(self.ptr, batch)
                if status != 0:
                    raise DecodeError(status)
                flat = np.ctypeslib.as_array(api.llama_get_logits(self.ptr), (len(part) * self.model.n_vocab,))
                out[start : start + len(part)] = flat.reshape(len(part), -1)
        finally:
            api.llama_batch_free(batch)
        return out

    # -- sequences

    def rm(self, seq: int, p0: int = -1, p1: int = -1) -> bool:
        return bool(api.llama_memory_seq_rm(self.mem, seq, p0, p1))

    def cp(self, src: int, dst: int, p0: int = -1, p1: int = -1) -> None:
        api.llama_memory_seq_cp(self.mem, src, dst, p0, p1)

    def keep(self, seq: int) -> None:
        api.llama_memory_seq_keep(self.mem, seq)

    def add(self, seq: int, p0: int, p1: int, delta: int) -> None:
        api.llama_memory_seq_add(self.mem, seq, p0, p1, delta)

    def div(self, seq: int, p0: int, p1: int, d: int) -> None:
        api.llama_memory_seq_div(self.mem, seq, p0, p1, d)

    def clear(self, data: bool = True) -> None:
        api.llama_memory_clear(self.mem, data)

    def pos_max(self, seq: int = 0) -> int:
        return api.llama_memory_seq_pos_max(self.mem, seq)

    def pos_min(self, seq: int = 0) -> int:
        return api.llama_memory_seq_pos_min(self.mem, seq)

    def shift(self, n_keep: int, n_discard: int, seq: int = 0) -> None:
        """Drop `n_discard` tokens after the first `n_keep` and close the gap, as chat programs do."""
        end = self.pos_max(seq) + 1
        assert self.rm(seq, n_keep, n_keep + n_discard)
        self.add(seq, n_keep + n_discard, end, -n_discard)

    # -- state

    def save_seq(self, seq: int = 0) -> bytes:
        size = api.llama_state_seq_get_size(self.ptr, seq)
        buf = (ctypes.c_uint8 * size)()
        n = api.llama_state_seq_get_data(self.ptr, buf, size, seq)
        return bytes(buf[:n]) if n else b""

    def load_seq(self, data: bytes, seq: int = 0) -> int:
        buf = (ctypes.c_uint8 * max(1, len(data))).from_buffer_copy(data or b"\0")
        return api.llama_state_seq_set_data(self.ptr, buf, len(data), seq)

    def save(self) -> bytes:
        size = api.llama_state_get_size(self.ptr)
        buf = (ctypes.c_uint8 * size)()
        n = api.llama_state_get_data(self.ptr, buf, size)
        return bytes(buf[:n])

    def load(self, data: bytes) -> int:
        buf = (ctypes.c_uint8 * max(1, len(data))).from_buffer_copy(data or b"\0")
        return api.llama_state_set_data(self.ptr, buf, len(data))

    def save_file(self, path: Path, tokens: Sequence[int], seq: int | None = None) -> int:
        """Whole state, or one sequence; 0 is failure."""
        array = (api.llama_token * max(1, len(tokens)))(*tokens)
        if seq is None:
            return int(api.llama_state_save_file(self.ptr, str(path).encode(), array, len(tokens)))
        return api.llama_state_seq_save_file(self.ptr, str(path).encode(), seq, array, len(tokens))

    def load_file(self, path: Path, n_max: int, seq: int | None = None) -> tuple[int, list[int]]:
        array = (api.llama_token * max(1, n_max))()
        count = ctypes.c_size_t(0)
        if seq is None:
            status = int(api.llama_state_load_file(self.ptr, str(path).encode(), array, n_max, ctypes.byref(count)))
        else:
            status = api.llama_state_seq_load_file(self.ptr, str(path).encode(), seq, array, n_max, ctypes.byref(count))
        return status, list(array[: count.value])

    def kv_bytes(self) -> int:
        return seqkv_kv_bytes(self.ptr)

    def kv_bytes_used(self) -> int:
        return seqkv_kv_bytes_used(self.ptr)

    def profile_bytes(self) -> int:
        return seqkv_profile_bytes(self.ptr)

    def bits(self) -> float:
        """Bits per value of the blocks of K and V; 0 without a seqkv cache."""
        return seqkv_bits(self.ptr)


class NoContext(RuntimeError):
    """llama_init_from_model returned NULL; the last log line."""


class DecodeError(RuntimeError):
    """llama_decode returned this status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"llama_decode: {status}")
        self.status = status


class Models:
    """Tiny models by name, written and loaded once."""

    def __init__(self, folder: Path, n_gpu_layers: int = 0) -> None:
        self.folder, self.n_gpu_layers = folder, n_gpu_layers
        self._models: dict[str, Model] = {}

    def path(self, name: str) -> Path:
        path = self.folder / f"{name}.gguf"
        if not path.exists():
            tiny.write(path, tiny.SPECS[name], name)
        return path

    def __call__(self, name: str) -> Model:
        """The model, with default cache settings."""
        if name not in self._models:
            self._models[name] = Model(self.path(name), self.n_gpu_layers)
        if PATCHED:
            status, err = self._models[name].configure()
            assert status == 0, err
        return self._models[name]

    def close(self) -> None:
        gc.collect()
        for model in self._models.values():
            model.close()
        self._models.clear()


@dataclass(frozen=True)
class LayerProfile:
    """What a profile says of one layer. Shapes with H KV heads of dk and dv values; E[h] as in z = E k."""

    k_mean: np.ndarray  # f32 (H, dk)
    k_encode: np.ndarray  # f16 (H, dk, dk)
    v_mean: np.ndarray  # f32 (H, dv)
    v_scale: np.ndarray  # f32 (H, dv)


def random_layer(spec: tiny.TinySpec, seed: int, mean: float = 1.0) -> LayerProfile:
    """Means of that size, and transforms that are rotations with rows scaled by 0.6 to 1.6."""
    rng = np.random.default_rng(seed)
    h, d = spec.n_head_kv, spec.head_dim
    rotations = np.stack([np.linalg.qr(rng.standard_normal((d, d)))[0] for _ in range(h)])
    scales = np.exp(rng.uniform(-0.5, 0.5, (2, h, d)))
    means = (mean * rng.standard_normal((2, h, d))).astype(np.float32)
    return LayerProfile(means[0], (scales[0][..., None] * rotations).astype(np.float16), means[1], scales[1].astype(np.float32))


def write_profile(
    path: Path,
    layers: dict[int, LayerProfile],
    bits: dict[str, Sequence[int]] | None = None,
    model_id: str = "ab" * 16,
    version: int = 2,
) -> Path:
    """A profile file. bits: arrays by name, such as "seqkv3.k_bits": one entry per layer of the model, bytes or int32."""
    import gguf

    out = gguf.GGUFWriter(str(path), "seqkv-profile")
    out.add_uint32("seqkv.profile.version", version)
    out.add_string("seqkv.profile.model_id", model_id)
    for name, values in (bits or {}).items():
        out.add_array(f"seqkv.profile.{name}", values)
    for il, layer in layers.items():
        for part in ("k_mean", "k_encode", "v_mean", "v_scale"):
            out.add_tensor(f"blk.{il}.{part}", getattr(layer, part))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def text(n: int, seed: int = 0) -> list[int]:
    """n token ids: BOS, then printable bytes with some repetition, as text has."""
    rng = np.random.default_rng(1000 + seed)
    words = [rng.integers(0x20, 0x7F, rng.integers(2, 9)) for _ in range(40)]
    ids: list[int] = [1]
    while len(ids) < n:
        ids.extend(3 + int(b) for b in words[rng.integers(len(words))])
    return ids[:n]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def kld(base: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL divergence of each row of logits from the base's, in nats."""
    p, q = log_softmax(base), log_softmax(other)
    return (np.exp(p) * (p - q)).sum(axis=-1)


def max_diff(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference of two arrays of logits; NaN or inf anywhere gives inf."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    return float(np.abs(a - b).max())


def share_different(a: bytes, b: bytes) -> float:
    """Share of bytes that differ; 1.0 if the lengths do."""
    if len(a) != len(b):
        return 1.0
    x, y = np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)
    return float((x != y).mean())


def concat(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate(list(parts))
