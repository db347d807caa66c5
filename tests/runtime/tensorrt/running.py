"""Scenarios in which the TensorRT backend works: what it computes, and what it asks of the GPU."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.runtime.tensorrt.world import (
    PROMPTS,
    World,
    graph_facts,
    image_state,
    same_scores,
)
from zreward.errors import BenchError, UsageError
from zreward.image import preprocess
from zreward.jsonfile import dataclass_from_json
from zreward.runtime import Scorer
from zreward.runtime.backends.tensorrt import DeviceArray, graphs
from zreward.runtime.bench import worker
from zreward.runtime.bench.machine import describe_machine
from zreward.runtime.bench.plan import BenchPlan
from zreward.runtime.bench.rates import Rate
from zreward.runtime.bench.run import _notes
from zreward.runtime.bench.worker import Job, Measured
from zreward.runtime.verify import verify_bundle


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
            same_scores(scorer.score_pairs(pairs), expected)
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
                    same_scores(scorer.score(prompt=key[0], images=[world.pixels[key[1]]]), expected[key])
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
    assert [one.provider for one in measured] == [world.flavour, "cpu"]
    results = [result for one in measured for result in one.results]
    bounds = [{timing.bound_ms is None for timing in result.stages.values()} for result in results]
    assert bounds[0] == {True} and False in bounds[1]
    (note,) = _notes(world.bundle, describe_machine(), plan, results, {}, [world.flavour])[-1:]
    assert note.startswith(f"There is no bound for {world.flavour}: a GPU computes there")
    world.assert_clean()
