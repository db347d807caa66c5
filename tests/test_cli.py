"""The command line as users meet it: output on 80 columns, exit statuses, and what a wrong call says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import Cli
from tests.support.bench import report as bench_report
from tests.support.broken_inputs import EXPECTED_ERRORS, N_LINES, write_job
from zreward.commands import console
from zreward.synthetic import DIMENSIONS, SceneConfig, write_dataset

COMMANDS = (
    "bench compare",
    "demo",
    "export",
    "engine",
    "contract",
    "inspect",
    "verify",
    "score",
    "bench",
    "conformance",
    "eval",
    "data",
    "plugins",
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of six prompts with four images each."""
    return write_dataset(tmp_path_factory.mktemp("scenes") / "data", SceneConfig(), 5, 6, 4)


def images_of(scenes: Path, prompt: int) -> list[Path]:
    return sorted((scenes.parent / "images").glob(f"{prompt:05d}-*.png"))


def widest(text: str) -> int:
    return max(map(len, text.splitlines()))


def test_help_lists_every_command_without_loading_the_heavy_libraries(cli: Cli) -> None:
    result = cli("--help")
    assert result.returncode == 0
    assert all(f" {name} " in result.stdout for name in COMMANDS)
    assert widest(result.stdout) <= 80
    code = (
        "import sys, zreward.cli; print([m for m in ('numpy', 'torch', 'onnx', 'PIL') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


@pytest.mark.parametrize("command", [*COMMANDS[:-1], "data scenes"])
def test_every_command_explains_itself(cli: Cli, command: str) -> None:
    result = cli(*command.split(), "--help")
    assert result.returncode == 0
    assert widest(result.stdout) <= 80


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["scroe"], 2, "'score'"),
        (["score"], 2, "Missing argument"),
        (["score", "bundle"], 2, "--prompt TEXT and at least one image"),
        (["score", "bundle", "--prompt", "p"], 2, "at least one image"),
        (["score", "bundle", "--input", "a.jsonl"], 2, "--input goes with --output"),
        (["score", "bundle", "--input", "a", "-o", "b", "--prompt", "p"], 2, "without images"),
        (["score", "bundle", "--prompt", "p", "a.png", "-o", "b"], 2, "go with --input"),
        (["score", "bundle", "--prompt", "p", "a.png"], 1, "not a bundle"),
        (["export", "nowhere", "-o", "bundle"], 1, "no such checkpoint"),
        (["export", "nowhere", "-o", "bundle", "--weights", "int3"], 2, "int3"),
        (["verify", "nowhere"], 1, "not a bundle"),
        (["inspect", "nowhere"], 1, "not a bundle"),
        (["bench", "nowhere", "--image-size", "big"], 2, "--image-size 'big'"),
        (["bench", "nowhere", "--image-size", "256,"], 2, "--image-size '256,'"),
        (["bench", "nowhere", "--image-size", "0"], 2, "must be at least 1"),
        (["bench", "nowhere", "--image-size", "99999"], 2, "use at most 10000"),
        (["bench", "nowhere", "--candidates", "0"], 2, "candidates must be at least 1"),
        (["bench", "nowhere", "--threads", "0"], 2, "threads must be at least 1"),
        (["bench", "nowhere", "--provider", "quantum"], 2, "unknown provider 'quantum'"),
        (["bench", "nowhere", "--gpu", "device=one"], 2, "expected the number of a GPU"),
        (["bench", "nowhere", "--repetitions", "0"], 2, "use 10 or more"),
        (["bench", "nowhere", "--min-seconds", "nan"], 2, "min-seconds must be between"),
        (["bench", "nowhere", "--json", "none/a.json"], 2, "no such folder for --json"),
        (["bench", "nowhere", "--html", "."], 2, "is a folder; --html takes the name of a file"),
        (["bench", "nowhere", "--json", "a", "--markdown", "a"], 2, "name the same file"),
        (["bench", "nowhere"], 1, "not a bundle"),
        (["bench", "./compare"], 1, "not a bundle"),
        (["bench", "compare"], 2, "Missing argument"),
        (["bench", "compare", "nowhere.json"], 1, "nowhere.json: cannot be read"),
        (["bench", "compare", "a", "b", "--threshold", "0.1"], 2, "expected a percentage such as 10%"),
        (["bench", "compare", "a", "b", "--threshold", "much"], 2, "expected a percentage"),
        (["eval", "nowhere", "nowhere"], 2, "does not exist"),
        (["contract", "nowhere"], 1, "no such checkpoint"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(
    cli: Cli, tmp_path: Path, arguments: list[str], status: int, message: str
) -> None:
    result = cli(*arguments, cwd=tmp_path)
    assert result.returncode == status
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_scores_as_a_table(cli: Cli, tiny_bundle: Path, scenes: Path) -> None:
    result = cli("score", tiny_bundle, "--prompt", "a red ball", *images_of(scenes, 0))
    assert result.returncode == 0, result.stderr
    assert widest(result.stdout) <= 80
    assert all(name in result.stdout for name in (*DIMENSIONS, "overall", "rank"))
    assert result.stdout.count("±") == 4 * len(DIMENSIONS)
    rows = [line.split() for line in result.stdout.splitlines() if ".png" in line]
    overall = [float(row[-2]) for row in rows]
    assert overall == sorted(overall, reverse=True)
    assert [row[-1] for row in rows] == ["1", "2", "3", "4"]


def test_scores_as_json_with_a_failed_item(cli: Cli, tiny_bundle: Path, scenes: Path) -> None:
    good, missing = images_of(scenes, 0)[0], scenes.parent / "missing.png"
    result = cli("score", tiny_bundle, "--prompt", "a red ball", "--json", missing, good)
    assert result.returncode == 1
    failed, scored = map(json.loads, result.stdout.splitlines())
    assert failed["error"]["type"] == "ImageError"
    assert "dimensions" not in failed
    assert scored["image"] == str(good)
    assert list(scored["dimensions"]) == list(DIMENSIONS)
    realism = scored["dimensions"]["realism"]
    assert sum(realism["probs"]) == pytest.approx(1)
    assert realism["mean"] == pytest.approx(sum(p * (1 + i / 2) for i, p in enumerate(realism["probs"])))
    means = [dimension["mean"] for dimension in scored["dimensions"].values()]
    assert scored["overall"] == pytest.approx(sum(means) / 4)
    assert len(scored["contract"]) == 64
    assert "missing.png" in result.stderr


def test_a_prompt_that_cannot_be_scored_fails(cli: Cli, tiny_bundle: Path, scenes: Path) -> None:
    result = cli("score", tiny_bundle, "--prompt", " ", images_of(scenes, 0)[0])
    assert result.returncode == 1
    assert "prompt is empty" in result.stderr


def test_inspect_and_verify(cli: Cli, tiny_bundle: Path) -> None:
    shown = cli("inspect", tiny_bundle)
    assert shown.returncode == 0
    assert "decoder.onnx" in shown.stdout
    manifest = json.loads(cli("inspect", tiny_bundle, "--json").stdout)
    assert manifest["schema"] == "zreward.bundle"
    report = json.loads(cli("verify", tiny_bundle, "--json", "--provider", "cpu").stdout)
    assert report["n_golden"] >= 1 and report["provider"] == "cpu"
    assert report["max_probability_difference"] <= report["tolerance"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (
            ["verify", "BUNDLE", "--provider", "quantum"],
            2,
            "unknown provider 'quantum'; this version has auto, cpu",
        ),
        (
            ["score", "BUNDLE", "--prompt", "p", "IMAGE", "--provider", "tensorrt"],
            1,
            "exported for cpu, which the provider tensorrt cannot run",
        ),
        (
            ["eval", "BUNDLE/contract.json", "SCENES", "--gpu", "device=1"],
            2,
            "--provider and --gpu are for bundles",
        ),
        (
            ["verify", "BUNDLE", "--provider", "cuda", "--gpu", "plugins=a.so"],
            2,
            "GPU option 'plugins': the provider cuda takes only device, memory",
        ),
    ],
)
def test_a_provider_that_cannot_compute_this(
    cli: Cli, tiny_bundle: Path, scenes: Path, arguments: list[str], status: int, message: str
) -> None:
    places = {"BUNDLE": tiny_bundle, "IMAGE": images_of(scenes, 0)[0], "SCENES": scenes}
    given = [str(places.get(a, a.replace("BUNDLE", str(tiny_bundle)))) for a in arguments]
    result = cli(*given)
    assert result.returncode == status
    assert message in " ".join(result.stderr.split()) and result.stdout == ""


