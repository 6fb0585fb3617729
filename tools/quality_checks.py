#!/usr/bin/env python3
"""Quality of KV cache types beyond the mean of `bench quality`.

    python tools/quality_checks.py drift     --text FILE        # KLD by position in a long context
    python tools/quality_checks.py texts     FILE FILE...       # KLD on several kinds of text
    python tools/quality_checks.py outliers  --text FILE        # a model with outliers in its keys
    python tools/quality_checks.py greedy                       # for how long greedy answers agree with f16's
    python tools/quality_checks.py retrieval --text FILE        # a planted fact, asked for at the end

Each prints its result and puts it under its own name into the JSON file (default docs/quality-checks.json), where the
results of the others stay. COMMAND --help lists the options.
"""
from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from seqkv_edge import bench, cli, fit, llama, model
from seqkv_edge.bench import F16, QualityKv
from seqkv_edge.chat import kv_options
from seqkv_edge.conversation import Template, common_prefix
from seqkv_edge.dropin import KvOptions
from seqkv_edge.engine import Context, Model, Sampler, Sampling, open_model
from seqkv_edge.errors import SeqkvError, UsageError

PROMPTS = (
    "What is the capital of Australia, and why was it not Sydney?",
    "Explain to a child why the sky is blue.",
    "How does a refrigerator keep food cold?",
    "What is the difference between a virus and a bacterium?",
    "Why do leaves change their colour in autumn?",
    "Write a Python function that returns the n-th Fibonacci number, with a docstring.",
    "Write a C function that reverses a string in place.",
    "Write an SQL query that finds the three customers with the most orders, and explain it.",
    "Find the mistake in this code: `def mean(xs): return sum(xs) / len(x)`",
    "List ten things to pack for a week of hiking in the mountains.",
    "Give me five names for a small bakery, each with a reason.",
    "List the planets of the solar system with one fact about each.",
    "Translate into French: The train to Lyon leaves at half past eight from platform four.",
    "Translate into Spanish: My sister has lived in a small village by the sea since last summer.",
    "Translate into German: We would like a table for two near the window, please.",
    "Summarise this paragraph in one sentence: The printing press with movable type was developed in Mainz around 1440. Within fifty "
    "years it had spread to more than two hundred cities, and books that had cost a year's wages could be bought by a craftsman. "
    "Universities, churches and merchants all used it, and so did those who quarrelled with them.",
    "Summarise this paragraph in two sentences: Bees visit flowers for nectar, which they carry home and thicken into honey. Pollen sticks "
    "to their hair on the way and reaches the next flower, so that the plant can make seeds. About a third of what people eat "
    "depends on this, which is why farmers rent hives when their orchards bloom.",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "Write a polite e-mail that asks a landlord to repair a leaking window.",
    "A train travels 180 kilometres in two and a half hours. What is its average speed? Show the steps.",
)

CITIES = (
    "Lisbon", "Nairobi", "Oslo", "Quito", "Hanoi", "Dublin", "Ankara", "Lima", "Riga", "Cairo", "Havana", "Seoul", "Vienna", "Accra", "Perth",
    "Bergen", "Toronto", "Warsaw", "Tunis", "Naples", "Kyoto", "Malaga", "Boston", "Zagreb", "Dakar", "Turin", "Leeds", "Porto", "Manila", "Sofia",
)  # fmt: skip


# --- next-token distributions ---


def score(loaded: Model, args: argparse.Namespace, text: str, **changes: Any) -> list[bench.QualityRow]:
    """`bench.score` with the command's options."""
    options = kv_options(args)
    kvs = bench.parse_quality_list(args.kv, options)
    settings = {"ctx": args.ctx, "chunks": args.chunks, "options": options, "threads": args.threads, "force": args.force}
    return bench.score(loaded, text, kvs, **settings | changes)


def ratio(a: float, b: float) -> float | None:
    """a / b; None where b is 0 (f16 against itself)."""
    return a / b if b else None


def drift(args: argparse.Namespace) -> dict[str, Any]:
    """Rows of `bench quality --quarters`, each with the KLD of the last quarter over that of the second."""
    with open_model(model.resolve(args.model), ngl=args.ngl) as loaded:
        rows = score(loaded, args, bench.read_text(args.text), quarters=True)
    result = []
    for row in rows:
        assert row.kld_quarters
        result.append(asdict(row) | {"last_to_second": ratio(row.kld_quarters[3], row.kld_quarters[1])})
    show("KLD by quarter of the window", result, ["kv", "kld_mean", "kld_quarters", "last_to_second"])
    return {"text": Path(args.text).name, "ctx": args.ctx, "chunks": args.chunks, "rows": result}


