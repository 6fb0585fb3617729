"""What only a Mac would report about the Metal kernels and their host code, as far as it can be known elsewhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_metal_kernels import CACHE, Cases, emulator, patched_tree, sources

ROOT = Path(__file__).resolve().parents[1]
HEADER = ROOT / "native" / "metal" / "seqkv-metal.h"
THREADGROUP_BYTES = 32 * 1024
SIZES = {"float": 4, "float2": 8, "float4": 16, "half": 2, "half2": 4, "half4": 8, "int": 4, "uint": 4, "uchar": 1}

# CMakeLists.txt of ggml-metal without Apple's frameworks; the assembler's part fails elsewhere, after the sources are written
PROJECT = """
cmake_minimum_required(VERSION 3.21)
project(embed C)
set(GGML_METAL_EMBED_LIBRARY ON)
foreach(name FOUNDATION_LIBRARY METAL_FRAMEWORK METALKIT_FRAMEWORK)
    set(${name} m)
endforeach()
file(WRITE ${CMAKE_BINARY_DIR}/empty.c "")
function(ggml_add_backend_library name)
    add_library(${name} STATIC ${CMAKE_BINARY_DIR}/empty.c)
endfunction()
add_subdirectory(${METAL} metal)
"""


@pytest.fixture(scope="module")
def tree() -> Path:
    """ggml of a tree with the Metal patch."""
    found = patched_tree()
    assert "ggml_metal_op_seqkv" in (found / "src" / "ggml-metal" / "ggml-metal-ops.cpp").read_text(), (
        f"{found}: run 'make build' for the Metal patch"
    )
    return found


@pytest.fixture(scope="module")
def cases(tree: Path) -> Cases:
    return Cases(tree)


@pytest.fixture(scope="module")
def kernels(tree: Path) -> dict[str, tuple[str, str]]:
    """Parameters and body of each kernel."""
    found = {}
    for text in sources(tree).values():
        for name, parameters, body in re.findall(r"^kernel void (\w+)\((.*?)\) \{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL):
            found[name] = (parameters, body)
    return found


def plans(cases: Cases) -> list[tuple[str, dict]]:
    """Launches of a selection of cases with the case's name: each head_dim, type and group once at least."""
    steps = []
    for i in [*range(0, len(cases.names), 3), *cases.select("SEQKV_STORE"), *cases.select("SEQKV_ATTN", n_tokens=2)]:
        handle = cases.lib.metal_open(i)
        steps += [(cases.names[i], step) for step in json.loads(cases.lib.metal_text(handle))["steps"]]
        cases.lib.metal_close(handle)
    return steps


def constants() -> dict[str, int]:
    """Numbers that the header defines."""
    return {
        name: eval(value) for name, value in re.findall(r"^#define (\w+)\s+([\d* ()]+?)\s*(?://.*)?$", HEADER.read_text(), re.MULTILINE)
    }


def enumerators(name: str) -> list[str]:
    body = re.search(rf"enum {name} {{(.*?)}};", HEADER.read_text(), re.DOTALL).group(1)
    return re.findall(r"\b(SEQKV_\w+)", re.sub(r"//.*", "", body))


def static_bytes(body: str) -> int:
    """Threadgroup arrays of a kernel."""
    total = 0
    for type_, names in re.findall(r"^    threadgroup (\w+)\s+(\w+\[.*\]);", body, re.MULTILINE):
        for declared in names.split(", "):
            n = SIZES[type_]
            for size in re.findall(r"\[(.*?)\]", declared):
                n *= eval(size.replace("/", "//"), constants())
            total += n
    return total


