"""What a store gives up when it is larger than it may be.

First chunks go (tails, and leaves before their parents), their tokens stay; sessions that lost chunks keep their tokens coded; then
whole sessions go, the least recently used first. `session show --why` tells what was done and why.
"""

from __future__ import annotations

import heapq
import time
from typing import Any

from . import tokens
from .errors import StoreError
from .state import FRAME
from .store import Removed, Store, chunk_name

HALF_LIFE = 7 * 86400.0
"""seconds after which a reuse counts half"""
_DEPTH = 8192
"""tokens before a frame that double the work of evaluating it"""


def shrink(store: Store, limit: int) -> Removed:
    """Degrade what is worth least until the store takes at most `limit` bytes, or only sessions in use are left."""
    chunks, tails = _drop_chunks(store, limit)
    return Removed(chunks=chunks, tails=tails, coded=_code_tokens(store), sessions=_drop_sessions(store, limit))


def scores(store: Store) -> dict[bytes, float]:
    """What keeping each chunk is worth per byte: expected reuse x work saved / bytes.

    Expected reuse: the sessions through the node and the times it was found, each halved every HALF_LIFE since its last use. Work
    saved: evaluating 64 tokens, which grows with the depth (attention), in units of a frame at the start.
    """
    now = time.time()
    weight: dict[bytes, float] = {}
    nodes = {node.id: node for node in store.nodes()}
    for info in store.sessions():
        id_, w = info.node, 0.5 ** ((now - info.used) / HALF_LIFE)
        while id_ is not None and id_ in nodes:
            weight[id_] = weight.get(id_, 0.0) + w
            id_ = nodes[id_].parent
    return {
        id_: (weight.get(id_, 0.0) + node.hits * 0.5 ** ((now - node.used) / HALF_LIFE)) * (1 + node.depth * FRAME / _DEPTH) / max(1, node.size)
        for id_, node in nodes.items()
    }


def _in_use(store: Store) -> tuple[set[str], set[bytes]]:
    names = {info.name for info in store.sessions() if store.locked(info.name)}
    nodes = {node.id for info in store.sessions() if info.name in names for node in store.path_to(info.node)}
    return names, nodes


def _drop_chunks(store: Store, limit: int) -> tuple[int, int]:
    names, used = _in_use(store)
    worth, now = scores(store), time.time()
    stored = {node.id: node for node in store.nodes() if node.level is not None}
    children: dict[bytes | None, int] = {}
    for node in stored.values():
        children[node.parent] = children.get(node.parent, 0) + 1
    heap: list[tuple[float, str, Any]] = []
    for info in store.sessions():
        if info.tail_size and info.name not in names:
            depth = info.n_tokens / _DEPTH
            score = 0.5 ** ((now - info.used) / HALF_LIFE) * (1 + depth) * (len(info.tail_tokens) + 1) / FRAME / info.tail_size
            heap.append((score, "tail", info))
    heap += [(worth[id_], "chunk", node) for id_, node in stored.items() if not children.get(id_) and id_ not in used]
    heap = [(score, kind, (i, item)) for i, (score, kind, item) in enumerate(heap)]  # never compare items
    heapq.heapify(heap)
    n_chunks = n_tails = 0
    total, count = store.bytes(), len(heap)
    files: list[str] = []
    with store._change() as db:
        while total > limit and heap:
            score, kind, (_, item) = heapq.heappop(heap)
            why = f"the store was {total - limit:,} bytes over its size, and this was worth least ({score:.3g} a byte)"
            if kind == "tail":
                row = db.execute("SELECT tail FROM sessions WHERE name = ?", (item.name,)).fetchone()
                if row and row[0]:
                    files.append(row[0])
                    db.execute("UPDATE sessions SET tail = NULL, tail_size = 0 WHERE name = ?", (item.name,))
                    store._event(db, f"session {item.name}", f"dropped its last rows: {why}")
                    total -= item.tail_size
                    n_tails += 1
                continue
            db.execute("UPDATE nodes SET level = NULL WHERE id = ?", (item.id,))
            store._event(db, f"chunk {item.id.hex()[:16]}", f"dropped: {why}")
            files.append(chunk_name(item.id, item.level))
            total -= item.size
            n_chunks += 1
            children[item.parent] -= 1
            parent = stored.get(item.parent)
            if parent is not None and not children[item.parent] and parent.id not in used:
                count += 1
                heapq.heappush(heap, (worth[parent.id], "chunk", (count, parent)))
    store._sweep(files)
    return n_chunks, n_tails


def _code_tokens(store: Store) -> int:
    """Sessions whose last frame has lost its chunk keep their tokens coded, and the frames before that as they are."""
    n = 0
    for info in store.sessions():
        if info.coder is not None or info.node is None or store.locked(info.name):
            continue
        path = store.path_to(info.node)
        kept = next((i for i, node in enumerate(path) if node.level is None), len(path))
        if kept == len(path):
            continue
        found = store.tokens(info)
        coded = tokens.encode(found)
        if tokens.decode(coded) != found:
            raise StoreError(f"the tokens of session {info.name!r} do not survive coding: they were kept as they are")
        with store._change() as db:
            found_row = db.execute(
                "UPDATE sessions SET tokens = x'', tail = NULL, tail_size = 0, coder = 'adaptive', coded = ? WHERE name = ? AND node = ?",
                (coded, info.name, info.node),
            )
            if not found_row.rowcount:
                continue  # changed meanwhile
            store._release(db, info.name, kept)
            store._event(db, f"session {info.name}", f"frames {kept} to {len(path) - 1} are kept as tokens: their chunks were dropped")
        n += 1
    return n


def _drop_sessions(store: Store, limit: int) -> int:
    n = 0
    for info in reversed(store.sessions()):
        if store.bytes() <= limit:
            break
        if store.locked(info.name):
            continue
        with store._change() as db:
            store._delete(db, info.name)
            store._event(db, f"session {info.name}", f"removed: the store was over its size of {limit:,} bytes, and this was used least recently")
        store.compact()
        n += 1
    return n
