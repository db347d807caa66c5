"""Scenes as arrays for training the reference student, with the targets that help it to see and to read.

Beside the labels of the four dimensions there are auxiliary targets, since labels alone teach a small
model from scratch only the loudest defects: what covers each image token, the severity of each defect,
and whether a token's object is one that the prompt asks for. Each image also comes with other prompts
that describe it more or less well, made from what is drawn, which multiplies the alignment examples.

Shapes: N images, K prompts per image, T image tokens, A annotators. Prompt 0 is the scene's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zreward.synthetic import DIMENSIONS, Candidate, PromptSpec, SceneConfig, aggregate, annotate, make_scene
from zreward.synthetic.language import COLOURS, RELATIONS, SHAPES, Group, sentence
from zreward.synthetic.render import CRACK, FIRST_OBJECT, SCRAP, SHADOW
from zreward.synthetic.requests import other_prompt
from zreward.synthetic.truth import (
    SceneObject,
    errors_of_matching,
    matched_objects,
    relations_held,
    score_of_errors,
)

NO_OBJECT = 255
COVERS = ("object", "shadow", "scrap", "crack")
FLAWS = ("floating", "sunk", "merged")
MATCHES = ("none", "asked for", "one attribute off", "not asked for")
GROUPS = ("none", "first", "second", "not asked for")
ERROR_KINDS = ("attributes", "missing", "extra", "relation")
NO_RELATION = 2
MAX_ERRORS = 3
MAX_DRAWN = 3

_DOMINANT_SHARE = 0.12


@dataclass(frozen=True)
class SceneArrays:
    """One split.

    Attributes:
        images: uint8 [N, size, size, 3].
        groups: int64 [N], the scene of each image.
        severities: uint8 [N, 11], fields of `Defects` in order.
        token_colour, token_shape: uint8 [N, T], index of the dominant object's, or their number for none.
        token_rank: uint8 [N, T], the dominant object's place from the left, or `MAX_DRAWN` for none.
        token_base: float32 [N, T], its floor depth; 0 for none.
        counts: uint8 [N, 10], how many objects have each colour, then each shape.
        token_cover: float32 [N, T, 4], share of the token covered by each of `COVERS`.
        token_flaws: uint8 [N, T, 3], severity of the dominant object's `FLAWS`.
        prompts: texts [N, K].
        asked: uint8 [N, K], how many objects the prompt asks for.
        errors: uint8 [N, K, 4], `ERROR_KINDS`, cut at `MAX_ERRORS`.
        matches: uint8 [N, K, T], index of `MATCHES`.
        token_group: uint8 [N, K, T], index of `GROUPS`: which group of the prompt the token's object stands for.
        relations: uint8 [N, K, 4], whether the first group stands in each of `RELATIONS` to the second; `NO_RELATION`
            where there is no such pair.
        true_scores: float32 [N, K, 4].
        annotations: float32 [N, K, 4, A].
        labels: float32 [N, K, 4], the panel's aggregate.
    """

    images: NDArray[np.uint8]
    groups: NDArray[np.int64]
    severities: NDArray[np.uint8]
    token_colour: NDArray[np.uint8]
    token_shape: NDArray[np.uint8]
    token_rank: NDArray[np.uint8]
    token_base: NDArray[np.float32]
    counts: NDArray[np.uint8]
    token_cover: NDArray[np.float32]
    token_flaws: NDArray[np.uint8]
    prompts: NDArray[np.str_]
    asked: NDArray[np.uint8]
    errors: NDArray[np.uint8]
    matches: NDArray[np.uint8]
    token_group: NDArray[np.uint8]
    relations: NDArray[np.uint8]
    true_scores: NDArray[np.float32]
    annotations: NDArray[np.float32]
    labels: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.images)


def build_arrays(
    config: SceneConfig,
    seed: int,
    n_prompts: int,
    candidates: int,
    *,
    token_side: int,
    extra_prompts: int = 0,
    workers: int = 1,
) -> SceneArrays:
    """Generate a split; the result does not depend on `workers`."""
    chunk = 100
    jobs = [
        (config, seed, range(start, min(start + chunk, n_prompts)), candidates, token_side, extra_prompts)
        for start in range(0, n_prompts, chunk)
    ]
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            parts = list(pool.map(_chunk_arrays, jobs))
    else:
        parts = [_chunk_arrays(job) for job in jobs]
    names = [field.name for field in dataclasses.fields(SceneArrays)]
    return SceneArrays(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def length_batches(
    rng: np.random.Generator, lengths: NDArray[np.int64], batch: int
) -> Iterator[NDArray[np.int64]]:
    """Row numbers in batches of equal length, in random order; the remainder of a length is a small batch."""
    batches: list[NDArray[np.int64]] = []
    for length in np.unique(lengths):
        rows = rng.permutation(np.flatnonzero(lengths == length))
        batches += [rows[start : start + batch] for start in range(0, len(rows), batch)]
    for index in rng.permutation(len(batches)):
        yield batches[index]


_Job = tuple[SceneConfig, int, range, int, int, int]


def _chunk_arrays(job: _Job) -> SceneArrays:
    config, seed, indices, candidates, side, extra = job
    columns: dict[str, list[Any]] = {field.name: [] for field in dataclasses.fields(SceneArrays)}
    for index in indices:
        scene = make_scene(config, seed, index, candidates)
        for number, candidate in enumerate(scene.candidates):
            rng = np.random.default_rng([seed, index, 1_000_000 + number])
            row = _image_row(candidate, side)
            requests = [(scene.spec, scene.prompt)]
            for _ in range(extra):
                spec = other_prompt(rng, candidate.objects, config.max_objects)
                requests.append((spec, sentence(rng, spec)))
            row |= _prompt_rows(rng, candidate, requests, row.pop("token_object"), config)
            row["groups"] = index
            for name, value in row.items():
                columns[name].append(value)
    return SceneArrays(**{name: np.asarray(values) for name, values in columns.items()})


def _image_row(candidate: Candidate, side: int) -> dict[str, Any]:
    """Per-image targets; `token_object` is the index of each token's dominant object."""
    segments = candidate.segments
    step = segments.shape[0] // side
    blocks = segments.reshape(side, step, side, step).transpose(0, 2, 1, 3).reshape(side * side, -1)
    labels = [FIRST_OBJECT + k for k in range(len(candidate.objects))]
    shares = (
        np.stack([(blocks == label).mean(axis=1) for label in labels]) if labels else np.zeros((1, side**2))
    )
    dominant = np.where(shares.max(axis=0) >= _DOMINANT_SHARE, shares.argmax(axis=0), NO_OBJECT)
    colours, shapes = list(COLOURS), list(SHAPES)

    def of_token(values: Sequence[int], absent: int) -> NDArray[np.uint8]:
        return np.array([absent if k == NO_OBJECT else values[k] for k in dominant], dtype=np.uint8)

    objects = candidate.objects
    cover = [shares.sum(axis=0), *((blocks == label).mean(axis=1) for label in (SHADOW, SCRAP, CRACK))]
    return {
        "images": candidate.image,
        "severities": np.array(dataclasses.astuple(candidate.defects), dtype=np.uint8),
        "token_object": dominant,
        "token_colour": of_token([colours.index(item.colour) for item in objects], len(colours)),
        "token_shape": of_token([shapes.index(item.shape) for item in objects], len(shapes)),
        "token_rank": of_token(range(len(objects)), MAX_DRAWN),
        "token_base": np.array(
            [0.0 if k == NO_OBJECT else objects[k].base for k in dominant], dtype=np.float32
        ),
        "counts": np.array(
            [sum(item.colour == colour for item in objects) for colour in colours]
            + [sum(item.shape == shape for item in objects) for shape in shapes],
            dtype=np.uint8,
        ),
        "token_cover": np.stack(cover, axis=1).astype(np.float32),
        "token_flaws": np.stack([of_token([getattr(item, f) for item in objects], 0) for f in FLAWS], axis=1),
    }