def test_host_and_kernels_agree(cases: Cases, kernels: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    """Every kernel that is asked for exists, takes as many buffers as it is given and arguments of that size; memory and threads are within limits."""
    structs = {}
    program = tmp_path / "sizes.cpp"
    names = sorted(set(re.findall(r"\} (ggml_metal_kargs_\w+);", HEADER.read_text())))
    program.write_text("#include <stdint.h>\n#include <stdio.h>\n" + f'#include "{HEADER}"\nint main() {{\n'
                       + "".join(f'printf("{n} %zu\\n", sizeof({n}));\n' for n in names) + "}\n")  # fmt: skip
    subprocess.run(["clang++", "-o", tmp_path / "sizes", program], check=True)
    for line in subprocess.run([tmp_path / "sizes"], capture_output=True, text=True, check=True).stdout.splitlines():
        name, size = line.split()
        structs[name] = int(size)

    seen = set()
    for case, step in plans(cases):
        assert step["kernel"] in kernels, case
        parameters, body = kernels[step["kernel"]]
        seen.add(step["kernel"])
        split = [p for p in re.split(r",(?![^\[]*\]\])", parameters) if "[[" not in p]
        struct = re.match(r"\s*constant (\w+) & args$", split[0]).group(1)
        assert structs[struct] == len(step["args"]), (case, step["kernel"])
        assert len(split) - 1 == len(step["buffers"]), (case, step["kernel"])
        assert all(re.match(r"\s*device ", p) for p in split[1:]), step["kernel"]
        assert bool(step["threadgroup_bytes"]) == ("[[threadgroup(0)]]" in parameters), step["kernel"]
        assert static_bytes(body) + step["threadgroup_bytes"] <= THREADGROUP_BYTES, (case, step["kernel"])
        assert step["threadgroup_bytes"] % 16 == 0
        assert 0 < step["threads"] <= 256 and step["threads"] % 32 == 0, (case, step["kernel"])
        assert all(0 < n < 2**31 for n in step["grid"]), (case, step["kernel"])
    assert seen == set(kernels)
    assert max(static_bytes(body) for _, body in kernels.values()) > 8192  # the arrays are found at all


def test_function_constants(tree: Path) -> None:
    text = "".join(sources(tree).values())
    used = re.findall(r"function_constant\(FC_SEQKV \+ (\w+)\)", text)
    assert set(used) == set(enumerators("seqkv_fc")) - {"SEQKV_FC_COUNT"}
    upstream = re.findall(r"^#define FC_\w+\s+(\d+)$", (tree / "src" / "ggml-metal" / "ggml-metal-impl.h").read_text(), re.MULTILINE)
    assert len(upstream) > 10 and constants()["FC_SEQKV"] - max(map(int, upstream)) >= 100


def test_only_metal_3(tree: Path) -> None:
    """Nothing of Metal 4, of C++ beyond what Metal has, and no types that GPUs do not have."""
    for name in ("seqkv_store.metal", "seqkv_attn.metal", "seqkv_common.h", "seqkv-metal.h"):
        text = re.sub(r"//.*", "", (ROOT / "native" / "metal" / name).read_text())
        for word in ("double", "bfloat", "tensor", "mpp", "goto", "virtual", "new", "delete", "throw", "try", "dynamic_cast", "std", "auto", "long", "size_t",
                     "simdgroup_async_copy", "atomic_float", "simd_shuffle_and_fill_up", "static_assert", "asm"):  # fmt: skip
            assert not re.search(rf"\b{word}\b", text), (name, word)
        assert "[&]" not in text and "[=]" not in text


def test_embedded_sources_compile(tree: Path, tmp_path: Path) -> None:
    """The sources as CMake writes them into the library hold no include of a file, and compile."""
    own = Path(sys.executable).with_name("cmake")
    cmake = str(own) if own.exists() else shutil.which("cmake")
    if not cmake:
        pytest.skip("no cmake: 'make build' installs it")
    (tmp_path / "CMakeLists.txt").write_text(PROJECT)
    build = tmp_path / "build"
    generator = ["-G", "Unix Makefiles"] if shutil.which("make") else []
    made = subprocess.run(
        [cmake, "-S", tmp_path, "-B", build, *generator, f"-DMETAL={tree / 'src' / 'ggml-metal'}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    subprocess.run([cmake, "--build", build, "--target", "ggml-metal", "--", "-k"], capture_output=True, check=False)
    listed = re.findall(r"X\(\w+, +(seqkv\w+)\)", (tree / "src" / "ggml-metal" / "ggml-metal-device.m").read_text())
    assert [f"{name}.metal" for name in listed] == ["seqkv_store.metal", "seqkv_attn.metal"]
    for name in listed:
        text = (build / "metal" / "autogenerated" / f"ggml-metal-embed-{name}.metal").read_text()
        assert not re.search(r'^\s*#include "', text, re.MULTILINE), name
        emulator.load(text, CACHE)


@pytest.mark.parametrize("name", ["ggml-metal-ops.cpp", "ggml-metal.cpp", "../seqkv/metal/seqkv-metal-plan.cpp"])
def test_host_code_compiles(tree: Path, name: str) -> None:
    metal = tree / "src" / "ggml-metal"
    # memory: upstream gets it through another header with Apple's library
    done = subprocess.run(["clang++", "-std=c++17", "-fsyntax-only", "-w", "-include", "memory", "-I", tree / "include", "-I", tree / "src", "-I", metal, metal / name],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_supports_op_is_exact(cases: Cases, tree: Path) -> None:
    supports = cases.lib.metal_supports
    uniform, graded = [[f"seqkv{bits}{plan}".encode() for bits in (1, 2, 3, 4)] for plan in ("", "k")]
    values = [*uniform, b"f32", b"f16", b"bf16", b"q8_0", b"q5_1", b"q5_0", b"q4_1", b"q4_0", b"iq4_nl"]
    for type_ in values + graded:
        assert supports(type_, 0, None, 128, 0) and supports(type_, 1, None, 0, 256) == (type_ in values), type_
        assert all(supports(type_, 0, type_v, 64, 256) for type_v in values), type_
        assert not any(supports(type_, 0, type_v, 64, 256) for type_v in graded), type_
    for type_ in (b"q4_K", b"q2_K", b"i32", b"tq2_0", b"iq4_xs", b"mxfp4"):
        assert not supports(type_, 0, None, 128, 128), type_
        assert not supports(type_, 0, b"seqkv3", 128, 128) and not supports(b"seqkv3", 0, type_, 128, 128), type_
    for d in (32, 80, 96, 192, 512):
        assert not supports(b"seqkv3", 0, None, d, 128) and not supports(b"seqkv3", 1, None, 128, d)
        assert not supports(b"seqkv3", 0, b"seqkv3", d, 128) and not supports(b"seqkv3", 0, b"seqkv3", 128, d)
    # upstream says yes to any type there
    device = (tree / "src" / "ggml-metal" / "ggml-metal-device.m").read_text()
    assert len(re.findall(r"ggml_seqkv_bits\(op->src\[0\]->type\)", device)) == 2
