#!/usr/bin/env python3
"""Ask about a long document in chats with several KV types and write the answers side by side.

    python tools/document_chat.py -o docs/document-chat.md [--model X.gguf] [--kv f16,seqkv4,seqkv3] [--tokens 6000] [--threads N]

The document is Python's own language documentation, as it ships with every CPython, cut to about --tokens tokens, with one
sentence of our own in its middle that a question asks for. Answers are greedy. Each type
reads the document once; every question goes on from there.
"""
from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from quality_checks import generate, prompt_tokens

from seqkv_edge import model
from seqkv_edge.calibrate import documentation
from seqkv_edge.conversation import common_prefix
from seqkv_edge.engine import Sampler, Sampling, open_model
from seqkv_edge.errors import SeqkvError
from seqkv_edge.llama import KvSpec

FACT = "The maintainers of this manual meet in the town of Oldenmark on the third Friday of March."
N_CTX, N_ANSWER = 8192, 120
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


def answers(path: Path, kv: str, text: str, threads: int | None) -> list[str]:
    """Greedy answers to QUESTIONS, each in a chat of its own that begins with the text, which is evaluated once."""
    result = []
    with open_model(path, ngl=0) as loaded, loaded.context(KvSpec.parse(kv), n_ctx=N_CTX, threads=threads) as context:
        prompts = [prompt_tokens(context, f"{text}\n\n{question}") for question in QUESTIONS]
        prefix = prompts[0][: min(common_prefix(prompts[0], other) for other in prompts[1:])]
        sampler = Sampler(loaded, Sampling(temp=0))
        with tempfile.TemporaryDirectory() as folder:
            state = Path(folder) / "prefix"
            context.evaluate(prefix)
            context.save_state(state)
            for prompt in prompts:
                if context.n_past > len(prefix):
                    context.load_state(state, len(prefix))
                tokens = generate(context, sampler, prompt[len(prefix) :], N_ANSWER)
                result.append(b"".join(map(loaded.piece, tokens)).decode("utf-8", "replace"))
        sampler.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--kv", default="f16,seqkv4,seqkv3")
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    try:
        path = model.resolve(args.model)
        text = document(path, args.tokens)
        table: dict[str, list[str]] = {}
        for kv in args.kv.split(","):
            table[kv] = [" ".join(answer.split()).replace("|", "\\|") for answer in answers(path, kv, text, args.threads)]
            print(f"{kv}: {table[kv]}", flush=True)
    except SeqkvError as error:
        sys.exit(f"document_chat.py: {error}")
    lines = [
        "# Questions about a long document",
        "",
        f"Written by `python tools/document_chat.py -o {args.out.as_posix()} --kv {args.kv} --tokens {args.tokens}`: {path.name}, a document of about "
        f"{args.tokens} tokens (Python's documentation with one sentence planted in the middle: \"{FACT}\"), greedy answers of at most {N_ANSWER} tokens.",
    ]
    for i, question in enumerate(QUESTIONS):
        lines += ["", f"## {question}", "", "| KV cache | answer |", "|---|---|", *(f"| {kv} | {found[i]} |" for kv, found in table.items())]
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
