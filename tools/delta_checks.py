#!/usr/bin/env python3
"""Size and speed of the lossless coder of stored frames, on the live state of a cache.

The text goes through the model with a seqkv cache, the state is saved as llama.cpp does it, its blocks are coded at both levels,
decoded and compared. Processor time is given, so that other programs disturb it less.

    python tools/delta_checks.py --text wikitext2-valid.txt --skip 600000 --tokens 2048
    python tools/delta_checks.py --text wikitext2-valid.txt --skip 600000 --tokens 1088 --again 1000   # the last 1000 twice
"""

from __future__ import annotations

import argparse
import struct
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from seqkv_edge import delta, model, profile
from seqkv_edge.dropin import KvOptions
from seqkv_edge.engine import open_model
from seqkv_edge.gguf_meta import fingerprint
from seqkv_edge.llama import KvSpec


def blocks_of(state: bytes, coder: delta.Coder, n: int) -> delta.Rows:
    """The blocks of a saved sequence: after the cells, `v_trans` = 0, the number of layers, and each layer's type, row and rows."""
    start = struct.pack("<II", 0, len(coder.layers))
    rows = [layer.rows(k, v) for layer, k, v in zip(coder.layers, coder.k_bits, coder.v_bits)]
    at = state.find(start)
    while at >= 0 and state[at + 12 : at + 20] != struct.pack("<Q", rows[0][0]):
        at = state.find(start, at + 1)
    if at < 0:
        sys.exit("the state has no blocks of this profile")
    at += 8
    found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for kind, out in enumerate(found):
        for row in rows:
            assert struct.unpack_from("<Q", state, at + 4)[0] == row[kind]
            out.append(np.frombuffer(state, np.uint8, n * row[kind], at + 12).reshape(n, -1).copy())
            at += 12 + n * row[kind]
    return delta.Rows(*found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="X.gguf", help="default: the embedded model")
    parser.add_argument("--text", required=True, type=Path, metavar="FILE")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="characters of the text left out")
    parser.add_argument("--tokens", type=int, default=2048, metavar="N")
    parser.add_argument("--again", type=int, default=0, metavar="N", help="repeat the last N tokens")
    parser.add_argument("--kv", default="seqkv3")
    args = parser.parse_args()
    path = model.resolve(args.model)
    found = profile.find(path, fingerprint(path))
    coder = found and delta.read(found, args.kv)
    if not coder:
        sys.exit(f"{path.name} has no profile with predictors: make one with 'calibrate --predictors'")
    with open_model(path) as loaded, tempfile.TemporaryDirectory() as folder:
        text = args.text.read_text(encoding="utf-8")[args.skip :][: args.tokens * 16]
        tokens = loaded.tokenize(text, add_special=True, parse_special=False)[: args.tokens]
        first = len(tokens)
        tokens += tokens[first - args.again :] if args.again else []
        n = len(tokens)
        with loaded.context(KvSpec.parse(args.kv), n_ctx=n, options=KvOptions(profile=str(found))) as context:
            start = time.perf_counter()
            context.evaluate(tokens)
            prefill = time.perf_counter() - start
            context.save_state(Path(folder) / "state")
            rows = blocks_of((Path(folder) / "state").read_bytes(), coder, n)
    frames = delta.frames(tokens, (np.arange(n) % delta.FRAME).astype(np.uint8))
    live = sum(a.shape[1] for a in [*rows.k, *rows.v])
    values = sum(layer.n_k + layer.n_v for layer in coder.layers)
    print(f"{n} tokens, {live} bytes a token live ({8 * live / values:.3f} bits a value), prefill {1e3 * prefill / n:.2f} ms a token")
    for level in delta.LEVELS:
        start = time.process_time()
        data = [coder.encode(level, frame, rows) for frame in frames]
        encoding = time.process_time() - start
        back = delta.Rows([np.zeros_like(a) for a in rows.k], [np.zeros_like(a) for a in rows.v])
        start = time.process_time()
        coder.decode_path(data, frames, back, threads=1)
        decoding = time.process_time() - start
        assert all(np.array_equal(a, b) for a, b in zip([*rows.k, *rows.v], [*back.k, *back.v])), "not what it was"
        sizes = np.array([len(d) for d in data])
        line = f"{level}: {sizes.sum() / n / live:.4f} of the live bytes, {8 * sizes.sum() / n / values:.3f} bits a value"
        if args.again:
            at = -(-first // delta.FRAME)
            line += f", second copy {sizes[at:].sum() / (n - at * delta.FRAME) / live:.4f}"
        print(f"{line}; processor time a token: encode {1e3 * encoding / n:.3f} ms, decode {1e3 * decoding / n:.3f} ms")


if __name__ == "__main__":
    main()
