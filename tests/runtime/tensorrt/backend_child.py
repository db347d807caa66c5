"""Scenarios of the TensorRT backend, in a process whose loader finds a CUDA driver and TensorRT made of stubs.

python -m tests.runtime.tensorrt.backend_child FLAVOUR BUNDLE [SCENARIO…]

Each scenario is a function that asserts; the process prints which ones passed, and the trace of those that did not.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import logging
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tests.support.cuda_driver import ILLEGAL_ADDRESS, NO_DEVICE, OUT_OF_MEMORY, FakeDriver
from tests.support.plugins import recorded_library
from tests.support.tensorrt_engines import FakeLibrary, write_engine
from zreward.bundle import Bundle
from zreward.errors import BackendError, BenchError, BundleError, PluginError, UsageError, ZrewardError
from zreward.image import preprocess
from zreward.jsonfile import dataclass_from_json
from zreward.runtime import Score, Scorer, backends
from zreward.runtime.backends.tensorrt import DeviceArray, graphs, opening
from zreward.runtime.bench import worker
from zreward.runtime.bench.machine import describe_machine
from zreward.runtime.bench.plan import BenchPlan
from zreward.runtime.bench.rates import Rate
from zreward.runtime.bench.run import _has_bound, _notes
from zreward.runtime.bench.worker import Job, Measured
from zreward.runtime.engine import DecoderState, Engine
from zreward.runtime.verify import verify_bundle

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

    def refused(self, error: type[ZrewardError] = BackendError, provider: str | None = None) -> str:
        """The message that opening the bundle fails with, leaving nothing behind."""
        try:
            Scorer.open(self.path, provider=provider or self.flavour)
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


def same(found: list[Score], expected: list[Score]) -> None:
    for one, other in zip(found, expected, strict=True):
        for name in other:
            np.testing.assert_array_equal(one[name].probs, other[name].probs)


def scores_equal_those_of_the_cpu(world: World) -> None:
    """Images of several sizes and prompts, once, again and again: as runs, as captures, as launched graphs."""
    images = [world.image, world.pixels[0], world.pixels[1][:48], world.pixels[2]]
    pairs = [(prompt, image) for prompt in PROMPTS for image in images]
    with world.on_cpu() as cpu:
        expected = cpu.score_pairs(pairs)
    with world.opened() as scorer:
        assert scorer.engine.opened.provider == world.flavour
        assert world.version in scorer.engine.opened.details
        for _ in range(5):
            same(scorer.score_pairs(pairs), expected)
        facts = graph_facts(scorer)
        assert (sum(f.captured for f in facts) > 3 and sum(f.replayed for f in facts) > 3) == world.own_graphs


def golden_inputs_are_replayed(world: World) -> None:
    world.write_engine()
    report = verify_bundle(world.path, provider=world.flavour)
    assert report.provider == world.flavour and world.version in report.backend
    assert report.n_golden > 0 and report.max_probability_difference < 1e-6
    world.assert_clean()


def every_call_of_a_run(world: World) -> None:
    """Order, sizes and pointers of what runs ask of the driver and of the library: as they are, captured, launched."""
    with world.opened() as scorer:
        engine, driver, library = scorer.engine, world.driver, world.library
        stream = engine.opened.sessions["vision"]._device.stream
        patches = preprocess(world.pixels[0], engine.contract.image)
        prompt = engine.prompt_state(PROMPTS[0])
        features = [engine.encode_image(patches)]
        state = engine.image_state(prompt, features, patches.token_grid)
        stages: dict[str, Callable[[], object]] = {
            "vision": lambda: engine.encode_image(patches),
            "image": lambda: engine.image_state(prompt, features, patches.token_grid),
            "questions": lambda: engine.answer(state),
        }
        graphs.RUNS_BEFORE_CAPTURE = 99
        for run in (*stages.values(), *stages.values()):  # until all buffers are there
            run()
        graphs.RUNS_BEFORE_CAPTURE = 2
        for session in engine.opened.sessions.values():
            for runner in session._runners:
                runner._seen.clear()
        for stage, run in stages.items():
            tensors = world.library.tensors("vision" if stage == "vision" else "decoder")
            fetched = [] if stage == "image" else ["cuMemcpyDtoHAsync"]  # states are not
            as_it_is = ["cuMemcpyHtoDAsync", *fetched, "cuStreamSynchronize", "cuCtxPopCurrent"]
            captured = [
                "cuMemcpyHtoDAsync",
                "cuStreamSynchronize",  # of the profile of the new context
                "cuStreamBeginCapture",
                "cuStreamEndCapture",
                "cuGraphInstantiateWithFlags",
                "cuGraphDestroy",
                *as_it_is[1:],
            ]
            launched = [as_it_is[0], "cuGraphLaunch", *as_it_is[1:]]
            in_turn = (
                [as_it_is, as_it_is, captured, launched, launched] if world.own_graphs else [as_it_is] * 5
            )
            for number, expected in enumerate(in_turn):
                driver.calls.clear()
                library.calls.clear()
                run()
                names = [call[0] for call in driver.calls]
                assert names == expected, (stage, number, names)
                ((to, host, n_bytes, on),) = driver.named("cuMemcpyHtoDAsync")
                assert on == stream and driver.is_device(to, n_bytes) and driver.is_pinned(host, n_bytes)
                for host, address, n_bytes, on in driver.named("cuMemcpyDtoHAsync"):
                    assert (
                        on == stream
                        and driver.is_device(address, n_bytes)
                        and driver.is_pinned(host, n_bytes)
                    )
                executed = library.calls.count("IExecutionContext.execute_async_v3")
                assert executed == {len(as_it_is): 1, len(captured): 2, len(launched): 0}[len(expected)]
                assert library.calls.count("IExecutionContext.set_tensor_address") == executed * len(tensors)
                if expected is as_it_is and number:
                    assert "IExecutionContext.set_input_shape" not in library.calls, (
                        "the sizes are those of before"
                    )
        # The state of the prompt is not copied: an image stage sends its embeddings, positions and two small inputs.
        driver.calls.clear()
        stages["image"]()
        ((_, _, n_bytes, _),) = driver.named("cuMemcpyHtoDAsync")
        tokens = len(features[0]) + 1
        sent = 4 * tokens * engine.bundle.manifest.model.hidden_size + 3 * 8 * tokens
        assert sent < n_bytes < sent + 4 * 256
        assert sum(np.asarray(array).nbytes for array in prompt.arrays.values()) > 10 * 256


def buffers_grow_and_are_used_again(world: World) -> None:
    with world.opened() as scorer:
        engine, driver = scorer.engine, world.driver
        small, large = (
            preprocess(image, engine.contract.image) for image in (world.pixels[0][:48, :48], world.image)
        )
        engine.encode_image(small)
        driver.calls.clear()
        engine.encode_image(small)
        assert not driver.named("cuMemAlloc") and not driver.named("cuMemHostAlloc")
        grown = []
        for _ in range(2):
            driver.calls.clear()
            engine.encode_image(large)
            grown.append([n_bytes for _, n_bytes in [(0, a[0]) for a in driver.named("cuMemAlloc")]])
            assert len(driver.named("cuMemFree")) == len(
                grown[-1]
            )  # what was there before is given back first
        assert grown[0] and not grown[1]
        inputs = large.pixel_values.nbytes + large.positions.nbytes
        assert max(grown[0]) >= inputs
        # Half as much again as was there makes twice as much.
        memory = engine.opened.sessions["vision"]._memory
        before = memory.unread.n_bytes
        memory_address = memory.unread.reserve(before)
        assert memory.unread.n_bytes == before and memory.unread.reserve(before) == memory_address
        with memory.device.in_use():
            memory.unread.reserve(before + 256)
        assert memory.unread.n_bytes == 2 * before


def states_stay_on_the_gpu(world: World) -> None:
    with world.on_cpu() as cpu, world.opened() as scorer:
        expected = image_state(cpu.engine, PROMPTS[0], *world.pixels[:2])
        world.driver.calls.clear()
        found = image_state(scorer.engine, PROMPTS[0], *world.pixels[:2])
        fetched = [n_bytes for _, _, n_bytes, _ in world.driver.named("cuMemcpyDtoHAsync")]
        assert len(fetched) == 2, "features of two images, and nothing of a state"
        assert found.length == expected.length and found.position == expected.position
        for name, array in expected.arrays.items():
            kept = found.arrays[name]
            assert isinstance(kept, DeviceArray) and kept.shape == array.shape and kept.dtype == array.dtype
            np.testing.assert_array_equal(np.asarray(kept), array)
        repeated = found.repeated(2)
        np.testing.assert_array_equal(repeated.arrays[name], np.repeat(array, 2, axis=0))
        np.testing.assert_array_equal(scorer.engine.answer(found).probs, cpu.engine.answer(expected).probs)
        blocks = {id(kept.block) for kept in found.arrays.values()}
        assert len(blocks) == 1
        pool = scorer.engine.opened.sessions["decoder"]._memory.states
        live = world.driver.live()["device"]
        address = next(iter(found.arrays.values())).block.address
        del kept
        del found, repeated
        again = image_state(scorer.engine, PROMPTS[0], *world.pixels[:2])
        assert next(iter(again.arrays.values())).block.address == address, "the idle block is taken again"
        assert world.driver.live()["device"] == live
        del again
        with scorer.engine.opened.sessions["decoder"]._device.in_use():
            assert pool.drop_idle() > 0
        assert world.driver.live()["device"] < live


def graphs_are_captured_replayed_and_bounded(world: World) -> None:
    if not world.own_graphs:
        with world.opened() as scorer:
            for _ in range(4):
                scorer.score(prompt=PROMPTS[0], images=[world.image])
            assert {facts.off for facts in graph_facts(scorer)} == {"TensorRT-RTX captures its own"}
            assert not world.driver.named("cuStreamBeginCapture")
        return
    graphs.MOST_GRAPHS = 2
    with world.opened() as scorer:
        engine, driver, library = scorer.engine, world.driver, world.library
        sizes = [preprocess(world.pixels[0][:height], engine.contract.image) for height in (24, 48, 72, 96)]
        expected = [engine.encode_image(size) for size in sizes]
        engine.encode_image(sizes[-1])  # by now the buffers are as large as they get
        session = engine.opened.sessions["vision"]
        (facts,) = session.graph_facts.values()
        contexts, launched = len(library.contexts), []
        for _ in range(4):
            library.runs.clear()
            driver.calls.clear()
            np.testing.assert_array_equal(engine.encode_image(sizes[0]), expected[0])
            launched.append((len(library.runs), len(driver.named("cuGraphLaunch")), facts.captured))
        # Twice as it is, then captured after another run, then launched; buffers did not move meanwhile.
        assert launched[-3:] == [(1, 0, 0), (1, 0, 1), (0, 1, 1)] or launched == [
            (1, 0, 0),
            (1, 0, 1),
            (0, 1, 1),
            (0, 1, 1),
        ], launched
        assert len(library.contexts) == contexts + 1, "a graph has a context of its own"
        for size, features in list(zip(sizes, expected, strict=True))[1:]:
            for _ in range(4):
                np.testing.assert_array_equal(engine.encode_image(size), features)
        assert facts.captured == 4 and driver.live()["graphs"] == 2
        assert len(library.contexts) == contexts + 2, "the contexts of graphs that made room are used again"
        replayed = facts.replayed
        np.testing.assert_array_equal(engine.encode_image(sizes[-1]), expected[-1])
        assert facts.replayed == replayed + 1
        # Where a buffer grew, addresses changed: the graphs over the old ones are not launched any more.
        with session._device.in_use():
            session._memory._inputs.reserve(session._memory._inputs.n_bytes + 1)
        np.testing.assert_array_equal(engine.encode_image(sizes[-1]), expected[-1])
        assert facts.replayed == replayed + 1
        for _ in range(3):
            np.testing.assert_array_equal(engine.encode_image(sizes[-1]), expected[-1])
        assert facts.captured == 5 and facts.replayed == replayed + 2


def a_capture_that_fails_turns_graphs_off(world: World) -> None:
    if not world.own_graphs:
        return
    for failure in ("library", "begin", "end", "instantiate", "context"):
        shutil.rmtree(world.path / "engines", ignore_errors=True)
        world.driver.reset()
        with world.opened() as scorer, heard() as messages:
            expected = scorer.score(prompt=PROMPTS[0], images=[world.image])
            driver = world.driver
            if failure == "library":
                world.library.refuses["capture"] = "a loop cannot be captured"
            if failure == "context":
                world.library.refuses["create_execution_context"] = "no memory"
            for name in {"begin": ["cuStreamBeginCapture"], "end": ["cuStreamEndCapture"]}.get(failure, []):
                driver.failures[name] = [901] * 9
            if failure == "instantiate":
                driver.failures["cuGraphInstantiateWithFlags"] = [OUT_OF_MEMORY] * 9
            for _ in range(4):
                same(scorer.score(prompt=PROMPTS[0], images=[world.image]), expected)
            world.library.refuses.clear()
            off = [facts.off for facts in graph_facts(scorer) if facts.off]
            assert off and len(messages) == len(off), (failure, off, messages)
            reason = {"library": "a loop cannot", "context": "no memory", "instantiate": "no memory left"}
            assert reason.get(failure, "during capture") in off[0], off
            assert not any(facts.captured for facts in graph_facts(scorer))


def threads_share_a_scorer(world: World) -> None:
    with world.on_cpu() as cpu:
        expected = {
            (prompt, index): cpu.score(prompt=prompt, images=[world.pixels[index]])
            for prompt in PROMPTS
            for index in range(3)
        }
    with world.opened() as scorer:
        failures: list[BaseException] = []

        def work(seed: int) -> None:
            try:
                for step in range(6):
                    key = PROMPTS[(seed + step) % 2], (seed + step) % 3
                    same(scorer.score(prompt=key[0], images=[world.pixels[key[1]]]), expected[key])
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures


def closing_gives_everything_back(world: World) -> None:
    world.write_engine()
    _close_with_a_state_alive(world)
    world.assert_clean()
    # What nobody closes goes with its last reference.
    scorer = Scorer.open(world.path, provider=world.flavour)
    scorer.score(prompt=PROMPTS[0], images=[world.image])
    assert world.driver.live()["device"] > 0
    del scorer
    world.assert_clean()


def _close_with_a_state_alive(world: World) -> None:
    scorer = Scorer.open(world.path, provider=world.flavour)
    engine = scorer.engine
    for _ in range(4):
        scorer.score(prompt=PROMPTS[0], images=[world.image])
    state = engine.prompt_state(PROMPTS[0])
    array = next(iter(state.arrays.values()))
    assert min(world.driver.live()[kind] for kind in ("device", "pinned", "streams", "contexts")) > 0
    scorer.close()
    scorer.close()
    world.assert_clean()
    for use in (
        lambda: engine.answer(state),
        lambda: np.asarray(array),
        lambda: engine.prompt_state("a cone"),
    ):
        try:
            use()
        except UsageError as error:
            assert "closed; open the bundle again" in str(error)
        else:
            raise AssertionError("it ran")


def an_engine_of_few_images_scores_many(world: World) -> None:
    with world.on_cpu() as cpu:
        expected = cpu.score(prompt=PROMPTS[0], images=world.pixels[:5])
    with world.opened(images=2) as scorer:
        world.library.runs.clear()
        found = scorer.score(prompt=PROMPTS[0], images=world.pixels[:5])
        rows = [
            shapes["past_key_values.0.conv_state"][0]
            for _, shapes in world.library.runs
            if "last_index" in shapes
        ]
        assert max(rows) == 2
    for one, other in zip(found, expected, strict=True):  # batches of another size
        for name in other:
            np.testing.assert_allclose(one[name].probs, other[name].probs, atol=1e-6)


def sizes_and_types_that_no_profile_takes(world: World) -> None:
    with world.opened(images=2) as scorer:
        engine = scorer.engine
        state = image_state(engine, PROMPTS[0], *world.pixels[:2])
        patches = preprocess(world.pixels[0], engine.contract.image)
        features = engine.encode_image(patches)
        vision = engine.opened.sessions["vision"]
        inputs = {"pixel_values": patches.pixel_values, "patch_positions": patches.positions}
        outputs = ["image_features"]
        for message, run in {
            "batch is 3, and 'prefix' takes 1 to 2": lambda: engine.image_state(
                engine.prompt_state(PROMPTS[0]), [features] * 3, patches.token_grid
            ),
            "input 'pixel_values' is float32, not float64": lambda: vision.run(
                outputs, {**inputs, "pixel_values": patches.pixel_values.astype(np.float64)}
            ),
            "the engine takes ['total_patches', 2], not ()": lambda: vision.run(
                outputs, {"pixel_values": patches.pixel_values}
            ),
            "the engine has no image_grid_thw": lambda: vision.run(
                outputs, {**inputs, "image_grid_thw": features}
            ),
            "the engine has no logits": lambda: vision.run(["logits"], inputs),
        }.items():
            assert message in message_of(run), message_of(run)
        assert np.isfinite(engine.answer(state).probs).all(), "the next run works"


def calls_that_the_library_refuses(world: World) -> None:
    with world.opened() as scorer:
        engine = scorer.engine
        expected = scorer.score(prompt=PROMPTS[0], images=[world.image])
        refusals = {
            "set_input_shape": "refuses pixel_values of [",
            "get_tensor_shape": "does not know the shape of image_features before it runs",
            "set_tensor_address": "refuses the address of",
            "execute_async_v3": "cannot run the engine",
        }
        images = [preprocess(world.pixels[0][:, : 24 * n], engine.contract.image) for n in range(1, 5)]
        assert len({image.token_grid for image in images}) == 4
        for (call, what), image in zip(refusals.items(), images, strict=True):
            world.library.refuses[call] = f"{call} said no"
            message = message_of(lambda image=image: engine.encode_image(image))
            assert what in message and f"(graph vision): {call} said no" in message, message
            world.library.refuses.clear()
            assert np.isfinite(engine.encode_image(image)).all()
        same(scorer.score(prompt=PROMPTS[0], images=[world.image]), expected)


def a_gpu_without_memory(world: World) -> None:
    world.driver.memory_bytes = 5_000
    world.write_engine()
    message = world.refused()
    assert (
        "no memory left (0 MB are needed" in message and "nvidia-smi" in message and "--images N" in message
    )
    world.driver.memory_bytes = 1 << 30
    with Scorer.open(world.path, provider=world.flavour) as scorer:
        expected = scorer.score(prompt=PROMPTS[0], images=[world.pixels[0]])
        # Idle blocks of states are given back before it is an error.
        pool = scorer.engine.opened.sessions["decoder"]._memory.states
        world.driver.memory_bytes = world.driver.used_bytes()
        pool._collect()
        assert pool._idle
        outcome = scorer.score(prompt=PROMPTS[0], images=[world.image, world.pixels[1]], errors="return")
        assert all("no memory left" in str(error) for error in outcome if isinstance(error, BackendError))
        assert any(isinstance(error, BackendError) for error in outcome)
        world.driver.memory_bytes = 1 << 30
        same(scorer.score(prompt=PROMPTS[0], images=[world.pixels[0]]), expected)
        # A buffer that cannot double takes what it needs.
        buffer = scorer.engine.opened.sessions["decoder"]._memory.unread
        with scorer.engine.opened.sessions["decoder"]._device.in_use():
            world.driver.failures["cuMemAlloc"] = [OUT_OF_MEMORY, OUT_OF_MEMORY]
            needed = buffer.n_bytes + 256
            buffer.reserve(needed)
            assert buffer.n_bytes == needed
    world.assert_clean()


def a_run_that_fails_on_the_gpu(world: World) -> None:
    with world.opened() as scorer:
        expected = scorer.score(prompt=PROMPTS[0], images=[world.image])
        world.driver.failures["cuStreamSynchronize"] = [ILLEGAL_ADDRESS]
        (error,) = scorer.score(prompt=PROMPTS[0], images=[world.image], errors="return")
        assert isinstance(error, BackendError)
        assert "cuStreamSynchronize: an illegal memory access" in str(error) and "start again" in str(error)
        same(scorer.score(prompt=PROMPTS[0], images=[world.image]), expected)


def engines_that_do_not_fit(world: World) -> None:
    assert f"it has no engine of {world.flavour}. Build one" in world.refused()
    for changes, what in (
        ({"tensorrt_version": "1.2.3"}, "was built by version 1.2.3"),
        ({"compute_capabilities": ("12.0",)}, "for compute capability 12.0, and this GPU has 8.9"),
        ({"bundle_sha256": "0" * 64}, "was built from another export"),
    ):
        path = world.write_engine(**changes)
        assert what in world.refused()
        shutil.rmtree(path)
    path = world.write_engine()
    for failure, what in {
        "Runtime": "does not start: no GPU; factory function",
        "deserialize_cuda_engine": "vision.engine: TensorRT",
        "create_execution_context": "cannot make one (graph vision): no GPU",
        "set_optimization_profile_async": "refuses profile 0 (graph vision): no GPU",
        "patch_positions": "wants patch_positions in the memory of the host",
    }.items():
        world.library.refuses = {failure: "no GPU"}
        assert what in world.refused(), world.refused()
    world.library.refuses = {}
    file = path / "decoder.engine"
    file.write_bytes(file.read_bytes().replace(b"decoder", b"decodes"))
    assert "was altered (its sha256 differs)" in world.refused(BundleError)
    file.write_text("{}")
    assert "cut short or altered" in world.refused(BundleError)
    assert "was altered" in world.refused(BundleError, "auto") or "cut short" in world.refused(
        BundleError, "auto"
    )
    shutil.rmtree(path)
    path = world.write_engine()
    record = json.loads((path / "engine.json").read_text())
    for graph in record["graphs"].values():
        graph["inputs"]["other"] = [1]
    (path / "engine.json").write_text(json.dumps(record))
    assert "not the engine that its engine.json describes" in world.refused()


def plugins_are_hashed_before_they_are_loaded(world: World) -> None:
    if not world.own_graphs:  # TensorRT-RTX has none
        return
    library = world.folder / "libzreward_plugins.so"
    sha256 = recorded_library(library, world.version).sha256
    machine_code = library.read_bytes()
    plain = world.write_engine()
    path = world.write_engine(plugins={library.name: sha256})
    opened = []
    for found, engine in ((library, path), (None, plain)):
        backends.find_library = lambda found=found: found
        with Scorer.open(world.path, provider=world.flavour) as scorer:
            opened.append("IPluginRegistry.load_library" in world.library.calls)
            assert engine.name in scorer.engine.opened.details
            scorer.score(prompt=PROMPTS[0], images=[world.image])
        world.library.calls.clear()
    assert opened == [True, False]
    shutil.rmtree(plain)
    assert "name the library" in world.refused()
    backends.find_library = lambda: library
    library.write_bytes(b"other code")
    assert "is not loaded" in world.refused()
    library.write_bytes(machine_code)
    library.with_suffix(".json").unlink()
    assert "the record of the library is missing" in world.refused(PluginError)
    assert "IPluginRegistry.load_library" not in world.library.calls


def auto_takes_what_runs(world: World) -> None:
    with heard() as messages:
        assert provider_of(world) == "cpu" and not messages, "no engine, no talk"
        path = world.write_engine()
        assert provider_of(world) == world.flavour and not messages
        world.driver.failures["cuInit"] = [NO_DEVICE]
        assert provider_of(world) == "cpu" and not messages, "a machine without a GPU scores without talk"
        shutil.rmtree(path)
        world.write_engine(tensorrt_version="1.2.3")
        assert provider_of(world) == "cpu"
        assert len(messages) == 1 and "was built by version 1.2.3" in messages[0]
    world.driver.failures["cuInit"] = [NO_DEVICE]
    assert "no usable GPU (cuInit: no CUDA-capable device is detected)" in world.refused()
    world.assert_clean()


def a_benchmark_has_no_bound(world: World) -> None:
    """The rate that a benchmark measures is the processor's."""
    world.write_engine()
    plan = BenchPlan(image_sizes=(48,), threads=(1,), providers=(world.flavour,), min_seconds=0, starts=1)
    said: list[Any] = []
    for provider in (world.flavour, "cpu"):
        job = Job(
            str(world.path), plan.only(provider, 1), Rate(1, 1.0, 1.0, None, "numpy"), time.monotonic(), False
        )
        worker._work(dataclasses.asdict(job), said.append)
    measured = [dataclass_from_json(Measured, m["measured"], "", BenchError) for m in said if "measured" in m]
    on_gpu, on_cpu = (one.results for one in measured)
    assert [_has_bound(result) for result in (*on_gpu, *on_cpu)] == [False, True]
    (note,) = _notes(world.bundle, describe_machine(), plan, [*on_gpu, *on_cpu], {})[-1:]
    assert note.startswith(f"There is no bound for {world.flavour}: a GPU computes there")
    world.assert_clean()


