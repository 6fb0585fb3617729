"""The `chat` command: a streaming terminal chat, or one answer when piped."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import fit, model
from .conversation import Conversation
from .dropin import KvOptions
from .engine import Context, Model, Progress, Sampling, open_model
from .errors import SeqkvError, UsageError
from .llama import KvSpec

if TYPE_CHECKING:
    from .session import Session

DEFAULT_CTX = 8192
HELP = """\
/help        this text
/stats       context, memory and speed
/clear       forget the conversation (the system prompt stays)
/save FILE   write the conversation and its KV cache
/load FILE   continue a saved conversation
/quit        leave (also ctrl-D, or ctrl-C twice)
A message of several lines: paste it, or put it between two lines of \"\"\"."""


@dataclass(frozen=True)
class Answer:
    """Measurements of one answer."""

    prefill_tokens: int
    prefill_seconds: float
    tokens: int
    seconds: float


def f16_bytes(context: Context) -> int:
    """Bytes that the tokens in the cache would take in f16."""
    per_token = sum(layer.k_values + layer.v_values for layer in context.model.meta.layers)
    return 2 * per_token * context.n_past


def status_line(context: Context, answer: Answer) -> str:
    parts = [f"context {context.n_past}/{context.n_ctx}"]
    used = context.kv_bytes_used()
    if used is not None:
        parts.append(f"KV {fit.format_size(used)} (f16 {fit.format_size(f16_bytes(context))})")
    if answer.prefill_tokens > 32 and answer.prefill_seconds > 0:
        parts.append(f"prefill {answer.prefill_tokens / answer.prefill_seconds:.0f} tokens/s")
    if answer.tokens > 1 and answer.seconds > 0:
        parts.append(f"{(answer.tokens - 1) / answer.seconds:.1f} tokens/s")
    return " · ".join(parts)


@contextlib.contextmanager
def stop_on_interrupt(context: Context) -> Iterator[None]:
    """ctrl-C sets `context.stop` instead of raising."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(_signal: int, _frame: Any) -> None:
        context.stop = True

    old = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)


class Chat:
    """One chat on the terminal: answers on standard output, everything else on standard error."""

    def __init__(self, conversation: Conversation, sampling: Sampling, n_predict: int) -> None:
        from rich.console import Console

        self.conversation, self.sampling, self.n_predict = conversation, sampling, n_predict
        self.context = conversation.context
        self.err = Console(stderr=True, highlight=False)
        self.last: Answer | None = None
        conversation.notice = lambda text: self.say(f"[{text}]")

    def say(self, text: str) -> None:
        """One dim line on standard error."""
        self.err.print(text, style="dim", markup=False, soft_wrap=True)

    def answer(self, text: str) -> None:
        """Ask, and stream the answer to standard output."""
        started = time.perf_counter()
        first = 0.0
        pieces = 0
        with contextlib.ExitStack() as stack:
            stack.enter_context(stop_on_interrupt(self.context))
            bar = stack.enter_context(contextlib.ExitStack())  # closed at the first piece

            def progress(n: int) -> Progress:
                if n <= self.context.n_batch or not self.err.is_terminal:
                    return lambda _n: None
                from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

                columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
                shown = bar.enter_context(Progress(*columns, console=self.err, transient=True))
                task = shown.add_task("reading", total=n)
                return lambda done: shown.advance(task, done)

            for piece in self.conversation.ask(text, self.sampling, n_predict=self.n_predict, progress=progress):
                if not first:
                    first = time.perf_counter()
                    bar.close()
                sys.stdout.write(piece)
                sys.stdout.flush()
                pieces += 1
        ended = time.perf_counter()
        sys.stdout.write("\n" if pieces else "")
        sys.stdout.flush()
        if self.context.stop:
            self.say("[stopped]")
        self.last = Answer(
            self.conversation.prefilled,
            (first or ended) - started,
            self.conversation.produced,
            ended - first if first else 0.0,
        )

    # --- interactive ---

    def loop(self) -> None:
        """Read messages until /quit or the end of input."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing for input()
        interrupted = False
        while True:
            try:
                text = read_message()
            except EOFError:
                self.err.print()
                return
            except KeyboardInterrupt:
                self.err.print()
                if interrupted:
                    return
                interrupted = True
                self.say("[ctrl-C again, ctrl-D or /quit leaves]")
                continue
            interrupted = False
            if not text.strip():
                continue
            try:
                if text.startswith("/") and "\n" not in text:
                    if self.command(text):
                        return
                else:
                    self.answer(text)
                    assert self.last
                    self.say(status_line(self.context, self.last))
            except SeqkvError as error:
                self.err.print(f"error: {error}", style="red", markup=False)

    def command(self, line: str) -> bool:
        """Run a /command. True: leave."""
        name, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        if name in ("/quit", "/exit"):
            return True
        if name == "/help":
            self.err.print(HELP, markup=False)
        elif name == "/stats":
            self.stats()
        elif name == "/clear":
            self.conversation.clear()
            self.say("[forgotten]")
        elif name in ("/save", "/load"):
            if not argument:
                raise UsageError(f"{name} needs a file name")
            path = Path(argument).expanduser()
            if name == "/save":
                n = self.conversation.save(path)
                self.say(f"[saved {self.context.n_past} tokens, {fit.format_size(n)}]")
            else:
                self.conversation.load(path)
                self.say(f"[loaded {self.context.n_past} tokens, {len(self.conversation.messages)} messages]")
        else:
            raise UsageError(f"unknown command {name}: /help lists them")
        return False

    def stats(self) -> None:
        context = self.context
        meta = context.model.meta
        total, used = context.kv_bytes(), context.kv_bytes_used()
        lines = [
            f"model     {meta.name} ({context.model.path.name}), trained for {meta.n_ctx_train} tokens",
            f"KV type   {context.kv}",
            f"context   {context.n_past} of {context.n_ctx} tokens",
            f"f16 would take {fit.format_size(f16_bytes(context))} for them",
        ]
        if total is not None and used is not None:
            lines.insert(3, f"KV        {fit.format_size(used)} in use, {fit.format_size(total)} allocated")
        if context.model.profile:
            lines.append(f"profile   {context.model.profile}")
        if self.last:
            lines.append(f"last      {status_line(context, self.last)}")
        self.err.print("\n".join(lines), markup=False)


