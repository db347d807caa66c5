"""The default rubric texts: four dimensions, five described levels, half-points in between.

They are the content of `ScoreContract.default()` and nothing else reads them. The dimensions are those
of Z-Reward (arXiv 2606.09076); the wording is this project's own.
"""

from __future__ import annotations

from zreward.contract import Dimension

INSTRUCTION = (
    "You are a strict and consistent judge of generated images. You are shown the prompt that an image "
    "was generated from, the image, and a question that names one dimension. Judge that dimension alone, "
    "by its rubric below. Levels run from 1 to 5 in half-point steps. Answer with a single digit: "
    "1 means 1.0, 2 means 1.5, 3 means 2.0, 4 means 2.5, 5 means 3.0, 6 means 3.5, 7 means 4.0, "
    "8 means 4.5, 9 means 5.0."
)

_ALIGNMENT = """\
Does the image show what the prompt asks for: subjects, attributes, counts, actions, relations, style?
5: every element is present and correct.
4: all main elements are correct; one small detail is missing or different.
3: the main subject is right, but an attribute, a count or a relation is clearly wrong.
2: only part of the request is recognizable; several elements are missing or wrong.
1: the image has little or nothing to do with the prompt."""

_REALISM = """\
Are surfaces, textures, light and fine detail believable for the medium that the prompt asks for?
5: free of visible defects; detail holds up when looked at closely.
4: one faint defect that is noticed only when looked for.
3: noticeable smearing, noise, repetition or over-smooth texture in places.
2: strong artifacts in important regions, or an overall synthetic look.
1: dominated by artifacts; surfaces and detail are broken almost everywhere."""

_AESTHETICS = """\
Is the image pleasing: composition, framing, colour, light, focus on the subject?
5: deliberate, balanced composition and harmonious colour; striking.
4: pleasing, with one minor weakness in framing, colour or light.
3: ordinary; nothing disturbs, nothing stands out.
2: awkward framing, clashing colour, clutter or poor light.
1: unpleasant to look at; composition and colour fail together."""

_PLAUSIBILITY = """\
Could the scene exist: anatomy, structure, contact, support, shadows, reflections, perspective?
5: everything obeys structure and physics.
4: one small inconsistency in a minor place.
3: a visible inconsistency, such as a wrong shadow or an unclear contact.
2: an obvious impossibility: a floating or merged object, a malformed limb, broken perspective.
1: several impossibilities that destroy the scene."""

RUBRICS = (
    Dimension(
        name="alignment",
        title="Text-image alignment",
        rubric=_ALIGNMENT,
        question="How well does the image match the prompt? Score the text-image alignment:",
    ),
    Dimension(
        name="realism",
        title="Realism",
        rubric=_REALISM,
        question="How real do surfaces and detail look? Score the realism:",
    ),
    Dimension(
        name="aesthetics",
        title="Aesthetics",
        rubric=_AESTHETICS,
        question="How pleasing is the image? Score the aesthetics:",
    ),
    Dimension(
        name="plausibility",
        title="Physical plausibility",
        rubric=_PLAUSIBILITY,
        question="Does the scene obey structure and physics? Score the physical plausibility:",
    ),
)
