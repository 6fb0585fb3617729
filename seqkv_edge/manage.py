"""The `session` command: what is in the store, and taking it out, in and away."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import bench, coders, exchange, fit, policy, session
from .errors import StoreError, UsageError
from .state import FRAME
from .store import Node, SessionInfo, Store, default_path


def open_store(path: str | None, *, create: bool = False) -> Store:
    """The store of --store DIR, or the default one."""
    return Store(Path(path) if path else default_path(), create=create)


def tier(info: SessionInfo, path: list[Node]) -> str:
    """Where a session's state is: "stored", "stored, lossy", "stored + tokens" (a part is evaluated again) or "tokens"."""
    whole = next((i for i, node in enumerate(path) if node.level is None), len(path))
    if whole * FRAME + (info.tail_size > 0 or info.n_tokens % FRAME == 0) * len(info.tail_tokens) >= info.n_tokens:
        return "stored, lossy" if any(coders.is_lossy(node.level) for node in path) else "stored"
    return "stored + tokens" if whole else "tokens"


Paths = dict[str, list[Node]]


def paths(store: Store) -> Paths:
    """The nodes of every session, from the root."""
    nodes = {node.id: node for node in store.nodes()}
    found: Paths = {}
    for info in store.sessions():
        path, id_ = found.setdefault(info.name, []), info.node
        while id_ is not None and id_ in nodes:
            path.append(nodes[id_])
            id_ = nodes[id_].parent
        path.reverse()
    return found


def describe(store: Store, found: Paths) -> list[dict[str, Any]]:
    """The sessions of `paths` as JSON. bytes: of a session's chunks, also those shared with others; own_bytes: of those that no other has."""
    users = Counter(node.id for path in found.values() for node in path)
    return [_describe(store, info, found[info.name], users) for info in store.sessions() if info.name in found]


def _describe(store: Store, info: SessionInfo, path: list[Node], users: Counter[bytes]) -> dict[str, Any]:
    identity = store.context_of(info.context)
    size = [n.size if n.level is not None else 0 for n in path]
    rest = info.tail_size + info.coded_size + 4 * len(info.tail_tokens)
    n_bits = sum(n.surprisal.n for n in path)
    return {
        "name": info.name, "model": identity.model_name, "kv": identity.kv, "tokens": info.n_tokens, "tier": tier(info, path),
        "frames": len(path), "turns": len(info.data.get("turns") or []), "messages": len(info.data.get("messages") or []),
        "bytes": sum(size) + rest, "own_bytes": sum(s for s, n in zip(size, path) if users[n.id] == 1) + rest,
        "bits_per_token": sum(n.surprisal.bits for n in path) / n_bits if n_bits else None, "bits_known_tokens": n_bits,
        "coder": info.coder, "created": info.created, "used": info.used, "in_use": store.locked(info.name),
    }  # fmt: skip


def _list(store: Store, args: argparse.Namespace) -> int:
    found = describe(store, paths(store))
    if args.json:
        print(json.dumps({"path": str(store.path), "bytes": store.bytes(), "sessions": found}, indent=2))
        return 0
    if not found:
        print(f"no sessions in {store.path}")
        return 0
    rows = [
        {
            "session": d["name"], "tokens": f"{d['tokens']:,}", "size": fit.format_size(d["bytes"]), "own": fit.format_size(d["own_bytes"]),
            "tier": d["tier"], "KV": d["kv"], "model": d["model"], "used": _ago(d["used"]) + (" (open)" if d["in_use"] else ""),
        }
        for d in found
    ]  # fmt: skip
    bench.print_records(f"{store.path}, {fit.format_size(store.bytes())}", rows)
    return 0


def _ago(when: float) -> str:
    seconds = max(0.0, time.time() - when)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return "now"


def _node_tier(node: Node) -> str:
    return "tokens" if node.level is None else "lossy" if coders.is_lossy(node.level) else "stored"


