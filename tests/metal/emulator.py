"""Metal kernels on the CPU: their sources as C++, run by machine.cpp behind the standard library of metal_stdlib. Needs clang++.

    text    = flatten(Path("kernels.metal"), [directories of includes], set())
    library = load(text, cache, kernels=r"kernel_.*_dk64")
    counts  = library.run("kernel_name", (x, y, z), threads, {index: address}, [(address, bytes), ...], {0: bytes}, {constant: value})

`grid` is in threadgroups, `threads` a number or three. Several buffers may be parts of one region, a region is all of a buffer that
the host gives; a kernel writes only to regions of arguments that it declares so. `schedule` is the order of threads and threadgroups:
0 forward, 1 backward, another number is the seed of a random one. A right kernel gives the same in all of them.

An EmulatorError is what a GPU would not report: a load or store outside of the given memory or misaligned, threadgroup memory that is
read before it is written, a race (two threads touch the same byte, one writes, and no barrier of their scope for that memory is between),
a barrier or simdgroup function that not all threads reach. Threadgroup memory is NaN at first.

What is counted: COUNTERS. Loads and stores are those of threads after optimization, to device memory unless named otherwise; matrix and
simd count once for a simdgroup, barriers for their scope; constant loads are those of tables, and of function constants that are not
baked. Operations are of lanes: fma is 2, a function of the library (exp) 1 call; conversions and addresses are none. The 512 multiply-adds of a matrix operation are not among them.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
COUNTERS = (
    "load_bytes", "store_bytes", "loads", "stores", "constant_loads", "threadgroup_loads", "threadgroup_stores", "threadgroup_bytes",
    "matrix", "simd", "barriers", "float_operations", "integer_operations", "calls",
)  # fmt: skip

# of a kernel's arguments; emu_builtin in machine.cpp knows the builtin ones, buffers are their index, threadgroup memory its index + 100
KINDS = {
    "threadgroup_position_in_grid": -1,
    "threadgroups_per_grid": -2,
    "thread_position_in_threadgroup": -3,
    "threads_per_threadgroup": -4,
    "thread_position_in_grid": -5,
    "thread_index_in_threadgroup": -6,
    "thread_index_in_simdgroup": -7,
    "simdgroup_index_in_threadgroup": -8,
    "simdgroups_per_threadgroup": -9,
    "threads_per_simdgroup": -10,
    "threads_per_grid": -11,
}

METAL = ["-x", "c++", "-std=c++14", "-nostdinc", "-D__METAL_VERSION__=320", "-D__METAL__", "-I", str(HERE)]
COMPILE = [
    "-O2", "-fPIC", "-mf16c", "-fno-exceptions", "-fno-math-errno", "-ffp-contract=off", "-fno-vectorize", "-fno-slp-vectorize", "-gline-tables-only",
    "-Xclang", "-fnative-half-type", "-Wno-everything", "-Werror=c++17-extensions", "-Werror=c++20-extensions",
    "-mllvm", "-disable-vector-combine", "-fsanitize=thread", "-mllvm", "-tsan-instrument-func-entry-exit=0", "-mllvm", "-tsan-instrument-read-before-write", "-ferror-limit=10",
]  # fmt: skip


class EmulatorError(Exception):
    pass


def missing() -> str:
    """Why nothing can be run here, or nothing."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the Metal emulator runs on Linux on x86-64 only"
    return "" if shutil.which("clang++") else "no clang++: install clang to run Metal kernels in the emulator (Debian: apt install clang)"


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

    text = re.sub(r"^#pragma once\n", "", path.read_text(), flags=re.MULTILINE)
    return re.sub(r'^#include "(.*?)"[^\n]*\n', inline, text, flags=re.MULTILINE)


