#!/usr/bin/env python3
"""The patch series on llama.cpp: fetch the pinned tree, apply, export, check.

    fetch      the pinned source distribution, checked (build/upstream/)
    checkout   pinned llama.cpp as a git repository of its own (build/upstream/llama.cpp)
    apply      checkout, then native/ as one commit, then the series, strictly
    sync       copy native/ into the tree again, nothing else
    export     commits of the tree -> patches/*.patch, series, patched-tree
    check      the rules of the series; this is what the test runs
    rebase     try the series on another source or version

Python standard library, git and (for the download) pip. The order of the patches is in
patches/series, the pin in patches/UPSTREAM. Nobody edits a patch by hand: commit in the tree, export.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Dict, Iterable, List, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parent.parent
NATIVE_IN_TREE = "ggml/src/seqkv"
MAX_LINES_PATCH = 400
MAX_LINES_SERIES = 1200
OUR_TYPES = "GGML_TYPE_SEQKV"
PUBLIC_HEADERS = ("include/", "ggml/include/")

PRISTINE = "refs/tags/pristine"
NATIVE = "refs/tags/native"
WHO = ("seqkv-edge authors", "authors@seqkv-edge.invalid")
WHEN = "2026-10-01T00:00:00+0000"


class Fail(Exception):
    """One line that says what is wrong and what to do."""


def say(text: str) -> None:
    print(text, flush=True)


# ---------------------------------------------------------------- pin and series


@dataclass(frozen=True)
class Pin:
    package: str
    version: str
    sha256: str
    path: str
    tree: str
    patched_tree: str
    type_last: Tuple[str, int]
    type_count: int

    @property
    def sdist(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}.tar.gz"


def parse_pin(text: str) -> Pin:
    values: Dict[str, str] = {}
    for line in text.splitlines():
        line = line.split("#", 1)[0].strip()
        if line:
            key, sep, value = line.partition("=")
            if not sep:
                raise Fail(f"patches/UPSTREAM: '{line}' is not 'key = value'")
            values[key.strip()] = value.strip()
    try:
        name, number = values["ggml-type-last"].split()
        return Pin(
            package=values["package"],
            version=values["version"],
            sha256=values["sha256"],
            path=values["path"],
            tree=values["tree"],
            patched_tree=values["patched-tree"],
            type_last=(name, int(number)),
            type_count=int(values["ggml-type-count"]),
        )
    except KeyError as e:
        raise Fail(f"patches/UPSTREAM: no line '{e.args[0]} = ...'") from None
    except ValueError:
        raise Fail("patches/UPSTREAM: ggml-type-last wants 'NAME number', ggml-type-count a number") from None


def parse_series(text: str) -> List[str]:
    names = [line.split("#", 1)[0].strip() for line in text.splitlines()]
    names = [n for n in names if n]
    for n in names:
        if "/" in n or not n.endswith(".patch"):
            raise Fail(f"patches/series: '{n}' is not the name of a .patch file")
    if len(set(names)) != len(names):
        raise Fail("patches/series: a patch is listed twice")
    return names


def format_series(old: str, names: Sequence[str]) -> str:
    """The new order, with the comments of the old file: its head, and those above a patch that is still there."""
    head: List[str] = []
    above: Dict[str, List[str]] = {}
    block: List[str] = []
    lines = old.splitlines()
    first = True
    for i, line in enumerate(lines):
        if line.strip() and not line.lstrip().startswith("#"):
            if first and "" in block:  # a blank line ends the head
                cut = block.index("")
                head, block = block[:cut], block[cut + 1 :]
            elif first:
                head, block = block, []
            first = False
            above[parse_series(line)[0]] = block
            block = []
        else:
            block.append(line.strip())
    if first:
        head = block
    while head and not head[-1]:
        head.pop()
    out = list(head)
    for n in names:
        out += above.get(n, []) + [n]
    return "\n".join(out) + "\n"


@dataclass(frozen=True)
class Series:
    dir: Path
    pin: Pin
    names: List[str]

    @classmethod
    def load(cls, directory: Path) -> "Series":
        for f in ("UPSTREAM", "series"):
            if not (directory / f).is_file():
                raise Fail(f"{directory / f} is missing: run this from a complete copy of the project")
        pin = parse_pin((directory / "UPSTREAM").read_text("utf-8"))
        names = parse_series((directory / "series").read_text("utf-8"))
        for n in names:
            if not (directory / n).is_file():
                raise Fail(f"patches/{n} is in patches/series but does not exist: restore it or run 'patches.py export'")
        return cls(directory, pin, names)

    def digest(self) -> str:
        h = hashlib.sha256(f"{self.pin.tree} {self.pin.patched_tree}".encode())
        for n in self.names:
            h.update(n.encode() + b"\0" + (self.dir / n).read_bytes() + b"\0")
        return h.hexdigest()


# ---------------------------------------------------------------- git


def git_env() -> Dict[str, str]:
    """No configuration of the user or machine, no identity needed, fixed dates."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    env.update(
        GIT_CONFIG_NOSYSTEM="1",
        GIT_CONFIG_GLOBAL=os.devnull,
        GIT_ATTR_NOSYSTEM="1",
        GIT_TERMINAL_PROMPT="0",
        GIT_AUTHOR_NAME=WHO[0],
        GIT_AUTHOR_EMAIL=WHO[1],
        GIT_AUTHOR_DATE=WHEN,
        GIT_COMMITTER_NAME=WHO[0],
        GIT_COMMITTER_EMAIL=WHO[1],
        GIT_COMMITTER_DATE=WHEN,
        LC_ALL="C",
        TZ="UTC",
    )
    return env


