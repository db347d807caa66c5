"""`zreward demo`: the whole way once, from the checkpoint that ships with the package to a contact sheet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zreward.commands import console
from zreward.commands.bench import print_stages
from zreward.commands.export import print_bundle
from zreward.commands.score import print_scores, ranks_from_overall

if TYPE_CHECKING:
    from zreward.contact_sheet import SheetPrompt
    from zreward.runtime import Scorer
    from zreward.synthetic import Scene

REFERENCE_STUDENT = Path(__file__).resolve().parent.parent / "assets" / "reference-student"

_SEED = 20_000  # no training or evaluation split starts here
_PROMPTS = 2
_CANDIDATES = 4


def demo(
    output: Annotated[
        Path, typer.Option("--output", help="Bundle directory; the images go beside it.")
    ] = Path("build/demo-bundle"),
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
) -> None:
    """Export the reference student, verify it, score drawn scenes and show the latency."""
    from zreward.export.build import ExportOptions, export_bundle
    from zreward.runtime import Scorer
    from zreward.runtime.verify import verify_bundle

    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with console.progress("MB") as progress:
        bundle = export_bundle(REFERENCE_STUDENT, output, ExportOptions(force=True), progress)
    with console.working("verifying"):
        report = verify_bundle(output, threads=threads)
    print_bundle(bundle)
    console.print_fact("verified", f"{report.n_golden} golden inputs")
    sheet_path = output.parent / f"{output.name}-scores.png"
    with Scorer.open(output, threads=threads) as scorer:
        _score_scenes(scorer, output.parent / f"{output.name}-images", sheet_path)
        _show_latency(scorer, threads)
    console.print_fact("look at", sheet_path)


def _score_scenes(scorer: Scorer, folder: Path, sheet_path: Path) -> None:
    from zreward.contact_sheet import draw_contact_sheet
    from zreward.synthetic import SceneConfig, generate

    folder.mkdir(exist_ok=True)
    scenes = generate(SceneConfig(), _SEED, _PROMPTS, _CANDIDATES)
    prompts = [_score_scene(scorer, scene, folder) for scene in scenes]
    draw_contact_sheet(prompts, title="zreward demo: the reference student").save(sheet_path)


def _score_scene(scorer: Scorer, scene: Scene, folder: Path) -> SheetPrompt:
    """Write the scene's images, score them from there, print the scores and return the sheet's part."""
    from PIL import Image

    from zreward.contact_sheet import SheetImage, SheetPrompt

    images = [Image.fromarray(candidate.image) for candidate in scene.candidates]
    paths = [folder / f"{scene.index}-{number}.png" for number in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    scores = scorer.score(prompt=scene.prompt, images=paths)
    ranks = ranks_from_overall({index: score.overall for index, score in enumerate(scores)})
    rows = [(path.name, ranks[index], scores[index]) for index, path in enumerate(paths)]
    print_scores(rows, title=f"“{scene.prompt}”")
    cards = [
        SheetImage(image, ranks[index], scores[index].overall, scores[index].dimensions)
        for index, image in enumerate(images)
    ]
    return SheetPrompt(scene.prompt, cards)


def _show_latency(scorer: Scorer, threads: int | None) -> None:
    from zreward.runtime.bench import BenchPlan
    from zreward.runtime.bench.measure import measure
    from zreward.runtime.bench.rates import measure_rate
    from zreward.synthetic import SceneConfig

    plan = BenchPlan(image_sizes=(SceneConfig().size,), threads=(threads,), min_seconds=1)
    with console.progress("%") as progress:
        results = measure(scorer, plan, measure_rate(threads), progress)
    for result in results:
        print_stages(result)
