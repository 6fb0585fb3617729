#!/usr/bin/env python3
"""Paste a long document into the chat with several KV types and write the answers side by side.

    python tools/document_chat.py -o docs/document-chat.md [--model X.gguf] [--kv f16,seqkv4,seqkv3] [--tokens 6000]

The document is Python's own language documentation, as it ships with every CPython, cut to about --tokens tokens, with one
sentence of our own in its middle that a question asks for. Answers are greedy.
"""
from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from seqkv_edge import model
from seqkv_edge.calibrate import documentation
from seqkv_edge.engine import open_model

FACT = "The maintainers of this manual meet in the town of Oldenmark on the third Friday of March."
QUESTIONS = (
    "In which town do the maintainers of this manual meet?",
    "Summarise the document in two sentences.",
    "Quote one sentence of the document about assignment.",
)


def document(path: Path, n_tokens: int) -> str:
    """About n_tokens tokens of the documentation with FACT as a paragraph in the middle."""
    paragraphs = documentation().split("\n\n")
    with open_model(path, ngl=0) as loaded:
        lengths = [len(loaded.tokenize(p + "\n\n", add_special=False, parse_special=False)) for p in paragraphs]
    kept, total = [], 0
    for paragraph, n in zip(paragraphs, lengths):
        if total + n > n_tokens:
            break
        kept.append(paragraph)
        total += n
    kept.insert(len(kept) // 2, FACT)
    return "\n\n".join(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--kv", default="f16,seqkv4,seqkv3")
    parser.add_argument("--tokens", type=int, default=6000)
    args = parser.parse_args()
    path = model.resolve(args.model)
    text = document(path, args.tokens)
    kinds = args.kv.split(",")
    lines = [
        "# Questions about a long document",
        "",
        f"Written by `python tools/document_chat.py -o {args.out.as_posix()} --kv {args.kv} --tokens {args.tokens}`: {path.name}, a document of about "
        f"{args.tokens} tokens (Python's documentation with one sentence planted in the middle: \"{FACT}\"), greedy answers.",
    ]
    for question in QUESTIONS:
        lines += ["", f"## {question}", "", "| KV cache | answer |", "|---|---|"]
        for kv in kinds:
            command = [sys.executable, "-m", "seqkv_edge", "chat", "--model", str(path), "--kv", kv, "--ctx", "8192", "--temp", "0", "-n", "120", "--ngl", "0"]
            done = subprocess.run(command, input=f"{text}\n\n{question}", capture_output=True, text=True, check=False)
            if done.returncode != 0:
                sys.exit(f"document_chat.py: {kv}: {done.stderr.strip()}")
            answer = " ".join(done.stdout.split()).replace("|", "\\|")
            print(f"{kv}: {answer}", flush=True)
            lines.append(f"| {kv} | {answer} |")
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