GIT_OPTIONS = [
    "-c", "safe.directory=*",
    "-c", "core.autocrlf=false",
    "-c", "core.fileMode=true",
    "-c", f"core.hooksPath={os.devnull}",
    "-c", f"core.attributesFile={os.devnull}",
    "-c", f"core.excludesFile={os.devnull}",
    "-c", "commit.gpgSign=false",
    "-c", "advice.detachedHead=false",
    "-c", "gc.auto=0",
]  # fmt: skip


def git_raw(cwd: Path, *args: str, env: Optional[Dict[str, str]] = None) -> "subprocess.CompletedProcess[bytes]":
    full = git_env()
    # a directory that is not a repository must not be taken for part of one above it
    full["GIT_CEILING_DIRECTORIES"] = str(Path(cwd).resolve().parent)
    full.update(env or {})
    try:
        return subprocess.run(["git", *GIT_OPTIONS, *args], cwd=cwd, env=full, stdin=subprocess.DEVNULL, capture_output=True)
    except FileNotFoundError:
        if not Path(cwd).is_dir():
            raise Fail(f"{cwd} does not exist: run 'patches.py checkout'") from None
        raise Fail("git is not installed: install it (Debian: apt install git)") from None


def git(cwd: Path, *args: str, env: Optional[Dict[str, str]] = None) -> str:
    r = git_raw(cwd, *args, env=env)
    if r.returncode:
        lines = r.stderr.decode("utf-8", "replace").strip().splitlines() or [f"status {r.returncode}"]
        raise Fail(f"git {args[0]} in {cwd}: {lines[0]}")
    return r.stdout.decode("utf-8", "surrogateescape").rstrip("\n")


def rev(tree: Path, name: str) -> Optional[str]:
    r = git_raw(tree, "rev-parse", "--verify", "--quiet", name)
    return r.stdout.decode().strip() if r.returncode == 0 else None


def commit_all(tree: Path, message: str, path: str = ".") -> None:
    """Commit everything below path, ignored files too (upstream's .gitignore names files it ships)."""
    git(tree, "add", "--all", "--force", "--", path)
    git(tree, "commit", "--quiet", "--no-verify", "--allow-empty", "-m", message)


def tree_hash(tree: Path, commit: str) -> str:
    """Tree hash of a commit without the copy of native/, whose content is not the patches' business."""
    index = git(tree, "rev-parse", "--git-path", "seqkv-index")
    path = Path(index) if os.path.isabs(index) else tree / index
    env = {"GIT_INDEX_FILE": str(path.resolve())}
    try:
        git(tree, "read-tree", commit, env=env)
        git(tree, "rm", "-r", "-q", "--cached", "--ignore-unmatch", "--", NATIVE_IN_TREE, env=env)
        return git(tree, "write-tree", env=env)
    finally:
        if path.exists():
            path.unlink()


def dirty(tree: Path) -> List[str]:
    out = git(tree, "status", "--porcelain", "--untracked-files=normal", "--", ".", f":(exclude){NATIVE_IN_TREE}")
    return out.splitlines()


def in_progress(tree: Path) -> bool:
    return any((tree / ".git" / d).exists() for d in ("rebase-apply", "rebase-merge", "MERGE_HEAD", "CHERRY_PICK_HEAD"))


# ---------------------------------------------------------------- source


def sha256_of(path: Path) -> str:
    h = hashlib.sha256()
    with path.open("rb") as f:
        for part in iter(lambda: f.read(1 << 20), b""):
            h.update(part)
    return h.hexdigest()


def verify_sha256(path: Path, want: str) -> None:
    got = sha256_of(path)
    if got != want:
        raise Fail(f"{path}: sha256 is {got}, the pin says {want}: delete the file and download it again")


def pip_commands() -> Iterable[List[str]]:
    """Ways to run pip, best first; a wheel build often has none in its own environment."""
    yield [sys.executable, "-I", "-m", "pip"]
    for name in ("pip3", "pip"):
        found = shutil.which(name)
        if found:
            yield [found]
    for directory in (Path(os.path.dirname(os.__file__)) / "ensurepip" / "_bundled", Path("/usr/share/python-wheels")):
        for wheel in sorted(directory.glob("pip-*.whl"), reverse=True):
            yield [sys.executable, str(wheel / "pip")]


