"""The Metal kernels in the emulator of tests/metal/ against the scalar oracle, on the cases of native/tests/test-seqkv-ops.h.

What is launched is what the host launches (native/metal/seqkv-metal-plan.cpp). Outputs and scratch are NaN before, buffers as large
as the tensors are, and the order of the threads changes from case to case.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "metal"))

import emulator  # noqa: E402

CACHE = ROOT / "build" / "metal"
FC_SEQKV = 9000
SOURCES = ("seqkv_store.metal", "seqkv_attn.metal")


def patched_tree() -> Path:
    """ggml of a patched llama.cpp; skips without one, or where the emulator does not run."""
    if emulator.missing():
        pytest.skip(emulator.missing())
    found = sorted((ROOT / "build").glob("*/llama.cpp/ggml"))
    if not found:
        pytest.skip("no patched tree under build/: 'make test' makes one")
    return found[0]


def sources(tree: Path) -> dict[str, str]:
    """The kernels' sources with all that they include."""
    metal = tree / "src" / "ggml-metal"
    include = [ROOT / "native" / "metal", ROOT / "native", metal / "kernels", metal, metal.parent]
    return {name: emulator.flatten(ROOT / "native" / "metal" / name, include, set()) for name in SOURCES}


class Cases:
    """native/tests/test-seqkv-metal.cpp."""

    def __init__(self, tree: Path) -> None:
        CACHE.mkdir(parents=True, exist_ok=True)
        built = CACHE / f"cases-{os.getpid()}.so"  # not one that another process has
        libraries = ROOT / "seqkv_edge" / "lib"
        command = ["clang++", "-std=c++17", "-O1", "-shared", "-fPIC", "-o", built, ROOT / "native" / "tests" / "test-seqkv-metal.cpp",
                   ROOT / "native" / "metal" / "seqkv-metal-plan.cpp", "-I", tree / "include", "-I", tree / "src", "-L", libraries,
                   "-lggml-base", "-lggml-cpu", f"-Wl,-rpath,{libraries}"]  # fmt: skip
        done = subprocess.run([str(x) for x in command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        lib = self.lib = ctypes.CDLL(str(built))
        built.unlink()
        lib.metal_case.restype = lib.metal_text.restype = ctypes.c_char_p
        lib.metal_open.restype = ctypes.c_void_p
        lib.metal_error.restype = ctypes.c_double
        lib.metal_differs.restype = ctypes.c_int64
        lib.metal_supports.restype = ctypes.c_bool
        lib.metal_text.argtypes = lib.metal_close.argtypes = [ctypes.c_void_p]
        lib.metal_error.argtypes = lib.metal_differs.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self.names = [lib.metal_case(i).decode() for i in range(lib.metal_n_cases())]
        self.small = [i for i, name in enumerate(self.names)
                      if int(re.search(r"\bn_tokens=(\d+)", name).group(1)) < 1000 and int(re.search(r"\bn_stream=(\d+)", name).group(1)) < 4]  # fmt: skip
        """those that are emulated: the others are about an order of rows and a kernel that CUDA alone has"""

    def select(self, op: str, **at_most: int) -> list[int]:
        """Cases of an op whose parameters are not larger than given."""
        return [i for i in self.small
                if self.names[i].startswith(op) and all(int(re.search(rf"\b{k}=(\d+)", self.names[i]).group(1)) <= n for k, n in at_most.items())]  # fmt: skip

    def run(self, i: int, kernels: dict[str, emulator.Library], schedule: int) -> tuple[float, float, int, dict[str, dict[str, int]]]:
        """Error, the most that is allowed, bytes that differ, and counters by kernel."""
        handle = self.lib.metal_open(i)
        try:
            plan = json.loads(self.lib.metal_text(handle))
            assert plan["supported"] and plan["steps"], self.names[i]
            size = plan["bytes"] + plan["scratch"]
            memory = np.full(size + 32, 0xFF, np.uint8)
            memory = memory[-memory.ctypes.data % 32 :][:size]
            ctypes.memmove(memory.ctypes.data, plan["before"], plan["bytes"])
            tensors = [(memory.ctypes.data, size), *map(tuple, plan["tensors"][1:])]
            counters = {}
            for step in plan["steps"]:
                arguments = np.array(step["args"], np.uint8)
                buffers = {0: arguments.ctypes.data, **{k + 1: tensors[t][0] + at for k, (t, at) in enumerate(step["buffers"])}}
                regions = [(arguments.ctypes.data, arguments.size), *{tensors[t] for t, _ in step["buffers"]}]
                constants = {FC_SEQKV + k: value for k, value in enumerate(step["constants"])}
                counters[step["kernel"]] = kernels[step["kernel"]].run(
                    step["kernel"], step["grid"], step["threads"], buffers, regions, step["threadgroup_bytes"], constants, schedule)  # fmt: skip
            out = memory.ctypes.data
            return self.lib.metal_error(handle, out), plan["max_error"], self.lib.metal_differs(handle, out), counters
        finally:
            self.lib.metal_close(handle)

    def failures(self, selected: list[int], kernels: dict[str, emulator.Library], most: int | None = None) -> list[str]:
        """What went wrong, in words; each case with another order of the threads than the one before. most: bytes that may differ."""
        found = []
        for i in selected:
            try:
                error, allowed, differs, _ = self.run(i, kernels, schedule=i % 3)
                if not error <= allowed or (most is not None and differs > most):  # a NaN fails too
                    found.append(f"{self.names[i]}: error {error}, {differs} bytes differ")
            except emulator.EmulatorError as e:
                found.append(f"{self.names[i]}: {e}")
        return found


def compile_kernels(texts: dict[str, str]) -> dict[str, emulator.Library]:
    """The library of each kernel by its name."""
    return {name: library for text in texts.values() for library in [emulator.load(text, CACHE)]
            for name in re.findall(r"^kernel void (\w+)\(", text, re.MULTILINE)}  # fmt: skip


@pytest.fixture(scope="module")
def cases() -> Cases:
    return Cases(patched_tree())


@pytest.fixture(scope="module")
def kernels() -> Iterator[dict[str, emulator.Library]]:
    yield compile_kernels(sources(patched_tree()))


def test_frame(cases: Cases, kernels: dict[str, emulator.Library]) -> None:
    selected = cases.select("SEQKV_FRAME")
    assert len(selected) >= 6
    assert not cases.failures(selected, kernels)


def test_store(cases: Cases, kernels: dict[str, emulator.Library]) -> None:
    """The oracle's bytes, of the cells that are left alone too."""
    selected = [i for i in cases.select("SEQKV_STORE") if "type_k=seqkv" in cases.names[i]]
    assert len(selected) >= 72
    assert not cases.failures(selected[::3], kernels, most=0)


def test_store_of_other_types(cases: Cases, kernels: dict[str, emulator.Library]) -> None:
    selected = [i for i in cases.select("SEQKV_STORE") if "type_k=seqkv" not in cases.names[i]]
    assert len(selected) >= 18
    assert not cases.failures(selected, kernels, most=1)  # a level's edge: where the compiler fuses additions into products depends on the CPU


def test_decode(cases: Cases, kernels: dict[str, emulator.Library]) -> None:
    selected = cases.select("SEQKV_ATTN", n_tokens=8)
    assert len(selected) >= 150
    assert not cases.failures(selected[::2], kernels)


def test_prefill(cases: Cases, kernels: dict[str, emulator.Library]) -> None:
    selected = sorted(set(cases.select("SEQKV_ATTN")) - set(cases.select("SEQKV_ATTN", n_tokens=8)))
    assert len(selected) >= 150
    assert not cases.failures(selected[::6], kernels)


@pytest.mark.slow
def test_every_order_of_threads(cases: Cases, kernels: dict[str, emulator.Library]) -> None:
    for i in cases.small:
        for schedule in (0, 1, 5):
            error, allowed, _, _ = cases.run(i, kernels, schedule)
            assert error <= allowed, (cases.names[i], schedule)


# what is wrong, the text that it replaces, by what, and the cases that have to show it
MUTANTS = [
    ("index: the trellis path one value late", "u << 3 & ~(7*start)", "u << 4 & ~(7*start)", ("SEQKV_ATTN", 1)),
    ("barrier: between the steps of the Hadamard transform", "    for (int h = 1; h < d; h *= 2) {\n        threadgroup_barrier(mem_flags::mem_threadgroup);",
     "    for (int h = 1; h < d; h *= 2) {", ("SEQKV_STORE", 33)),
    ("barrier: before the probabilities are read", "        simdgroup_barrier(mem_flags::mem_threadgroup);\n\n        FOR_UNROLL (int r = 0; r < ROWS; ++r) {\n            if (simd_shuffle",
     "        FOR_UNROLL (int r = 0; r < ROWS; ++r) {\n            if (simd_shuffle", ("SEQKV_ATTN", 1)),
    ("barrier: of the simdgroup only, before the predictions are read", "            threadgroup_barrier(mem_flags::mem_threadgroup);\n        }\n        const int  j ",
     "            simdgroup_barrier(mem_flags::mem_threadgroup);\n        }\n        const int  j ", ("SEQKV_ATTN", 1)),
    ("codebook: one level", "-127,  -93,  -70,", "-127,  -92,  -70,", ("SEQKV_ATTN", 1)),
    ("range: a row too many", "min(begin + a.part_rows, exact ? a.n_virt : a.n_kv)", "min(begin + a.part_rows, exact ? a.n_virt + 1 : a.n_kv)",
     ("SEQKV_ATTN", 1)),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "shown_by"), [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS])
def test_broken_kernels_are_caught(cases: Cases, old: str, new: str, shown_by: tuple[str, int]) -> None:
    texts = sources(patched_tree())
    assert any(text.count(old) == 1 for text in texts.values())
    broken = compile_kernels({name: text.replace(old, new) for name, text in texts.items()})
    op, n_tokens = shown_by
    selected = [
        i for i in cases.select(op, n_tokens=n_tokens) if re.search("type_k=seqkv3k?,type_v=seqkv3,|type_v=f16,dk=128", cases.names[i])
    ]
    assert cases.failures(selected[:8], broken)