def split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([{<") - (c in ")]}>")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def kinds(parameters: str, kernel: str) -> list[int]:
    """Kinds of a kernel's parameters, then the bits of the buffers that it may write."""
    result, written = [], 0
    for parameter in split(parameters):
        attribute = re.search(r"\[\[\s*(\w+)\s*(?:\((.*?)\))?\s*\]\]", parameter)
        name = attribute.group(1) if attribute else "buffer"
        if name == "threadgroup":
            result.append(100 + int(attribute.group(2)))
        elif name in KINDS:
            result.append(KINDS[name])
        elif name == "buffer" and re.search(r"\b(device|constant)\b", parameter) and re.search(r"[*&]", parameter):
            index = int(attribute.group(2)) if attribute else next(i for i in range(31) if i not in result)
            if index in result:
                raise EmulatorError(f"{kernel}: two arguments are buffer {index}")
            result.append(index)
            written |= (not re.search(r"\b(const|constant)\b", parameter)) << index
        else:
            raise EmulatorError(f"{kernel}: cannot pass {parameter.strip()}")
    return [*result, written]


def translate(source: str, wanted: str, baked: Mapping[int, int]) -> str:
    """Preprocessed Metal as C++ for metal_stdlib: function constants, threadgroup arrays, kernels and attributes."""
    count = iter(range(1 << 20))

    def function_constant(found: re.Match[str]) -> str:
        type_, name, index = found.groups()
        if baked:
            return f"static constexpr {type_} {name} = ({type_}) emu_baked({index});"
        return f"static {type_} {name}; static emu::function_constant emu_{name}({index}, {name});"

    source = re.sub(r"^#pragma unroll.*", "#pragma unroll", source, flags=re.MULTILINE)  # its count is not preprocessed
    source = re.sub(r"\bconstant\s+(\w+)\s+(\w+)\s*\[\[\s*function_constant\((.*?)\)\s*\]\]\s*;", function_constant, source)

    def array(found: re.Match[str]) -> str:
        text = ""
        for declarator in split(found.group(2)):
            name, dimensions = re.fullmatch(r"\s*(\w+)\s*(.*)", declarator, re.DOTALL).groups()
            type_ = f"emu::array<{found.group(1)}{dimensions}>"
            text += f"{type_}::type & {name} = *({type_}::type *) emu_threadgroup({next(count)}, sizeof({type_}::type), alignof({type_}::type)); "
        return text

    source = re.sub(r"\bthreadgroup\s+(\w+)\s+(\w+\s*(?:\[[^;=]*)?);", array, source)

    table: dict[str, list[int]] = {}
    static: dict[str, str] = {}

    def definition(found: re.Match[str]) -> str:
        named, template, name, parameters = found.groups()
        table[name] = kinds(parameters, name)
        if not template:
            static[name] = re.search(r'"(.*?)"', named).group(1) if named else name
        return f"{template or ''} static void {name}({parameters}) {{"

    source = re.sub(
        r"(\[\[\s*host_name\s*\([^)]*\)\s*\]\]\s*)?(template\s*<[^;{}]*>\s*)?\bkernel\s+void\s+(\w+)\s*\(([^{};]*)\)\s*\{",
        definition,
        source,
    )

    registered = []

    def instance(found: re.Match[str]) -> str:
        host, name, arguments = found.groups()
        if name not in table:
            raise EmulatorError(f"{host}: no kernel {name} before it")
        if re.search(wanted, host):
            registered.append((host, name, f"{name}{arguments}"))
        return ""

    source = re.sub(r"\btemplate\s*\[\[\s*host_name\s*\(\s*\"(.*?)\"\s*\)\s*\]\]\s*kernel\s+\w+\s+(\w+)\s*(<[^;]*>)\s*;", instance, source)
    registered += [(host, name, name) for name, host in static.items() if re.search(wanted, host)]
    source = re.sub(r"\[\[[^\[\]]*\]\]", "", source)
    constants = "".join(f"i == {index} ? {value} : " for index, value in baked.items())
    text = f"#include <metal_stdlib>\nconstexpr int emu_baked(int i) {{ return {constants}0; }}\n{source}\n"
    for i, (host, name, value) in enumerate(registered):
        text += f"static const int emu_kinds_{i}[] = {{ {', '.join(map(str, table[name]))} }};\n"
        text += f'static emu::kernel emu_kernel_{i}("{host}", {value}, emu_kinds_{i});\n'
    if not registered:
        raise EmulatorError(f"no kernel is named {wanted}")
    return text