def a_driver_that_lacks_a_function(world: World) -> None:
    """cuda-bindings looks for functions once, so this runs in a process of its own."""
    world.write_engine()
    assert "the CUDA driver lacks cuMemAlloc" in world.refused()


SCENARIOS: tuple[Callable[[World], None], ...] = (
    scores_equal_those_of_the_cpu,
    golden_inputs_are_replayed,
    every_call_of_a_run,
    buffers_grow_and_are_used_again,
    states_stay_on_the_gpu,
    graphs_are_captured_replayed_and_bounded,
    a_capture_that_fails_turns_graphs_off,
    threads_share_a_scorer,
    closing_gives_everything_back,
    an_engine_of_few_images_scores_many,
    sizes_and_types_that_no_profile_takes,
    calls_that_the_library_refuses,
    a_gpu_without_memory,
    a_run_that_fails_on_the_gpu,
    engines_that_do_not_fit,
    plugins_are_hashed_before_they_are_loaded,
    auto_takes_what_runs,
    a_benchmark_has_no_bound,
)


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


def main() -> None:
    """Print the outcome of each scenario: null, or the trace of its failure."""
    flavour, source, *named = sys.argv[1:]
    module = importlib.import_module("tensorrt" if flavour == "tensorrt" else "tensorrt_rtx_bindings")
    alone = [a_driver_that_lacks_a_function.__name__]
    driver, outcomes = FakeDriver(without=("cuMemAlloc",) if named == alone else ()), {}
    defaults = {(m, n): getattr(m, n) for m, n in ((graphs, "MOST_GRAPHS"), (backends, "find_library"))}
    for scenario in (*SCENARIOS, a_driver_that_lacks_a_function):
        if scenario.__name__ not in (named or [scenario.__name__ for scenario in SCENARIOS]):
            continue
        for (owner, name), value in defaults.items():
            setattr(owner, name, value)
        driver.reset()
        with TemporaryDirectory() as temporary:
            try:
                scenario(World(flavour, module, driver, Path(source), Path(temporary)))
                outcomes[scenario.__name__] = None
            except Exception:
                outcomes[scenario.__name__] = "\n".join([traceback.format_exc(), *driver.violations])
        gc.collect()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
