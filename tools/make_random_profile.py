#!/usr/bin/env python3
"""Write a profile with predictors for a model of random weights: for the speed of stored frames at a model's shape, not for their size.

    python tools/make_random_profile.py 8b.gguf      # beside it: 8b.seqkv.gguf

Such a model has no statistics to learn (its keys hardly vary around their mean), and fitting takes long at 8B's shape. Keys get a
Hadamard transform, weights are drawn as often as they are in SmolLM2's predictors, and steps are so small that predictions are of no
use: frames are then coded at their full bits, which takes a decoder longest.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from seqkv_edge import delta, profile
from seqkv_edge.design import LayerDesign, hadamard
from seqkv_edge.gguf_meta import fingerprint, read_model

KEY_DEVIATION = 1.4
"""root mean square of a key of tools that write random weights in Q4_0 with the scale .3/sqrt(n_embd)"""

K_GAIN, V_GAIN = 12, 130
"""gains of blocks of such keys, transformed, and values"""


def predictor(random: np.random.Generator, n: int, inputs: int, groups: int, usual_gain: int) -> delta.Predictor:
    weight = random.choice(np.array([-2, -1, 0, 1, 2], np.int8), (n, inputs), p=(0.05, 0.2, 0.5, 0.2, 0.05)) if inputs else None
    copy = np.array([0, 20, 40, 60, 80, 100, 120], np.uint8)
    gain = np.zeros((groups, delta.GAIN_TERMS), np.int32)
    gain[:, 0] = 256 * usual_gain
    zeros = np.zeros(delta.COPY_CLASSES, np.int8)
    return delta.Predictor(weight, np.full(n, 8, np.uint16), np.full(n, 128, np.uint8), copy, zeros, zeros, gain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    args = parser.parse_args()
    meta, random = read_model(args.model), np.random.default_rng(0)
    designs, layers, n_prev = [], {}, 0
    for il, (layer, heads) in enumerate(zip(meta.layers, meta.heads_kv)):
        dk, dv = layer.k_values // heads, layer.v_values // heads
        encode = np.repeat(hadamard(dk)[None] / KEY_DEVIATION, heads, axis=0).astype(np.float16)
        designs.append(LayerDesign(il, np.zeros((heads, dk), np.float32), encode, np.zeros((heads, dv), np.float32), np.ones((heads, dv), np.float32),
                                   float("nan"), float("nan")))  # fmt: skip
        rope = delta.rope_table(500000.0 ** (-np.arange(0, dk, 2) / dk))
        made = delta.make_layer(encode, dv, rope, False, np.full(heads, V_GAIN, np.uint8))
        n_k, n_v = made.n_k, made.n_v
        kinds = {"fast": (0, n_k), "small": (n_prev, n_prev + n_k)}
        layers[il] = dataclasses.replace(made, predictors={
            level: (predictor(random, n_k, k_in, n_k // 64 * 3, K_GAIN), predictor(random, n_v, v_in, n_v // 64, V_GAIN)) for level, (k_in, v_in) in kinds.items()
        })  # fmt: skip
        n_prev = n_k + n_v
    target = profile.beside(args.model)
    profile.write(target, args.model, fingerprint(args.model), profile.Measured(designs, 0, "0" * 64))
    profile.add_predictors(target, layers)
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
