#!/usr/bin/env python3
"""The largest context of models in some amounts of memory, per KV type: computed by `fit`, and allocated where there is a GPU.

    python tools/what_fits.py 8b.gguf 14b.gguf [--memory 8G,12G,16G,24G] [--fill 8G] [--json docs/fits.json]

A context of the computed size is made with all layers on the GPU, 512 tokens are evaluated, and what the GPU's memory in use has grown
by since before the model was loaded is compared with the amount. For the amounts of --fill the context is filled up to its end first:
what attention needs beside the cache may grow with it. What the driver itself takes is not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from seqkv_edge import fit, llama
from seqkv_edge.bench import device_used, parse_list
from seqkv_edge.dropin import KvOptions
from seqkv_edge.engine import devices, open_model
from seqkv_edge.errors import SeqkvError

BATCH = 512


@dataclass(frozen=True)
class Row:
    model: str
    memory: int
    """bytes"""
    kv: str
    ctx: int
    """tokens; 0: none fit. The length that a model was trained for is not considered"""
    computed: int
    measured: int | None
    """bytes; None: no GPU, or nothing fits"""
    filled: bool
    error: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="FILE.gguf")
    parser.add_argument("--memory", default="8G,12G,16G,24G", metavar="LIST")
    parser.add_argument("--fill", default="", metavar="LIST", help="of --memory: fill the context before measuring")
    parser.add_argument("--kv", default=fit.DEFAULT_KV, metavar="LIST")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    amounts = [fit.parse_size(text) for text in args.memory.split(",")]
    filled = [fit.parse_size(text) for text in args.fill.split(",") if text]
    settings, options = fit.Settings(n_ubatch=BATCH, profile=False, gpu=True), KvOptions(profile=None)
    gpu = any(device.gpu for device in devices())
    rows = []
    for path in args.models:
        before = device_used()
        with open_model(Path(path)) as model:
            text = model.tokenize("All work and no play. ", add_special=False, parse_special=False)
            for memory in amounts:
                for kv in parse_list(args.kv):
                    ctx = fit.largest_ctx(model.meta, kv, memory, llama.type_bits, settings)
                    computed = fit.need(model.meta, kv, ctx, llama.type_bits, settings).total
                    measured, error = None, ""
                    if gpu and ctx:
                        try:
                            with model.context(kv, n_ctx=ctx, n_batch=BATCH, options=options) as context:
                                n = ctx if memory in filled else min(ctx, BATCH)
                                context.evaluate((text * n)[:n])
                                measured = device_used() - before
                        except SeqkvError as failure:
                            error = str(failure)
                    rows.append(Row(Path(path).name, memory, str(kv), ctx, computed, measured, memory in filled, error))
                    print(rows[-1], file=sys.stderr, flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return int(any(row.error or (row.measured or 0) > row.memory for row in rows))


if __name__ == "__main__":
    sys.exit(main())