def pip_download(package: str, version: str, dest: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("PIP_BUILD_TRACKER", "PIP_REQ_TRACKER", "CMAKE_ARGS")}
    by_hand = f"pip download --no-deps --no-binary :all: {package}=={version}"
    for command in pip_commands():
        if subprocess.run([*command, "--version"], capture_output=True, env=env).returncode:
            continue
        say(f"downloading {package} {version} (source distribution) with pip")
        r = subprocess.run(
            [*command, "download", "--quiet", "--no-deps", "--no-binary", package, "--dest", str(dest), f"{package}=={version}"],
            env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if r.returncode == 0:
            return
        lines = [s for s in r.stdout.decode("utf-8", "replace").splitlines() if "ERROR" in s.upper()] or ["no message"]
        raise Fail(f"pip could not download {package} {version} ({lines[0].strip()}): check the network, or give a copy with --source (from '{by_hand}')")
    raise Fail(f"no pip to download with: install pip (Debian: apt install python3-pip) or give --source (from '{by_hand}')")


def fetch_sdist(pin: Pin, cache: Path) -> Path:
    final = cache / pin.sdist
    if final.is_file():
        if sha256_of(final) == pin.sha256:
            return final
        say(f"{final} is damaged, downloading again")
        final.unlink()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="tmp-download-") as tmp:
        pip_download(pin.package, pin.version, Path(tmp))
        got = sorted(Path(tmp).glob("*.tar.gz"))
        if len(got) != 1:
            raise Fail(f"pip gave no source distribution of {pin.package} {pin.version}: give a copy with --source")
        verify_sha256(got[0], pin.sha256)
        os.replace(got[0], final)
    return final


def extract(sdist: Path, inside: str, dest: Path) -> None:
    """The files below <top>/<inside>/ of the archive; a stray .git of the packager is left out."""
    try:
        archive = tarfile.open(sdist, "r:*")
    except (tarfile.TarError, OSError) as e:
        raise Fail(f"{sdist}: not a source distribution ({e}): give a .tar.gz or a directory") from None
    wanted = PurePosixPath(inside).parts
    count = 0
    with archive:
        for m in archive:
            parts = PurePosixPath(m.name).parts
            rest = parts[1 + len(wanted) :]
            if parts[1 : 1 + len(wanted)] != wanted or not rest or ".git" in rest:
                continue
            if m.isdir():
                continue
            if ".." in parts or parts[0] == "/" or not m.isfile():
                raise Fail(f"{sdist}: refused to extract '{m.name}' (not a plain file inside the archive)")
            target = dest.joinpath(*rest)
            target.parent.mkdir(parents=True, exist_ok=True)
            data = archive.extractfile(m)
            assert data is not None
            with data, target.open("wb") as out:
                shutil.copyfileobj(data, out)
            target.chmod(0o755 if m.mode & 0o100 else 0o644)
            count += 1
    if not count:
        raise Fail(f"{sdist}: holds no {inside}/: give the source distribution of llama-cpp-python")


def copy_source(source: Path, inside: str, dest: Path) -> None:
    top = source / inside if (source / inside).is_dir() else source
    if not (top / "ggml" / "include" / "ggml.h").is_file():
        raise Fail(f"{source}: no llama.cpp tree (ggml/include/ggml.h): give its top directory, or the source distribution")
    shutil.copytree(top, dest, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".git"))


def make_repo(dest: Path, pin: Pin, source: Optional[Path], cache: Path, want: Optional[str]) -> str:
    """A repository at dest with one commit, the pristine tree; complete or absent. Returns the tree hash."""
    dest.parent.mkdir(parents=True, exist_ok=True)
    for stale in dest.parent.glob(f".{dest.name}.tmp-*"):
        if time.time() - stale.stat().st_mtime > 3600:
            shutil.rmtree(stale, ignore_errors=True)
    tmp = Path(tempfile.mkdtemp(dir=dest.parent, prefix=f".{dest.name}.tmp-"))
    try:
        if source is None or source.is_file():
            if source is None:
                source = fetch_sdist(pin, cache)
            elif want:
                verify_sha256(source, pin.sha256)
            extract(source, pin.path, tmp)
        elif source.is_dir():
            copy_source(source, pin.path, tmp)
        else:
            raise Fail(f"{source} does not exist: --source wants a llama.cpp directory or a source distribution")
        tmp.chmod(0o755)
        git(tmp, "init", "--quiet")
        git(tmp, "symbolic-ref", "HEAD", "refs/heads/seqkv")
        for key, value in (("core.autocrlf", "false"), ("gc.auto", "0"), ("user.name", WHO[0]), ("user.email", WHO[1])):
            git(tmp, "config", key, value)
        commit_all(tmp, f"llama.cpp of {pin.package} {pin.version}")
        got = git(tmp, "rev-parse", "HEAD^{tree}")
        if want and got != want:
            raise Fail(f"{source}: not the pinned llama.cpp (tree {got}, the pin says {want}): give an unchanged copy of {pin.sdist}")
        git(tmp, "update-ref", PRISTINE, "HEAD")
        git(tmp, "update-ref", NATIVE, "HEAD")
        if dest.exists():
            old = Path(tempfile.mkdtemp(dir=dest.parent, prefix=f".{dest.name}.tmp-"))
            os.replace(dest, old / "old")
            os.replace(tmp, dest)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(tmp, dest)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return got


# ---------------------------------------------------------------- tree


def read_stamp(tree: Path) -> Dict[str, object]:
    try:
        stamp = json.loads((tree / ".git" / "seqkv-stamp").read_text("utf-8"))
        return stamp if isinstance(stamp, dict) else {}
    except (OSError, ValueError):
        return {}


def write_stamp(tree: Path, **values: object) -> None:
    tmp = tree / ".git" / "seqkv-stamp.tmp"
    tmp.write_text(json.dumps(values) + "\n", "utf-8")
    os.replace(tmp, tree / ".git" / "seqkv-stamp")


