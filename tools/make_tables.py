#!/usr/bin/env python3
"""Write native/tables.h: the levels of the trellis quantizers, their scales, the encoder's tables and the gain tables.

A quantizer of B bits is trellis-coded (Marcellin and Fischer 1990, "Trellis coded quantization of memoryless and
Gauss-Markov sources"): 2**(B+1) levels in four interleaved subsets, level l in subset l % 4; one bit a value
walks Ungerboeck's 8-state trellis (parity polynomials 13 and 04, octal) that selects the subset, the other B-1 bits pick
the level in it. Levels are trained on the unit Gaussian like a Lloyd-Max quantizer, with the trellis search in place
of the nearest level, and rounded to int8.

    python tools/make_tables.py            # rewrite native/tables.h
    python tools/make_tables.py --print    # print it instead
    python tools/make_tables.py --errors   # mean squared errors of the quantizers on the training data
"""

from __future__ import annotations

import argparse
import functools
import math
import pathlib
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_BITS = 6
RUN = 64  # values of one trellis run
RUNS = 4000
ROUNDS = 15
TOP = 127  # largest level

GAIN_STEPS, GAIN_BIAS = 4, 128  # uniform blocks: 2**((g - 128)/4), g = 1..255
GRADED_STEPS, GRADED_BIAS = 3, 12  # graded blocks: 2**((g - 12)/3), g = 1..31

Floats = NDArray[np.float64]


class Quantizer(NamedTuple):
    """Trellis quantizer of the unit Gaussian: x ~ scale * levels[l], with mean squared error mse."""

    levels: NDArray[np.int64]  # (2**(B+1),) ascending, symmetric, -127..127
    scale: float  # least squares
    mse: float


def first_levels(n: int) -> Floats:
    """n ascending levels to begin with: the density of the Lloyd-Max levels at high rate (Panter and Dite 1951), pdf**(1/3),
    drawn in, since a trellis needs its outermost levels less often."""
    wide = NormalDist(sigma=0.85 * math.sqrt(3))
    return np.array([wide.inv_cdf((i + 0.5) / n) for i in range(n)])


def samples() -> Floats:
    """(RUN, RUNS) unit Gaussians, each column one run; the generator's stream is frozen by NumPy."""
    return np.random.RandomState(20).standard_normal((RUN, RUNS))


def search(x: Floats, levels: Floats) -> NDArray[np.int64]:
    """Level indices (n, runs) of the trellis paths nearest to the columns of x (n, runs), by the Viterbi algorithm."""
    n, runs = x.shape
    # nearest level of each subset: index and squared distance, (n, 4, runs)
    index = np.empty((n, 4, runs), dtype=np.int64)
    for d in range(4):
        subset = levels[d::4]
        index[:, d] = 4 * np.searchsorted((subset[1:] + subset[:-1]) / 2, x) + d
    distance = (x[:, None, :] - levels[index]) ** 2
    # state: the last three path bits, u_(i-1) | u_(i-2) << 1 | u_(i-3) << 2
    cost = np.full((8, runs), np.inf)
    cost[0] = 0
    taken = np.empty((n, 8, runs), dtype=bool)  # the older of the two predecessors' third bits
    new = np.arange(8)
    older = [new >> 1, new >> 1 | 4]
    subset_of = [(new >> 2 & 1) | ((new ^ new >> 1 ^ u3) & 1) << 1 for u3 in (0, 1)]
    for i in range(n):
        a, b = (cost[older[u3]] + distance[i][subset_of[u3]] for u3 in (0, 1))
        taken[i] = b < a
        cost = np.where(taken[i], b, a)
    state, column = cost.argmin(axis=0), np.arange(runs)
    path = np.empty((n, runs), dtype=np.int64)
    for i in reversed(range(n)):
        u3 = taken[i, state, column].astype(np.int64)
        path[i] = index[i, (state >> 2 & 1) | ((state ^ state >> 1 ^ u3) & 1) << 1, column]
        state = state >> 1 | u3 << 2
    return path


