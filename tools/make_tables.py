#!/usr/bin/env python3
"""Write native/tables.h: the codebooks and the gain table of the seqkv blocks.

Codebooks are the Lloyd-Max quantizers of the unit Gaussian (Max 1960, "Quantizing for minimum distortion"), found
here by fixed-point iteration with the exact centroid  E[x | a < x < b] = (pdf(a) - pdf(b)) / (cdf(b) - cdf(a)).
The gain table is 2 ** ((g - GAIN_BIAS) / GAIN_STEPS) for g = 1..255 and 0 for g = 0.

    python tools/make_tables.py            # rewrite native/tables.h
    python tools/make_tables.py --print    # print it instead
"""
from __future__ import annotations

import argparse
import math
import pathlib

GAIN_STEPS = 10  # steps per octave: 7.2 % apart, at most 3.5 % off
GAIN_BIAS = 132  # g = 132 is gain 1; the range is 2**-13.1 .. 2**12.3


def lloyd_max(bits: int) -> list[float]:
    """Positive half of the 2**bits-level Lloyd-Max codebook of the unit Gaussian, ascending."""
    pdf = lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi) if math.isfinite(x) else 0.0  # noqa: E731
    cdf = lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2)))  # noqa: E731
    n = 2 ** (bits - 1)
    levels = [(i + 0.5) * 3.0 / n for i in range(n)]
    while True:
        edges = [0.0] + [(a + b) / 2 for a, b in zip(levels, levels[1:])] + [math.inf]
        new = [(pdf(a) - pdf(b)) / (cdf(b) - cdf(a)) for a, b in zip(edges, edges[1:])]
        if max(abs(a - b) for a, b in zip(new, levels)) < 1e-13:
            return new
        levels = new


def gain(g: int) -> float:
    return 0.0 if g == 0 else 2.0 ** ((g - GAIN_BIAS) / GAIN_STEPS)


def render() -> str:
    out = [
        "// Written by tools/make_tables.py; do not edit.",
        "#pragma once",
        "",
        f"#define SEQKV_GAIN_STEPS {GAIN_STEPS}",
        f"#define SEQKV_GAIN_BIAS  {GAIN_BIAS}",
        "",
        "// Lloyd-Max levels of the unit Gaussian, ascending, code = index",
    ]
    for bits in (2, 3, 4):
        half = lloyd_max(bits)
        full = [-x for x in reversed(half)] + half
        out.append(f"static const float seqkv_codebook{bits}[{len(full)}] = {{")
        for i in range(0, len(full), 4):
            out.append("    " + " ".join(f"{x: .8f}f," for x in full[i : i + 4]))
        out.append("};")
    out += ["", "// gain byte -> gain: 0, then 2^((g - SEQKV_GAIN_BIAS)/SEQKV_GAIN_STEPS)", "static const float seqkv_gain[256] = {"]
    for i in range(0, 256, 8):
        out.append("    " + " ".join(f"{gain(g):.8e}f," for g in range(i, i + 8)))
    out.append("};")
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print the header instead of writing it")
    if parser.parse_args().print:
        print(render(), end="")
    else:
        (pathlib.Path(__file__).parent.parent / "native" / "tables.h").write_text(render())
