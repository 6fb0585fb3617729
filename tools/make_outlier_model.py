#!/usr/bin/env python3
"""Write a GGUF with strong outliers in its keys that computes the same as the one it is made from.

    python tools/make_outlier_model.py IN.gguf OUT.gguf [--seed N]

In every layer, four RoPE pairs of each KV head get a factor of 8, 16 or 32: both key rows of the pair are multiplied by
it, the matching query rows of all heads of the group are divided by it, so that every score q.k stays what it was. Both
rows of a pair share the factor, so it commutes with RoPE; factors are powers of two, so nothing is rounded. The two
matrices (and biases, if any) are written in F32, all other tensors as they are.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import gguf
import numpy as np

ARCH = "llama"
N_PAIRS = 4
"""scaled pairs per KV head"""
FACTORS = (8.0, 16.0, 32.0)


def key_scales(rng: np.random.Generator, n_head_kv: int, head_dim: int) -> np.ndarray:
    """f32 (n_head_kv, head_dim): the factor of every key row. Rows 2i and 2i + 1 of a head are a pair."""
    scales = np.ones((n_head_kv, head_dim // 2), np.float32)
    for head in scales:
        n = min(N_PAIRS, len(head))
        head[rng.choice(len(head), size=n, replace=False)] = rng.choice(FACTORS, size=n)
    return scales.repeat(2, axis=1)


def scaled(tensor: gguf.ReaderTensor, scales: np.ndarray) -> np.ndarray:
    """The rows of a matrix, or the elements of a bias, multiplied by `scales` (rows,); f32. Raises ValueError."""
    values = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    if len(values) != len(scales):
        raise ValueError(f"{tensor.name} has {len(values)} rows, expected {len(scales)}")
    return np.ascontiguousarray(values * scales.reshape(-1, *[1] * (values.ndim - 1)))


def make(source: Path, target: Path, seed: int = 0) -> None:
    """Write the outlier model of `source` to `target`; the same seed gives the same bytes.

    Raises ValueError when `source` is not a llama model with separate query and key matrices, OSError.
    """
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target} is the model itself: write to another file")
    reader = gguf.GGUFReader(source)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    arch = fields["general.architecture"].contents()
    if arch != ARCH:
        raise ValueError(f"{source} is a {arch} model: only {ARCH} models, whose RoPE pairs are neighbours, can be scaled")
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def number(key: str, default: int | None = None) -> int:
        field = fields.get(f"{arch}.{key}")
        value = default if field is None else field.contents()
        if not isinstance(value, int):
            raise ValueError(f"{source}: metadata {arch}.{key} is {value!r}, expected one number")
        return value

    n_layer, n_head = number("block_count"), number("attention.head_count")
    n_head_kv = number("attention.head_count_kv", n_head)
    head_dim = number("attention.key_length", number("embedding_length") // n_head)
    rng = np.random.default_rng(seed)
    replaced: dict[str, np.ndarray] = {}
    for il in range(n_layer):
        if f"blk.{il}.attn_k.weight" not in tensors or f"blk.{il}.attn_q.weight" not in tensors:
            raise ValueError(f"{source} has no blk.{il}.attn_q.weight and attn_k.weight: fused matrices cannot be scaled")
        if f"blk.{il}.attn_k_norm.weight" in tensors:
            raise ValueError(f"{source} normalizes its keys, which would undo the factors")
        scales = key_scales(rng, n_head_kv, head_dim)
        rows = {"k": scales.ravel(), "q": 1 / scales.repeat(n_head // n_head_kv, axis=0).ravel()}
        for part in ("k", "q"):
            for kind in ("weight", "bias"):
                name = f"blk.{il}.attn_{part}.{kind}"
                if name in tensors:
                    replaced[name] = scaled(tensors[name], rows[part])

    writer = gguf.GGUFWriter(target, arch)
    writer.data_alignment = reader.alignment
    for name, field in fields.items():
        if name == "general.architecture":
            continue
        value = field.contents()
        if name == "general.name":  # part of the identity: a profile of the source must not pass for one of this model
            value = f"{value} (key outliers, seed {seed})"
        writer.add_key_value(name, value, field.types[0], field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None)
    if "general.name" not in fields:
        writer.add_name(f"{source.stem} (key outliers, seed {seed})")
    for tensor in reader.tensors:
        if tensor.name in replaced:
            writer.add_tensor(tensor.name, replaced[tensor.name])
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="IN.gguf")
    parser.add_argument("target", type=Path, metavar="OUT.gguf")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which pairs, which factors (default 0)")
    args = parser.parse_args()
    try:
        make(args.source, args.target, args.seed)
    except (ValueError, OSError) as error:
        sys.exit(f"make_outlier_model.py: {error}")


if __name__ == "__main__":
    main()
