"""`build_engine` and `zreward engine`: an engine in a bundle's directory, or an error that says what to do."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Cli
from tests.support.bundles import accept_changes, lowered_here
from tests.support.tensorrt_api import on_linux_x86_64
from zreward import cuda_device
from zreward.bundle import Bundle
from zreward.engines import BuiltEngine, engines_of, select_engine
from zreward.errors import BackendError, BundleError, ExportError, UsageError
from zreward.export import ExportOptions, export_bundle
from zreward.export.tensorrt import EngineOptions, build_engine, profiles, worker
from zreward.export.tensorrt.job import EngineFacts, EngineJob
from zreward.progress import Progress
from zreward.prompt import PromptEncoder, load_tokenizer
from zreward.runtime import Scorer
from zreward.runtime.engine import Engine
from zreward.runtime.verify import verify_bundle
from zreward.tensorrt_library import FLAVOURS, load_tensorrt

RTX = EngineOptions(flavour="tensorrt-rtx", images=2)


@pytest.fixture(scope="module")
def engine(fp16_bundle: Path) -> BuiltEngine:
    """Engines of both graphs with all their profiles, by TensorRT-RTX."""
    stages: set[str] = set()

    def report(stage: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        stages.add(stage)

    before = Bundle.open(fp16_bundle).sha256
    built = build_engine(fp16_bundle, RTX, report)
    assert stages == {"building vision.engine", "building decoder.engine"}
    assert Bundle.open(fp16_bundle).sha256 == before
    return built


def test_the_bundle_is_proved_by_onnx_runtime(fp16_bundle: Path) -> None:
    manifest = Bundle.open(fp16_bundle).manifest
    assert manifest.target == "tensorrt" and manifest.golden.tolerance == 2e-2
    assert verify_bundle(fp16_bundle, provider="cpu").max_probability_difference < 1e-3


def test_a_bundle_in_bfloat16_is_proved_where_nothing_multiplies_it(
    fp16_bundle: Path, tmp_path: Path
) -> None:
    options = ExportOptions(target="tensorrt", weights="bf16", parity=False)
    with lowered_here():
        bundle = export_bundle(fp16_bundle.with_name("checkpoint"), tmp_path / "bundle", options)
    pairs = zip(bundle.golden_items(), Bundle.open(fp16_bundle).golden_items(), strict=True)
    differences = [
        np.abs(np.array(item.probs[name]) - np.array(exact.probs[name])).max()
        for item, exact in pairs
        for name in item.probs
    ]
    assert 1e-4 < max(differences) < 0.1  # random weights exaggerate it
    assert not [file for file in bundle.path.iterdir() if "rounded" in file.name]


@on_linux_x86_64
def test_an_engine_says_what_it_was_built_by_and_for(fp16_bundle: Path, engine: BuiltEngine) -> None:
    info = engine.info
    assert engine.path == fp16_bundle / "engines" / "tensorrt-rtx-sm80+"
    assert info.tensorrt_version == load_tensorrt("tensorrt-rtx").__version__
    assert info.compute_capabilities == ("8.0+",)
    assert info.precision == "fp16" and not info.plugins
    assert info.graphs["decoder"].inputs["inputs_embeds"] == ("batch", "sequence_len", 64)
    assert [profile.name for profile in info.graphs["decoder"].profiles] == ["prefix", "questions"]
    assert len(engine.read("vision")) == engine.file("vision").stat().st_size > 100_000
    bundle = Bundle.open(fp16_bundle)
    assert engines_of(bundle) == (engine,)
    chosen = select_engine(
        bundle, flavour="tensorrt-rtx", tensorrt_version=info.tensorrt_version, compute_capability="12.0"
    )
    assert chosen == engine
    with pytest.raises(BackendError, match=r"for compute capability 8.0 and later, and this GPU has 7.5"):
        select_engine(
            bundle, flavour="tensorrt-rtx", tensorrt_version=info.tensorrt_version, compute_capability="7.5"
        )


@on_linux_x86_64
def test_its_profiles_take_every_run_of_a_score(
    fp16_bundle: Path, engine: BuiltEngine, tmp_path: Path
) -> None:
    """Every shape that the runtime gives its graphs, from the system text to the questions of two images."""
    seen: dict[str, set[int]] = {"vision": set(), "decoder": set()}
    bundle = Bundle.open(fp16_bundle)

    class Watched:
        def __init__(self, path: Path) -> None:
            from zreward.runtime.backends import open_session

            self.session, self.name = open_session(path, provider="cpu", threads=1), path.stem
            self.inputs = self.session.inputs

        def run(self, outputs: list[str], inputs: dict[str, Any]) -> list[Any]:
            graph = engine.info.graphs[self.name]
            seen[self.name].add(graph.profile_for({name: array.shape for name, array in inputs.items()}))
            return self.session.run(outputs, inputs)

    with Scorer(Engine(bundle, open_graph=Watched)) as scorer:
        image = bundle.path / bundle.golden_items()[0].image
        scores = scorer.score(prompt="a red fox " * 10, images=[image, image])
        alone = scorer.score(prompt="a red fox " * 10, images=[image])
        with pytest.raises(BackendError, match="images N"):
            scorer.score(prompt="a red fox", images=[image] * 3)
    assert seen == {"vision": {0}, "decoder": {0, 1}}
    assert abs(scores[0].overall - alone[0].overall) < 2e-3


@on_linux_x86_64
def test_the_command_refuses_to_replace_an_engine_unasked(
    cli: Cli, fp16_bundle: Path, engine: BuiltEngine
) -> None:
    again = cli("engine", fp16_bundle, "--flavour", "tensorrt-rtx")
    assert again.returncode == 2 and "--force" in again.stderr
    assert engines_of(Bundle.open(fp16_bundle)) == (engine,)


def test_the_profiles_hold_what_the_contract_allows(fp16_bundle: Path) -> None:
    contract = Bundle.open(fp16_bundle).contract
    encoder = PromptEncoder(contract, load_tokenizer(fp16_bundle))
    sizes = profiles(contract, encoder, 8)
    (image,) = sizes["vision"]
    assert image.axes["total_patches"][1] == 40 * 4
    prefix, questions = sizes["decoder"]
    assert prefix.axes["batch"] == (1, 1, 8) and questions.axes["batch"] == (1, 4, 32)
    assert questions.axes["state_batch"] == (1, 1, 8)
    assert prefix.axes["past_sequence_len"][0] == 0
    assert prefix.axes["sequence_len"][2] >= contract.max_prompt_tokens
    with pytest.raises(UsageError, match="at least 1"):
        profiles(contract, encoder, 0)


def test_another_target_is_refused(copy: Path) -> None:
    accept_changes(Bundle.open(copy), target="cpu")
    with pytest.raises(UsageError, match=r"exported for 'cpu'.*--target tensorrt"):
        build_engine(copy, RTX)


def test_a_damaged_bundle_is_refused_before_anything_is_built(copy: Path) -> None:
    data = copy / "decoder.onnx.data"
    content = bytearray(data.read_bytes())
    content[5000] ^= 1
    data.write_bytes(content)
    with pytest.raises(BundleError, match="was altered"):
        build_engine(copy, RTX)


def test_without_a_driver_tensorrt_says_where_to_build(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device, "_LIBRARY", "libcuda-of-no-machine.so.1")
    with pytest.raises(BackendError, match="no CUDA driver on this machine"):
        build_engine(copy, EngineOptions())
    assert not (copy / "engines").exists()


def test_without_tensorrt_the_message_says_how_to_install_it(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zreward.export.tensorrt.build.compute_capability", lambda: "8.9")
    with pytest.raises(
        BackendError, match=r"TensorRT cannot be imported .*`pip install 'zreward\[tensorrt\]'`"
    ):
        build_engine(copy, EngineOptions())
    assert list((copy / "engines").iterdir()) == []


@on_linux_x86_64
def test_a_graph_that_is_refused_names_the_operator(copy: Path) -> None:
    path = copy / "vision.onnx"
    path.write_bytes(path.read_bytes().replace(b"Softmax", b"Softmix"))
    job = EngineJob("tensorrt-rtx", str(path), str(copy / "vision.engine"), ())
    with pytest.raises(ExportError, match=r"the parser of TensorRT 1.7.* refuses it: .*Softmix"):
        worker.build_in_child(job, lambda stage, done, total: None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flavour": "tensorflow"}, "unknown flavour 'tensorflow'; choose from tensorrt, tensorrt-rtx"),
        (
            {"flavour": "tensorrt-rtx", "plugins": Path("p.so")},
            "TensorRT-RTX has no plugins; leave --plugins",
        ),
        ({"flavour": "tensorrt-rtx", "quick_head": True}, "TensorRT-RTX has no plugins; leave --plugins"),
        (
            {"plugins": Path("p.so"), "quick_head": True},
            "--plugins and --quick-head both have the score head",
        ),
        ({"plugins": Path("nowhere.so")}, "nowhere.so: no such library; `zreward plugins build`"),
        ({"timing_cache": Path("nowhere/timings")}, "nowhere/timings: its folder does not exist"),
        ({"timing_cache": Path()}, "a folder; --timing-cache names a file"),
        ({"flavour": "tensorrt-rtx", "timing_cache": Path("timings")}, "measures nothing while it builds"),
        ({"compute_capabilities": ("8.9",)}, "--compute-capability is for tensorrt-rtx"),
        ({"flavour": "tensorrt-rtx", "compute_capabilities": ("sm89",)}, "'sm89' is not of the form 8.9"),
        ({"optimization_level": 6}, "is 0 to 5, not 6"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EngineOptions(**options)


@on_linux_x86_64
def test_a_kind_of_gpu_that_the_library_does_not_know(copy: Path) -> None:
    with pytest.raises(ExportError, match=r"does not build for compute capability 9.0"):
        build_engine(copy, dataclasses.replace(RTX, compute_capabilities=("9.0",)))


class TestFloatsOf8Bits:
    @pytest.fixture
    def float8_bundle(self, copy: Path) -> Path:
        """A bundle that says that it has them."""
        manifest = json.loads((copy / "manifest.json").read_text())
        layers = {"model.layer": {"format": "fp8"}, "model.other": {"format": "int4-g128"}}
        manifest["quantization"] = {"scheme": "fp8,*.other=int4", "layers": layers}
        (copy / "manifest.json").write_text(json.dumps(manifest))
        return copy

    @pytest.fixture
    def jobs(self, monkeypatch: pytest.MonkeyPatch) -> list[EngineJob]:
        """What would be built."""
        found: list[EngineJob] = []

        def build(job: EngineJob, report: Progress) -> EngineFacts:
            found.append(job)
            Path(job.engine).write_bytes(b"engine")
            return EngineFacts("1.7", {}, 0)

        monkeypatch.setattr("zreward.export.tensorrt.build.build_in_child", build)
        return found

    def test_engines_are_for_gpus_that_multiply_them(
        self, float8_bundle: Path, jobs: list[EngineJob]
    ) -> None:
        with pytest.raises(BundleError, match="has the axes"):  # inputs that nobody parsed
            build_engine(float8_bundle, RTX)
        assert {job.compute_capabilities for job in jobs} == {("8.9", "12.0")}

    def test_others_are_refused(
        self, float8_bundle: Path, jobs: list[EngineJob], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        message = "multiplies floats of 8 bits, which GPUs do from compute capability 8.9 on, not 8.6; export"
        with pytest.raises(UsageError, match=message):
            build_engine(float8_bundle, dataclasses.replace(RTX, compute_capabilities=("8.6", "8.9")))
        monkeypatch.setattr("zreward.export.tensorrt.build.compute_capability", lambda: "8.6")
        with pytest.raises(UsageError, match=message):
            build_engine(float8_bundle, EngineOptions())
        assert not jobs


def test_building_imports_neither_torch_nor_onnx() -> None:
    blocked = ("torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "mobius", "tensorrt_rtx_bindings")
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "import zreward.export.tensorrt.worker, zreward.export.tensorrt\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(FLAVOURS) == {"tensorrt", "tensorrt-rtx"}