def read_message() -> str:
    """One message from the terminal; pasted lines and lines between triple quotes belong together."""
    line = input("> ")
    if line.strip() == '"""':
        lines: list[str] = []
        while (line := input(". ")).strip() != '"""':
            lines.append(line)
        return "\n".join(lines)
    lines = [line]
    while _waiting():
        lines.append(input())
    return "\n".join(lines)


def _waiting() -> bool:
    """Whether more input has already arrived (a paste)."""
    try:
        return bool(select.select([sys.stdin], [], [], 0.03)[0])
    except (OSError, ValueError):  # not a socket (Windows)
        return False


def _identity(loaded: Model, kv: KvSpec, options: KvOptions) -> dict[str, Any]:
    """What a saved cache of a seqkv type depends on."""
    if not kv.ours:
        return {}
    digest = hashlib.sha256(loaded.profile.read_bytes()).hexdigest() if loaded.profile else None
    return {"n_sink": options.n_sink, "n_window": options.n_window, "profile": digest}


def kv_options(args: argparse.Namespace) -> KvOptions:
    """KvOptions of --sink, --window, --profile, --no-profile, and of --session where there is one."""
    default = KvOptions()
    return KvOptions(
        default.n_sink if args.sink is None else args.sink,
        default.n_window if args.window is None else args.window,
        None if args.no_profile else args.profile or default.profile,
        getattr(args, "session", None) is not None,
    )


def run(args: argparse.Namespace) -> int:
    """The command. Returns the exit status."""
    interactive = args.prompt is None and sys.stdin.isatty()
    prompt: str | None = None
    if not interactive:
        prompt = args.prompt if args.prompt is not None else sys.stdin.read()
        if not prompt.strip():
            raise UsageError("the prompt is empty: give --prompt TEXT, or text on standard input")
    kv = KvSpec.parse(args.kv)
    if not kv.ours and (args.sink, args.window, args.profile, args.no_profile) != (None, None, None, False):
        raise UsageError(f"--sink, --window, --profile and --no-profile apply to the seqkv types, not to --kv {kv}")
    options = kv_options(args)
    sampling = Sampling(args.seed, args.temp, args.top_k, args.top_p, args.min_p, args.repeat_penalty)
    with open_model(model.resolve(args.model), ngl=args.ngl) as loaded:
        n_ctx = args.ctx or min(loaded.meta.n_ctx_train, DEFAULT_CTX)
        with loaded.context(kv, n_ctx=n_ctx, options=options, threads=args.threads, force=args.force) as context:
            conversation = Conversation(context, system=args.system, identity=_identity(loaded, kv, options))
            chat = Chat(conversation, sampling, args.n)
            if conversation.template.missing:
                chat.say(f"[{loaded.path.name} has no chat template: using plain User:/Assistant: lines]")
            if context.n_ctx > fit.pad_ctx(loaded.meta.n_ctx_train):
                chat.say(f"[the model was trained for {loaded.meta.n_ctx_train} tokens: expect nonsense beyond]")
            with contextlib.ExitStack() as stack:
                session = _open_session(args, chat, stack)
                if prompt is not None:
                    chat.answer(prompt)
                    if sys.stderr.isatty() and chat.last:
                        chat.say(status_line(context, chat.last))
                else:
                    chat.say(f"[{loaded.meta.name} · {kv} · context {context.n_ctx} · /help]")
                    chat.loop()
            if session is not None and session.failed:
                return 1  # said when it happened
            return 130 if prompt is not None and context.stop else 0


def _open_session(args: argparse.Namespace, chat: Chat, stack: contextlib.ExitStack) -> Session | None:
    """The session of --session, loaded; closed (saved) with `stack`."""
    if args.session is None:
        return None
    from .manage import open_store
    from .session import ChatSession, Session

    limit = fit.parse_size(args.store_size)
    store = stack.enter_context(open_store(args.store, create=True))
    session = Session(store, args.session, chat.context, size_limit=limit)
    session.say = lambda text: chat.say(f"[{text}]")
    stack.callback(session.close)
    line = ChatSession(session, chat.conversation).open()
    if sys.stderr.isatty():
        chat.say(f"[{line}]")
    return session