def segments(store: Store) -> list[dict[str, Any]]:
    """The trie without its unbranched stretches: each segment is a run of frames with one child, one set of sessions and one tier.

    id of its last node, parent: id of the segment before it (None: the root), from, tokens, bits, bits_known, bytes, tier, sessions.
    """
    nodes = store.nodes()
    children: dict[bytes | None, list[Node]] = {}
    for node in nodes:
        children.setdefault(node.parent, []).append(node)
    through: dict[bytes, list[str]] = {}
    for name, path in paths(store).items():
        for node in path:
            through.setdefault(node.id, []).append(name)
    found: list[dict[str, Any]] = []
    stack: list[tuple[Node, str | None]] = [(node, None) for node in reversed(children.get(None, []))]
    while stack:
        first, parent = stack.pop()
        run = [first]
        names, level = through.get(first.id, []), _node_tier(first)
        while len(below := children.get(run[-1].id, [])) == 1 and through.get(below[0].id, []) == names and _node_tier(below[0]) == level:
            run.append(below[0])
        id_ = run[-1].id.hex()[:16]
        found.append({
            "id": id_, "parent": parent, "from": FRAME * first.depth, "tokens": FRAME * len(run),
            "bits": sum(n.surprisal.bits for n in run), "bits_known_tokens": sum(n.surprisal.n for n in run),
            "bytes": sum(n.size for n in run if n.level is not None), "tier": level,
            "hits": max(n.hits for n in run), "private": first.private, "sessions": names, "nodes": [n.id for n in run],
        })  # fmt: skip
        stack += [(node, id_) for node in reversed(children.get(run[-1].id, []))]
    return found


def _bits(segment: dict[str, Any]) -> str:
    n = segment["bits_known_tokens"]
    return "-" if not n else f"{segment['bits']:.0f} bits" + (f" of {n} tokens" if n < segment["tokens"] else "")


def _show(store: Store, args: argparse.Namespace) -> int:
    if args.name is not None:
        store.session(args.name)
    found = segments(store)
    if args.name is not None:
        found = [s for s in found if args.name in s["sessions"]]
    sessions = [d for d in describe(store, paths(store)) if args.name in (None, d["name"])]
    scores = policy.scores(store) if args.why or args.json else {}
    for segment in found:
        values = [scores.get(id_, 0.0) for id_ in segment.pop("nodes")]
        segment["score"] = min(values, default=0.0)
    shared = _shared(store, args.name) if args.name is not None else []
    events = [{"time": t, "what": what, "why": why} for t, what, why in store.events()]
    if args.plot:
        plot(found, Path(args.plot))
    if args.json:
        print(json.dumps({"bytes": store.bytes(), "sessions": sessions, "segments": found, "shared": shared, "events": events}, indent=2))
        return 0
    from rich.console import Console
    from rich.tree import Tree

    root = Tree(f"{store.path}, {fit.format_size(store.bytes())}")
    branches = {None: root}
    for segment in found:
        text = f"{segment['tokens']} tokens, {_bits(segment)}, {fit.format_size(segment['bytes'])}"
        text += {"stored": "", "lossy": " (with loss)", "tokens": " (tokens only)"}[segment["tier"]]
        ends = [d["name"] for d in sessions if d["name"] in segment["sessions"] and _ends_here(store, d["name"], segment)]
        for name in ends:
            info = store.session(name)
            text += f"  <- {name}" + (f" + {len(info.tail_tokens)} tokens" if info.tail_tokens else "")
        if args.why:
            text += f"; worth {segment['score']:.3g} a byte: {len(segment['sessions'])} sessions, found {segment['hits']} times"
        branches[segment["id"]] = branches.get(segment["parent"], root).add(text)
    for d in sessions:
        if not d["frames"]:
            root.add(f"{d['name']}: {d['tokens']} tokens, {fit.format_size(d['bytes'])} ({d['tier']}{', coded: ' + d['coder'] if d['coder'] else ''})")
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=200)
    console.print(root)
    for d in shared:
        known = "" if d["bits_known_tokens"] == d["tokens"] else f" in the {d['bits_known_tokens']} whose logits were at hand"
        console.print(f"d_T to {d['name']}: {d['tokens']} tokens in common, {d['bits']:.0f} bits{known}")
    if args.why:
        for event in events:
            if args.name is None or event["what"] == f"session {args.name}" or event["what"].startswith("chunk "):
                console.print(f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(event['time']))}  {event['what']}: {event['why']}")
    return 0


