"""The `calibrate` command: makes a model's profile."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import model, profile
from .bench import read_text
from .engine import open_model
from .errors import SeqkvError


def run(args: argparse.Namespace) -> int:
    """The command. Returns the exit status."""
    path = model.resolve(args.model)
    text = None if args.text is None else read_text(args.text)
    with open_model(path, ngl=args.ngl) as loaded:
        assert loaded.pointer
        target = Path(args.output) if args.output else profile.beside(path)
        if not target.parent.is_dir():
            raise SeqkvError(f"cannot write {target}: {target.parent} is not a directory; choose another place with -o")
        seconds = profile.estimate(loaded.pointer, path, args.tokens)
        print(f"calibration on {args.tokens} tokens: about {_duration(seconds)} on this machine", file=sys.stderr)
        try:
            info = profile.make(loaded.pointer, path, target, text=text, n_tokens=args.tokens)
        except OSError as error:
            reason = error.strerror or error
            raise SeqkvError(f"cannot write {target}: {reason}; choose another place with -o") from None
    print(f"{target}: profile of {info.model_name} ({info.model_id[:8]}) from {info.n_tokens} tokens")
    if info.quality:
        print("mean KLD against f16 on the text behind them: "
              + ", ".join(f"{kv} {kld:.4f}" for kv, kld in info.quality.items()))  # fmt: skip
    return 0


def _duration(seconds: float) -> str:
    return f"{max(1, round(seconds))} s" if seconds < 120 else f"{seconds / 60:.0f} min"
