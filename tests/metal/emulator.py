"""Metal kernels on the CPU: their sources as C++, run by metal_emulator.h. Needs clang++.

    library = load(flatten(Path("kernels.metal"), [directories of includes]), cache)
    counters = library.run("kernel_name", (x, y, z), threads, {index: address}, [(address, bytes), ...])

An EmulatorError is what a GPU would not report: a load or store outside of the given memory, threadgroup memory that two threads
touch without a barrier between, a barrier or simd function that not all threads reach. Threadgroup memory is NaN at first.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
COUNTERS = ("load_bytes", "store_bytes", "loads", "stores", "matrix", "simd", "barriers")

# attributes of a kernel's arguments
BUILTIN = {
    "threadgroup_position_in_grid": "m.group",
    "threadgroups_per_grid": "m.groups",
    "thread_index_in_threadgroup": "m.current",
    "thread_index_in_simdgroup": "m.current%emu::SIMD",
    "simdgroup_index_in_threadgroup": "m.current/emu::SIMD",
    "threads_per_threadgroup": "m.n_threads",
}


QUALIFIERS = """
#define device
#define thread
#define kernel
#define constant const
#define threadgroup
#define EMU_SHARED static __attribute__((section("tgmem")))
"""


class EmulatorError(Exception):
    pass


def argument(text: str, index: int) -> tuple[str, int]:
    """C++ for the value of one argument of a kernel, and the index of the next buffer."""
    found = re.match(r"(.*?)\s*\b(\w+)\s*(?:\[\[(.*)\]\])?$", text.strip(), re.DOTALL)
    assert found, text
    type_, name, attribute = found.groups()
    if attribute and attribute.startswith("threadgroup("):
        return f"({type_}) m.group_memory", index
    if attribute:
        value = BUILTIN[attribute]
        if value in ("m.group", "m.groups"):
            return (value if type_.endswith("3") else f"({type_}) {value}.x"), index
        return (f"{type_}{{ (ushort) {value}, 1, 1 }}" if type_.endswith("3") else f"({type_}) ({value})"), index
    if type_.endswith("&"):
        return f"*({type_[:-1]} *) m.buffers[{index}]", index + 1
    return f"({type_}) m.buffers[{index}]", index + 1


def translate(source: str) -> str:
    """A kernel file as C++: function constants, threadgroup arrays, kernels and their attributes."""
    source = re.sub(r"^constant int (\w+)\s*\[\[function_constant\((.*)\)\]\];",
                    r"static int \1; static const bool fc_\1 = (emu::m.constants[\2] = &\1, true);", source, flags=re.MULTILINE)  # fmt: skip
    source = re.sub(r"^( +)threadgroup (\w+ +\w+\[.*\];)", r"\1EMU_SHARED \2", source, flags=re.MULTILINE)
    table = []

    def kernel(found: re.Match[str]) -> str:
        values, index = [], 0
        for part in re.split(r",(?![^\[]*\]\])", found.group(2)):
            value, index = argument(part, index)
            values.append(value)
        table.append((found.group(1), f"{found.group(1)}({', '.join(values)})"))
        parameters = re.sub(r"\[\[.*?\]\]", "", found.group(2))
        return f"static void {found.group(1)}({parameters}) {{"

    source = re.sub(r"^kernel void (\w+)\((.*?)\) \{", kernel, source, flags=re.MULTILINE | re.DOTALL)
    calls = "".join(f'    {{ "{name}", [](machine & m) {{ {call}; }} }},\n' for name, call in table)
    return f"{source}\nnamespace emu {{ const entry kernels[] = {{\n{calls}    {{ nullptr, nullptr }} }}; }}\n"


def flatten(path: Path, include: Sequence[Path], seen: set[Path]) -> str:
    """A source with the files that it includes by quoted names."""
    if path.resolve() in seen:
        return ""
    seen.add(path.resolve())

    def inline(found: re.Match[str]) -> str:
        for directory in (path.parent, *include):
            if (directory / found.group(1)).is_file():
                return flatten(directory / found.group(1), include, seen)
        raise EmulatorError(f"{path}: no {found.group(1)} in {[str(d) for d in include]}")

    text = re.sub(r"^#pragma once\n|^#include <metal_stdlib>\n", "", path.read_text(), flags=re.MULTILINE)
    return re.sub(r'^#include "(.*?)"\n', inline, text, flags=re.MULTILINE)


class Library:
    def __init__(self, path: Path) -> None:
        self.lib = ctypes.CDLL(str(path))
        self.lib.emu_run.restype = ctypes.c_char_p

    def run(self, name: str, grid: Sequence[int], threads: int, buffers: Mapping[int, int], regions: Sequence[tuple[int, int]],
            threadgroup_bytes: int = 0, constants: Mapping[int, int] = {}, schedule: int = 0) -> dict[str, int]:  # fmt: skip
        """buffers: address by index. regions: (address, bytes) of all memory that the kernel may touch. Returns counters."""
        addresses = (ctypes.c_void_p * 32)(*[buffers.get(i) for i in range(32)])
        ranges = (ctypes.c_uint64 * (2 * len(regions)))(*[x for address, n in regions for x in (address, address + n)])
        values = (ctypes.c_int * (2 * len(constants)))(*[x for pair in constants.items() for x in pair])
        counters = (ctypes.c_uint64 * len(COUNTERS))()
        error = self.lib.emu_run(name.encode(), (ctypes.c_uint * 3)(*grid), threads, addresses, ranges, len(regions),
                                 ctypes.c_size_t(threadgroup_bytes), values, len(constants), schedule, counters)  # fmt: skip
        if error:
            raise EmulatorError(f"{name}: {error.decode()}")
        return dict(zip(COUNTERS, counters))


def load(source: str, cache: Path) -> Library:
    """Compiles flattened Metal source text."""
    text = f'#include "metal_emulator.h"\n#include "metal_emulator.cpp"\n{QUALIFIERS}{translate(source)}'
    headers = "".join((HERE / name).read_text() for name in ("metal_emulator.h", "metal_emulator.cpp"))
    key = hashlib.sha256((headers + text).encode()).hexdigest()[:16]
    built = cache / f"metal-{key}.so"
    if not built.exists():
        cache.mkdir(parents=True, exist_ok=True)
        cpp = built.with_suffix(".cpp")
        cpp.write_text(text)
        command = ["clang++", "-std=c++17", "-O1", "-mf16c", "-mfma", "-ffp-contract=off", "-w", "-shared", "-fPIC", "-fsanitize-coverage=func,trace-pc-guard,trace-loads,trace-stores",
                   "-I", str(HERE), "-o", f"{built}.tmp", str(cpp)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise EmulatorError(done.stderr[-6000:])
        Path(f"{built}.tmp").rename(built)
    return Library(built)