def _shared(store: Store, name: str) -> list[dict[str, Any]]:
    """The trie metric of a session to the others that begin like it, the closest first."""
    found = []
    for info in store.sessions():
        if info.name != name:
            bits, n, known = store.distance(name, info.name)
            if n:
                found.append({"name": info.name, "tokens": n, "bits": bits, "bits_known_tokens": known})
    return sorted(found, key=lambda d: (-d["tokens"], d["name"]))


def _ends_here(store: Store, name: str, segment: dict[str, Any]) -> bool:
    node = store.session(name).node
    return node is not None and node.hex()[:16] == segment["id"]


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """The trie as a picture: depth to the right, a row per leaf, colour and width by the sessions that share a segment."""
    pyplot = bench.plotter()
    by_parent: dict[str | None, list[dict[str, Any]]] = {}
    for segment in found:
        by_parent.setdefault(segment["parent"], []).append(segment)
    shown = {s["id"] for s in found}
    rows: dict[str, float] = {}
    n_leaves = 0
    for segment in reversed(found):  # children before parents
        below = [rows[s["id"]] for s in by_parent.get(segment["id"], [])]
        if below:
            rows[segment["id"]] = sum(below) / len(below)
        else:
            rows[segment["id"]], n_leaves = float(n_leaves), n_leaves + 1
    figure, axes = pyplot.subplots(figsize=(9, max(2.0, 0.4 * n_leaves + 1)), layout="constrained")
    most = max((len(s["sessions"]) for s in found), default=1) or 1
    for segment in found:
        y, start = rows[segment["id"]], segment["from"]
        colour = pyplot.get_cmap("viridis")(len(segment["sessions"]) / most)
        width, style = 1.5 + 4 * len(segment["sessions"]) / most, {"stored": "-", "lossy": "--", "tokens": ":"}[segment["tier"]]
        axes.plot([start, start + segment["tokens"]], [y, y], style, color=colour, linewidth=width)
        if segment["parent"] in shown:
            axes.plot([start, start], [rows[segment["parent"]], y], "-", color="0.6", linewidth=1)
        if not by_parent.get(segment["id"]):
            axes.text(start + segment["tokens"], y, "  " + ", ".join(segment["sessions"][:3]), va="center", fontsize=8)
    axes.set(xlabel="tokens", title="frames by the sessions that share them (dashed: with loss, dotted: tokens only)")
    axes.set_yticks([])
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _export(store: Store, args: argparse.Namespace) -> int:
    n = exchange.export_session(store, args.name, Path(args.file))
    print(f"{args.file}: {fit.format_size(n)}")
    return 0


def _import(store: Store, args: argparse.Namespace) -> int:
    name = exchange.import_session(store, Path(args.file), args.name)
    print(f"session {name!r}: {store.session(name).n_tokens} tokens")
    return 0


def _fork(store: Store, args: argparse.Namespace) -> int:
    info = session.fork(store, args.name, args.new, args.turn)
    print(f"session {info.name!r}: {info.n_tokens} tokens of {args.name!r}")
    return 0