def texts(args: argparse.Namespace) -> dict[str, Any]:
    """Rows of `bench quality` per text, each with its mean KLD over that of the first text."""
    result: list[dict[str, Any]] = []
    with open_model(model.resolve(args.model), ngl=args.ngl) as loaded:
        for path in args.texts:
            rows = score(loaded, args, bench.read_text(path))
            result += [{"text": Path(path).name} | asdict(row) for row in rows]
    first = {row["kv"]: row["kld_mean"] for row in result[: len(rows)]}
    result = [row | {"to_first": ratio(row["kld_mean"], first[row["kv"]])} for row in result]
    show("KLD by text", result, ["text", "kv", "ppl_base", "kld_mean", "to_first"])
    return {"ctx": args.ctx, "chunks": args.chunks, "rows": result}


def outliers(args: argparse.Namespace) -> dict[str, Any]:
    """Rows of `bench quality` on the model and on its outlier model, and the ratio of their mean KLDs.

    f16_kld: mean KLD between the two models with an f16 cache, over one window; it is the noise of the measurement, since
    both compute the same.
    """
    from make_outlier_model import make

    text, path, options = bench.read_text(args.text), model.resolve(args.model), kv_options(args)
    own = replace(options, profile=options.profile and "auto")  # a --profile is that of the original
    rows: list[list[bench.QualityRow]] = []
    base: np.ndarray | None = None
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / f"{path.stem}-outliers.gguf"
        try:
            make(path, other, args.seed)
        except ValueError as error:
            raise SeqkvError(str(error)) from None
        for file, profile in ((path, options), (other, own)):
            with open_model(file, ngl=args.ngl) as loaded:
                window = bench.window_tokens(loaded, text, args.ctx, 1)[0]
                first = args.ctx // 2
                with bench.open_cache(loaded, F16, n_ctx=args.ctx, options=profile, threads=args.threads, force=args.force) as context:
                    if base is None:
                        base = bench.window_logits(context, window, first, lambda _n: None)
                    else:
                        f16_kld = float(bench.compare_window(base, context, window, first, lambda _n: None).kld.mean())
                rows.append(score(loaded, args, text, options=profile))
    result = [
        asdict(a) | {"kld_mean_outliers": b.kld_mean, "ppl_outliers": b.ppl, "to_original": ratio(b.kld_mean, a.kld_mean)} for a, b in zip(*rows)
    ]
    show(f"KLD with outliers in the keys (between the models in f16: {f16_kld:.6f})", result, ["kv", "kld_mean", "kld_mean_outliers", "to_original"])
    settings = {"text": Path(args.text).name, "ctx": args.ctx, "chunks": args.chunks, "seed": args.seed}
    return settings | {"f16_kld": f16_kld, "rows": result}


# --- greedy answers ---


def generate(context: Context, sampler: Sampler, tokens: Sequence[int], n: int) -> list[int]:
    """Evaluate tokens behind what the cache holds; the greedy answer of at most n tokens, with the token that ends it."""
    context.evaluate(tokens)
    answer: list[int] = []
    while True:
        token = sampler.sample(context)
        answer.append(token)
        if len(answer) == n or context.model.is_end(token):
            return answer
        context.evaluate([token])


def agreement(base: Sequence[int], other: Sequence[int], n: int) -> int:
    """Tokens until two answers of at most n tokens differ; n when they are equal, also when both ended before."""
    return n if list(base) == list(other) else common_prefix(base, other)


def prompt_tokens(context: Context, text: str) -> list[int]:
    """Tokens of one user message in the model's chat template."""
    prompt = Template(context).render([{"role": "user", "content": text}]).decode("utf-8", "surrogateescape")
    return context.model.tokenize(prompt, add_special=False, parse_special=True)


def open_all(loaded: Model, args: argparse.Namespace, kvs: list[QualityKv], n_ctx: int) -> Iterator[tuple[QualityKv, Context]]:
    """A context of n_ctx tokens per KV type, one after the other. All are tried with a short one first."""
    settings: dict[str, Any] = {"options": kv_options(args), "threads": args.threads, "force": args.force}
    for size in (256, n_ctx):
        for kv in kvs:
            with bench.open_cache(loaded, kv, n_ctx=size, **settings) as context:
                if size == n_ctx:
                    yield kv, context