def count_operations(ir: str) -> str:
    """LLVM IR whose basic blocks add what they compute to emu_operations; not those of the standard library's namespace emu."""
    array = "[4 x i64]"
    counter, of = ("ptr", "ptr") if re.search(r"\bptr\b", ir) else ("i64*", f"{array}*")  # clang 14 has typed pointers
    n = iter(range(1 << 30))
    floats = re.compile(
        r"= (?:(?:fadd|fsub|fmul|fdiv|fcmp)\b|(?:tail )?call (?=.*@llvm\.(?:minnum|maxnum|fabs|floor|ceil|round|rint|trunc)\.))[^<%]*(?:<(\d+) x)?"
    )
    integers = re.compile(r"= (?:add|sub|mul|udiv|sdiv|urem|srem|shl|lshr|ashr|and|or|xor|icmp|select)\b[^<%]*(?:<(\d+) x)?"
                          r"|= (?:tail )?call (?=.*@llvm\.(?:smin|smax|umin|umax|abs|ctpop|ctlz|cttz|bitreverse|fshl|fshr)\.)")  # fmt: skip
    tables = set(re.findall(r"^@([\w.]+) = .*\bconstant \[", ir, re.MULTILINE))
    address = re.compile(r"(%[\w.]+) = getelementptr .*@([\w.]+),")
    load_ = re.compile(r"= load .*, \S+ (%[\w.]+), align")
    constant: set[str] = set()  # addresses in tables, of the function
    call = re.compile(r"= (?:tail )?call .*@(?:llvm\.)?(fma|fmuladd|exp|exp2|log|log2|sqrt|sin|cos|tanh|pow)f?(?:\.v(\d+)f\d+|\.f\d+)?\(")

    def add(counts: list[int]) -> list[str]:
        lines = []
        for k, c in enumerate(counts):
            if c:
                i = next(n)
                at = f"{counter} getelementptr inbounds ({array}, {of} @emu_operations, i64 0, i64 {k})"
                lines += [f"  %emu{i} = load i64, {at}", f"  %emuadd{i} = add i64 %emu{i}, {c}", f"  store i64 %emuadd{i}, {at}"]
        return lines

    out: list[str] = []
    block: list[str] = []
    counts = [0, 0, 0, 0]
    inside = False

    def flush() -> None:
        k = next((k for k, line in enumerate(block) if " = phi " not in line), len(block))
        out.extend([*block[:k], *add(counts), *block[k:]])
        block.clear()
        counts[:] = [0, 0, 0, 0]

    for line in ir.splitlines():
        if line.startswith("define "):
            inside = not re.search(r"@_ZNK?3emu", line)
            constant.clear()
            out.append(line)
        elif line.startswith("}"):
            flush()
            out.append(line)
            inside = False
        elif not inside:
            out.append(line)
        elif re.match(r'[\w."$-]+:', line) or not line:
            flush()
            out.append(line)
        else:
            block.append(line)
            if (found := address.search(line)) and found.group(2) in tables:
                constant.add(found.group(1))  # its loads are not given to access() of machine.cpp
            elif found := load_.search(line):
                counts[3] += found.group(1) in constant
            elif found := floats.search(line):
                counts[0] += int(found.group(1) or 1)
            elif found := integers.search(line):
                counts[1] += int(found.group(1) or 1)
            elif found := call.search(line):
                lanes = int(found.group(2) or 1)
                counts[0 if found.group(1).startswith("fm") else 2] += lanes * (2 if found.group(1).startswith("fm") else 1)
    return "\n".join(out) + f"\n@emu_operations = external global {array}\n"


