#!/usr/bin/env python3
"""Write the tables of README.md and docs/measurements.md from the JSON files that the benchmarks wrote to docs/.

    python tools/report.py            # rewrite the tables
    python tools/report.py --check    # exit 1 if a table is not what its JSON gives

A table stands between the lines  <!-- table NAME -->  and  <!-- end -->; NAME is quality, speed or memory.
"""
from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/measurements.md")


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def quality() -> str:
    rows = json.loads((ROOT / "docs/quality.json").read_text())
    base = rows[0]["ppl_base"]
    body = [["f16", "16", "16", f"{base:.3f}", "0", "0", "0", "100 %"]]
    for r in rows:
        exact = r["bits_per_value_at_ctx"] - r["bits_per_value"]  # window and tables, at the measured context
        at_8192 = r["bits_per_value"] + exact * 2048 / 8192
        body.append([
            r["kv"], f"{r['bits_per_value']:.3f}", f"{at_8192:.2f}", f"{r['ppl']:.3f}", f"{r['kld_mean']:.4f}", f"{r['kld_median']:.4f}",
            f"{r['kld_p99']:.3f}", f"{100 * r['top1_agreement']:.1f} %",
        ])
    return table(["KV cache", "bits/value", "with window at 8,192", "PPL", "KLD mean", "median", "99 %", "same top token"], body)


def speed() -> str:
    rows = json.loads((ROOT / "docs/speed.json").read_text())
    depths = sorted({r["depth"] for r in rows})
    kinds = list(dict.fromkeys(r["kv"] for r in rows))
    cell = {(r["kv"], r["depth"]): r for r in rows}
    body = [
        [kv] + [f"{cell[kv, d][m]:.{digits}f}" for m, digits in (("decode_tps", 1), ("prefill_tps", 0)) for d in depths]
        for kv in kinds
    ]
    return table(["KV cache"] + [f"{m} at {d:,}" for m in ("decode", "prefill 512") for d in depths], body)


def memory() -> str:
    rows = json.loads((ROOT / "docs/memory.json").read_text())
    mib = 2**20
    body = [
        [r["kv"], f"{r['ctx']:,}", f"{r['kv_bytes'] / mib:.1f}", f"{(r['kv_bytes_reported'] or 0) / mib:.1f}", f"{r['kv_bytes_process'] / mib:.1f}",
         f"{r['bits_per_value']:.2f}", f"{r['rss_bytes'] / mib:.0f}"]
        for r in rows
    ]
    return table(["KV cache", "context", "tensors, MiB", "reported, MiB", "process growth, MiB", "bits/value", "resident, MiB"], body)


TABLES = {"quality": quality, "speed": speed, "memory": memory}


def render(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", replace, text, flags=re.S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    for name in PAGES:
        page = ROOT / name
        text = page.read_text(encoding="utf-8")
        new = render(text)
        if args.check and new != text:
            sys.exit(f"report.py: a table of {name} does not match its JSON: run python tools/report.py")
        if not args.check:
            page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
