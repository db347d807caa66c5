"""Directories that appear complete or not at all, whatever killed exports left beside them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from zreward.errors import UsageError
from zreward.staging import staged_directory


def make_bundle(path: Path, content: str) -> Path:
    path.mkdir(parents=True)
    (path / "manifest.json").write_text(content)
    return path


def write(final: Path, content: str, *, replace: bool = False) -> None:
    with staged_directory(final, replace=replace) as staging:
        (staging.path / "manifest.json").write_text(content)
        staging.commit()


def content_of(final: Path) -> str:
    return (final / "manifest.json").read_text()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def dead_process() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_nothing_shows_before_commit_and_nothing_else_after(tmp_path: Path) -> None:
    final = tmp_path / "new" / "deep" / "bundle"
    with staged_directory(final, replace=False) as staging:
        (staging.path / "manifest.json").write_text("one")
        assert not final.exists()
        staging.commit()
    assert content_of(final) == "one"
    assert names_in(final.parent) == ["bundle"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path: Path, existing: bool) -> None:
    final = tmp_path / "bundle"
    if existing:
        make_bundle(final, "old")
    with pytest.raises(KeyboardInterrupt), staged_directory(final, replace=existing) as staging:
        (staging.path / "manifest.json").write_text("half")
        raise KeyboardInterrupt
    assert names_in(tmp_path) == (["bundle"] if existing else [])
    assert not existing or content_of(final) == "old"


def test_an_existing_bundle_needs_permission(tmp_path: Path) -> None:
    final = make_bundle(tmp_path / "bundle", "old")
    with pytest.raises(UsageError, match=r"exists.*--force"):
        write(final, "new")
    assert content_of(final) == "old"
    write(final, "new", replace=True)
    assert content_of(final) == "new"
    assert names_in(tmp_path) == ["bundle"]


def test_what_is_not_a_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(make_bundle(tmp_path / "bundle", "old"))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = names_in(tmp_path)
    for name in ("folder", "file", "link", "dangling"):
        with pytest.raises(UsageError, match="not a bundle"):
            write(tmp_path / name, "new", replace=True)
    assert names_in(tmp_path) == before
    assert (tmp_path / "folder" / "thesis.tex").exists() and content_of(tmp_path / "bundle") == "old"


def test_a_checkpoint_is_replaced_by_a_checkpoint_alone(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", "old")
    with (
        pytest.raises(UsageError, match="is not a checkpoint"),
        staged_directory(bundle, replace=True, kind="checkpoint"),
    ):
        pass
    final = tmp_path / "checkpoint"
    for content in ("one", "two"):
        with staged_directory(final, replace=True, kind="checkpoint") as staging:
            (staging.path / "config.json").write_text(content)
            staging.commit()
    assert (final / "config.json").read_text() == "two" and content_of(bundle) == "old"


@pytest.mark.parametrize("name", ["", ".", "..", "a/.."])
def test_a_name_that_is_no_name(name: str) -> None:
    with (
        pytest.raises(UsageError, match="name the bundle's directory"),
        staged_directory(Path(name), replace=True),
    ):
        pass


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(UsageError, match="cannot be written here"):
        write(tmp_path / "file" / "bundle", "new")


@pytest.mark.parametrize("name", ["bundle", "bundle [v1] *"])
def test_leftovers_of_dead_processes_are_removed(tmp_path: Path, dead_process: int, name: str) -> None:
    make_bundle(tmp_path / f".{name}.partial-{dead_process}", "half")
    make_bundle(tmp_path / f".{name}.partial-{os.getpid()}", "of an earlier process with our id")
    make_bundle(tmp_path / f".{name}.partial-1", "half")  # process 1 runs
    make_bundle(tmp_path / f".{name}.partial-draft", "not ours")
    make_bundle(tmp_path / f".other.partial-{dead_process}", "of another name")
    write(tmp_path / name, "new")
    kept = {f".{name}.partial-1", f".{name}.partial-draft", f".other.partial-{dead_process}", name}
    assert set(names_in(tmp_path)) == kept


@pytest.mark.parametrize("name", ["bundle", "bundle [v1] *"])
def test_a_bundle_moved_aside_by_a_killed_export_comes_back(
    tmp_path: Path, dead_process: int, name: str
) -> None:
    final = tmp_path / name
    make_bundle(tmp_path / f".{name}.replaced-{dead_process}", "old")
    with pytest.raises(UsageError, match="exists"):  # restored first, so that it needs permission again
        write(final, "new")
    assert content_of(final) == "old"
    write(final, "new", replace=True)
    assert content_of(final) == "new" and names_in(tmp_path) == [name]


def test_a_replaced_bundle_is_dropped_where_its_successor_arrived(tmp_path: Path, dead_process: int) -> None:
    final = make_bundle(tmp_path / "bundle", "second")
    make_bundle(tmp_path / f".bundle.replaced-{dead_process}", "first")
    write(final, "third", replace=True)
    assert content_of(final) == "third" and names_in(tmp_path) == ["bundle"]


def test_a_bundle_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    final = tmp_path / "bundle"
    with pytest.raises(UsageError, match="exists"), staged_directory(final, replace=False) as staging:
        make_bundle(final, "of somebody else")
        staging.commit()
    assert content_of(final) == "of somebody else" and names_in(tmp_path) == ["bundle"]


def test_a_rename_that_fails_puts_the_old_bundle_back(tmp_path: Path) -> None:
    final = make_bundle(tmp_path / "bundle", "old")
    with pytest.raises(OSError), staged_directory(final, replace=True) as staging:
        sync = os.fsync

        def lose_directory(handle: int) -> None:
            sync(handle)
            staging.path.rename(tmp_path / "lost")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lose_directory)
            staging.commit()
    assert content_of(final) == "old" and names_in(tmp_path) == ["bundle", "lost"]


def test_one_process_writes_a_name_once_at_a_time(tmp_path: Path) -> None:
    final = tmp_path / "bundle"
    errors: list[BaseException] = []

    def second() -> None:
        try:
            write(final, "second")
        except UsageError as error:
            errors.append(error)

    with staged_directory(final, replace=False) as staging:
        (staging.path / "manifest.json").write_text("first")
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        staging.commit()
    assert len(errors) == 1 and "writing it already" in str(errors[0])
    assert content_of(final) == "first"


KILLED_AT_STEP = """
import os, shutil, signal, sys
from pathlib import Path
from zreward.staging import staged_directory

step, steps = int(sys.argv[2]), iter(range(100))

def counted(call):
    def run(*arguments, **options):
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return run

with staged_directory(Path(sys.argv[1]), replace=True) as staging:
    (staging.path / "manifest.json").write_text("new")
    Path.rename, shutil.rmtree = counted(Path.rename), counted(shutil.rmtree)
    staging.commit()
"""


@pytest.mark.parametrize(("step", "shown"), [(0, "old"), (1, None), (2, "new")])
def test_killed_between_any_two_steps_of_the_commit(tmp_path: Path, step: int, shown: str | None) -> None:
    """Before the old bundle is moved aside, before the new one takes its place, before the old one is removed."""
    final = make_bundle(tmp_path / "bundle", "old")
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", KILLED_AT_STEP, final, str(step)], cwd=root)
    assert done.returncode == -9
    assert (content_of(final) if final.exists() else None) == shown
    with pytest.raises(UsageError, match="exists"):
        write(final, "next")
    assert content_of(final) == (shown or "old")
    assert names_in(tmp_path) == ["bundle"]