def run_clang(arguments: Sequence[str | Path], text: str | None = None) -> str:
    done = subprocess.run(["clang++", *map(str, arguments)], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmulatorError(done.stderr[:6000])
    return done.stdout


class Library:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.lib = ctypes.CDLL(str(path))

    def run(self, name: str, grid: Sequence[int], threads: int | Sequence[int], buffers: Mapping[int, int], regions: Sequence[tuple[int, int]],
            threadgroup_bytes: int | Mapping[int, int] = 0, constants: Mapping[int, int] = {}, schedule: int = 0, lockstep: bool = False) -> dict[str, int]:  # fmt: skip
        """buffers: address by index. regions: (address, bytes) of all memory that the kernel may touch. lockstep: a
        simdgroup runs as if it had one program counter, and races within it are none. Returns COUNTERS."""
        shape = (threads, 1, 1) if isinstance(threads, int) else threads
        sizes = {0: threadgroup_bytes} if isinstance(threadgroup_bytes, int) else threadgroup_bytes

        def pairs(values: Mapping[int, int]) -> ctypes.Array[ctypes.c_int64]:
            return (ctypes.c_int64 * (2 * len(values) + 1))(*[x for pair in values.items() for x in pair], -1)

        counters = (ctypes.c_uint64 * len(COUNTERS))()
        error, at = ctypes.create_string_buffer(1024), ctypes.c_uint64()
        ranges = (ctypes.c_uint64 * (2 * len(regions)))(*[x for address, n in regions for x in (address, address + n)])
        self.lib.emu_run(name.encode(), (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*shape), (ctypes.c_void_p * 32)(*[buffers.get(i) for i in range(32)]),
                         ranges, len(regions), pairs(sizes), pairs(constants), schedule, lockstep, counters, error, ctypes.byref(at))  # fmt: skip
        if error.value:
            raise EmulatorError(f"{name}: {error.value.decode()}{self.line(at.value)}")
        return dict(zip(COUNTERS, counters))

    def line(self, address: int) -> str:
        if not address or not shutil.which("addr2line"):
            return ""
        done = subprocess.run(["addr2line", "-e", self.path, hex(address - 1)], capture_output=True, text=True, check=False)
        return f", at {Path(done.stdout.strip()).name}"


def load(source: str, cache: Path, kernels: str = "", baked: Mapping[int, int] = {}) -> Library:
    """Compiles flattened Metal source text: kernels whose name contains a match of `kernels`, with function constants as compile-time
    constants if `baked` has some (the others are 0 then)."""
    headers = "".join((HERE / name).read_text() for name in ("metal_stdlib", "machine.cpp", "emulator.py"))
    key = hashlib.sha256("\0".join([headers, source, kernels, str(sorted(baked.items()))]).encode()).hexdigest()[:16]
    built = cache / f"metal-{key}.so"
    if built.exists():
        return Library(built)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:  # another process may build the same: what is made is moved to its place
        text, ir, code, library = (Path(scratch) / name for name in ("kernels.cpp", "kernels.ll", "kernels.o", "kernels.so"))
        text.write_text(translate(run_clang(["-E", "-DEMU_PREPROCESS", *METAL, "-"], source), kernels, baked))
        # half arguments: the option's name has changed
        version = int(run_clang(["-dumpversion"]).split(".")[0])
        half = "-fallow-half-arguments-and-returns" if version < 16 else "-fnative-half-arguments-and-returns"
        made = run_clang([*COMPILE, "-Xclang", half, *METAL, "-S", "-emit-llvm", "-o", "-", text])
        # clang before 15 takes it that the sanitizer's runtime replaces these
        ir.write_text(count_operations(re.sub(r"@(memcpy|memmove|memset)\(", r"@__tsan_\1(", made)))
        machine = cache / f"machine-{hashlib.sha256(headers.encode()).hexdigest()[:16]}.o"
        if not machine.exists():
            run_clang(["-std=c++17", "-O2", "-fPIC", "-c", "-o", Path(scratch) / "machine.o", HERE / "machine.cpp"])
            (Path(scratch) / "machine.o").rename(machine)
        run_clang(["-O2", "-fPIC", "-mf16c", "-w", "-c", "-Xclang", "-disable-llvm-passes", "-mllvm", "-disable-block-placement", "-o", code, ir])
        run_clang(["-shared", "-Wl,-Bsymbolic", "-o", library, code, machine])
        library.rename(built)
    return Library(built)
