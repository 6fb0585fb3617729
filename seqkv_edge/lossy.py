"""How much loss a stored session may have: the largest step whose distance, measured on the session itself, is within a budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import bench, coders, delta, state
from .engine import Context
from .errors import StoreError
from .state import FRAME, Chunk, Layout

STEPS = ("lossy01", "lossy11", "lossy12", "lossy22")
"""levels (coders.py), from the least loss to the most"""
_SCORED = 256
"""last tokens of a session that are compared"""


def choose(context: Context, layout: Layout, tokens: Sequence[int], chunks: Sequence[Chunk], coder: delta.Coder, budget: float) -> tuple[str, float]:
    """(level, mean KLD in nats) of the last of STEPS within `budget`: the distance of the next tokens' distributions from those of
    the exact state.

    context: of the session's kind; its cache is overwritten. tokens, chunks: of the session's whole frames. The last tokens are
    evaluated behind the frames before them, once with these as they are and once as each step makes them. Raises StoreError: the
    session is too short to measure, or no step is within the budget.
    """
    n_scored = min(_SCORED, FRAME * len(chunks) // 2) // FRAME * FRAME
    before = len(chunks) - n_scored // FRAME
    if n_scored < FRAME or before < 2:
        raise StoreError(f"{FRAME * len(chunks)} tokens in whole frames are too few to measure a loss: {3 * FRAME} are needed")
    scored = list(tokens[FRAME * before : FRAME * before + n_scored])

    def logits(frames: Sequence[Chunk]) -> np.ndarray:
        """(n_scored, n_vocab) behind stored frames. The last of these is evaluated, as in a session that has lost its end."""
        n = FRAME * (before - 1)
        pieces = [(chunk, FRAME) for chunk in frames[: before - 1]]
        context.set_state(state.build(layout, pieces, tokens[:n]), tokens[:n])
        context.evaluate(tokens[n : n + FRAME])
        return np.concatenate([rows.copy() for rows in context.logits(scored, 0)])

    base = logits(chunks)
    best: tuple[str, float] | None = None
    for step in STEPS:
        path = coders.path_coder(coder, step)
        reduced = [Chunk(path.stored(chunk.blocks), chunk.extra) for chunk in chunks[: before - 1]]
        kld = float(bench.compare(base, logits(reduced), np.array(scored)).kld.mean())
        if kld > budget:
            if best is None:
                raise StoreError(f"the smallest step already has a KLD of {kld:.4f} here, above {budget:g}: allow more, or leave it exact")
            break
        best = step, kld
    assert best is not None
    return best
