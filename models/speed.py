"""Random-weight Llama models of any shape in Q4_0, for measurements of speed and memory; what they write is noise.

    python models/speed.py 8b 8b.gguf              # a shape by name: 1b, 8b, 14b
    python models/speed.py 8b x.gguf --layers 8 --embd 2048 --ff 8192 --kv-heads 4      # parts of it changed

All layers have the same weights, so that writing is quick; they are loaded and computed as if they had not. The same shape gives
the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import gguf
import numpy as np

Q4_0 = gguf.GGMLQuantizationType.Q4_0


@dataclass(frozen=True)
class Shape:
    layers: int
    embd: int
    ff: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int = 32000

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of a layer's matrices."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "attn_q": (q, self.embd), "attn_k": (kv, self.embd), "attn_v": (kv, self.embd), "attn_output": (self.embd, q),
            "ffn_gate": (self.ff, self.embd), "ffn_up": (self.ff, self.embd), "ffn_down": (self.embd, self.ff),
        }  # fmt: skip


SHAPES = {
    "1b": Shape(layers=16, embd=2048, ff=8192, heads=32, kv_heads=8, head_dim=64),
    "8b": Shape(layers=32, embd=4096, ff=14336, heads=32, kv_heads=8, head_dim=128),
    "14b": Shape(layers=40, embd=5120, ff=17408, heads=40, kv_heads=8, head_dim=128),
}


def blocks(random: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """uint8 (rows, columns/32*18): Q4_0 blocks, a scale in f16 and 32 values of 4 bits. Rows have a norm of about 1.4."""
    x = random.integers(0, 256, (rows, columns // 32, 18), np.uint8)
    x[:, :, :2] = np.array([0.3 / np.sqrt(columns)], np.float16).view(np.uint8)
    return x.reshape(rows, -1)


def write(path: str | Path, shape: Shape) -> None:
    """Write the model. ValueError for a shape that Q4_0 or the vocabulary does not have."""
    if any(columns % 32 for _, columns in shape.matrices().values()):
        raise ValueError("embedding, feed-forward and heads x head_dim must be multiples of 32, Q4_0's blocks")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581"]  # the last is a space
    if shape.vocab < len(special):
        raise ValueError(f"a vocabulary has {len(special)} tokens at least, bytes among them")
    kind = gguf.TokenType
    n_words = shape.vocab - len(special)

    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(262144)
    out.add_block_count(shape.layers)
    out.add_embedding_length(shape.embd)
    out.add_feed_forward_length(shape.ff)
    out.add_head_count(shape.heads)
    out.add_head_count_kv(shape.kv_heads)
    out.add_key_length(shape.head_dim)
    out.add_value_length(shape.head_dim)
    out.add_rope_dimension_count(shape.head_dim)
    out.add_rope_freq_base(500000.0)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(shape.vocab)
    out.add_tokenizer_model("llama")
    out.add_token_list([*special, *(f"\u2581w{i}" for i in range(n_words))])
    out.add_token_scores([0.0] * len(special) + [-float(i) for i in range(n_words)])
    out.add_token_types([kind.UNKNOWN, kind.CONTROL, kind.CONTROL] + [kind.BYTE] * 256 + [kind.NORMAL] * (1 + n_words))
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_unk_token_id(0)

    random = np.random.default_rng(0)
    ones = np.ones(shape.embd, np.float32)
    layer = {name: blocks(random, *size) for name, size in shape.matrices().items()}
    for name in ("token_embd", "output"):
        out.add_tensor(f"{name}.weight", blocks(random, shape.vocab, shape.embd), raw_dtype=Q4_0)
    out.add_tensor("output_norm.weight", ones)
    for i in range(shape.layers):
        for name, data in layer.items():
            out.add_tensor(f"blk.{i}.{name}.weight", data, raw_dtype=Q4_0)
        for name in ("attn_norm", "ffn_norm"):
            out.add_tensor(f"blk.{i}.{name}.weight", ones)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", metavar="OUT.gguf")
    for field in fields(Shape):
        parser.add_argument("--" + field.name.replace("_", "-"), type=int, metavar="N")
    args = parser.parse_args(argv)
    changed = {field.name: value for field in fields(Shape) if (value := getattr(args, field.name)) is not None}
    try:
        write(args.out, replace(SHAPES[args.shape], **changed))
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
