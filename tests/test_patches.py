"""The patch series keeps its rules, and the script that checks them sees a breach of each."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load():
    spec = importlib.util.spec_from_file_location("patches", ROOT / "tools" / "patches.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["patches"] = module
    spec.loader.exec_module(module)
    return module


patches = load()

HEADER = """
#define N 4 /* a brace in a macro: { */
enum ggml_type {
    GGML_TYPE_F32 = 0,
    GGML_TYPE_Q2_0 = 42, // the last one
    GGML_TYPE_COUNT = 43,
};
typedef struct { int x; } pair_t;
struct ggml_thing {
    int a;  // comment
    union { float f; int i; } u;
};
GGML_API int ggml_f(struct ggml_thing * t);
"""


def upstream(tmp_path: Path, text: str = "one\ntwo\nthree\nfour\nfive\nsix\n"):
    """A tiny llama.cpp, its source distribution and the series files for it: (patches directory, archive)."""
    top = tmp_path / "llama_cpp_python-0.0.1" / "vendor" / "llama.cpp"
    (top / "ggml" / "include").mkdir(parents=True)
    (top / "ggml" / "include" / "ggml.h").write_text(HEADER)
    (top / "src.c").write_text(text)
    (top / ".gitignore").write_text("*.log\n")
    (top / "kept.log").write_text("ignored by .gitignore, part of the tree\n")
    (top / ".git").write_text("gitdir: ../../.git/modules/vendor/llama.cpp\n")
    archive = tmp_path / "llama_cpp_python-0.0.1.tar.gz"
    with tarfile.open(archive, "w:gz") as t:
        t.add(tmp_path / "llama_cpp_python-0.0.1", "llama_cpp_python-0.0.1")
    scratch = tmp_path / "scratch"
    pin = patches.Pin("llama-cpp-python", "0.0.1", patches.sha256_of(archive), "vendor/llama.cpp", "", "", ("GGML_TYPE_Q2_0", 42), 43)
    tree = patches.make_repo(scratch, pin, archive, tmp_path, None)
    assert (scratch / "kept.log").is_file() and (scratch / ".git").is_dir()
    directory = tmp_path / "patches"
    directory.mkdir()
    (directory / "UPSTREAM").write_text(
        f"package = llama-cpp-python\nversion = 0.0.1\nsha256 = {pin.sha256}\npath = vendor/llama.cpp\ntree = {tree}\n"
        f"ggml-type-last = GGML_TYPE_Q2_0 42\nggml-type-count = 43\npatched-tree = {tree}\n"
    )
    (directory / "series").write_text("# head\n")
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "block.h").write_text("// block\n")
    return directory, archive


@pytest.fixture
def project(tmp_path):
    """A project with one patch, made the way a developer makes it."""
    directory, archive = upstream(tmp_path)
    p = Project(tmp_path, directory, archive)
    p.run("apply")
    p.edit("src.c", "three\n", "3\n", "core: write three as a digit\n\nA reason.")
    p.run("export")
    return p


@dataclasses.dataclass
class Project:
    root: Path
    directory: Path
    archive: Path

    @property
    def tree(self) -> Path:
        return self.root / "tree"

    def call(self, command: str, *args: str):
        out = subprocess.run(
            [sys.executable, str(ROOT / "tools" / "patches.py"), command, "--tree", str(self.tree), "--cache", str(self.root),
             "--native", str(self.root / "native"), "--patches", str(self.directory), *args],
            capture_output=True, text=True,
        )  # fmt: skip
        return out.returncode, out.stdout, out.stderr

    def run(self, command: str, *args: str) -> str:
        code, out, err = self.call(command, *args)
        assert code == 0, err
        return out

    def fails(self, command: str, *args: str) -> str:
        code, _, err = self.call(command, *args)
        assert code == 1 and len(err.strip().splitlines()) == 1, err
        return err

    def edit(self, name: str, old: str, new: str, message: str) -> None:
        path = self.tree / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        patches.git(self.tree, "commit", "-qam", message)

    def patch(self) -> Path:
        (found,) = self.directory.glob("*.patch")
        return found


# ---------------------------------------------------------------- the series of this project


def test_series_of_this_project():
    tree = ROOT / "build" / "upstream" / "llama.cpp"
    series = patches.Series.load(ROOT / "patches")
    if patches.find_repo(series, tree) is None:
        try:
            patches.fetch_sdist(series.pin, ROOT / "build" / "upstream")
        except patches.Fail as e:
            if "could not download" not in str(e) and "no pip" not in str(e):
                raise
            print(f"skipped: {e}")
            pytest.skip(str(e))
    assert patches.check(series, tree, ROOT / "build" / "upstream", None) == []


# ---------------------------------------------------------------- the whole way on a tiny upstream


def test_apply_export_check_round_trip(project):
    assert project.patch().name == "core-write-three-as-a-digit.patch"
    before = project.patch().read_bytes()
    assert "ok" in project.run("check")
    assert "patched already" in project.run("apply")
    fresh = dataclasses.replace(project)
    subprocess.run(["rm", "-rf", str(project.tree)], check=True)
    fresh.run("apply")
    assert "3\n" in (fresh.tree / "src.c").read_text().splitlines(keepends=True)
    assert (fresh.tree / "ggml/src/seqkv/block.h").read_text() == "// block\n"
    fresh.run("export")
    assert project.patch().read_bytes() == before


def test_native_does_not_change_the_patched_tree(project):
    (project.root / "native" / "block.h").write_text("// another block\n")
    assert "1 file(s)" in project.run("sync")
    project.run("check")
    project.run("export")
    subprocess.run(["rm", "-rf", str(project.tree)], check=True)
    project.run("apply")


def test_native_edited_in_the_tree_is_not_lost(project):
    (project.tree / "ggml/src/seqkv/block.h").write_text("// edited in the tree\n")
    assert "native/block.h" in project.fails("export")
    assert "edited in the tree" in project.fails("sync")
    project.run("sync", "--force")
    project.run("export")


def test_own_work_is_not_dropped(project):
    (project.tree / "src.c").write_text("edited\n")
    assert "uncommitted" in project.fails("apply")
    assert "uncommitted" in project.fails("export")
    patches.git(project.tree, "commit", "-qam", "more\n\nA reason.")
    assert "commits that are not in patches/" in project.fails("apply")
    project.run("apply", "--force")
    assert "3\n" in (project.tree / "src.c").read_text()


def test_interrupted_apply_recovers(project):
    patches.write_stamp(project.tree, moving=True)
    (project.tree / "src.c").write_text("half written\n")
    (project.tree / ".git" / "index.lock").write_text("")
    assert "interrupted" in project.fails("export")
    project.run("apply")
    assert "3\n" in (project.tree / "src.c").read_text()
    assert "patched already" in project.run("apply")


def test_patch_with_fuzz_is_refused(project):
    text = project.patch().read_text()
    assert "\n two\n" in text
    project.patch().write_text(text.replace("\n two\n", "\n TWO\n"))  # GNU patch would take this
    assert "does not apply" in project.fails("apply", "--force")
    assert "does not apply" in project.fails("check")


def test_patch_edited_by_hand_is_refused(project):
    project.patch().write_text(project.patch().read_text().replace("\n+3\n", "\n+33\n"))
    assert "edited by hand" in project.fails("apply", "--force")
    code, _, err = project.call("check")
    assert code == 1 and "edited by hand" in err


def test_moved_hunk_is_refused(project):
    """git applies it at an offset, the export shows that the bytes are not its own."""
    project.patch().write_text(project.patch().read_text().replace("@@ -1,6 +1,6 @@", "@@ -4,6 +4,6 @@"))
    assert "other bytes" in project.fails("check")


def test_wrong_sha_is_refused(project):
    with project.archive.open("ab") as f:
        f.write(b"\0")
    with pytest.raises(patches.Fail, match="sha256"):
        patches.verify_sha256(project.archive, patches.Series.load(project.directory).pin.sha256)
    subprocess.run(["rm", "-rf", str(project.tree)], check=True)
    assert "sha256" in project.fails("apply", "--source", str(project.archive))
    assert not project.tree.exists()


def test_other_source_is_refused(project):
    other = project.root / "other"
    subprocess.run(["cp", "-r", str(project.tree), str(other)], check=True)
    subprocess.run(["rm", "-rf", str(project.tree)], check=True)
    assert "not the pinned" in project.fails("apply", "--source", str(other))
    assert not project.tree.exists()


def test_changed_struct_fails_the_check(project):
    project.edit("ggml/include/ggml.h", "int a;", "long a;", "ggml: widen a\n\nA reason.")
    project.run("export")
    assert "struct ggml_thing changed" in project.fails("check")


def test_new_types_come_right_after_upstreams(project):
    project.edit(
        "ggml/include/ggml.h", "GGML_TYPE_COUNT = 43", "GGML_TYPE_SEQKV2 = 43,\n    GGML_TYPE_COUNT = 44", "ggml: add a type\n\nA reason."
    )
    project.run("export")
    project.run("check")


def test_rebase_names_the_patch_that_fails(project):
    other = project.root / "other"
    subprocess.run(["cp", "-r", str(project.root / "llama_cpp_python-0.0.1/vendor/llama.cpp"), str(other)], check=True)
    assert "ok    core-write" in project.run("rebase", "--source", str(other))
    (other / "src.c").write_text("something else\n")
    assert "core-write-three-as-a-digit.patch does not apply" in project.fails("rebase", "--source", str(other))


def test_foreign_directory_is_left_alone(project):
    foreign = project.root / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    code, _, err = dataclasses.replace(project).call("apply", "--tree", str(foreign), "--force")
    assert code == 1 and "not made by this script" in err
    assert (foreign / "thesis.txt").read_text() == "mine"


# ---------------------------------------------------------------- parts


def patch_text(added: int, body: str = "A reason.\n", path: str = "src.c") -> bytes:
    lines = "".join("+-- not a header\n" if i == 0 else "+++ x\n" for i in range(added))
    return (
        "From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001\nFrom: a <a@b>\n"
        f"Date: Thu, 1 Oct 2026 00:00:00 +0000\nSubject: [PATCH] a subject that\n is folded\n\n{body}\n"
        f"diff --git a/{path} b/{path}\nindex 1..2 100644\n--- a/{path}\n+++ b/{path}\n@@ -1,2 +1,{added + 1} @@\n one\n--- two\n{lines}"
    ).encode()


def test_parse_patch_counts_lines_that_look_like_headers():
    p = patches.parse_patch("a.patch", patch_text(3))
    assert (p.subject, p.reason, p.files) == ("a subject that is folded", "A reason.", ["src.c"])
    assert (p.added, p.removed) == (3, 1)


def test_budget():
    def problems(*sizes: int):
        return patches.budget_problems([patches.parse_patch(f"{i}.patch", patch_text(n)) for i, n in enumerate(sizes)])

    assert problems(399, 399) == []
    assert "0.patch: 401 changed lines" in problems(400)[0]
    assert "1600 changed lines" in problems(399, 399, 399, 399)[0]


def test_patch_rules():
    def problems(data: bytes):
        return patches.patch_problems(patches.parse_patch("a.patch", data))

    assert "no reason" in problems(patch_text(1, body=""))[0]
    assert "native/" in problems(patch_text(1, path="ggml/src/seqkv/block.h"))[0]
    with pytest.raises(patches.Fail, match="not made by git format-patch"):
        patches.parse_patch("a.patch", b"--- a/x\n+++ b/x\n")


def test_records():
    found = patches.records(HEADER)
    assert found["struct pair_t"] == "int x;"
    assert found["struct ggml_thing"] == "int a;union{float f;int i;}u;"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("int a;", "int a; int b;", "struct ggml_thing changed"),
        ("float f;", "double f;", "struct ggml_thing changed"),
        ("int x;", "char x;", "struct pair_t changed"),
        ("struct ggml_thing {", "struct ggml_other {", "struct ggml_thing is gone"),
        ("GGML_TYPE_Q2_0 = 42", "GGML_TYPE_Q2_0 = 41", "GGML_TYPE_Q2_0 was 42, is 41"),
        ("ggml_f(struct", "ggml_g(struct", "is gone or changed"),
    ],
)
def test_header_change_is_seen(old, new, says):
    assert HEADER.count(old) == 1
    (line, *_) = patches.header_problems("ggml.h", HEADER, HEADER.replace(old, new))
    assert says in line


def test_header_additions_and_comments_are_fine():
    after = HEADER.replace("// comment", "// other /* words").replace(
        "GGML_TYPE_COUNT = 43", "GGML_TYPE_SEQKV2 = 43,\n GGML_TYPE_COUNT = 44"
    )
    after += "struct ggml_new { int a; };\nGGML_API void ggml_h(void);\n"
    assert patches.header_problems("ggml.h", HEADER, after) == []


@pytest.mark.parametrize(
    ("tail", "says"),
    [
        ("GGML_TYPE_SEQKV2 = 43, GGML_TYPE_SEQKV3 = 44, GGML_TYPE_COUNT = 45", None),
        ("GGML_TYPE_COUNT = 43", None),
        ("GGML_TYPE_SEQKV2 = 44, GGML_TYPE_COUNT = 45", "expected one of"),
        ("GGML_TYPE_OTHER = 43, GGML_TYPE_COUNT = 44", "expected one of"),
        ("GGML_TYPE_SEQKV2 = 43, GGML_TYPE_COUNT = 50", "expected GGML_TYPE_COUNT = 44"),
    ],
)
def test_enum_tail(tail, says):
    pin = dataclasses.replace(patches.Series.load(ROOT / "patches").pin, type_last=("GGML_TYPE_Q2_0", 42), type_count=43)
    problems = patches.enum_problems(pin, HEADER, HEADER.replace("GGML_TYPE_COUNT = 43", tail))
    assert (problems == []) if says is None else (says in problems[0])


def test_enum_tail_of_another_upstream():
    pin = dataclasses.replace(patches.Series.load(ROOT / "patches").pin, type_last=("GGML_TYPE_Q2_0", 42), type_count=43)
    moved = HEADER.replace("GGML_TYPE_COUNT = 43", "GGML_TYPE_Q1_1 = 43, GGML_TYPE_COUNT = 44")
    assert "update the pin" in patches.enum_problems(pin, moved, moved)[0]


def test_series_keeps_its_comments():
    old = "# head\n\n# for a\na.patch\n# for b\nb.patch\n"
    assert patches.format_series(old, ["b.patch", "c.patch"]) == "# head\n# for b\nb.patch\nc.patch\n"
    assert patches.format_series("# head\n", ["a.patch"]) == "# head\na.patch\n"
    assert patches.parse_series("# x\na.patch # why\n\nb.patch\n") == ["a.patch", "b.patch"]
    for bad in ("../a.patch", "a.diff", "a.patch\na.patch"):
        with pytest.raises(patches.Fail):
            patches.parse_series(bad)


def test_pin_errors_name_the_line():
    text = (ROOT / "patches" / "UPSTREAM").read_text("utf-8")
    assert len(patches.parse_pin(text).sha256) == 64
    with pytest.raises(patches.Fail, match="sha256"):
        patches.parse_pin(text.replace("sha256 =", "sha =", 1))


def test_archive_cannot_write_outside(tmp_path):
    archive = tmp_path / "x.tar.gz"
    (tmp_path / "f").write_text("x")
    with tarfile.open(archive, "w:gz") as t:
        t.add(tmp_path / "f", "top/vendor/llama.cpp/../../../../escaped")
    with pytest.raises(patches.Fail, match="refused"):
        patches.extract(archive, "vendor/llama.cpp", tmp_path / "out")
    assert not (tmp_path / "escaped").exists()