def _pack_lossy(store: Store, args: argparse.Namespace) -> str:
    """`session pack --lossy KLD`. Returns the line to print."""
    from . import lossy, model
    from .dropin import KvOptions
    from .engine import open_model
    from .gguf_meta import fingerprint
    from .llama import KvSpec

    info = store.session(args.name)
    identity, file = store.context_of(info.context), model.resolve(args.model)
    if fingerprint(file) != identity.model_id:
        raise UsageError(f"session {args.name!r} is of {identity.model_name}, not of {file.name}: give its model with --model")
    chunks, error = store.restore(path := store.path_to(info.node))
    if error is not None:
        raise error
    tokens = [token for node in path for token in node.tokens]
    options = KvOptions(*session.window_of(identity.layout), predictors=True)
    with open_model(file, ngl=args.ngl) as loaded:
        with loaded.context(KvSpec.parse(identity.kv), n_ctx=info.n_tokens + FRAME, options=options, threads=args.threads) as context:
            profile = loaded.profile
            coder = coders.predictors(profile, identity.layout) if profile else None
            if session.identify(context).key != identity.key or profile is None or coder is None:
                raise StoreError(f"the profile of {file.name} has no predictors, or is not that of session {args.name!r}: it stays as it is")
            step, kld = lossy.choose(context, identity.layout, tokens, chunks, coder, args.lossy)
    n, before, after = store.make_lossy(args.name, profile, step)
    if not n:
        return f"session {args.name!r}: other sessions share its frames, or they have a loss already: nothing was done"
    fewer = f"keys in {step[5]} and values in {step[6]} bits a value fewer"
    return f"session {args.name!r}: {n} frames, {fewer}: {before:,} -> {after:,} bytes; KLD {kld:.4f} from what they were (over its last tokens)"


def _pack(store: Store, args: argparse.Namespace) -> int:
    from . import model, model_coder
    from . import tokens as adaptive
    from .engine import open_model
    from .gguf_meta import fingerprint

    info = store.session(args.name)
    lock = store.lock(args.name)
    if not lock.take():
        raise StoreError(f"session {args.name!r} is in use by another process: end that first")
    try:
        if args.lossy is not None:
            print(_pack_lossy(store, args))
            return 0
        if args.adaptive:
            found = store.tokens(info)
            coder, coded = "adaptive", adaptive.encode(found)
            if adaptive.decode(coded) != found:
                raise StoreError(f"the tokens of session {args.name!r} do not survive coding: they were kept as they are")
        else:
            file = model.resolve(args.model)
            identity = store.context_of(info.context)
            if fingerprint(file) != identity.model_id:
                raise UsageError(f"session {args.name!r} is of {identity.model_name}, not of {file.name}: give its model with --model")
            with open_model(file, ngl=args.ngl) as loaded, bench.progress_bar("coding, then decoding", 2 * info.n_tokens) as advance:
                found = store.tokens(info, lambda data: model_coder.decode(loaded, data, threads=args.threads))
                coder, coded = "model", model_coder.encode(loaded, found, advance, threads=args.threads)
        store.set_coded(args.name, coder, coded, len(found))
    finally:
        lock.free()
    print(f"session {args.name!r}: {len(found)} tokens in {len(coded):,} bytes, {8 * len(coded) / max(1, len(found)):.2f} bits each")
    return 0


def _rm(store: Store, args: argparse.Namespace) -> int:
    for name in args.name:
        store.session(name)
    print(f"freed {fit.format_size(sum(store.delete(name) for name in args.name))}")
    return 0


def _gc(store: Store, args: argparse.Namespace) -> int:
    removed = store.gc(args.limit, grace=0.0)
    if args.json:
        print(json.dumps(asdict(removed)))
        return 0
    r = removed
    print(
        f"freed {fit.format_size(max(0, r.bytes))}: {r.nodes} frames without a session, {r.chunks} chunks and {r.tails} tails dropped, "
        f"{r.coded} sessions kept as tokens, {r.sessions} removed; {r.files} files"
    )
    return 0