def own_work(tree: Path) -> Optional[str]:
    """What the tree holds beyond the applied series, in words; None when nothing."""
    stamp = read_stamp(tree)
    if stamp.get("moving"):
        return None  # interrupted while moving from one series to the next: nothing of anyone's is in it
    if in_progress(tree):
        return "a rebase, merge or 'git am' in progress"
    head = rev(tree, "HEAD")
    if head not in (stamp.get("tip"), rev(tree, PRISTINE)):
        return "commits that are not in patches/"
    changes = dirty(tree)
    if changes:
        return f"uncommitted changes ({changes[0][3:]})"
    return None


def is_pristine_repo(tree: Path, pin: Pin) -> bool:
    return (tree / ".git").is_dir() and rev(tree, PRISTINE + "^{tree}") == pin.tree


def checkout(series: Series, tree: Path, cache: Path, source: Optional[Path] = None, force: bool = False) -> None:
    if is_pristine_repo(tree, series.pin):
        return
    if tree.exists() and any(tree.iterdir()):
        if not (tree / ".git").is_dir() or not rev(tree, PRISTINE):
            raise Fail(f"{tree} exists and was not made by this script: remove it, or name another with --tree")
        else:
            work = own_work(tree)
            if work and not force:
                raise Fail(f"{tree} is of another pin and has {work}: export them or remove the directory")
    say(f"preparing llama.cpp of {series.pin.package} {series.pin.version} in {tree}")
    make_repo(tree, series.pin, source, cache, series.pin.tree)


def native_files(native: Path) -> Dict[str, Path]:
    files = {}
    for p in sorted(native.rglob("*")):
        rel = p.relative_to(native)
        if p.is_file() and not any(s.startswith(".") or s == "__pycache__" or s.endswith("~") for s in rel.parts):
            files[rel.as_posix()] = p
    return files


def native_differences(native: Path, tree: Path) -> List[str]:
    ours, copy = native_files(native), native_files(tree / NATIVE_IN_TREE)
    return [n for n in sorted(set(ours) | set(copy)) if n not in ours or n not in copy or ours[n].read_bytes() != copy[n].read_bytes()]


def sync(native: Path, tree: Path, force: bool = False) -> int:
    """Make ggml/src/seqkv equal to native/; unchanged files keep their time stamp. Returns the files changed.

    A file that was edited in the tree since the last copy is not overwritten without force.
    """
    changed = native_differences(native, tree)
    ours = native_files(native)
    record = tree / ".git" / "seqkv-native"
    copied = json.loads(record.read_text("utf-8")) if record.is_file() else {}
    for n in changed:
        target = tree / NATIVE_IN_TREE / n
        if n in copied and target.is_file() and sha256_of(target) != copied[n] and not force:
            raise Fail(f"{target} was edited in the tree: copy it to native/{n}, or drop the edit with --force")
        if n in ours:
            target.parent.mkdir(parents=True, exist_ok=True)
            tmp = target.with_name(f".{target.name}.tmp")
            tmp.write_bytes(ours[n].read_bytes())
            os.replace(tmp, target)
        else:
            target.unlink()
    if record.parent.is_dir():
        now = {n: sha256_of(p) for n, p in ours.items()}
        if now != copied:
            record.write_text(json.dumps(now), "utf-8")
    return len(changed)


def am(tree: Path, patch: Path) -> Optional[str]:
    """Apply one patch as a commit, without fuzz and without a 3-way merge. Returns the reason of a failure."""
    r = git_raw(
        tree, "-c", "am.threeWay=false", "-c", "apply.whitespace=nowarn", "-c", "apply.ignoreWhitespace=no",
        "am", "--quiet", "--keep-cr", "--no-scissors", "--no-3way", "--committer-date-is-author-date", str(patch.resolve()),
    )  # fmt: skip
    if r.returncode == 0:
        return None
    lines = (r.stderr + r.stdout).decode("utf-8", "replace").splitlines()
    errors = [s[len("error: ") :] for s in lines if s.startswith("error: ")]
    return "; ".join(errors[:2]) or (lines[0] if lines else f"status {r.returncode}")


class Worktree:
    """A second, temporary work tree of a repository: a failure in it leaves the first one as it was."""

    def __init__(self, repo: Path, commit: str, parent: Optional[Path] = None):
        self.repo, self.commit, self.parent = repo, commit, parent

    def __enter__(self) -> Path:
        git(self.repo, "worktree", "prune")
        self.dir = Path(tempfile.mkdtemp(dir=self.parent, prefix=".seqkv-worktree-"))
        git(self.repo, "worktree", "add", "--quiet", "--force", "--detach", str(self.dir / "tree"), self.commit)
        return self.dir / "tree"

    def __exit__(self, *exc: object) -> None:
        shutil.rmtree(self.dir, ignore_errors=True)
        git_raw(self.repo, "worktree", "prune")


def apply_series(series: Series, wt: Path) -> None:
    for n in series.names:
        why = am(wt, series.dir / n)
        if why:
            raise Fail(f"patches/{n} does not apply: {why}: redo it in a tree of the patches before it and run 'patches.py export'")


def check_patched_tree(series: Series, wt: Path) -> str:
    got = tree_hash(wt, "HEAD")
    if got != series.pin.patched_tree:
        raise Fail(
            f"the patched tree is {got}, patches/UPSTREAM says {series.pin.patched_tree}: "
            "patches/ was edited by hand; restore it with git, or run 'patches.py apply --unverified' and 'patches.py export'"
        )
    return got


