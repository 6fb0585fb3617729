#!/usr/bin/env python3
"""Write native/entropy_tables.h: the distribution and the logarithms of the lossless coder of blocks (native/entropy.h).

    python tools/make_entropy_tables.py            # rewrite native/entropy_tables.h
    python tools/make_entropy_tables.py --print    # print it instead
"""

from __future__ import annotations

import argparse
import math
import pathlib
import re

NATIVE = pathlib.Path(__file__).parent.parent / "native"

TOTAL = 1 << 15  # sum of the frequencies of an alphabet
SYMBOLS = 256  # of the largest alphabet: what is left for the frequency 1 that every symbol has
SPREAD = 64  # table steps of a spread
SLOPE = 1.7  # logistic distribution nearest to the unit Gaussian
OCTAVE = 48  # logarithmic steps: a multiple of the 3 and 4 gain steps
LOWEST, HIGHEST = -288, 384  # logarithms that are looked up
PRIOR = 8  # values that the starting spread counts as
MEAN_ABS = 48  # expected |residual| in table steps


def cdf() -> list[int]:
    """[k + 512]: (TOTAL - SYMBOLS) * P(x < (k + 1/2)/SPREAD), logistic."""
    x = ((k - 512 + 0.5) / SPREAD for k in range(1024))
    return [round((TOTAL - SYMBOLS) / (1 + math.exp(-SLOPE * t))) for t in x]


def scales() -> list[int]:
    """[bits]: 2^17 * seqkv_scale of native/tables.h."""
    found = re.search(r"seqkv_scale\[7\] = \{([^}]*)\}", (NATIVE / "tables.h").read_text())
    assert found
    return [round(float(x.strip().rstrip("f")) * (1 << 17)) for x in found[1].split(",") if x.strip()]


def array(kind: str, name: str, items: list[int]) -> list[str]:
    lines = ["    " + " ".join(f"{x:5d}," for x in items[i : i + 16]) for i in range(0, len(items), 16)]
    return [f"static const {kind} {name}[{len(items)}] = {{", *lines, "};"]


def render() -> str:
    exp2 = [round(2 ** (k / OCTAVE) * (1 << 16)) for k in range(LOWEST, HIGHEST + 1)]
    top = (PRIOR * MEAN_ABS + 64 * 192) // 8 + 1
    log = [round(OCTAVE * math.log2(max(k, 1) * 8)) for k in range(top)]
    count = [round(OCTAVE * math.log2((n + PRIOR) * MEAN_ABS)) for n in range(64)]
    return "\n".join([
        "// Written by tools/make_entropy_tables.py; do not edit.",
        "#pragma once",
        "",
        "#include <stdint.h>",
        "",
        f"// [k + 512]: {TOTAL - SYMBOLS}/(1 + exp(-{SLOPE} x)), x = (k + 1/2)/{SPREAD}",
        *array("uint32_t", "seqkv_cdf", cdf()),
        "// bits -> 2^17 seqkv_scale",
        *array("uint16_t", "seqkv_scale17", scales()),
        f"// [k - {LOWEST}]: 2^16 * 2^(k/{OCTAVE}), k up to {HIGHEST}",
        *array("uint32_t", "seqkv_exp2_table", exp2),
        f"// [k]: {OCTAVE} log2(8 k)",
        *array("int32_t", "seqkv_log_sum", log),
        f"// [n]: {OCTAVE} log2({MEAN_ABS} (n + {PRIOR}))",
        *array("int16_t", "seqkv_log_count", count),
    ]) + "\n"  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print the header instead of writing it")
    if parser.parse_args().print:
        print(render(), end="")
    else:
        (NATIVE / "entropy_tables.h").write_text(render())