def test_contract_is_written_once(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    for file in tiny_checkpoint.iterdir():
        if file.is_file() and file.name != "contract.json":
            (tmp_path / file.name).symlink_to(file)
    result = cli("contract", tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "contract.json").is_file()
    assert "'9'" in result.stdout
    again = cli("contract", tmp_path)
    assert again.returncode == 2
    assert "--force" in again.stderr
    forced = cli("contract", tmp_path, "--force", "--json")
    assert list(json.loads(forced.stdout)["tokens"]) == [str(digit) for digit in range(1, 10)]


def test_bench_writes_samples_machine_and_versions(cli: Cli, tiny_bundle: Path, tmp_path: Path) -> None:
    names = {option: tmp_path / f"bench.{option}" for option in ("json", "markdown", "html")}
    files = [argument for option, path in names.items() for argument in (f"--{option}", path)]
    sweep = ["--image-size", "48,120", "--candidates", "1,3", "--threads", "1", "--separate"]
    quick = ["--min-seconds", "0", "--starts", "1"]
    result = cli("bench", tiny_bundle, *sweep, *quick, *files)
    assert result.returncode == 0, result.stderr
    assert widest(result.stdout) <= 80
    report = json.loads(names["json"].read_text(encoding="utf-8"))
    assert report["machine"]["cpu_count"] == os.cpu_count()
    assert report["versions"]["onnxruntime"]
    found = [(r["configuration"]["image_size"], r["configuration"]["candidates"]) for r in report["results"]]
    assert found == [(48, 1), (48, 3), (120, 1), (120, 3)]
    for stage in report["results"][0]["stages"].values():
        assert len(stage["samples_ms"]) == 10
        assert 0 < stage["min_ms"] <= stage["median_ms"] <= stage["p99_ms"] <= stage["max_ms"]
    assert names["markdown"].read_text(encoding="utf-8").startswith("# Benchmark of")
    assert names["html"].read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert len(list(tmp_path.iterdir())) == 3


def test_bench_compare_exits_with_1_on_a_regression(cli: Cli, tmp_path: Path) -> None:
    for name, slower in (("before", 1.0), ("after", 1.5)):
        bench_report((120, 240), slower=slower).save(tmp_path / f"{name}.json")
    files = ["--json", "c.json", "--markdown", "c.md"]
    result = cli("bench", "compare", "before.json", "after.json", *files, cwd=tmp_path)
    assert result.returncode == 1
    assert widest(result.stdout) <= 80
    assert result.stdout.count("REGRESSION") == 6
    assert "6 regressions above 10 %" in result.stdout
    assert json.loads((tmp_path / "c.json").read_text())["n_regressions"] == 6
    assert (tmp_path / "c.md").read_text(encoding="utf-8").count("REGRESSION") == 6
    assert cli("bench", "compare", "after.json", "before.json", cwd=tmp_path).returncode == 0
    loose = ["--threshold", "80%"]
    assert cli("bench", "compare", "before.json", "after.json", *loose, cwd=tmp_path).returncode == 0
    same = cli("bench", "compare", "before.json", "before.json", cwd=tmp_path)
    assert same.returncode == 0
    assert "before.json (2) against before.json" in same.stdout


def test_bench_interrupted_leaves_nothing_and_says_130(tiny_bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "zreward.cli", "bench", tiny_bundle, "--json", tmp_path / "a.json"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "256×256" not in (line := process.stderr.readline()):
        assert line, "it ended before it was interrupted"
    process.send_signal(signal.SIGINT)
    _, talk = process.communicate(timeout=30)
    assert process.returncode == 130, talk
    assert "Traceback" not in talk
    assert list(tmp_path.iterdir()) == []


def test_eval_of_a_bundle_and_of_its_scores_agree(
    cli: Cli, tiny_bundle: Path, scenes: Path, tmp_path: Path
) -> None:
    scores = tmp_path / "scores.jsonl"
    direct = cli("eval", tiny_bundle, scenes.parent, "--json", "--resamples", "20")
    assert direct.returncode == 0, direct.stderr
    assert cli("score", tiny_bundle, "--input", scenes, "-o", scores).returncode == 0
    from_file = cli("eval", scores, scenes, "--json", "--resamples", "20")
    one, other = json.loads(direct.stdout), json.loads(from_file.stdout)
    assert (one["source"]["kind"], other["source"]["kind"]) == ("bundle", "scores")
    assert one["source"]["contract_sha256"] == other["source"]["contract_sha256"]
    assert one["source"]["bundle_sha256"].startswith(other["source"]["bundle_sha256"])
    assert [row["dimension"] for row in one["rows"]] == [*DIMENSIONS, "overall"]
    for name in ("data", "bins", "bootstrap", "notes"):
        assert one[name] == other[name]
    for row, same in zip(one["rows"], other["rows"], strict=True):
        for name in ("plcc", "srcc", "hpa", "n_pairs", "margin_hpa", "n_margin_pairs"):
            assert row[name] == pytest.approx(same[name])
        for name in ("likelihood", "sharpness"):
            assert row["calibration"][name] == pytest.approx(same["calibration"][name])


def test_eval_prints_tables_of_80_columns_and_writes_a_page(
    cli: Cli, tiny_bundle: Path, scenes: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    result = cli("eval", tiny_bundle, scenes, "--resamples", "20", "--html", page)
    assert result.returncode == 0, result.stderr
    assert widest(result.stdout) <= 80
    assert all(
        word in result.stdout for word in (*DIMENSIONS, "margin", "95 % intervals", "Calibration", "NLL")
    )
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert f"written: {page}" in result.stderr
    assert "95 %" not in cli("eval", tiny_bundle, scenes, "--resamples", "0").stdout


def test_eval_of_a_checkpoint(cli: Cli, tiny_checkpoint: Path, scenes: Path) -> None:
    result = cli("eval", tiny_checkpoint, scenes, "--json", "--resamples", "0", "--threads", "1")
    assert result.returncode == 0, result.stderr
    value = json.loads(result.stdout)
    assert value["source"]["kind"] == "checkpoint"
    assert value["rows"][-1]["n_items"] == 24 * len(DIMENSIONS)


def test_eval_with_failed_items_prints_the_rest_and_fails(
    cli: Cli, tiny_bundle: Path, scenes: Path, tmp_path: Path
) -> None:
    data = scenes.parent / "broken.jsonl"
    lines = scenes.read_text(encoding="utf-8").splitlines()
    data.write_text("\n".join([lines[0].replace(".png", ".gone"), *lines[1:]]), encoding="utf-8")
    result = cli("eval", tiny_bundle, data, "--json", "--resamples", "0")
    assert result.returncode == 1
    assert json.loads(result.stdout)["data"]["n_failed"] == 1
    assert "item 1: " in result.stderr
    assert "1 of 24 images could not be scored" in result.stderr


def test_eval_refuses_wrong_calls_in_one_line_before_the_work(
    cli: Cli, tiny_bundle: Path, tiny_checkpoint: Path, scenes: Path, tmp_path: Path
) -> None:
    empty, unlabelled, other = (tmp_path / f"{name}.jsonl" for name in ("empty", "unlabelled", "other"))
    empty.write_text("", encoding="utf-8")
    unlabelled.write_text('{"prompt": "p", "image": "x.png"}\n', encoding="utf-8")
    other.write_text('{"prompt": "p", "image": "x.png", "scores": {"beauty": 3}}\n', encoding="utf-8")
    (tmp_path / "folder").mkdir()
    for arguments, message in (
        ([tmp_path / "folder", scenes], "neither a bundle"),
        ([tiny_bundle, empty], "the data set is empty"),
        ([tiny_bundle, unlabelled], "line 1: no 'scores'"),
        ([tiny_bundle, tmp_path / "folder"], "no such data set"),
        ([tiny_bundle, other], "labels of 'beauty'"),
        ([tiny_checkpoint, other], "labels of 'beauty'"),
        ([scenes, scenes], "line 1: answers another data set"),
        ([tiny_bundle, scenes, "--html", tmp_path / "no" / "page.html"], "no such folder for --html"),
        ([tiny_bundle, scenes, "--html", tmp_path / "folder"], "is a folder"),
        ([tiny_bundle, scenes, "--html", scenes], "--html would replace what is evaluated"),
        ([tiny_bundle, scenes, "--reasoning"], "--reasoning is for checkpoints"),
        ([tiny_checkpoint, scenes, "--traces", "2"], "add --reasoning"),
    ):
        result = cli("eval", *arguments)
        assert result.returncode == 2, message
        assert message in " ".join(result.stderr.replace("│", " ").split())
        assert "Traceback" not in result.stderr
        assert result.stdout == ""


def test_data_scenes_are_reproducible(cli: Cli, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert cli("data", "scenes", tmp_path / name, "--prompts", "2", "--seed", "3").returncode == 0
    a, b = ((tmp_path / name / "scenes.jsonl").read_bytes() for name in ("a", "b"))
    assert a == b
    assert a.count(b"\n") == 12
    refused = cli("data", "scenes", tmp_path / "a")
    assert refused.returncode == 2
    assert "not an empty directory" in refused.stderr


def test_a_reader_that_goes_away_is_met_quietly(tiny_bundle: Path) -> None:
    command = f"{sys.executable} -m zreward.cli inspect {tiny_bundle} --json | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stderr == ""


@pytest.mark.slow
def test_a_thousand_lines_with_ten_broken_ones_killed_in_the_middle(
    cli: Cli, student_bundle: Path, tmp_path: Path
) -> None:
    job, output = write_job(tmp_path), tmp_path / "scores.jsonl"
    command = [sys.executable, "-m", "zreward.cli", "score", student_bundle, "--input", job, "-o", output]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not output.exists() or output.read_bytes().count(b"\n") < 200:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = output.read_bytes()
    finished = before.count(b"\n")
    assert 200 <= finished < N_LINES, "it was killed too late to prove anything"

    result = cli("score", student_bundle, "--input", job, "-o", output)
    assert result.returncode == 1
    assert f"1,000 lines, {finished:,} of them from an earlier run; 10 failed" in result.stderr
    assert output.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    answers = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [answer["line"] for answer in answers] == list(range(1, N_LINES + 1))
    assert {a["line"]: a["error"]["type"] for a in answers if "error" in a} == EXPECTED_ERRORS
    assert sum("overall" in answer for answer in answers) == 990


@pytest.mark.slow
def test_interrupting_says_so_with_130(tiny_bundle: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path)
    output = tmp_path / "scores.jsonl"
    command = [sys.executable, "-m", "zreward.cli", "score", tiny_bundle, "--input", job, "-o", output]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not output.exists() or output.stat().st_size == 0:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, talk = process.communicate(timeout=30)
    assert process.returncode == 130, talk
    assert "goes on from here" in talk
    assert "Traceback" not in talk


def test_an_interrupt_that_python_drops_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    dropped = []
    monkeypatch.setattr(sys, "unraisablehook", lambda problem: dropped.append(problem.exc_type))
    before = signal.getsignal(signal.SIGINT)
    with console.remembered_interrupt() as stop_if_interrupted:
        stop_if_interrupted()
        thing = Interrupted()
        del thing
        assert dropped == [KeyboardInterrupt]
        with pytest.raises(KeyboardInterrupt):
            stop_if_interrupted()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_demo_goes_the_whole_way(cli: Cli, tmp_path: Path) -> None:
    result = cli("demo", "--output", "out/demo-bundle", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert widest(result.stdout) <= 80 or "contract" in max(result.stdout.splitlines(), key=len)
    assert result.stdout.count(".png") >= 6
    assert result.stdout.count("“") == 2
    assert "total, same prompt" in result.stdout
    assert (tmp_path / "out" / "demo-bundle" / "manifest.json").is_file()
    assert (tmp_path / "out" / "demo-bundle-scores.png").stat().st_size > 10_000