def with_f16(args: argparse.Namespace) -> list[QualityKv]:
    """The KV types of --kv behind f16."""
    return list(dict.fromkeys([F16, *bench.parse_quality_list(args.kv, kv_options(args))]))


def greedy(args: argparse.Namespace) -> dict[str, Any]:
    """Per prompt and type: the number of tokens for which the greedy answer is f16's.

    The row "uncoded" is the seqkv cache with everything in its exact window: it differs from f16 by the order and rounding
    of sums alone, so that agreement as short as its own says nothing about a type.
    """
    prompts, n = PROMPTS[: args.prompts], args.n
    if not prompts or n < 1:
        raise UsageError("--prompts and -n must be at least 1")
    options = kv_options(args)
    answers: dict[str, list[list[int]]] = {}
    with open_model(model.resolve(args.model), ngl=args.ngl) as loaded:
        kvs = with_f16(args)
        sampler = Sampler(loaded, Sampling(temp=0))

        def run(label: str, context: Context) -> None:
            answers[label] = []
            for question in questions:
                context.clear()
                answers[label].append(generate(context, sampler, question, n))
                advance(1)

        try:
            with bench.open_cache(loaded, F16, n_ctx=256, options=options) as context:
                questions = [prompt_tokens(context, prompt) for prompt in prompts]
            n_ctx = max(map(len, questions)) + n
            exact = KvOptions(0, fit.pad_ctx(n_ctx), None)
            with bench.progress_bar("greedy, answers", (len(kvs) + 1) * len(prompts)) as advance:
                for kv, context in open_all(loaded, args, kvs, n_ctx):
                    run(str(kv), context)
                settings: dict[str, Any] = {"options": exact, "threads": args.threads, "force": args.force}
                with bench.open_cache(loaded, QualityKv.parse("seqkv4"), n_ctx=n_ctx, **settings) as context:
                    run("uncoded", context)
        finally:
            sampler.close()
    base = answers.pop(str(F16))
    agree = {label: [agreement(a, b, n) for a, b in zip(base, other)] for label, other in answers.items()}
    rows = [
        {"kv": kv, "median": statistics.median(found), "mean": statistics.mean(found), "to_the_end": sum(x == n for x in found)}
        for kv, found in agree.items()
    ]
    show(f"tokens until the greedy answer differs from f16's (at most {n}, {len(prompts)} prompts)", rows, list(rows[0]))
    details = [
        {"prompt": prompt, "f16_tokens": len(base[i]), "agreement": {kv: found[i] for kv, found in agree.items()}}
        for i, prompt in enumerate(prompts)
    ]
    return {"n": n, "rows": rows, "prompts": details}


# --- retrieval ---


@dataclass(frozen=True)
class Format:
    """How a fact is planted and asked for; {city} and {number} are filled in."""

    needle: str
    question: str
    start: str
    """beginning of the answer, given to the model"""


_FACT, _TWICE = "The secret number of {city} is {number}.", "Remember this: the secret number of {city} is {number}. "
FORMATS = {
    "asked": Format(_FACT, "What is the secret number of {city}?", ""),
    "begun": Format(_FACT, "What is the secret number of {city}?", "The secret number of {city} is"),
    "repeated": Format(_TWICE + _FACT, "What is the secret number of {city}? Answer with the number only.", ""),
    "repeated and begun": Format(_TWICE + _FACT, "What is the secret number of {city}?", "The secret number of {city} is"),
}
N_ANSWER = 24
"""tokens of an answer"""


def found(answer: str, number: str) -> bool:
    """Whether the answer names the number, digits grouped or not."""
    return number in re.findall(r"\d+", re.sub(r"(?<=\d)[,\s](?=\d)", "", answer))


def cuts(text: str, n: int) -> list[int]:
    """n offsets in the text, evenly spread, each at the end of a sentence or line: after its last character."""
    result = []
    for i in range(n):
        end = int(len(text) * (i + 0.5) / n)
        cut = max(text.rfind(". ", 0, end) + 1, text.rfind("\n", 0, end))
        if cut <= (result[-1] if result else 0):
            raise UsageError("the text has too few sentences or lines to plant facts between: use another --text or fewer --depths")
        result.append(cut)
    return result


