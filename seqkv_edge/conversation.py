"""A conversation on one KV cache: chat template, reuse of what the cache holds, context shift, save and load.

The cache always holds the tokens of `rendered`, the text of the conversation so far. A new prompt that starts with
`rendered` costs only its new part; anything else falls back to the longest common prefix of tokens.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from .engine import Context, Interrupted, Progress, Sampler, Sampling, temporary_beside
from .errors import SeqkvError, StateError, UsageError
from .gguf_meta import fingerprint

Message = dict[str, str]
_TRAILER = b"seqkvch1"
_MAX_TRAILER = 1 << 28


@dataclass(frozen=True)
class Plan:
    """What one question will cost."""

    tokens: list[int]
    """all tokens of the prompt"""
    reused: int
    """how many of them the cache holds"""


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the common prefix of two sequences."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def removal(old: bytes, new: bytes, boundaries: Sequence[int]) -> tuple[int, int] | None:
    """Token range whose removal turns the text `old` into `new`.

    boundaries: byte offset of every token's start in `old`, and len(old) at the end. Returns (first, end) as token
    indices, or None when no token-aligned removal of one piece does it.
    """
    n_cut = len(old) - len(new)
    if n_cut <= 0 or not boundaries or boundaries[-1] != len(old):
        return None
    prefix = common_prefix(old, new)
    suffix = common_prefix(old[::-1], new[::-1])
    index = {offset: i for i, offset in enumerate(boundaries)}
    for first, offset in enumerate(boundaries):
        if len(new) - suffix <= offset <= prefix and offset + n_cut in index:
            return first, index[offset + n_cut]
    return None


class Template:
    """The model's own chat template; "User:/Assistant:" lines for a model that has none."""

    def __init__(self, context: Context) -> None:
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        model, api = context.model, context.api
        self.stops: tuple[bytes, ...] = ()
        source = model.meta.chat_template
        self.missing = source is None
        bos, eos = int(api.llama_vocab_bos(model.vocab)), int(api.llama_vocab_eos(model.vocab))
        texts = [model.piece(t, special=True).decode("utf-8", "replace") if t >= 0 else "" for t in (bos, eos)]
        self._bos = texts[0] if api.llama_vocab_get_add_bos(model.vocab) else ""
        self._format: Callable[..., Any] | None = None
        if source is None:
            self.stops = (b"\nUser:",)
        else:
            try:
                self._format = Jinja2ChatFormatter(source, eos_token=texts[1], bos_token=texts[0])
            except Exception as error:
                raise SeqkvError(f"the model's chat template cannot be read: {_line(error)}") from error

    def render(self, messages: list[Message]) -> bytes:
        """The prompt for the next answer. Raises SeqkvError when the template refuses the conversation."""
        if self._format is None:
            names = {"system": "", "user": "User: ", "assistant": "Assistant: "}
            text = "\n".join(names[m["role"]] + m["content"] for m in messages) + "\nAssistant:"
        else:
            try:
                text = self._format(messages=messages).prompt
            except Exception as error:
                raise SeqkvError(f"the model's chat template refuses this conversation: {_line(error)}") from error
        if self._bos and not text.startswith(self._bos):
            text = self._bos + text
        return text.encode("utf-8", "surrogateescape")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class Conversation:
    """Messages and their KV cache."""

    def __init__(self, context: Context, *, system: str | None = None, identity: dict[str, Any] | None = None) -> None:
        """identity: what a saved state depends on beyond model and type (profile, window); checked by `load`."""
        self.context = context
        self.template = Template(context)
        self.system = system
        self.messages: list[Message] = self._start()
        self.rendered = b""
        self.pending: list[int] = []
        """tokens at the end of `rendered` that are not in the cache yet"""
        self.prefilled = 0
        """tokens evaluated for the last question"""
        self.produced = 0
        """tokens of the last answer"""
        self.notice: Callable[[str], None] = lambda _text: None
        """called with one line when something unexpected is done (context shift)"""
        self.changed: Callable[[], None] = lambda: None
        """called when there is something to save: a question, the beginning of its answer, its end"""
        self.find_prefix: Callable[[list[int], int], int] = lambda _tokens, reused: reused
        """may put a longer prefix of these tokens into the cache than the number it holds; returns the number it then holds"""
        self.answer_from: int | None = None
        """where in the cache the answer in progress begins"""
        self._before_answer = b""
        """`rendered` without the answer in progress"""
        self._identity = identity or {}

    def _start(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def clear(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = self._start()
        self._forget_cache()
        self.changed()

    def _forget_cache(self) -> None:
        self.context.clear()
        self.rendered, self.pending = b"", []

    # --- asking ---

    def ask(
        self, text: str, sampling: Sampling, *, n_predict: int = -1, progress: Callable[[int], Progress] | None = None
    ) -> Iterator[str]:
        """Answer a message; yields text as it comes.

        progress: called with the number of tokens to evaluate, returns what is called with each batch.
        Stops when the model ends, after n_predict tokens (< 0: no limit), or when `context.stop` is set. A question
        that fails (does not fit, template) leaves the conversation as it was.
        """
        context = self.context
        context.stop = False
        self.prefilled = self.produced = 0
        self.messages.append({"role": "user", "content": text})
        try:
            plan = self._make_room(n_predict)
            self.rendered, self.pending = b"", []  # until the prompt is in: reuse by tokens only
            reused = self.find_prefix(plan.tokens, plan.reused)
            context.keep(reused)
            todo = plan.tokens[reused:]
            self.prefilled = len(todo)
            self.changed()
            context.evaluate(todo, progress(len(todo)) if progress else None)
            self.rendered = self.template.render(self.messages)
            self.answer_from, self._before_answer = context.n_past, self.rendered
            self.changed()
        except Interrupted:
            self.messages.pop()
            return
        except BaseException:
            self.messages.pop()
            raise
        answer = bytearray()
        try:
            yield from self._generate(answer, sampling, n_predict)
        finally:
            content = bytes(answer).decode("utf-8", "replace")
            self.messages.append({"role": "assistant", "content": content})
            self.answer_from = None
            self.changed()

    def _generate(self, answer: bytearray, sampling: Sampling, n_predict: int) -> Iterator[str]:
        context, model = self.context, self.context.model
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        sampler = Sampler(model, sampling)
        held = b""  # bytes that may begin a stop text
        try:
            while (n_predict < 0 or self.produced < n_predict) and not context.stop:
                token = sampler.sample(context)
                if model.is_end(token):
                    self.pending = [token]
                    self.rendered += model.piece(token, special=True)
                    break
                piece = model.piece(token)
                answer += piece
                self.rendered += model.piece(token, special=True)
                self.produced += 1
                held += piece
                cut = min((held.find(s) for s in self.template.stops if s in held), default=-1)
                if cut >= 0:
                    del answer[len(answer) - (len(held) - cut) :]
                    held = held[:cut]
                    self.rendered = b""  # the cache holds more than the conversation: reuse by tokens
                    self.pending = [token]
                    break
                starts = [s[:n] for s in self.template.stops for n in range(1, len(s))]
                keep = max((len(s) for s in starts if held.endswith(s)), default=0)
                if text := decoder.decode(held[: len(held) - keep]):
                    yield text
                held = held[len(held) - keep :]
                if context.n_past + 1 > context.n_ctx and not self._shift_while_answering(token, bytes(answer)):
                    break
                context.evaluate([token])
            if text := decoder.decode(held, True):
                yield text
        finally:
            sampler.close()

    def _tokens(self, prompt: bytes) -> list[int]:
        text = prompt.decode("utf-8", "surrogateescape")
        return self.context.model.tokenize(text, add_special=False, parse_special=True)

    def _plan(self) -> Plan:
        prompt, context = self.template.render(self.messages), self.context
        if self.rendered and prompt.startswith(self.rendered):
            tokens = context.tokens + self.pending + self._tokens(prompt[len(self.rendered) :])
            reused = context.n_past
        else:
            tokens = self._tokens(prompt)
            reused = common_prefix(tokens, context.tokens)
        return Plan(tokens, min(reused, len(tokens) - 1))  # the last one is evaluated again for its logits

    # --- room ---

    def _turns(self) -> int:
        return sum(m["role"] == "user" for m in self.messages)

    def _without_oldest(self) -> list[Message]:
        """The messages without the oldest turn (a user message and its answer)."""
        users = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
        return self.messages[: users[0]] + self.messages[users[1] :]

    def _make_room(self, n_predict: int) -> Plan:
        """Plan the prompt, dropping the oldest turns until it fits with room for an answer."""
        context = self.context
        n_ctx = context.n_ctx
        plan = self._plan()
        reserve = min(n_predict if n_predict >= 0 else 256, 256, n_ctx // 4)
        if len(plan.tokens) + reserve <= n_ctx:
            return plan
        alone = [m for m in self.messages[:-1] if m["role"] == "system"] + self.messages[-1:]
        n_alone = len(self._tokens(self.template.render(alone)))
        if n_alone >= n_ctx:
            raise UsageError(
                f"the message takes {n_alone} tokens with its template, the context holds {n_ctx}: shorten it or use a "
                "larger --ctx"
            )
        dropped, moved = 0, True
        while len(plan.tokens) + reserve > n_ctx and self._turns() > 1:
            kept = self._without_oldest()
            moved = self._cut(self.template.render(kept), plan) and moved
            self.messages = kept
            dropped += 1
            plan = self._plan()
        if dropped:
            how = "" if moved else ", evaluating the rest again"
            self.notice(f"context full: forgot the oldest {'turn' if dropped == 1 else f'{dropped} turns'}{how}")
        return plan

    def _cut(self, prompt: bytes, plan: Plan) -> bool:
        """Shift the cache to fit `prompt`, the plan's prompt without its oldest turn. False: it was cleared."""
        old = self.template.render(self.messages)
        if self.rendered and old.startswith(self.rendered):
            rest = len(old) - len(self.rendered)
            if self._shift_to(prompt[: len(prompt) - rest]):
                return True
        self._forget_cache()
        return False

    def _shift_to(self, target: bytes) -> bool:
        """Make cache, pending and rendered those of the text `target`, by removing one range of tokens."""
        context = self.context
        pieces = [len(context.model.piece(t, special=True)) for t in context.tokens + self.pending]
        found = removal(self.rendered, target, list(accumulate(pieces, initial=0)))
        if found is None or found[1] > context.n_past or not context.shift(*found):
            return False
        self.rendered = target
        return True

    def _shift_while_answering(self, token: int, answer: bytes) -> bool:
        """Free room in the middle of an answer; `token` is sampled but not in the cache. False: impossible."""
        context = self.context
        self.pending = [token]
        try:
            if self._turns() > 1:
                kept = self._without_oldest()
                prompt = self.template.render(kept)
                if self._shift_to(prompt + answer):
                    self.messages = kept
                    self._moved_while_answering(prompt)
                    self.notice("context full: forgot the oldest turn")
                    return True
            n_keep = self._head()
            n_drop = (context.n_past - n_keep) // 2
            if n_drop > 0 and context.shift(n_keep, n_keep + n_drop):
                self.rendered = b""
                self._moved_while_answering(b"")
                self.notice(f"context full: forgot {n_drop} tokens after the system prompt")
                return True
        finally:
            self.pending = []
        self.notice("context full: this model's cache cannot be shifted, the answer ends here")
        return False

    def _moved_while_answering(self, prompt: bytes) -> None:
        # the token just sampled is counted but not in the cache
        self.answer_from, self._before_answer = max(0, self.context.n_past - self.produced + 1), prompt
        self.changed()

    def _head(self) -> int:
        """Tokens at the start of the cache that do not depend on the conversation (system prompt, first header)."""
        a, b = (
            self._tokens(self.template.render([*self._start(), {"role": "user", "content": c}])) for c in ("a", "b")
        )
        return common_prefix(common_prefix_of(a, b), self.context.tokens)

    # --- save and load ---

    def as_json(self) -> dict[str, Any]:
        """All but the cache. An answer in progress is not in it: `answer_from` says where its tokens begin."""
        rendered = self.rendered if self.answer_from is None else self._before_answer
        return {
            "system": self.system, "messages": self.messages, "rendered": rendered.decode("latin-1"),
            "pending": self.pending, "answer_from": self.answer_from,
        }  # fmt: skip

    def from_json(self, data: dict[str, Any], *, cached: bool) -> bool:
        """Become what `as_json` wrote, on a cache that holds its tokens (cached) or not. Raises StateError.

        A question whose answer had not begun is taken back: False.
        """
        checked = check_conversation(data)
        if checked is None:
            raise StateError("a saved conversation is damaged")
        self.system, self.messages = data["system"], [dict(m) for m in data["messages"]]
        self.rendered, self.pending = (data["rendered"].encode("latin-1"), list(data["pending"])) if cached else (b"", [])
        self.answer_from = None
        if not self.messages or self.messages[-1]["role"] != "user":
            return True
        start, context = data["answer_from"], self.context
        if start is None or not cached or context.n_past <= start:
            self.messages.pop()
            self.rendered, self.pending = b"", []
            return False
        tokens = context.tokens[start:]
        text = b"".join(context.model.piece(t) for t in tokens).decode("utf-8", "replace")
        self.messages.append({"role": "assistant", "content": text})
        if self.rendered:
            self.rendered += b"".join(context.model.piece(t, special=True) for t in tokens)
        return True

    def save(self, path: Path) -> int:
        """Write the conversation and its cache to one file, atomically. Returns its bytes. Raises StateError.

        The file is llama.cpp's sequence state followed by a JSON trailer, its length (u64) and a magic word.
        """
        if not self.context.n_past:
            raise StateError("nothing to save yet")
        temporary = temporary_beside(path)
        try:
            n_state = self.context.save_state(temporary)
            trailer = json.dumps({
                "version": 1,
                "model_id": fingerprint(self.context.model.path),
                "kv": str(self.context.kv),
                "identity": self._identity,
                "n_tokens": self.context.n_past,
                "state_bytes": n_state,
                "state_blake3": _digest(temporary, n_state),
                "system": self.system,
                "messages": self.messages,
                "rendered": self.rendered.decode("latin-1"),
                "pending": self.pending,
            }).encode()  # fmt: skip
            with temporary.open("ab") as file:
                file.write(trailer + len(trailer).to_bytes(8, "little") + _TRAILER)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StateError(f"cannot write {path}: {error.strerror or error}") from None
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return path.stat().st_size

    def load(self, path: Path) -> None:
        """Continue a saved conversation. Raises StateError and keeps the present one."""
        data = _read_trailer(path)
        if data.get("model_id") != fingerprint(self.context.model.path):
            raise StateError(f"{path} was saved with another model")
        if data.get("kv") != str(self.context.kv):
            raise StateError(f"{path} was saved with --kv {data.get('kv')}, this is --kv {self.context.kv}")
        if data.get("identity") != self._identity:
            raise StateError(f"{path} was saved with another profile, sink or window than this chat uses")
        if data["n_tokens"] > self.context.n_ctx:
            raise StateError(f"{path} holds {data['n_tokens']} tokens: start with --ctx {data['n_tokens']} or more")
        if data["state_blake3"] != _digest(path, data["state_bytes"]):
            raise StateError(f"{path} is damaged (checksum)")
        try:
            self.context.load_state(path, data["n_tokens"])
        except StateError:
            if not self.context.n_past:
                self.rendered, self.pending = b"", []
            raise
        self.system, self.messages = data["system"], data["messages"]
        self.rendered, self.pending = data["rendered"].encode("latin-1"), data["pending"]


def common_prefix_of(a: list[int], b: list[int]) -> list[int]:
    return a[: common_prefix(a, b)]


def _digest(path: Path, n: int) -> str:
    """blake3 of the first n bytes of a file."""
    from blake3 import blake3

    digest = blake3()
    with path.open("rb") as file:
        while n > 0 and (chunk := file.read(min(n, 1 << 22))):
            digest.update(chunk)
            n -= len(chunk)
    return digest.hexdigest()


def check_conversation(data: dict[str, Any]) -> dict[str, Any] | None:
    """`data` if it has the form of `Conversation.as_json`."""
    fields = {"system": (str, type(None)), "messages": list, "rendered": str, "pending": list, "answer_from": (int, type(None))}
    if not all(name in data and isinstance(data[name], kind) for name, kind in fields.items()):
        return None
    if not all(isinstance(m, dict) and m.get("role") in ("system", "user", "assistant") for m in data["messages"]):
        return None
    if not all(isinstance(m.get("content"), str) for m in data["messages"]) or not all(ord(c) < 256 for c in data["rendered"]):
        return None
    return data if all(isinstance(t, int) and t >= 0 for t in data["pending"]) else None


_FIELDS: dict[str, Any] = {
    "model_id": str, "kv": str, "identity": dict, "n_tokens": int, "state_bytes": int, "state_blake3": str,
    "system": (str, type(None)), "messages": list, "rendered": str, "pending": list,
}  # fmt: skip


def _read_trailer(path: Path) -> dict[str, Any]:
    """The JSON part of a saved conversation, checked for form. Raises StateError."""
    bad = StateError(f"{path} is not a saved conversation, or is truncated")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size < 16:
                raise bad
            file.seek(size - 16)
            tail = file.read(16)
            n = int.from_bytes(tail[:8], "little")
            if tail[8:] != _TRAILER or n > min(size - 16, _MAX_TRAILER):
                raise bad
            file.seek(size - 16 - n)
            data = json.loads(file.read(n))
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError:
        raise bad from None
    if not isinstance(data, dict) or data.get("version") != 1:
        raise bad
    if not all(isinstance(data.get(key), kind) for key, kind in _FIELDS.items()):
        raise bad
    roles_fine = all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in data["messages"]
    )
    if data["state_bytes"] + n + 16 != size or not 0 < data["n_tokens"] <= size or not roles_fine:
        raise bad
    if not all(isinstance(t, int) for t in data["pending"]):
        raise bad
    return data