def apply(series: Series, tree: Path, cache: Path, native: Path, source: Optional[Path], force: bool, verify: bool = True) -> None:
    checkout(series, tree, cache, source, force)
    work = own_work(tree)
    if work and not force:
        raise Fail(f"{tree} has {work}: run 'patches.py export' to keep them, or 'apply --force' to drop them")
    stamp, digest = read_stamp(tree), series.digest()
    if not work and not stamp.get("moving") and stamp.get("series") == digest and stamp.get("tip") == rev(tree, "HEAD"):
        n = sync(native, tree, force)
        say(f"llama.cpp is patched already, {n} file(s) of native/ copied")
        return
    with Worktree(tree, PRISTINE, tree.parent) as wt:
        sync(native, wt)
        if native_files(native):
            commit_all(wt, "seqkv: copy of native/", NATIVE_IN_TREE)
        base = git(wt, "rev-parse", "HEAD")
        apply_series(series, wt)
        if verify:
            check_patched_tree(series, wt)
        tip = git(wt, "rev-parse", "HEAD")
    if not force and not stamp.get("moving"):
        sync(native, tree)  # before anything moves: it refuses to overwrite an edit
    # files that are the same in both states are not touched, so a rebuild stays small
    write_stamp(tree, moving=True)
    for d in ("rebase-apply", "rebase-merge"):
        shutil.rmtree(tree / ".git" / d, ignore_errors=True)
    lock = tree / ".git" / "index.lock"
    if lock.exists():
        lock.unlink()
    git(tree, "symbolic-ref", "HEAD", "refs/heads/seqkv")
    git(tree, "reset", "--quiet", "--hard", tip)
    git(tree, "update-ref", NATIVE, base)
    sync(native, tree, True)
    write_stamp(tree, series=digest if verify else "", tip=tip)
    say(f"{len(series.names)} patch(es) applied in {tree}")


# ---------------------------------------------------------------- export


def format_patch(tree: Path, commit: str) -> bytes:
    r = git_raw(
        tree, "-c", "diff.noprefix=false", "-c", "diff.mnemonicPrefix=false", "-c", "diff.suppressBlankEmpty=false",
        "format-patch", "-1", "--stdout", "--no-stat", "--patch", "--zero-commit", "--no-signature", "--no-numbered", "--full-index",
        "--no-renames", "--no-ext-diff", "--no-textconv", "--no-attach", "--no-thread", "--no-base", "--no-notes",
        "--diff-algorithm=myers", "--indent-heuristic", "--unified=3", "--inter-hunk-context=0", "--src-prefix=a/", "--dst-prefix=b/",
        commit, "--", ".", f":(exclude){NATIVE_IN_TREE}",
    )  # fmt: skip
    if r.returncode:
        raise Fail(f"git format-patch: {r.stderr.decode('utf-8', 'replace').strip().splitlines()[0]}")
    return r.stdout


def export_commits(tree: Path, base: str) -> List[Tuple[str, bytes]]:
    """(file name, patch) of every commit after base that touches more than the copy of native/."""
    if rev(tree, "HEAD") is None or git_raw(tree, "merge-base", "--is-ancestor", base, "HEAD").returncode:
        raise Fail(f"{tree}: HEAD is not on top of the native commit: rebase onto the tag 'native' of a tree made by 'patches.py apply'")
    if git(tree, "rev-list", "--merges", f"{base}..HEAD"):
        raise Fail(f"{tree}: there are merge commits: make the history linear with 'git rebase native'")
    out: List[Tuple[str, bytes]] = []
    rows = git(tree, "log", "--reverse", "--format=%H %f", f"{base}..HEAD", "--", ".", f":(exclude){NATIVE_IN_TREE}")
    for row in rows.splitlines():
        commit, slug = row.split(" ", 1)
        name = slug.lower()[:60].rstrip("-.") + ".patch"
        if name in [n for n, _ in out]:
            raise Fail(f"two commits give {name}: change a subject with 'git commit --amend' or 'git rebase -i native'")
        out.append((name, format_patch(tree, commit)))
    return out


def export(series: Series, tree: Path, native: Path) -> None:
    if not is_pristine_repo(tree, series.pin):
        raise Fail(f"{tree} is not a tree of this pin: run 'patches.py apply' first")
    if in_progress(tree):
        raise Fail(f"{tree}: a rebase, merge or 'git am' is in progress: finish it first")
    if read_stamp(tree).get("moving"):
        raise Fail(f"{tree}: 'apply' was interrupted in it: run 'patches.py apply' first")
    changes = dirty(tree)
    if changes:
        raise Fail(f"{tree} has uncommitted changes ({changes[0][3:]}): commit them first")
    differ = native_differences(native, tree)
    if differ:
        raise Fail(f"{NATIVE_IN_TREE}/{differ[0]} differs from native/{differ[0]}: put the edit into native/ and run 'patches.py sync'")
    patches = export_commits(tree, NATIVE)
    for name, data in patches:
        for line in patch_problems(parse_patch(name, data)):
            say(f"warning: {line}")
    patched = tree_hash(tree, "HEAD")
    keep = {name for name, _ in patches}
    for name, data in patches:
        tmp = series.dir / f".{name}.tmp"
        tmp.write_bytes(data)
        os.replace(tmp, series.dir / name)
    (series.dir / "series").write_text(format_series((series.dir / "series").read_text("utf-8"), [n for n, _ in patches]), "utf-8")
    pin_file = series.dir / "UPSTREAM"
    text = re.sub(r"(?m)^patched-tree\s*=.*$", f"patched-tree = {patched}", pin_file.read_text("utf-8"))
    pin_file.write_text(text, "utf-8")
    for p in series.dir.glob("*.patch"):
        if p.name not in keep:
            p.unlink()
    again = Series.load(series.dir)
    write_stamp(tree, series=again.digest(), tip=rev(tree, "HEAD"))
    total = 0
    for name, data in patches:
        info = parse_patch(name, data)
        total += info.changed
        say(f"{info.changed:5d} lines  {name}")
    say(f"{total:5d} lines in {len(patches)} patch(es), patched-tree = {patched}")