def to_int8(levels: Floats) -> NDArray[np.int64]:
    """Levels scaled to a largest of TOP and rounded, kept apart where they round to the same number."""
    half = np.rint(levels[len(levels) // 2 :] * (TOP / levels[-1])).astype(np.int64)
    for i in range(len(half)):
        half[i] = max(half[i], half[i - 1] + 1 if i else 1)
    return np.concatenate([-half[::-1], half])


@functools.lru_cache(maxsize=None)
def quantizer(bits: int) -> Quantizer:
    """The quantizer of values with this many bits, 1..6."""
    x = samples()
    levels = first_levels(2 ** (bits + 1))
    for _ in range(ROUNDS):
        path = search(x, levels).ravel()
        count = np.bincount(path, minlength=len(levels))
        total = np.bincount(path, x.ravel(), minlength=len(levels))
        # symmetrised; a level without samples stays
        count, total = count + count[::-1], total - total[::-1]
        levels = np.where(count > 0, total / np.maximum(count, 1), levels)
    table = to_int8(levels)
    if table[-1] != TOP or not np.all(np.diff(table) > 0):
        raise ValueError(f"the levels of {bits} bits do not fit into int8: {table}")
    scale = levels[-1] / TOP
    for _ in range(3):  # the scale fits the paths, the paths the scale
        y = table[search(x, table * scale)]
        scale = float(np.sum(x * y) / np.sum(y * y))
    return Quantizer(table, scale, float(np.mean((x - scale * table[search(x, table * scale)]) ** 2)))


def nearest(levels: NDArray[np.int64]) -> list[int]:
    """For t in [(k-256)/2, (k-255)/2), k = 0..511: the level of each subset nearest to t, subset d in byte d (int8).

    Edges between levels of a subset are multiples of 1/2, so the answer is the same all over an interval.
    """
    t = (np.arange(512) - 256) / 2 + 0.25
    words = np.zeros(512, dtype=np.int64)
    for d in range(4):
        subset = levels[d::4]
        words |= (subset[np.abs(t[:, None] - subset).argmin(axis=1)] & 255) << 8 * d
    return words.tolist()


def gain(g: int, steps: int, bias: int) -> float:
    return 0.0 if g == 0 else 2.0 ** ((g - bias) / steps)


def array(head: str, items: list[str], per_line: int) -> list[str]:
    lines = ["    " + " ".join(f"{x}," for x in items[i : i + per_line]) for i in range(0, len(items), per_line)]
    return [f"SEQKV_TABLE {head}[{len(items)}] = {{", *lines, "};"]


def render() -> str:
    bits = range(1, MAX_BITS + 1)
    # 6 digits: what is left of the arithmetic of different machines is far below
    shrink = [1.0] + [float(f"{1 - quantizer(b).mse:.6g}") for b in bits]
    scale = [0.0] + [float(f"{quantizer(b).scale / shrink[b]:.6g}") for b in bits]
    out = [
        "// Written by tools/make_tables.py; do not edit.",
        "#pragma once",
        "",
        "#ifndef __METAL_VERSION__ // it has these types, and not the header",
        "#include <stdint.h>",
        "#endif",
        "",
        "#ifndef SEQKV_TABLE",
        "#    define SEQKV_TABLE static const",
        "#endif",
        "",
        f"#define SEQKV_GAIN_STEPS   {GAIN_STEPS} // gain steps an octave, uniform blocks",
        f"#define SEQKV_GAIN_BIAS    {GAIN_BIAS}",
        f"#define SEQKV_GRADED_STEPS {GRADED_STEPS} // graded blocks",
        f"#define SEQKV_GRADED_BIAS  {GRADED_BIAS}",
        "",
        "// levels of the trellis quantizers of 1..6 bits, ascending",
    ]
    for b in bits:
        out += array(f"int8_t seqkv_level{b}", [f"{x:4d}" for x in quantizer(b).levels], 16)
    out += [
        "",
        "// bits -> factor of the levels for a unit Gaussian, unbiased: E <z_hat, z> = <z, z>",
        *array("float seqkv_scale", [f"{x:.8g}" + ("f" if x else ".0f") for x in scale], 7),
        "// bits -> least-squares factor / unbiased factor = 1 - mean squared error",
        *array("float seqkv_shrink", [f"{x:.8g}" + ("f" if x != 1 else ".0f") for x in shrink], 7),
        "",
        "// [floor(2*t) + 256], t in units of the levels, clamped: in byte d the level of subset d (l % 4 = d) nearest to t",
    ]
    for b in bits:
        out += array(f"uint32_t seqkv_nearest{b}", [f"0x{x:08x}" for x in nearest(quantizer(b).levels)], 8)
    out += ["", "// gain byte -> gain: 0, then 2^((g - SEQKV_GAIN_BIAS)/SEQKV_GAIN_STEPS)"]
    out += array("float seqkv_gain", [f"{gain(g, GAIN_STEPS, GAIN_BIAS):.8e}f" for g in range(256)], 8)
    out += ["// gain of a group of a graded block: 0, then 2^((g - SEQKV_GRADED_BIAS)/SEQKV_GRADED_STEPS)"]
    out += array("float seqkv_gain_graded", [f"{gain(g, GRADED_STEPS, GRADED_BIAS):.8e}f" for g in range(32)], 8)
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print the header instead of writing it")
    parser.add_argument("--errors", action="store_true", help="print the errors of the quantizers")
    args = parser.parse_args()
    if args.errors:
        for b in range(1, MAX_BITS + 1):
            print(f"{b} bits: mse {quantizer(b).mse:.6f}")
    elif args.print:
        print(render(), end="")
    else:
        (pathlib.Path(__file__).parent.parent / "native" / "tables.h").write_text(render())
