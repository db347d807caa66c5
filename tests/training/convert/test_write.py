"""What is written and where, what is refused, and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Cli
from tests.training.convert.support import Job, encoded, write_images, write_json, write_parquet
from zreward.errors import UsageError
from zreward.training.convert.formats import FORMATS

DIM = "aesthetics"


def pair(**changes: Any) -> dict[str, Any]:
    return {"prompt": "a cat", "path1": "a.png", "path2": "b.png"} | changes


def rated(**changes: Any) -> dict[str, Any]:
    return {"prompt": "a cat", "img_path": "a.png", "total_score": [3, 4]} | changes


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_images(tmp_path, "a.png", "b.png")
    return write_json(tmp_path / "all.json", [pair(), pair(prompt="ein Käfer")])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class TestPaths:
    def test_relative_below_the_output_and_absolute_elsewhere(self, tmp_path: Path, source: Path) -> None:
        for folder in ("out", "elsewhere"):
            (tmp_path / folder).mkdir()
        write_images(tmp_path / "out" / "images", "a.png", "b.png")
        job = Job(tmp_path / "out")
        job.run("hpdv3", source, images=tmp_path / "out" / "images", dimension=DIM)
        assert [line["image"] for line in job.lines()[:2]] == ["images/a.png", "images/b.png"]
        job = Job(tmp_path / "elsewhere")
        job.run("hpdv3", source, dimension=DIM)
        assert job.lines()[0]["image"] == str(tmp_path / "a.png")
        assert len(job.loaded()) == 4

    def test_from_a_relative_output(
        self, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        job = Job(Path())
        job.run("hpdv3", Path(source.name), dimension=DIM)
        assert job.lines()[0]["image"] == "a.png"

    def test_absolute_paths_in_the_set(self, job: Job, tmp_path: Path, source: Path) -> None:
        write_json(source, [pair(path1=str(tmp_path / "a.png"))])
        job.run("hpdv3", source, images=tmp_path, dimension=DIM)
        assert job.lines()[0]["image"] == "a.png"

    def test_prompts_keep_their_letters(self, job: Job, source: Path) -> None:
        job.run("hpdv3", source, dimension=DIM)
        assert "ein Käfer" in job.data.read_text(encoding="utf-8")
        assert job.loaded().items[2].prompt == "ein Käfer"


class TestMissing:
    def test_the_first_and_the_count_are_named(self, job: Job, source: Path) -> None:
        write_json(source, [pair(), pair(path1="gone.png"), pair(path2="\0"), pair(path2="x" * 300)])
        with pytest.raises(
            UsageError, match=r"3 images or prompts are missing, the first is .*gone\.png; is .*--images"
        ):
            job.run("hpdv3", source, dimension=DIM, pairs=True)
        assert not job.data.exists() and not job.pairs.exists()

    def test_a_comparison_without_one_side_is_left_out(self, job: Job, source: Path) -> None:
        write_json(source, [pair(path1="gone.png"), pair()])
        summary = job.run("hpdv3", source, dimension=DIM, pairs=True, skip_missing=True)
        assert (summary.lines, summary.pairs, summary.n_missing) == (2, 1, 1)
        assert summary.first_missing.endswith("gone.png")
        assert [line["id"] for line in job.lines()] == ["2-1", "2-2"]
        assert len(job.loaded_pairs()) == 1

    def test_a_ranking_keeps_the_images_that_are_there(self, job: Job, source: Path) -> None:
        row = {"prompt": "a", "image_path": ["a.png", "gone.png", "b.png"], "rank": [1, 2, 3]}
        write_json(source, [row])
        summary = job.run("hpdv2", source, dimension=DIM, pairs=True, skip_missing=True)
        assert (summary.lines, summary.pairs, summary.n_missing) == (2, 1, 1)
        assert job.pair_lines() == [{"first": "1-1", "second": "1-3", "dimension": DIM}]

    def test_nothing_left(self, job: Job, source: Path) -> None:
        write_json(source, [rated(img_path="gone.png"), rated(prompt="  ")])
        with pytest.raises(
            UsageError, match=r"nothing is left to write \(1 × the prompt is empty; 1 missing, .*gone"
        ):
            job.run("evalmuse-40k", source, skip_missing=True)
        assert not job.data.exists()

    def test_empty_prompts_are_left_out(self, job: Job, source: Path) -> None:
        write_json(source, [rated(prompt=""), rated()])
        summary = job.run("evalmuse-40k", source)
        assert summary.left_out == {"the prompt is empty": 1}
        assert [line["id"] for line in job.lines()] == ["2"]


class TestOutput:
    def test_nothing_half_written(self, job: Job, tmp_path: Path, source: Path) -> None:
        write_json(source, [pair(), pair(choice_dist=[0, 0])])
        before = names(tmp_path)
        with pytest.raises(UsageError, match="record 2"):
            job.run("hpdv3", source, dimension=DIM, pairs=True)
        assert names(tmp_path) == before

    def test_an_earlier_file_stays_when_the_next_one_fails(self, job: Job, source: Path) -> None:
        job.run("hpdv3", source, dimension=DIM)
        earlier = job.data.read_bytes()
        write_json(source, [pair(), pair(choice_dist=[0, 0])])
        with pytest.raises(UsageError, match="record 2"):
            job.run("hpdv3", source, dimension=DIM, replace=True)
        assert job.data.read_bytes() == earlier

    def test_an_earlier_file_is_replaced_only_when_asked(self, job: Job, source: Path) -> None:
        job.run("hpdv3", source, dimension=DIM)
        with pytest.raises(
            UsageError, match=r"data\.jsonl exists; choose another name, or replace it with --force"
        ):
            job.run("hpdv3", source, dimension=DIM)
        summary = job.run("hpdv3", source, dimension=DIM, limit=1, replace=True)
        assert summary.lines == len(job.lines()) == 2

    def test_the_pairs_are_checked_as_well(self, job: Job, source: Path) -> None:
        job.pairs.write_text("mine")
        with pytest.raises(UsageError, match=r"pairs\.jsonl exists"):
            job.run("hpdv3", source, dimension=DIM, pairs=True)
        assert job.pairs.read_text() == "mine" and not job.data.exists()

    def test_the_source_is_never_replaced(self, tmp_path: Path, source: Path) -> None:
        job = Job(tmp_path)
        job.data = source
        with pytest.raises(UsageError, match="is what is read"):
            job.run("hpdv3", source, dimension=DIM, replace=True)
        job = Job(tmp_path)
        job.pairs = job.data
        with pytest.raises(UsageError, match="need two files"):
            job.run("hpdv3", source, dimension=DIM, pairs=True)

    def test_places_that_are_no_files(self, tmp_path: Path, source: Path) -> None:
        job = Job(tmp_path / "none")
        with pytest.raises(UsageError, match=r"none: no such folder to write data\.jsonl in"):
            job.run("hpdv3", source, dimension=DIM)
        job.data = tmp_path
        with pytest.raises(UsageError, match="is a folder"):
            job.run("hpdv3", source, dimension=DIM)


class TestRequests:
    @pytest.mark.parametrize("name", [name for name, entry in FORMATS.items() if entry.preference])
    def test_a_preference_needs_a_dimension(self, job: Job, source: Path, name: str) -> None:
        with pytest.raises(UsageError, match=r"not in what; name the dimension .* --dimension"):
            job.run(name, source)

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("evalmuse-40k", {"dimension": DIM}, "rates known dimensions and nothing else"),
            ("evalmuse-40k", {"pairs": True}, "leave out --pairs"),
            ("hpdv3", {"dimension": DIM, "prompts": Path("p.json")}, "has prompts of its own"),
            ("hpdv3", {"dimension": DIM, "images": Path("none")}, "none: no such folder of images"),
        ],
    )
    def test_options_that_do_not_fit(
        self, job: Job, source: Path, name: str, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(UsageError, match=message):
            job.run(name, source, **options)

    def test_no_source(self, job: Job, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"none\.json: no such file or folder"):
            job.run("evalmuse-40k", tmp_path / "none.json")


class TestCommandLine:
    def test_converts(self, cli: Cli, job: Job, source: Path) -> None:
        result = cli(
            *("data", "convert", "hpdv3", source, "-o", job.data),
            *("--dimension", DIM, "--pairs", job.pairs, "--limit", "1"),
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.split() == [
            *("data", "set", str(job.data), "lines", "2"),
            *("pairs", "file", str(job.pairs), "pairs", "1"),
        ]
        assert len(job.loaded_pairs()) == 1

    def test_says_what_was_left_out(self, cli: Cli, job: Job, source: Path) -> None:
        write_json(source, [rated(), rated(prompt=""), rated(img_path="gone.png")])
        result = cli("data", "convert", "evalmuse-40k", source, "-o", job.data, "--skip-missing")
        assert result.returncode == 0
        assert "left out 1 records: the prompt is empty" in result.stderr
        assert "left out 1 that are missing, the first is" in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["hpdv4", "all.json", "-o", "d"], "unknown format 'hpdv4'; known are hpdv3, hpdv2"),
            (["hpdv3", "all.json", "-o", "d"], "name the dimension that it shall label"),
            (["hpdv3", "none.json", "-o", "d", "--dimension", DIM], "none.json: no such file"),
            (["hpdv3", "all.json"], "Missing option"),
            (["hpdv3", "all.json", "-o", "d", "--dimension", DIM, "--limit", "0"], "--limit"),
        ],
    )
    def test_a_wrong_call_ends_with_2(
        self, cli: Cli, tmp_path: Path, source: Path, arguments: list[str], message: str
    ) -> None:
        result = cli("data", "convert", *arguments, cwd=tmp_path)
        assert result.returncode == 2
        assert message in " ".join(result.stderr.replace("│", " ").split())
        assert "Traceback" not in result.stderr and result.stdout == ""
        assert names(tmp_path) == {"a.png", "b.png", "all.json"}

    def test_bad_input_is_one_line(self, cli: Cli, tmp_path: Path, source: Path) -> None:
        source.write_text('[{"prompt": ')
        result = cli("data", "convert", "hpdv3", source, "-o", tmp_path / "d", "--dimension", DIM)
        assert result.returncode == 2
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "all.json: not valid JSON, or cut short" in errors[0]

    def test_a_dimension_of_another_contract_is_noted(self, cli: Cli, job: Job, source: Path) -> None:
        result = cli("data", "convert", "hpdv3", source, "-o", job.data, "--dimension", "beauty")
        assert result.returncode == 0
        assert "'beauty' is not one of the default contract's dimensions" in result.stderr

    def test_help_names_every_format(self, cli: Cli) -> None:
        result = cli("data", "convert", "--help")
        text = "".join(result.stdout.replace("│", " ").split())
        assert result.returncode == 0
        assert all(name in text for name in FORMATS)
        assert max(map(len, result.stdout.splitlines())) <= 80


def test_neither_torch_nor_parquet_is_loaded_for_a_json_set(job: Job, source: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from zreward.training.convert.records import Request\n"
        "from zreward.training.convert.write import Target, convert_dataset\n"
        f"source = Path({str(source)!r})\n"
        f"convert_dataset('hpdv3', Request(source, source.parent, 'realism'), Target(Path({str(job.data)!r})))\n"
        "print([name for name in ('torch', 'transformers', 'pyarrow', 'google.protobuf') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_parquet_is_read_as_it_goes(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--limit 1` on a file with a broken second half: the broken part is never looked at."""
    monkeypatch.setattr("zreward.training.convert.sources._BATCH_ROWS", 1)
    rows = [
        {
            "prompt": "a cat",
            "left_image": {"bytes": os.urandom(64) if shade else encoded(0), "path": None},
            "right_image": {"bytes": encoded(1), "path": None},
            "vote_type": "leftvote",
        }
        for shade in range(4)
    ]
    source = write_parquet(tmp_path / "test.parquet", rows, row_group_size=1)
    summary = job.run("genai-bench-votes", source, dimension=DIM, limit=1)
    assert summary.lines == 2
    with pytest.raises(UsageError, match="record 2"):
        job.run("genai-bench-votes", source, dimension=DIM, replace=True)
    assert json.loads(job.data.read_text().splitlines()[0])["id"] == "1-left"
