"""The CPU ops of instruction sets other than this machine's: each is built in build/instruction-sets/ and run against the oracle.

x86-64 sets run all cases where the CPU has them. aarch64 is cross-compiled and runs in an emulator: correctness, not speed. Nothing in
native/cpu depends on extensions of armv8-a (dotprod, i8mm, SVE), so the baseline stands for all of them.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import backend_ops
import pytest

ROOT = Path(__file__).resolve().parents[1]
X86 = ("SSE42", "AVX", "F16C", "FMA", "AVX2", "BMI2", "AVX512")
CROSS = "aarch64-linux-gnu"

# For the emulator, which is 30 times slower: one and three tokens, 75 (prefill), every type of K and of V, head_dim 64, 128 and
# 256, groups of 1 to 64, cells in and out of order, with and without profile.
FEWER = "|".join((
    "n_tokens=7,",  # FRAME
    "dk=64,.*n_tokens=33,",  # STORE
    "n_kv=192,.*n_tokens=1,",
    "n_kv=512,.*n_tokens=(1,n_stream=1,order=1|3,n_stream=1,order=2)",
    "n_tokens=2,",
    "(dk=64,|type_v=seqkv3,).*n_tokens=75,n_stream=1,order=1",
))
FEWER_CASES = {"SEQKV_FRAME": 6, "SEQKV_STORE": 40, "SEQKV_ATTN": 70}


@dataclass(frozen=True)
class Set:
    """An instruction set: what ggml is told to use, and flags of /proc/cpuinfo that running it takes."""

    name: str
    features: tuple[str, ...]
    flags: frozenset[str]


SETS = (
    Set("sse42", ("SSE42",), frozenset({"sse4_2"})),
    Set("avx2", X86[:-1], frozenset({"avx2", "fma", "f16c", "bmi2"})),
    Set("avx512", X86, frozenset({"avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"})),  # without VBMI, VNNI
)


def build(name: str, *options: str) -> Path:
    """test-backend-ops with these options; the patched llama.cpp, compiler and build tool are those of this environment's build."""
    main = backend_ops.build_directory()
    cache = dict(re.findall(r"^(\w+):\w+=(.*)$", (main / "CMakeCache.txt").read_text(), re.MULTILINE))
    directory = ROOT / "build" / "instruction-sets" / name
    tool = cache.get("CMAKE_MAKE_PROGRAM")
    backend_ops.cmake(
        *("-S", ROOT, "-B", directory, "-G", cache["CMAKE_GENERATOR"], f"-DPython_EXECUTABLE={sys.executable}"),
        f"-DSEQKV_LLAMA_TREE={cache.get('SEQKV_LLAMA_TREE') or main / 'llama.cpp'}",
        *([f"-DCMAKE_MAKE_PROGRAM={tool}"] if tool else []),
        *("-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_ALL_WARNINGS=OFF", "-DGGML_NATIVE=OFF", *options),
    )
    return backend_ops.build(directory)


@pytest.mark.parametrize("isa", SETS, ids=lambda isa: isa.name)
def test_x86(isa: Set) -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not cpuinfo.exists():
        pytest.skip(f"needs Linux on x86-64; this is {platform.system()} on {platform.machine()}")
    binary = build(isa.name, *(f"-DGGML_{x}={'ON' if x in isa.features else 'OFF'}" for x in X86))
    missing = isa.flags - set(cpuinfo.read_text().split())
    if missing:
        pytest.skip(f"compiled but not run: this CPU has no {', '.join(sorted(missing))}")
    backend_ops.run([binary], backend_ops.CASES)


def test_neon(monkeypatch: pytest.MonkeyPatch) -> None:
    if platform.machine() in ("aarch64", "arm64"):
        pytest.skip("test_backend_ops.py runs NEON code on this machine")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if not shutil.which(f"{CROSS}-g++") or not emulator:
        pytest.skip(f"needs {CROSS}-g++ and qemu-aarch64 (Debian: apt install g++-{CROSS} qemu-user)")
    binary = build(
        "neon",
        *("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DGGML_CPU_ARM_ARCH=armv8-a"),
        *(f"-DCMAKE_C_COMPILER={CROSS}-gcc", f"-DCMAKE_CXX_COMPILER={CROSS}-g++"),
    )
    if not os.environ.get("QEMU_LD_PREFIX"):
        monkeypatch.setenv("QEMU_LD_PREFIX", f"/usr/{CROSS}")  # Debian's libraries of the cross compiler
    backend_ops.run([emulator, binary], FEWER_CASES, FEWER)
