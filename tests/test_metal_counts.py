"""What decode costs per key at head_dim 128 and 4 queries a KV head, counted by the emulator: ours beside upstream's f16 and q8_0.

python tests/test_metal_counts.py     # the table of docs/decisions.md
"""

from __future__ import annotations

import ctypes
import json
import re
from pathlib import Path

import numpy as np
from test_metal_emulator import Attention
from test_metal_kernels import CACHE, FC_SEQKV, Cases, emulator, patched_tree, sources

KEYS = 4096
NAMES = ("load_bytes", "loads", "float_operations", "matrix", "integer_operations")
Counts = dict[str, float]


def upstream(tree: Path, type_: str) -> Counts:
    attention = Attention(type_, 128, 4, 1, KEYS, 1)
    attention.mask[:] = 0
    _, counters = attention.metal(tree, vec=True, baked=True)
    return {name: counters[name] / KEYS for name in NAMES}


def ours(cases: Cases, text: str, bits: int) -> Counts:
    """All three kernels. Decode skips what the mask of the case leaves out, so that its counts are divided by what is left."""
    i = next(i for i, name in enumerate(cases.names) if f"type_k=seqkv{bits}k,type_v=seqkv{bits},dk=128" in name and f"n_kv={KEYS}" in name)
    handle = cases.lib.metal_open(i)
    plan = json.loads(cases.lib.metal_text(handle))
    query, decode, reduce = plan["steps"]
    address, n_bytes = plan["tensors"][decode["buffers"][2][0]]
    attended = np.frombuffer((ctypes.c_uint8 * n_bytes).from_address(address), np.uint16)[:KEYS] == 0
    n_attended = int(attended.sum())
    cases.lib.metal_close(handle)
    library = emulator.load(text, CACHE, baked={FC_SEQKV + k: value for k, value in enumerate(query["constants"])})
    error, allowed, _, counters = cases.run(i, {step["kernel"]: library for step in plan["steps"]}, 0)
    assert error <= allowed
    return {
        name: sum(counters[step["kernel"]][name] / (n_attended if step is decode else KEYS) for step in (query, decode, reduce))
        for name in NAMES
    }


def table() -> dict[str, Counts]:
    tree = patched_tree()
    cases, text = Cases(tree), sources(tree)["seqkv_attn.metal"]
    return {**{name: upstream(tree, name) for name in ("f16", "q8_0")}, **{f"seqkv{bits}": ours(cases, text, bits) for bits in (4, 3, 2)}}


def test_decode_costs_less_than_upstream() -> None:
    rows = table()
    full = rows["q8_0"]
    assert full["load_bytes"] > 4 * 2 * 136  # four heads that read K and V each
    for bits in (2, 3, 4):
        row = rows[f"seqkv{bits}"]
        assert row["load_bytes"] < 0.45 * full["load_bytes"]
        assert row["float_operations"] + 1024 * row["matrix"] < full["float_operations"]  # a matrix operation is 512 multiply-adds
        assert row["float_operations"] + row["integer_operations"] < full["float_operations"] + full["integer_operations"]
    assert rows["seqkv2"]["load_bytes"] < rows["seqkv3"]["load_bytes"] < rows["seqkv4"]["load_bytes"]


if __name__ == "__main__":
    print("| KV cache | " + " | ".join(re.sub("_", " ", name) for name in NAMES) + " |\n|" + "---|" * (len(NAMES) + 1))
    for label, row in table().items():
        print(f"| {label} | " + " | ".join(f"{row[name]:,.0f}" for name in NAMES) + " |")
