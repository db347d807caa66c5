"""Scenarios in which something is missing or wrong, and what the TensorRT backend says."""

from __future__ import annotations

import json
import shutil

import numpy as np

from tests.runtime.tensorrt.world import (
    PROMPTS,
    World,
    graph_facts,
    heard,
    image_state,
    message_of,
    provider_of,
    same_scores,
)
from tests.support.cuda_driver import ILLEGAL_ADDRESS, INVALID_VALUE, NO_DEVICE, OUT_OF_MEMORY
from tests.support.plugins import recorded_library
from zreward import plugins
from zreward.errors import BackendError, BundleError, PluginError
from zreward.image import preprocess
from zreward.runtime import GpuOptions, Scorer


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
                same_scores(scorer.score(prompt=PROMPTS[0], images=[world.image]), expected)
            world.library.refuses.clear()
            off = [facts.off for facts in graph_facts(scorer) if facts.off]
            assert off and len(messages) == len(off), (failure, off, messages)
            reason = {"library": "a loop cannot", "context": "no memory", "instantiate": "no memory left"}
            assert reason.get(failure, "during capture") in off[0], off
            assert not any(facts.captured for facts in graph_facts(scorer))


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
        same_scores(scorer.score(prompt=PROMPTS[0], images=[world.image]), expected)


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
        same_scores(scorer.score(prompt=PROMPTS[0], images=[world.pixels[0]]), expected)
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
        same_scores(scorer.score(prompt=PROMPTS[0], images=[world.image]), expected)


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
    world.driver.failures["cuStreamCreate"] = [INVALID_VALUE]
    assert "the GPU failed (cuStreamCreate: invalid argument)" in world.refused()
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


def another_gpu_is_named(world: World) -> None:
    """An engine for the second GPU alone runs there, and on no other."""
    world.write_engine(compute_capabilities=("9.0",))
    assert "for compute capability 9.0, and this GPU has 8.9" in world.refused()
    with Scorer.open(world.path, provider=world.flavour, gpu=GpuOptions(device=1)) as scorer:
        scorer.score(prompt=PROMPTS[0], images=[world.image])
        assert world.driver.retained == [1]
    assert "no usable GPU (cuDeviceGet: invalid device ordinal)" in world.refused(gpu=GpuOptions(device=2))
    world.assert_clean()


def plugins_are_hashed_before_they_are_loaded(world: World) -> None:
    if not world.own_graphs:  # TensorRT-RTX has none
        return
    library = world.folder / "libzreward_plugins.so"
    sha256 = recorded_library(library, world.version).sha256
    machine_code = library.read_bytes()
    plain = world.write_engine()
    path = world.write_engine(plugins={library.name: sha256})
    opened = []
    for found, named, engine in ((library, None, path), (None, None, plain), (None, library, path)):
        plugins.find_library = lambda found=found: found
        with Scorer.open(world.path, provider=world.flavour, gpu=GpuOptions(plugins=named)) as scorer:
            opened.append("IPluginRegistry.load_library" in world.library.calls)
            assert engine.name in scorer.engine.opened.details
            scorer.score(prompt=PROMPTS[0], images=[world.image])
        world.library.calls.clear()
    assert opened == [True, False, False]  # a process loads a library once
    elsewhere = GpuOptions(plugins=world.folder / "none.so")
    assert "there is no plugin library here" in world.refused(PluginError, gpu=elsewhere)
    shutil.rmtree(plain)
    assert "name the library" in world.refused()
    plugins.find_library = lambda: library
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


def a_driver_that_lacks_a_function(world: World) -> None:
    """cuda-bindings looks for functions once, so this runs in a process of its own."""
    world.write_engine()
    assert "the CUDA driver lacks cuMemAlloc" in world.refused()