class Haystack:
    """Prompts with a fact at one of several depths of a text. All prompts of a depth begin with the same tokens."""

    def __init__(self, context: Context, text: str, n_tokens: int, n_depths: int) -> None:
        self.model = loaded = context.model
        tokens = loaded.tokenize(text[: n_tokens * 16], add_special=False, parse_special=False)
        if len(tokens) < n_tokens:
            raise UsageError(f"the text has {len(tokens)} tokens, {n_tokens} are needed: use more text or fewer --tokens")
        self.text = b"".join(map(loaded.piece, tokens[:n_tokens])).decode("utf-8", "ignore").strip()
        self.cuts = cuts(self.text, n_depths)
        mark = "\x02"
        rendered = Template(context).render([{"role": "user", "content": mark}]).decode("utf-8", "surrogateescape")
        head, _, self._tail = rendered.partition(mark)
        pieces = [self.text[a:b] for a, b in zip([0, *self.cuts], self.cuts)]
        self.segments = [self._tokens(piece) for piece in pieces]
        """what a depth's prefix has more than the one before"""
        self.segments[0] = self._tokens(head, special=True) + self.segments[0]

    def _tokens(self, text: str, special: bool = False) -> list[int]:
        return self.model.tokenize(text, add_special=False, parse_special=special) if text else []

    def rest(self, depth: int, form: Format, city: str, number: str) -> list[int]:
        """Tokens behind the prefix of a depth: the fact, the rest of the text, the question, the answer's beginning."""
        needle, question, start = (part.format(city=city, number=number) for part in (form.needle, form.question, form.start))
        body = f" {needle}{self.text[self.cuts[depth] :]}\n\n{question}"
        return self._tokens(body) + self._tokens(self._tail, special=True) + self._tokens(start)


def ask_all(context: Context, stack: Haystack, form: Format, facts: list[tuple[str, str]], advance: Any) -> list[list[bool]]:
    """(depths, facts): whether the model finds each fact. A depth's prefix is evaluated once and restored for each fact."""
    results: list[list[bool]] = []
    prefix: list[int] = []
    sampler = Sampler(context.model, Sampling(temp=0))
    try:
        with tempfile.TemporaryDirectory() as folder:
            state = Path(folder) / "prefix"
            context.clear()
            for depth, segment in enumerate(stack.segments):
                if prefix:
                    context.load_state(state, len(prefix))
                context.evaluate(segment)
                prefix += segment
                context.save_state(state)
                results.append([])
                for city, number in facts:
                    if context.n_past > len(prefix):
                        context.load_state(state, len(prefix))
                    answer = generate(context, sampler, stack.rest(depth, form, city, number), N_ANSWER)
                    text = b"".join(map(context.model.piece, answer)).decode("utf-8", "replace")
                    results[-1].append(found(text, number))
                    advance(1)
    finally:
        sampler.close()
    return results


def retrieval(args: argparse.Namespace) -> dict[str, Any]:
    """Successes per type and depth. The format is the one of FORMATS that f16 does best with on a few facts."""
    if args.facts > len(CITIES) or min(args.facts, args.trial, args.depths) < 1:
        raise UsageError(f"--facts must be 1 to {len(CITIES)}, --trial and --depths at least 1")
    rng = np.random.default_rng(args.seed)
    facts = list(zip(CITIES, map(str, rng.choice(np.arange(10000, 100000), size=len(CITIES), replace=False))))
    trial = facts[-args.trial :]
    facts = facts[: args.facts]
    text = bench.read_text(args.text)
    with open_model(model.resolve(args.model), ngl=args.ngl) as loaded:
        kvs = with_f16(args)
        with bench.open_cache(loaded, F16, n_ctx=256, options=kv_options(args)) as context:
            stack = Haystack(context, text, args.tokens, args.depths)
        longest = max(len(stack.rest(0, form, *fact)) for form in FORMATS.values() for fact in facts + trial)
        n_ctx = len(stack.segments[0]) + longest + N_ANSWER + 64  # cut elsewhere, the text may have some tokens more
        results: dict[QualityKv, list[list[bool]]] = {}
        total = args.depths * (len(FORMATS) * len(trial) + len(kvs) * len(facts))
        with bench.progress_bar("retrieval, questions", total) as advance:
            for kv, context in open_all(loaded, args, kvs, n_ctx):
                if kv == F16:
                    trials = {name: int(np.sum(ask_all(context, stack, form, trial, advance))) for name, form in FORMATS.items()}
                    best = max(trials, key=lambda name: trials[name])
                results[kv] = ask_all(context, stack, FORMATS[best], facts, advance)
    base = np.array(results[F16])
    rows = []
    for kv in kvs:
        got = np.array(results[kv])
        rows.append({
            "kv": str(kv), "successes": int(got.sum()), "of": got.size, "by_depth": [int(x) for x in got.sum(axis=1)],
            "lost": int((base & ~got).sum()), "gained": int((got & ~base).sum()),
        })  # fmt: skip
    show(f"planted facts found, format: {best}", rows, list(rows[0]))
    settings = {"text": Path(args.text).name, "tokens": args.tokens, "facts": len(facts), "seed": args.seed}
    depths = [cut / len(stack.text) for cut in stack.cuts]
    return settings | {"format": best, "trials": trials, "trials_of": args.depths * len(trial), "depths": depths, "rows": rows}