def _verify(store: Store, args: argparse.Namespace) -> int:
    problems = store.verify()
    if args.json:
        print(json.dumps([asdict(p) for p in problems], indent=2))
    else:
        for problem in problems:
            print(f"{problem.where}: {problem.what}")
        print(f"{len(store.nodes())} frames, {len(store.sessions())} sessions: " + (f"{len(problems)} problems" if problems else "all right"), file=sys.stderr)
    return 1 if problems else 0


_ACTIONS: dict[str, Callable[[Store, argparse.Namespace], int]] = {
    "list": _list, "show": _show, "export": _export, "import": _import, "fork": _fork, "pack": _pack, "rm": _rm, "gc": _gc, "verify": _verify,
}  # fmt: skip


def _budget(text: str) -> float:
    value = float(text)
    if not 0 < value < 100:
        raise ValueError
    return value


def add_arguments(parser: argparse.ArgumentParser, parser_class: type) -> None:
    """The command line of `session`."""
    kinds = parser.add_subparsers(dest="what", required=True, metavar="|".join(_ACTIONS), parser_class=parser_class)
    texts = {
        "list": "sessions, the last used first",
        "show": "the tree of all sessions, or of one: tokens, surprisal, bytes",
        "export": "write a session to one file",
        "import": "add a session from a file",
        "fork": "a new session that begins like another, up to a turn of it",
        "pack": "keep a session as tokens alone, coded with its model's probabilities (an evaluation of each token, twice); or, with --lossy, its cache in fewer bits",
        "rm": "remove sessions, and the frames that no other one needs",
        "gc": "remove what no session needs; with --store-size, degrade what is worth least until the store fits",
        "verify": "compare everything with its checksums (status 1: something is damaged)",
    }
    for name, text in texts.items():
        kind = kinds.add_parser(name, help=text, description=text)
        kind.add_argument("--store", metavar="DIR", help=f"directory of the store (default {default_path()})")
        kind.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        if name in ("list", "show", "gc", "verify"):
            kind.add_argument("--json", action="store_true", help="print JSON")
        if name == "show":
            kind.add_argument("name", nargs="?", metavar="NAME", help="this session alone")
            kind.add_argument("--why", action="store_true", help="what each part is worth, and what was dropped and why")
            kind.add_argument("--plot", metavar="FILE.png", help="draw the tree")
        elif name == "rm":
            kind.add_argument("name", nargs="+", metavar="NAME")
        elif name == "export":
            kind.add_argument("name", metavar="NAME")
            kind.add_argument("file", metavar="FILE")
        elif name == "import":
            kind.add_argument("file", metavar="FILE")
            kind.add_argument("--name", metavar="NAME", help="default: its name in the file")
        elif name == "fork":
            kind.add_argument("name", metavar="NAME")
            kind.add_argument("new", metavar="NEW")
            kind.add_argument("--turn", type=int, metavar="N", help="1: after the first answer, -1: after the last (default: all of it)")
        elif name == "pack":
            kind.add_argument("name", metavar="NAME")
            kind.add_argument("--adaptive", action="store_true", help="without the model: about twice the size, at once, decodable everywhere")
            kind.add_argument(
                "--lossy", type=_budget, metavar="KLD", help="keep the cache, in fewer bits: the most that changes the next tokens by this on average "
                "(nats, .01 for example); what other sessions share stays exact"
            )
            kind.add_argument("--model", metavar="FILE.gguf", help="the session's model (default: SmolLM2-135M-Instruct)")
            kind.add_argument("--ngl", type=int, metavar="N", help="layers on the GPU")
            kind.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
        elif name == "gc":
            kind.add_argument("--store-size", metavar="SIZE", help="for example 2G")


def run(args: argparse.Namespace) -> int:
    """The command. Returns the exit status."""
    if args.what == "gc":
        args.limit = None if args.store_size is None else fit.parse_size(args.store_size)
    with open_store(args.store, create=args.what == "import") as store:
        return _ACTIONS[args.what](store, args)