# ---------------------------------------------------------------- check: patches


@dataclass(frozen=True)
class Patch:
    name: str
    subject: str
    reason: str
    files: List[str]
    added: int
    removed: int

    @property
    def changed(self) -> int:
        return self.added + self.removed


def parse_patch(name: str, data: bytes) -> Patch:
    lines = data.decode("utf-8", "replace").split("\n")
    if not lines[0].startswith("From "):
        raise Fail(f"patches/{name}: not made by git format-patch: run 'patches.py export'")
    subject, body, files = "", [], []  # type: str, List[str], List[str]
    added = removed = i = 0
    while i < len(lines) and lines[i]:
        if lines[i].startswith("Subject: "):
            subject = re.sub(r"^\[PATCH[^\]]*\]\s*", "", lines[i][len("Subject: ") :])
            while i + 1 < len(lines) and lines[i + 1].startswith(" "):
                i += 1
                subject += lines[i]
        i += 1
    while i < len(lines) and lines[i] != "---" and not lines[i].startswith("diff --git "):
        body.append(lines[i])
        i += 1
    old = new = 0  # lines of the hunk still to come
    for line in lines[i:]:
        if old > 0 or new > 0:
            if line.startswith("+"):
                added, new = added + 1, new - 1
            elif line.startswith("-"):
                removed, old = removed + 1, old - 1
            elif not line.startswith("\\"):
                old, new = old - 1, new - 1
            continue
        hunk = re.match(r"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@", line)
        if hunk:
            old, new = (int(g) if g is not None else 1 for g in hunk.groups())
        elif line.startswith("diff --git a/"):
            files.append(line.split(" b/", 1)[1])
    return Patch(name, subject.strip(), "\n".join(body).strip(), files, added, removed)


def patch_problems(p: Patch) -> List[str]:
    out = []
    if not p.reason:
        out.append(f"patches/{p.name}: the message gives no reason: write why the patch exists below the subject")
    if p.changed > MAX_LINES_PATCH:
        out.append(f"patches/{p.name}: {p.changed} changed lines, at most {MAX_LINES_PATCH}: move code to native/ or split the patch")
    if not p.files:
        out.append(f"patches/{p.name}: changes no file: drop it")
    for f in p.files:
        if f.startswith(NATIVE_IN_TREE + "/"):
            out.append(f"patches/{p.name}: changes {f}: our own code belongs into native/")
    return out


def budget_problems(patches: Sequence[Patch]) -> List[str]:
    out = [line for p in patches for line in patch_problems(p)]
    total = sum(p.changed for p in patches)
    if total > MAX_LINES_SERIES:
        out.append(f"the series has {total} changed lines, at most {MAX_LINES_SERIES}: move code to native/")
    return out


# ---------------------------------------------------------------- check: public headers


