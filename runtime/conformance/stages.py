"""Golden inputs stage by stage: what a provider makes of them, and how far that is from the reference.

Each stage gets what the stage before it gave, as in a score; so the first stage that is off is the one to look at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zreward.bundle import Bundle, GoldenItem
from zreward.errors import BackendError, ZrewardError
from zreward.image import preprocess
from zreward.runtime.backends import OpenGraphs, Session
from zreward.runtime.conformance.checks import Check
from zreward.runtime.conformance.tolerances import Tolerance
from zreward.runtime.engine import DecoderState, Engine
from zreward.runtime.scorer import Scorer

Array = NDArray[Any]

COMPARED = (
    "vision_features",
    "states_after_prompt",
    "states_after_image",
    "probabilities",
    "mean",
    "variance",
)
"""Checks that `compared` makes."""

_MOMENTS = ("mean", "variance")


class Subject:
    """Open graphs with the stages of a score over them.

    Args:
        bundle: whose graphs they are.
        opened: the graphs; who opened them closes them.

    Attributes:
        engine: the stages.
        scorer: scores end to end, one image at a time.
    """

    def __init__(self, bundle: Bundle, opened: OpenGraphs) -> None:
        self.bundle, self.opened = bundle, opened
        self._head = _Head(opened.sessions["decoder"])
        sessions: dict[str, Session] = {**opened.sessions, "decoder": self._head}
        paths = {bundle.path / file: sessions[name] for name, file in bundle.manifest.graphs.items()}
        self.engine = Engine(bundle, open_graph=paths.__getitem__)
        self.scorer = Scorer(self.engine)

    def observe(self, item: GoldenItem) -> Observed:
        """Run the stages of one golden input; errors as those of `Engine`."""
        engine = self.engine
        patches = preprocess(self.bundle.path / item.image, engine.contract.image)
        features = engine.encode_image(patches)
        prompt = engine.prompt_state(item.prompt)
        image = engine.image_state(prompt, [features], patches.token_grid)
        probs = engine.answer(image).probs[0]
        return Observed(features, _on_host(prompt), _on_host(image), probs, *self._head.moments)


@dataclass(frozen=True, eq=False)
class Observed:
    """What the stages of one golden input gave.

    Attributes:
        features: of the image, float32 [tokens, hidden].
        after_prompt, after_image: states by the name of the decoder's input.
        probs: float32 [dimensions, bins].
        mean, variance: as the graph gave them, float32 [dimensions].
    """

    features: Array
    after_prompt: Mapping[str, Array]
    after_image: Mapping[str, Array]
    probs: Array
    mean: Array
    variance: Array


@dataclass(frozen=True)
class StateDifference:
    """How far one state is from the reference, at most over the golden inputs.

    Attributes:
        state: name of the decoder's input.
        after: "prompt" or "image".
        relative_l2: None where it is not a finite number.
    """

    state: str
    after: str
    relative_l2: float | None


@dataclass(frozen=True)
class Differences:
    """Of all golden inputs, the largest: by the name of the check, and by state."""

    figures: Mapping[str, float]
    states: tuple[StateDifference, ...]


def relative_l2(found: Array, expected: Array) -> float:
    """‖found − expected‖ / ‖expected‖; the norm itself where the expected one is zero, infinity for other shapes."""
    if found.shape != expected.shape:
        return float("inf")
    wide = np.asarray(expected, np.float64)
    norm = float(np.linalg.norm(wide))
    return float(np.linalg.norm(np.asarray(found, np.float64) - wide)) / (norm or 1.0)


def differences(found: Sequence[Observed], expected: Sequence[Observed]) -> Differences:
    """How far what was found is from the reference, of the same golden inputs."""
    pairs = list(zip(found, expected, strict=True))
    figures = {
        "vision_features": _largest(relative_l2(a.features, b.features) for a, b in pairs),
        "probabilities": _largest(_apart(a.probs, b.probs) for a, b in pairs),
        "mean": _largest(_apart(a.mean, b.mean) for a, b in pairs),
        "variance": _largest(_apart(a.variance, b.variance) for a, b in pairs),
    }
    states = []
    for after in ("prompt", "image"):
        name = f"after_{after}"
        largest = {
            key: _largest(relative_l2(getattr(a, name)[key], getattr(b, name)[key]) for a, b in pairs)
            for key in getattr(pairs[0][1], name)
        }
        figures[f"states_{name}"] = _largest(largest.values())
        states += [
            StateDifference(key, after, value if np.isfinite(value) else None)
            for key, value in largest.items()
        ]
    return Differences(figures, tuple(states))


def compared(found: Differences, allowed: Mapping[str, Tolerance]) -> Iterator[Check]:
    """A check for each stage, with the state that is furthest off."""
    for name, figure in found.figures.items():
        detail = ""
        if name.startswith("states_after_"):
            states = [state for state in found.states if name == f"states_after_{state.after}"]
            detail = max(states, key=lambda s: float("inf") if s.relative_l2 is None else s.relative_l2).state
        yield Check.within(name, figure, allowed[name].allowed, detail)


def golden_differences(found: Sequence[Array], items: Sequence[GoldenItem]) -> float:
    """The largest difference to a golden bin probability; `found` are float32 [dimensions, bins] of each item."""
    return _largest(
        _apart(probs, np.array(list(item.probs.values()))) for probs, item in zip(found, items, strict=True)
    )


def scored(subject: Subject, items: Sequence[GoldenItem]) -> list[Array]:
    """Probabilities of the golden inputs end to end, by `Scorer`: float64 [dimensions, bins] of each.

    Raises:
        BackendError: one cannot be scored.
    """
    found = []
    for item in items:
        (score,) = subject.scorer.score(
            prompt=item.prompt, images=[subject.bundle.path / item.image], errors="return"
        )
        if isinstance(score, ZrewardError):
            raise BackendError(f"{item.image}: {score}")
        found.append(np.stack([score[name].probs for name in item.probs]))
    return found


def means_apart(found: Sequence[Array], expected: Sequence[Array], bins: Sequence[float]) -> float:
    """The largest difference of a score, from probabilities [dimensions, bins] of each item."""
    values = np.array(bins)
    return _largest(_apart(a @ values, b @ values) for a, b in zip(found, expected, strict=True))


class _Head:
    """The decoder, remembering the moments that the score head gives beside the probabilities."""

    def __init__(self, session: Session) -> None:
        self._session, self.inputs = session, session.inputs
        self.moments: tuple[Array, Array] = (np.empty(0), np.empty(0))

    def run(self, outputs: list[str], inputs: dict[str, Any]) -> list[Any]:
        if "probs" not in outputs:
            return self._session.run(outputs, inputs)
        results = self._session.run([*outputs, *_MOMENTS], inputs)
        self.moments = results[-2], results[-1]
        return results[:-2]


def _on_host(state: DecoderState) -> dict[str, Array]:
    return {name: np.asarray(array) for name, array in state.arrays.items()}


def _apart(found: Array, expected: Array) -> float:
    """The largest absolute difference; a NaN if there is one."""
    if found.shape != expected.shape:
        return float("inf")
    return float(np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64)).max())


def _largest(values: Any) -> float:
    """A NaN if there is one: `max` would lose it."""
    return float(np.max(list(values)))
