"""`Scorer`: prompts and images in, four distributions an image out.

It decides what runs together: items of one prompt share the prompt's state (kept for the last few prompts),
images of one size run as one batch, and a failed item is that item's error and nobody else's. While the model works on
one batch, threads decode and resize the images of the next.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Literal, overload

import numpy as np

from zreward.bundle import Bundle
from zreward.contract import ScoreContract
from zreward.distribution import DistributionError, ScoreDistribution
from zreward.errors import BackendError, UsageError, ZrewardError
from zreward.image import ImageInput, Patches, preprocess
from zreward.lengths import MAX_IMAGES
from zreward.runtime.backends.options import GpuOptions
from zreward.runtime.engine import DecoderState, Engine
from zreward.runtime.score import Score

_CACHED_PROMPTS = 4
_PREPROCESSORS = min(4, os.cpu_count() or 1)  # threads that decode and resize

_CLOSED = "this Scorer is closed; open the bundle again"

Pair = tuple[str, ImageInput]


class Scorer:
    """Scores images with one bundle. Safe to share between threads.

    Use `Scorer.open`. As a context manager it releases the graphs at the end.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine
        self._prompts: OrderedDict[str, DecoderState] = OrderedDict()
        self._lock = threading.Lock()
        self._preprocessors = ThreadPoolExecutor(_PREPROCESSORS, thread_name_prefix="zreward-preprocess")

    @staticmethod
    def open(
        bundle: str | Path,
        *,
        provider: str = "auto",
        threads: int | None = None,
        gpu: GpuOptions | None = None,
    ) -> Scorer:
        """Open the bundle directory `bundle`.

        Args:
            bundle: directory written by `zreward export`.
            provider: "cpu"; "tensorrt" or "tensorrt-rtx" for an engine that `zreward engine` built into the bundle;
                "cuda" or "ort-tensorrt" for ONNX Runtime on a GPU; "auto" for what the bundle was exported for where
                that runs on this machine, an engine or "cuda", else the CPU.
            threads: of the CPU, per run; None means one per physical core.
            gpu: which GPU, and how it is used, where one is.

        Raises:
            BundleError: the bundle or an engine is incomplete, altered, or of another version.
            BackendError: what the provider needs is missing, it refuses the graphs, or the bundle is for another one.
            PluginError: a library of plugins is missing or was altered, or does not fit.
            UsageError: an unknown provider, a thread count below one, or an option that the provider does not take.
        """
        return Scorer(Engine(Bundle.open(bundle), provider=provider, threads=threads, gpu=gpu))

    @property
    def engine(self) -> Engine:
        """The stages behind the scores, for benchmarks.

        Raises:
            UsageError: the scorer is closed.
        """
        if self._engine is None:
            raise UsageError(_CLOSED)
        return self._engine

    @property
    def bundle(self) -> Bundle:
        return self.engine.bundle

    @property
    def contract(self) -> ScoreContract:
        return self.engine.contract

    @overload
    def score(
        self, *, prompt: str, images: Sequence[ImageInput], errors: Literal["raise"] = ...
    ) -> list[Score]: ...
    @overload
    def score(
        self, *, prompt: str, images: Sequence[ImageInput], errors: Literal["return"]
    ) -> list[Score | ZrewardError]: ...
    def score(
        self, *, prompt: str, images: Sequence[ImageInput], errors: Literal["raise", "return"] = "raise"
    ) -> list[Score] | list[Score | ZrewardError]:
        """Score candidates of one prompt.

        Args:
            prompt: the text that the images were generated from.
            images: each a path, encoded bytes, a PIL image, or an HWC uint8 array.
            errors: "raise" the first failed item's error, or "return" errors in the items' places.

        Returns:
            One `Score` per image, in order.
        """
        if isinstance(images, str | bytes | Path) or not isinstance(images, Sequence):
            raise UsageError("images must be a list of images; for a single one pass [image]")
        pairs = [(prompt, image) for image in images]
        return self.score_pairs(pairs, errors="return") if errors == "return" else self.score_pairs(pairs)

    @overload
    def score_pairs(self, pairs: Sequence[Pair], *, errors: Literal["raise"] = ...) -> list[Score]: ...
    @overload
    def score_pairs(
        self, pairs: Sequence[Pair], *, errors: Literal["return"]
    ) -> list[Score | ZrewardError]: ...
    def score_pairs(
        self, pairs: Sequence[Pair], *, errors: Literal["raise", "return"] = "raise"
    ) -> list[Score] | list[Score | ZrewardError]:
        """Score (prompt, image) pairs of any mix of prompts; otherwise as `score`."""
        if errors not in ("raise", "return"):
            raise UsageError(f"errors must be 'raise' or 'return', not {errors!r}")
        if not isinstance(pairs, Sequence) or any(not isinstance(p, tuple) or len(p) != 2 for p in pairs):
            raise UsageError("pairs must be a list of (prompt, image) tuples")
        engine = self.engine
        results: list[Score | ZrewardError] = []
        chunks = [pairs[start : start + MAX_IMAGES] for start in range(0, len(pairs), MAX_IMAGES)]
        ahead = self._preprocessed(engine, chunks[0]) if chunks else []
        for index, pair_chunk in enumerate(chunks):
            ready = ahead
            ahead = self._preprocessed(engine, chunks[index + 1]) if index + 1 < len(chunks) else []
            chunk = self._score_chunk(engine, pair_chunk, ready)
            failure = next((r for r in chunk if isinstance(r, ZrewardError)), None)
            if failure is not None and errors == "raise":
                for waiting in ahead:
                    waiting.cancel()
                raise failure
            results.extend(chunk)
        return results

    def rank(self, *, prompt: str, images: Sequence[ImageInput]) -> list[int]:
        """Indices of `images` from the best overall score to the worst; equals keep their order."""
        scores = self.score(prompt=prompt, images=images)
        return sorted(range(len(scores)), key=lambda index: -scores[index].overall)

    def close(self) -> None:
        """Release the graphs; scoring afterwards is an error. Closing twice is not."""
        with self._lock:
            engine, self._engine = self._engine, None
            self._prompts.clear()
        if engine is not None:
            engine.close()
        self._preprocessors.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _preprocessed(self, engine: Engine, pairs: Sequence[Pair]) -> list[Future[Patches]]:
        """The patches of each pair's image, soon; a bad prompt is an error before its image is looked at."""

        def work(prompt: str, image: ImageInput) -> Patches:
            engine.encoder.text_prefix_ids(prompt)
            return preprocess(image, engine.contract.image)

        try:
            return [self._preprocessors.submit(work, *pair) for pair in pairs]
        except RuntimeError:  # another thread has closed the scorer
            raise UsageError(_CLOSED) from None

    def _score_chunk(
        self, engine: Engine, pairs: Sequence[Pair], ready: Sequence[Future[Patches]]
    ) -> list[Score | ZrewardError]:
        results: dict[int, Score | ZrewardError] = {}
        groups: dict[tuple[str, tuple[int, int]], list[tuple[int, Patches]]] = {}
        for index, ((prompt, _), future) in enumerate(zip(pairs, ready, strict=True)):
            try:
                patches = future.result()
            except CancelledError:
                raise UsageError(_CLOSED) from None
            except ZrewardError as error:
                results[index] = error
                continue
            groups.setdefault((prompt, patches.token_grid), []).append((index, patches))
        # Groups of one prompt follow each other, so that its state is computed once, whatever the cache holds.
        first = {prompt: order for order, (prompt, _) in reversed(list(enumerate(groups)))}
        for (prompt, grid), items in sorted(groups.items(), key=lambda group: first[group[0][0]]):
            try:
                scores = self._score_group(engine, prompt, [patches for _, patches in items], grid)
            except ZrewardError as error:
                scores = [error] * len(items)
            results.update(zip((index for index, _ in items), scores, strict=True))
        return [results[index] for index in range(len(pairs))]

    def _score_group(
        self, engine: Engine, prompt: str, patches: list[Patches], grid: tuple[int, int]
    ) -> list[Score | ZrewardError]:
        prompt_state = self._prompt_state(engine, prompt)
        step = engine.images_together(prompt_state, patches[0].n_tokens)
        scores: list[Score | ZrewardError] = []
        for start in range(0, len(patches), step):
            features = [engine.encode_image(p) for p in patches[start : start + step]]
            answers = engine.answer(engine.image_state(prompt_state, features, grid))
            masses = [None] * len(features) if answers.label_mass is None else list(answers.label_mass)
            scores += [self._score_of(engine, p, m) for p, m in zip(answers.probs, masses, strict=True)]
        return scores

    @staticmethod
    def _score_of(engine: Engine, probs: np.ndarray, mass: np.ndarray | None) -> Score | ZrewardError:
        contract = engine.contract
        try:
            distributions = {
                name: ScoreDistribution(contract.bins, row)
                for name, row in zip(contract.dimension_names, probs, strict=True)
            }
        except DistributionError as error:
            return BackendError(
                f"the model gave no usable distribution ({error}); check it with `zreward verify`"
            )
        label_mass = None
        if mass is not None:
            if not np.isfinite(mass).all():
                return BackendError(f"the model gave a label mass of {mass.tolist()}")
            label_mass = {n: float(m) for n, m in zip(contract.dimension_names, mass, strict=True)}
        return Score(distributions, label_mass)

    def _prompt_state(self, engine: Engine, prompt: str) -> DecoderState:
        """The state after `prompt`, from the cache of the last few prompts where it is there."""
        with self._lock:
            state = self._prompts.get(prompt) if isinstance(prompt, str) else None
            if state is not None:
                self._prompts.move_to_end(prompt)
                return state
        state = engine.prompt_state(prompt)
        with self._lock:
            if self._engine is not None:  # a closed scorer holds no memory
                self._prompts[prompt] = state
            while len(self._prompts) > _CACHED_PROMPTS:
                self._prompts.popitem(last=False)
        return state
