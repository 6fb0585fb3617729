"""CUDA's decode kernel for long contexts, compiled for the CPU (tests/cuda/): its sums, its barriers and copies, for three generations of GPUs. Exact rows too.
On a GPU the cases of test-backend-ops with many streams and KV heads reach it; the others go to the kernel for short contexts."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "native" / "cuda"
IN_ORDER, SHIFTED, SCRAMBLED, GAPS = range(4)


def without(text: str, begin: str, end: str) -> str:
    """Everything but what lies from begin to end (exclusive); both must be there."""
    at = text.index(begin)
    return text[:at] + (text[text.index(end, at) :] if end else "")


def build(where: Path, arch: int, broken: tuple[str, str] | None = None) -> Path:
    """The emulated kernel for a compute capability (times 100); broken: a piece of its text and what to put in its place."""
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("no g++")
    found = list((ROOT / "build").glob("*/llama.cpp/ggml/include/ggml.h"))
    if not found:
        pytest.skip("no patched tree under build/: 'make test' makes one")
    for name in ("seqkv-attn.cuh", "seqkv-unpack.cuh", "seqkv-decode.cuh"):
        shutil.copy(CUDA / name, where)
    for name in ("machine.h", "seqkv-mma.cuh", "decode.cpp"):
        shutil.copy(ROOT / "tests" / "cuda" / name, where)
    common = (CUDA / "seqkv-common.cuh").read_text()
    for old, new in (("seqkv-cuda.cuh", "machine.h"), ("../ggml-seqkv.h", str(ROOT / "native/ggml-seqkv.h")), ("../decode.h", str(ROOT / "native/decode.h"))):  # fmt: skip
        assert f'#include "{old}"' in common
        common = common.replace(f'#include "{old}"', f'#include "{new}"')
    (where / "seqkv-common.cuh").write_text(common)
    cells = without((CUDA / "seqkv-cells.cuh").read_text(), "// value i of a head of another type", "// N words of shared memory")
    (where / "seqkv-cells.cuh").write_text(cells.replace('#include "../../ggml-cuda/dequantize.cuh"\n', ""))
    kernels = without((CUDA / "seqkv-decode-kernels.cuh").read_text(), "template <int D, bool DENSE>\nstatic void launch_queries", "")
    for kind, name in (("char", "smem_raw"), ("half", "smem_h")):
        old = f"extern __shared__ __align__(16) {kind} {name}[];"
        assert kernels.count(old) == 1
        kernels = kernels.replace(old, f"{kind} * {name} = ({kind} *) shared_memory;")
    if broken:
        assert kernels.count(broken[0]) == 1
        kernels = kernels.replace(*broken)
    (where / "seqkv-decode-kernels.cuh").write_text(kernels)
    program = where / f"decode-{arch}"
    command = [compiler, "-std=c++17", "-O1", "-w", f"-DARCH={arch}", "-I", str(where), "-I", str(found[0].parent), "-o", str(program), str(where / "decode.cpp")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return program


def run(program: Path, *orders: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *map(str, orders)], capture_output=True, text=True, check=False, timeout=600)


def test_decode_kernel(tmp_path: Path) -> None:
    done = run(build(tmp_path, 900), GAPS)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count("NMSE") == 19 and done.stdout.count("exact rows") == 5
    assert {way for line in done.stdout.splitlines() if "whole " in line for way in line.split("whole ")[1].split(":")[0].split()} == {"0", "1"}, "not every way of copying"  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("arch", [900, 800, 750])
def test_decode_kernel_in_all_orders(tmp_path: Path, arch: int) -> None:
    done = run(build(tmp_path, arch), IN_ORDER, SHIFTED, SCRAMBLED, GAPS)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken",
    [
        ("        wait_for(3);\n", ""),  # values are read before they are there
        ("        done_with(3);\n", ""),
        ("        fill(1, tile + plan.teams, false, turn_k);\n", ""),  # and waited for in vain
        ("seen = next_meta[i] < 0 ? 0 : seen;", ""),  # cells without a token
        ("l[n] = l[n]*f_old[n] + sum;", "l[n] += sum;"),
        ("w[0] = odd ? got : own_word;", "w[0] = own_word;"),  # a query's upper digits where lower ones belong
        ("part < parts.n_parts - parts.n_z; part += parts.n_z", "part < parts.n_parts - parts.n_z; part += 2*parts.n_z"),  # exact rows left out
    ],
)
def test_a_broken_kernel_is_found(tmp_path: Path, broken: tuple[str, str]) -> None:
    assert run(build(tmp_path, 900, broken), SHIFTED, GAPS).returncode != 0