def strip_comments(text: str) -> str:
    def keep(m: "re.Match[str]") -> str:
        return m.group(0) if m.group(0)[0] in "\"'" else " "

    return re.sub(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', keep, text, flags=re.S)


def strip_header(text: str) -> str:
    text = strip_comments(text).replace("\\\n", " ")
    text = re.sub(r"(?m)^[ \t]*#[ \t]*(define|undef|include|pragma|error|warning)\b.*$", "", text)
    return re.sub(r'extern\s+"C"\s*\{?', "", text)


def matching_brace(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        if text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return i
    return len(text) - 1


def squeeze(text: str) -> str:
    return re.sub(r"\s*([^\w\s])\s*", r"\1", re.sub(r"\s+", " ", text)).strip()


def records(header: str) -> Dict[str, str]:
    """Bodies of the structs, unions and classes of a C or C++ header, by name, in one line each."""
    text = strip_header(header)
    out: Dict[str, str] = {}
    for m in re.finditer(r"\b(struct|union|class)\b([^;{}()=<>]*)\{", text):
        end = matching_brace(text, m.end() - 1)
        words = re.findall(r"\w+", m.group(2).split(":", 1)[0])
        after = re.match(r"\s*([^;{}]*);", text[end + 1 :])
        alias = re.findall(r"\w+", after.group(1)) if after else []
        name = words[-1] if words else (alias[-1] if alias else f"anonymous at {len(out)}")
        out[f"{m.group(1)} {name}"] = squeeze(text[m.end() : end])
    return out


def enums(header: str) -> Dict[str, int]:
    """Values of all enum constants of a header; constants with a value we can't compute get the next number."""
    text = strip_header(header)
    out: Dict[str, int] = {}
    for m in re.finditer(r"\benum\b[^;{}()]*\{", text):
        body = text[m.end() : matching_brace(text, m.end() - 1)]
        body = re.sub(r"(?m)^[ \t]*#.*$", "", body)
        value = -1
        for item in body.split(","):
            name, _, expr = (s.strip() for s in item.partition("="))
            if not re.fullmatch(r"\w+", name):
                continue
            value += 1
            if expr:
                shift = re.fullmatch(r"\(?\s*(\w+)\s*<<\s*(\w+)\s*\)?", expr)
                try:
                    value = int(shift.group(1), 0) << int(shift.group(2), 0) if shift else int(expr, 0)
                except ValueError:
                    value = out.get(expr, value)
            out[name] = value
    return out


def functions(header: str) -> List[str]:
    text = strip_header(header)
    return [squeeze(s) for s in re.findall(r"\b(?:GGML_API|LLAMA_API|GGML_BACKEND_API)\b[^;{}]*;", text)]


def header_problems(name: str, before: str, after: str) -> List[str]:
    out = []
    old, new = records(before), records(after)
    for key, body in old.items():
        if key not in new:
            out.append(f"{name}: {key} is gone: public structs stay as they are")
        elif new[key] != body:
            out.append(f"{name}: {key} changed: public structs stay as they are (the Python mirror of it is pinned); add a function instead")
    old_values, new_values = enums(before), enums(after)
    for key, value in old_values.items():
        if key.endswith("_COUNT") and new_values.get(key, -1) >= value:
            continue
        if new_values.get(key) != value:
            out.append(f"{name}: {key} was {value}, is {new_values.get(key)}: add constants at the end only")
    gone = set(functions(before)) - set(functions(after))
    for f in sorted(gone):
        out.append(f"{name}: '{f}' is gone or changed: add a function instead")
    return out


def enum_values(header: str, name: str) -> List[Tuple[str, int]]:
    """Constants of one enum, in order."""
    text = strip_header(header)
    m = re.search(r"\benum\s+" + re.escape(name) + r"\s*\{", text)
    if not m:
        return []
    body = text[m.start() : matching_brace(text, m.end() - 1) + 1]
    return list(enums(body).items())


def enum_problems(pin: Pin, before: str, after: str) -> List[str]:
    tail = enum_values(before, "ggml_type")[-2:]
    if tail != [pin.type_last, ("GGML_TYPE_COUNT", pin.type_count)]:
        return [f"enum ggml_type of upstream ends with {tail}, patches/UPSTREAM says {pin.type_last[0]} and {pin.type_count}: update the pin after a look"]
    values = enum_values(after, "ggml_type")
    at = [i for i, (n, _) in enumerate(values) if n == pin.type_last[0]]
    if not at or not values:
        return [f"enum ggml_type lost {pin.type_last[0]}: keep upstream's types"]
    ours = values[at[0] + 1 : -1]
    want = pin.type_count
    for n, v in ours:
        if not n.startswith(OUR_TYPES) or v != want:
            return [f"enum ggml_type: {n} = {v} follows {pin.type_last[0]}: expected one of {OUR_TYPES}* with {want}"]
        want += 1
    if values[-1] != ("GGML_TYPE_COUNT", want):
        return [f"enum ggml_type ends with {values[-1][0]} = {values[-1][1]}: expected GGML_TYPE_COUNT = {want}"]
    return []


def public_headers(tree: Path, commit: str) -> Dict[str, str]:
    names = git(tree, "ls-tree", "-r", "--name-only", commit, "--", *PUBLIC_HEADERS).splitlines()
    return {n: git(tree, "show", f"{commit}:{n}") for n in names if n.endswith(".h")}


# ---------------------------------------------------------------- check, rebase


def find_repo(series: Series, tree: Path) -> Optional[Path]:
    """A repository of the pinned tree that is here already: the given one, or one that a build made."""
    for candidate in [tree, *sorted((ROOT / "build").glob("*/llama.cpp"))]:
        if candidate.is_dir() and is_pristine_repo(candidate, series.pin):
            return candidate
    return None


def check(series: Series, tree: Path, cache: Path, source: Optional[Path]) -> List[str]:
    """All rules of the series; returns the problems, one line each."""
    patches = [parse_patch(n, (series.dir / n).read_bytes()) for n in series.names]
    problems = budget_problems(patches)
    for p in sorted(series.dir.glob("*.patch")):
        if p.name not in series.names:
            problems.append(f"patches/{p.name} is not in patches/series: add it or delete it")
    repo = find_repo(series, tree)
    if repo is None:
        checkout(series, tree, cache, source)
        repo = tree
    with Worktree(repo, PRISTINE) as wt:
        base = git(wt, "rev-parse", "HEAD")
        before = public_headers(wt, base)
        try:
            apply_series(series, wt)
        except Fail as e:
            return [*problems, str(e)]
        try:
            check_patched_tree(series, wt)
        except Fail as e:
            problems.append(str(e))
        again = export_commits(wt, base)
        if [n for n, _ in again] != series.names:
            problems.append(f"export names the patches {', '.join(n for n, _ in again)}: run 'patches.py export'")
        for name, data in again:
            if name in series.names and (series.dir / name).read_bytes() != data:
                problems.append(f"patches/{name}: export gives other bytes: run 'patches.py apply --unverified' and 'patches.py export'")
        after = public_headers(wt, "HEAD")
    for name, text in before.items():
        problems += header_problems(name, text, after.get(name, ""))
    problems += enum_problems(series.pin, before.get("ggml/include/ggml.h", ""), after.get("ggml/include/ggml.h", ""))
    for p in patches:
        say(f"{p.changed:5d} lines  {p.name}: {p.subject}")
    say(f"{sum(p.changed for p in patches):5d} lines in {len(patches)} patch(es); budget {MAX_LINES_PATCH} a patch, {MAX_LINES_SERIES} in all")
    return problems


def rebase(series: Series, source: Optional[Path], version: Optional[str], keep: Optional[Path]) -> List[str]:
    """Try the series on another llama.cpp; returns what failed. A kept tree stays at the last patch that applied."""
    failures: List[str] = []
    with tempfile.TemporaryDirectory(prefix="seqkv-rebase-") as name:
        tmp = Path(name)
        if source is None:
            if version is None:
                raise Fail("rebase wants --source PATH or --version X")
            pip_download(series.pin.package, version, tmp)
            got = sorted(tmp.glob("*.tar.gz"))
            if len(got) != 1:
                raise Fail(f"pip gave no source distribution of {series.pin.package} {version}")
            source = got[0]
        if source.is_file():
            say(f"sha256 = {sha256_of(source)}")
        if keep is not None and keep.exists():
            raise Fail(f"{keep} exists: name a new directory with --keep")
        tree = (keep or tmp / "llama.cpp").resolve()
        say(f"tree = {make_repo(tree, series.pin, source.resolve(), tmp, None)}")
        header = tree / "ggml" / "include" / "ggml.h"
        tail = enum_values(header.read_text("utf-8"), "ggml_type")[-2:]
        say(f"ggml-type-last = {tail[0][0]} {tail[0][1]}\nggml-type-count = {tail[1][1]}" if len(tail) == 2 else "no enum ggml_type")
        for n in series.names:
            why = am(tree, series.dir / n)
            if why is None:
                say(f"ok    {n}")
                continue
            say(f"FAIL  {n}: {why}")
            failures.append(f"patches/{n} does not apply: {why}")
            git_raw(tree, "am", "--abort")
            if keep is not None:
                break
    return failures


# ---------------------------------------------------------------- command line


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="patches.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, help_text: str, source: bool = False) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=help_text)
        p.add_argument("--tree", type=Path, default=ROOT / "build/upstream/llama.cpp", help="the patched tree (default: build/upstream/llama.cpp)")
        p.add_argument("--cache", type=Path, default=ROOT / "build/upstream", help="directory of the download (default: build/upstream)")
        p.add_argument("--native", type=Path, default=ROOT / "native", help=argparse.SUPPRESS)
        p.add_argument("--patches", type=Path, default=ROOT / "patches", help=argparse.SUPPRESS)
        if source:
            p.add_argument("--source", type=Path, help="an existing unpatched llama.cpp directory or source distribution, instead of the download")
        return p

    add("fetch", "download the pinned source distribution")
    p = add("checkout", "fetch the pinned tree", source=True)
    p.add_argument("--force", action="store_true", help="replace a tree of another pin, with the work in it")
    p = add("apply", "copy native/ and apply the series", source=True)
    p.add_argument("--force", action="store_true", help="drop commits and edits of the tree that are not in patches/")
    p.add_argument("--unverified", action="store_true", help="do not compare the tree hash (after a merge of patches/; export next)")
    p = add("sync", "copy native/ into the tree again")
    p.add_argument("--force", action="store_true", help="overwrite files that were edited in the tree")
    add("export", "write the commits of the tree to patches/")
    add("check", "check the series", source=True)
    p = add("rebase", "try the series on another llama.cpp", source=True)
    p.add_argument("--version", help="a version of llama-cpp-python to download")
    p.add_argument("--keep", type=Path, help="keep the tree here, at the last patch that applied")
    args = parser.parse_args(argv)

    try:
        series = Series.load(args.patches.resolve())
        tree, cache, native = args.tree.resolve(), args.cache.resolve(), args.native.resolve()
        source = args.source.resolve() if getattr(args, "source", None) else None
        if args.command in ("apply", "sync", "export") and not native.is_dir():
            raise Fail(f"{native} is missing: run this from a complete copy of the project")
        if args.command == "fetch":
            say(str(fetch_sdist(series.pin, cache)))
        elif args.command == "checkout":
            checkout(series, tree, cache, source, args.force)
            say(f"{tree} is llama.cpp of {series.pin.package} {series.pin.version}")
        elif args.command == "apply":
            apply(series, tree, cache, native, source, args.force, not args.unverified)
        elif args.command == "sync":
            if not is_pristine_repo(tree, series.pin):
                raise Fail(f"{tree} is not a tree of this pin: run 'patches.py apply' first")
            say(f"{sync(native, tree, args.force)} file(s) of native/ copied")
        elif args.command == "export":
            export(series, tree, native)
        else:
            if args.command == "check":
                problems = check(series, tree, cache, source)
            else:
                problems = rebase(series, source, args.version, args.keep)
            for line in problems:
                print(f"patches.py: {line}", file=sys.stderr)
            if problems:
                return 1
            say("ok")
        return 0
    except Fail as e:
        print(f"patches.py: error: {e}", file=sys.stderr)
    except KeyboardInterrupt:
        print("patches.py: interrupted; run the same command again", file=sys.stderr)
    except OSError as e:
        print(f"patches.py: error: {e}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