# --- command ---


def show(title: str, rows: list[dict[str, Any]], names: list[str]) -> None:
    """A table of some fields of the rows on standard output."""

    def cell(name: str, value: Any) -> str:
        return "  ".join(bench.format_cell(name, x) for x in value) if isinstance(value, list) else bench.format_cell(name, value)

    bench.print_records(title, [{name.replace("_", " "): cell(name, row[name]) for name in names} for row in rows])


def merge(path: Path, name: str, result: dict[str, Any]) -> None:
    """Put a result under its name into a JSON file; what else the file holds stays. Raises SeqkvError."""
    try:
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(results, dict):
            raise ValueError("it is not a JSON object")
        path.write_text(json.dumps(results | {name: result}, indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SeqkvError(f"cannot add the result to {path} ({error}): give another --json FILE") from None


COMMANDS = {"drift": drift, "texts": texts, "outliers": outliers, "greedy": greedy, "retrieval": retrieval}
DEFAULT_KV = {name: "q8_0,q5_0,q4_0,seqkv4,seqkv3,seqkv2" for name in COMMANDS} | {name: "q8_0,seqkv4,seqkv3" for name in ("greedy", "retrieval")}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, function in COMMANDS.items():
        command = commands.add_parser(name, description=function.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        cli._add_model(command)
        command.add_argument("--kv", default=DEFAULT_KV[name], metavar="LIST", help=f"as for bench quality (default {DEFAULT_KV[name]})")
        cli._add_kv_options(command)
        command.add_argument("--json", type=Path, default=Path("docs/quality-checks.json"), metavar="FILE", help="default docs/quality-checks.json")
        numbers: dict[str, tuple[int, str]] = {}
        if name in ("drift", "texts", "outliers"):
            numbers = {"ctx": (8192 if name == "drift" else 2048, "window in tokens"), "chunks": (2 if name == "drift" else 4, "windows")}
        if name == "texts":
            command.add_argument("texts", nargs="+", metavar="FILE", help="texts to score; the first is what the others are compared with")
        elif name != "greedy":
            command.add_argument("--text", required=True, metavar="FILE", help="filler" if name == "retrieval" else "text to score")
        if name == "outliers":
            numbers["seed"] = (0, "which pairs are scaled")
        elif name == "greedy":
            numbers = {"n": (256, "tokens of an answer"), "prompts": (len(PROMPTS), "how many of the prompts")}
        elif name == "retrieval":
            numbers = {
                "tokens": (6000, "tokens of filler"), "depths": (5, "places to plant a fact"), "facts": (20, "facts at each depth"),
                "trial": (2, "other facts at each depth to choose the format with"), "seed": (0, "of the numbers"),
            }  # fmt: skip
        for option, (default, text) in numbers.items():
            dash = "-" if len(option) == 1 else "--"
            command.add_argument(f"{dash}{option}", type=int, default=default, metavar="N", help=f"{text} (default {default})")
    return top


def main() -> None:
    args = parser().parse_args()
    llama.log.echo = False
    try:
        result = COMMANDS[args.command](args)
        merge(args.json, args.command, {"model": model.resolve(args.model).name} | result)
    except SeqkvError as error:
        sys.exit(f"quality_checks.py: {error}")


if __name__ == "__main__":
    main()
