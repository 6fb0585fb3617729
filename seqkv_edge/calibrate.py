"""The `calibrate` command: makes a model's profile (version 1: means)."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import model, profile
from .bench import read_text
from .engine import open_model
from .errors import ModelError, SeqkvError


def run(args: argparse.Namespace) -> int:
    """The command. Returns the exit status."""
    path = model.resolve(args.model)
    text = None if args.text is None else read_text(args.text)
    with open_model(path, ngl=args.ngl) as loaded:
        assert loaded.pointer
        target = Path(args.output) if args.output else profile.beside(path)
        try:
            info = profile.make(loaded.pointer, path, target, text=text, n_tokens=args.tokens, n_sink=args.sink)
        except OSError as error:
            reason = error.strerror or error
            raise SeqkvError(f"cannot write {target}: {reason}; choose another place with -o") from None
    if info.n_layer == 0:
        raise ModelError(f"{path} has no layers to profile")
    print(f"{target}: means of {info.n_layer} layers over {info.n_tokens} tokens, for model {info.model_id[:8]}")
    return 0
