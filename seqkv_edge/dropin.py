"""How KV options and profiles reach the contexts of an unmodified llama-cpp-python.

`llama_cpp.Llama` knows `type_k` and `type_v` only. Two functions of `llama_cpp.llama_cpp` are wrapped when that module
is imported:

- loading a model remembers its path, and reads our options out of the model's `kv_overrides`. llama.cpp looks
  overrides up by name, so keys it never asks for ("seqkv.n_sink", "seqkv.n_window", "seqkv.profile.N") change nothing
  there; they tie the options to this very model, through `Llama`'s own argument, with no state of ours in between
  (they survive pickling, threads, and several models at once);
- creating a context whose `type_k` or `type_v` is one of our types checks that the model can use it, finds or makes the
  profile, and configures the model. Other contexts are untouched.

Plain integers (`type_k=seqkv_edge.kv("seqkv3")["type_k"]`) therefore work too, with default options.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from . import lib_dir
from .errors import SeqkvError, UsageError

_KEY = "seqkv."
_CHUNK = 120  # bytes of a profile path per override; llama.cpp holds 127 and a final zero


@dataclass(frozen=True)
class KvOptions:
    """Options of the seqkv types for one model."""

    n_sink: int = 4
    """first tokens kept exact"""
    n_window: int = 64
    """last tokens kept exact"""
    profile: str | None = "auto"
    """"auto", None (no prediction) or a path"""
    predictors: bool = False
    """whether an automatic profile gets the predictors that stored sessions are coded with, if that takes moments (profile.prepare)"""

    def __post_init__(self) -> None:
        for name in ("n_sink", "n_window"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
                raise UsageError(f"{name} must be an integer >= 0, not {value!r}")


@dataclass(frozen=True)
class LoadedModel:
    """What is known of a loaded model: its file (None when it was not loaded from a path), its options, and the profile that its last
    context of our types was made with."""

    path: Path | None
    options: KvOptions
    profile: Path | None = None


_models: dict[int, LoadedModel] = {}
_lock = threading.RLock()


def kv_arguments(spec: str, *, n_sink: int, n_window: int, profile: str | os.PathLike[str] | None) -> dict[str, Any]:
    """See `seqkv_edge.kv`."""
    from . import llama

    parsed = llama.KvSpec.parse(spec)
    options = KvOptions(n_sink, n_window, None if profile is None else os.fspath(profile))
    arguments: dict[str, Any] = {"type_k": llama.type_id(parsed.k), "type_v": llama.type_id(parsed.v)}
    if parsed.needs_flash_attn:
        arguments["flash_attn"] = True
    if options != KvOptions():
        if not parsed.ours:
            raise UsageError(f"n_sink, n_window and profile apply to the seqkv types, not to {spec!r}")
        arguments["kv_overrides"] = to_overrides(options)
    return arguments


def to_overrides(options: KvOptions) -> dict[str, int | str]:
    """Options as a `kv_overrides` argument of `Llama`. A relative profile path is made absolute."""
    overrides: dict[str, int | str] = {_KEY + "n_sink": options.n_sink, _KEY + "n_window": options.n_window}
    value = "none" if options.profile is None else options.profile
    if value not in ("auto", "none"):
        value = os.path.abspath(value)
    # cut between characters: each piece is encoded by itself
    pieces = [""]
    for character in value:
        if len((pieces[-1] + character).encode("utf-8")) > _CHUNK:
            pieces.append("")
        pieces[-1] += character
    for i, piece in enumerate(pieces):
        overrides[f"{_KEY}profile.{i}"] = piece
    return overrides


def from_overrides(overrides: dict[str, int | str]) -> KvOptions:
    """The inverse of `to_overrides`; keys of others are skipped, an unknown key of ours is an error."""
    ours = {key[len(_KEY) :]: value for key, value in overrides.items() if key.startswith(_KEY)}
    if not ours:
        return KvOptions()
    pieces: dict[int, str] = {}
    numbers: dict[str, int] = {}
    for key, value in ours.items():
        name, _, index = key.partition(".")
        if name in ("n_sink", "n_window") and not index and isinstance(value, int):
            numbers[name] = value
        elif name == "profile" and isinstance(value, str) and (index or "0").isdigit():
            pieces[int(index or "0")] = value
        else:
            raise UsageError(f"unknown KV option {_KEY}{key}: known are n_sink, n_window and profile")
    text = "".join(pieces[i] for i in sorted(pieces)) or "auto"
    return KvOptions(profile=None if text == "none" else text, **numbers)


def _read_overrides(module: ModuleType, params: Any) -> dict[str, int | str]:
    """The integer and string overrides of a llama_model_params."""
    found: dict[str, int | str] = {}
    array = params.kv_overrides
    if not array:
        return found
    i = 0
    while array[i].key:
        item = array[i]
        key = bytes(item.key).decode("utf-8", "replace")
        if item.tag == module.LLAMA_KV_OVERRIDE_TYPE_INT:
            found[key] = int(item.value.val_i64)
        elif item.tag == module.LLAMA_KV_OVERRIDE_TYPE_STR:
            address = ctypes.addressof(item.value) + type(item.value).val_str.offset
            found[key] = ctypes.string_at(address, 128).split(b"\0", 1)[0].decode("utf-8", "replace")
        i += 1
    return found


def install(module: ModuleType) -> None:
    """Wrap the loading and context functions of `llama_cpp.llama_cpp`. Does nothing when done before."""
    if getattr(module, "_seqkv_edge_installed", False):
        return
    module._seqkv_edge_installed = True  # type: ignore[attr-defined]

    def wrap(name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        original = getattr(module, name)
        wrapper = make(original)
        for attribute in ("__name__", "__doc__", "argtypes", "restype"):
            setattr(wrapper, attribute, getattr(original, attribute, None))
        wrapper.__wrapped__ = original  # type: ignore[attr-defined]
        setattr(module, name, wrapper)
        package = sys.modules.get("llama_cpp")  # `from .llama_cpp import *` may have copied the original
        if package is not None and getattr(package, name, None) is original:
            setattr(package, name, wrapper)

    def loader(path_of: Callable[[tuple[Any, ...]], Path | None]) -> Callable[..., Callable[..., Any]]:
        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def load(*args: Any) -> Any:
                options = from_overrides(_read_overrides(module, args[-1]))
                model = original(*args)
                if model:
                    _models[int(model)] = LoadedModel(path_of(args), options)
                return model

            return load

        return make

    def make_free(original: Callable[..., Any]) -> Callable[..., Any]:
        models = _models

        def free(model: Any) -> Any:
            models.pop(int(getattr(model, "value", model) or 0), None)
            return original(model)

        return free

    def make_init(original: Callable[..., Any]) -> Callable[..., Any]:
        def init(model: Any, params: Any) -> Any:
            from . import llama

            if llama.is_ours(params.type_k) or llama.is_ours(params.type_v):
                _prepare(int(getattr(model, "value", model)), params.type_k, params.type_v)
            return original(model, params)

        return init

    def make_backend_init(original: Callable[..., Any]) -> Callable[..., Any]:
        def init() -> Any:
            # with -DGGML_BACKEND_DL=ON the backends are files that ggml would look for beside the Python interpreter
            handle = module.__dict__["_lib"]
            handle.ggml_backend_reg_count.restype = ctypes.c_size_t
            if handle.ggml_backend_reg_count() == 0:
                handle.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
                handle.ggml_backend_load_all_from_path.restype = None
                handle.ggml_backend_load_all_from_path(os.fsencode(lib_dir()))
            return original()

        return init

    wrap("llama_backend_init", make_backend_init)
    wrap("llama_model_load_from_file", loader(lambda args: Path(os.fsdecode(args[0]))))
    wrap("llama_model_load_from_splits", loader(lambda args: Path(os.fsdecode(args[0][0]))))
    wrap("llama_model_load_from_file_ptr", loader(lambda args: None))
    wrap("llama_model_free", make_free)
    wrap("llama_init_from_model", make_init)
    wrap("_llama_new_context_with_model", make_init)


def _prepare(model: int, type_k: int, type_v: int) -> None:
    from . import profile

    with _lock:
        loaded = _models.get(model, LoadedModel(None, KvOptions()))
        if loaded.path is None and loaded.options.profile == "auto":
            raise SeqkvError(
                "a model that was not loaded from a path has no automatic profile: use kv(..., profile=None)"
            )
        used = profile.prepare(model, loaded.path, type_k, type_v, loaded.options)
        if model in _models:
            _models[model] = replace(loaded, profile=used)


def profile_of(model: int) -> Path | None:
    """The profile that the last context of our types of a loaded model (a llama_model pointer) was made with."""
    with _lock:
        found = _models.get(model)
    return found.profile if found else None
