"""The `info` command: versions, libraries, backends, types, places."""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import platform
from dataclasses import asdict
from typing import Any

from . import __version__, lib_dir, llama, model, profile
from .engine import devices
from .errors import SeqkvError

# where the kernels of each backend have run
BACKENDS = {
    "CPU": "run on hardware",
    "CUDA": "run on hardware (H100, H200)",
    "Metal": "run in emulation only, never on a GPU",
}


def collect() -> dict[str, Any]:
    """Everything `info` prints. Libraries that cannot be loaded are described by "error"."""
    try:
        binding = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        binding = None
    result: dict[str, Any] = {
        "seqkv_edge": __version__,
        "python": platform.python_version(),
        "llama_cpp_python": {"pinned": llama.BINDING_VERSION, "installed": binding},
        "backends": BACKENDS,
    }
    try:
        result["libraries"] = _libraries()
        result["devices"] = [asdict(device) for device in devices()]
        result["types"] = _types()
    except SeqkvError as error:
        result["error"] = str(error)
    result["profile_cache"] = str(profile.cache_dir())
    result["store"] = _store()
    try:
        result["default_model"] = str(model.default_model())
    except SeqkvError as error:
        result["default_model"] = None
        result["default_model_error"] = str(error)
    return result


def _store() -> dict[str, Any]:
    from .store import Store, default_path

    found: dict[str, Any] = {"path": str(default_path()), "sessions": 0, "bytes": 0}
    if (default_path() / "index.sqlite").is_file():
        try:
            with Store(default_path(), create=False) as store:
                found |= {"sessions": len(store.sessions()), "bytes": store.bytes()}
        except SeqkvError as error:
            found["error"] = str(error)
    return found


def _libraries() -> dict[str, Any]:
    llama.quiet()
    loaded = llama.library()
    texts = {}
    for key, name in (("ggml_version", "ggml_version"), ("ggml_commit", "ggml_commit")):
        function = getattr(loaded.handle, name)
        function.restype = ctypes.c_char_p
        texts[key] = (function() or b"").decode()
    return {
        "directory": str(lib_dir()),
        "files": sorted(p.name for p in lib_dir().iterdir() if p.suffix in (".so", ".dylib", ".dll")),
        "patched": loaded.patched,
        **texts,
        "system": loaded.api.llama_print_system_info().decode().strip(),
    }


def _types() -> list[dict[str, Any]]:
    names = llama.KV_TYPES if llama.library().patched else llama.KV_TYPES[len(llama.OUR_TYPES) :]
    return [{"name": name, "bits_per_value": llama.type_bits(name), "ours": name in llama.OUR_TYPES} for name in names]


def run(args: argparse.Namespace) -> int:
    """The command. Returns the exit status: 1 when the libraries cannot be used."""
    data = collect()
    if args.json:
        print(json.dumps(data, indent=2))
        return 1 if "error" in data else 0
    from rich.console import Console
    from rich.table import Table

    from .fit import format_size

    console = Console(highlight=False, soft_wrap=True)
    binding = data["llama_cpp_python"]
    lines = [
        f"seqkv-edge        {data['seqkv_edge']} (Python {data['python']})",
        f"llama-cpp-python  {binding['installed'] or 'not installed'} (pinned {binding['pinned']})",
    ]
    if libraries := data.get("libraries"):
        patched = "patched" if libraries["patched"] else "NOT patched"
        lines.append(f"libraries         {libraries['directory']} ({patched})")
        lines.append(f"ggml              {libraries['ggml_version']} ({libraries['ggml_commit']})")
        lines.append(f"system            {libraries['system']}")
    for device in data.get("devices", []):
        memory = f", {format_size(device['memory_total'])}" if device["memory_total"] else ""
        lines.append(f"device            {device['name']}: {device['description']}{memory}")
    lines.append("seqkv kernels     " + "; ".join(f"{name}: {state}" for name, state in BACKENDS.items()))
    lines.append(f"profile cache     {data['profile_cache']}")
    store = data["store"]
    lines.append(f"session store     {store['path']}: " + (store.get("error") or f"{store['sessions']} sessions, {format_size(store['bytes'])}"))
    lines.append(f"default model     {data['default_model'] or data['default_model_error']}")
    console.print("\n".join(lines), markup=False)
    if "types" in data:
        table = Table()
        table.add_column("KV type")
        table.add_column("bits per value", justify="right")
        for row in data["types"]:
            table.add_row(row["name"] + (" *" if row["ours"] else ""), f"{row['bits_per_value']:.3f}")
        console.print(table)
        console.print("* of this package; block bytes alone, the exact window comes on top", markup=False)
    if "error" in data:
        console.print(f"error             {data['error']}", markup=False)
        return 1
    return 0