def _prompt_rows(
    rng: np.random.Generator,
    candidate: Candidate,
    requests: Sequence[tuple[PromptSpec, str]],
    token_object: NDArray[np.int64],
    config: SceneConfig,
) -> dict[str, Any]:
    """Targets that depend on the prompt, stacked over K; prompt 0 keeps the candidate's own labels."""
    objects = candidate.objects
    matchings = [(spec, matched_objects(spec, objects)) for spec, _ in requests]
    errors = [errors_of_matching(*matching, len(objects)) for matching in matchings]
    own_truth = [candidate.true_scores[name] for name in DIMENSIONS]
    truths = np.array(
        [
            [score_of_errors(spec, found), *own_truth[1:]]
            for (spec, _), found in zip(requests, errors, strict=True)
        ]
    )
    own = np.array([candidate.annotator_scores[name] for name in DIMENSIONS])
    annotations = np.repeat(own[None], len(requests), axis=0)
    annotations[1:, 0] = annotate(rng, truths[1:], config)[:, 0]
    return {
        "prompts": [text for _, text in requests],
        "asked": np.array([spec.n_objects for spec, _ in requests], dtype=np.uint8),
        "errors": np.minimum([dataclasses.astuple(found) for found in errors], MAX_ERRORS).astype(np.uint8),
        "matches": np.stack([_token_matches(spec, objects, token_object) for spec, _ in requests]),
        "token_group": np.stack([_token_groups(*m, objects, token_object) for m in matchings]),
        "relations": np.array(
            [relations_held(*matching) or [NO_RELATION] * len(RELATIONS) for matching in matchings],
            dtype=np.uint8,
        ),
        "true_scores": truths.astype(np.float32),
        "annotations": annotations.astype(np.float32),
        "labels": aggregate(annotations).astype(np.float32),
    }


def _token_matches(
    spec: PromptSpec, objects: Sequence[SceneObject], token_object: NDArray[np.int64]
) -> NDArray[np.uint8]:
    def match(item: SceneObject) -> int:
        wrong = min((item.colour != g.colour) + (item.shape != g.shape) for g in spec.groups)
        return 1 + wrong

    of_object = [match(item) for item in objects]
    return np.array([0 if k == NO_OBJECT else of_object[k] for k in token_object], dtype=np.uint8)


def _token_groups(
    spec: PromptSpec,
    pairs: Sequence[tuple[Group, SceneObject | None]],
    objects: Sequence[SceneObject],
    token_object: NDArray[np.int64],
) -> NDArray[np.uint8]:
    stands_for = {
        id(drawn): 1 + place
        for asked, drawn in pairs
        for place, group in enumerate(spec.groups)
        if asked is group
    }
    of_object = [stands_for.get(id(item), len(GROUPS) - 1) for item in objects]
    return np.array([0 if k == NO_OBJECT else of_object[k] for k in token_object], dtype=np.uint8)
