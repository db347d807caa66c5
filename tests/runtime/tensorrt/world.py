"""What the scenarios of the TensorRT backend work with."""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.cuda_driver import FakeDriver
from tests.support.tensorrt_engines import FakeLibrary, write_engine
from zreward.bundle import Bundle
from zreward.errors import BackendError, ZrewardError
from zreward.image import preprocess
from zreward.runtime import GpuOptions, Score, Scorer
from zreward.runtime.backends.tensorrt import opening
from zreward.runtime.engine import DecoderState, Engine

PROMPTS = ("a red ball left of a blue cube", "two green cones")


class World:
    """What a scenario works with: a copy of the bundle without engines, the driver, and the library."""

    def __init__(self, flavour: str, module: Any, driver: FakeDriver, source: Path, folder: Path) -> None:
        self.flavour, self.module, self.driver, self.folder = flavour, module, driver, folder
        self.path = Path(shutil.copytree(source, folder / "bundle"))
        self.bundle = Bundle.open(self.path)
        self.version = module.__version__
        self.library = FakeLibrary(module, driver, self.bundle)
        opening.load_tensorrt = lambda name: self.library
        item = self.bundle.golden_items()[0]
        self.image = self.path / item.image
        self.pixels = [
            np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8) for seed in range(9)
        ]

    @property
    def own_graphs(self) -> bool:
        """Whether the runtime captures CUDA graphs; TensorRT-RTX does it itself."""
        return self.flavour == "tensorrt"

    def write_engine(self, **changes: Any) -> Path:
        return write_engine(self.bundle, self.flavour, self.version, **changes).path

    @contextmanager
    def opened(self, **changes: Any) -> Iterator[Scorer]:
        """A scorer on a new engine; everything must be given back in the end, and no rule broken."""
        self.write_engine(**changes)
        with Scorer.open(self.path, provider=self.flavour) as scorer:
            yield scorer
        self.assert_clean()

    def on_cpu(self) -> Scorer:
        return Scorer.open(self.path, provider="cpu", threads=1)

    def assert_clean(self) -> None:
        gc.collect()
        assert not self.driver.violations, self.driver.violations
        assert set(self.driver.live().values()) == {0}, self.driver.live()
        assert not self.library.contexts and not self.library.engines

    def refused(
        self,
        error: type[ZrewardError] = BackendError,
        provider: str | None = None,
        gpu: GpuOptions | None = None,
    ) -> str:
        """The message that opening the bundle fails with, leaving nothing behind."""
        try:
            Scorer.open(self.path, provider=provider or self.flavour, gpu=gpu)
        except error as found:
            message = str(found)
        else:
            raise AssertionError("it was opened")
        self.assert_clean()  # once the error no longer holds what it went through
        return message


def image_state(engine: Engine, prompt: str, *images: Any) -> DecoderState:
    patches = [preprocess(image, engine.contract.image) for image in images]
    return engine.image_state(
        engine.prompt_state(prompt), [engine.encode_image(p) for p in patches], patches[0].token_grid
    )


def same_scores(found: list[Score], expected: list[Score]) -> None:
    for one, other in zip(found, expected, strict=True):
        for name in other:
            np.testing.assert_array_equal(one[name].probs, other[name].probs)


def graph_facts(scorer: Scorer) -> list[Any]:
    return [
        facts for session in scorer.engine.opened.sessions.values() for facts in session.graph_facts.values()
    ]


def provider_of(world: World) -> str:
    with Scorer.open(world.path, threads=1) as scorer:
        scorer.score(prompt=PROMPTS[0], images=[world.image])
        return scorer.engine.opened.provider


def message_of(run: Callable[[], object]) -> str:
    try:
        run()
    except BackendError as error:
        return str(error)
    raise AssertionError("it ran")


@contextmanager
def heard() -> Iterator[list[str]]:
    """What the runtime logs as a warning."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("zreward.runtime")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
