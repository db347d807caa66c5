"""The fused score head against float64 numpy, in ONNX Runtime and the ONNX reference evaluator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from tests.support.graphs import checkpoint_of, model_from_text, normal, run_onnxruntime, run_reference
from zreward.errors import ExportError
from zreward.export.irtools import DOMAIN
from zreward.export.passes.dead_outputs import remove_dead_outputs
from zreward.export.passes.score_head import LABEL_MASS, RUBRIC_EXPECTATION, fuse_score_head

Floats = NDArray[np.float64]

HIDDEN, VOCABULARY = 16, 50
CODE_IDS = (7, 3, 49, 0, 21)
BINS = (1.0, 2.0, 3.0, 4.0, 5.0)
EPSILON = 1e-5

DECODER = """
decoder (float[batch, sequence, 16] skip, float[batch, sequence, 16] branch, float[16] norm, float[50, 16] head)
    => (float[batch, sequence, 50] logits, float[batch, sequence, 16] present)
{
    normed, mean, inverse, present =
        com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.00001> (skip, branch, norm)
    matrix = Transpose <perm = [1, 0]> (head)
    logits = MatMul (normed, matrix)
}
"""


@dataclass(frozen=True)
class Case:
    """Random inputs of one head, and what it must answer, in float64."""

    inputs: dict[str, NDArray[np.generic]]
    norm: NDArray[np.float32]
    head: NDArray[np.float32]

    def logits(self) -> Floats:
        """float64 [batch, vocabulary] at each row's last index."""
        rows = np.arange(len(self.inputs["last_index"]))
        last = self.inputs["last_index"]
        hidden = (self.inputs["skip"][rows, last] + self.inputs["branch"][rows, last]).astype(np.float64)
        normed = hidden / np.sqrt((hidden**2).mean(axis=1, keepdims=True) + EPSILON) * self.norm
        return normed @ self.head.T.astype(np.float64)

    def probs(self) -> Floats:
        return softmax(self.logits()[:, CODE_IDS] / self.inputs["temperature"].astype(np.float64)[:, None])


def softmax(logits: Floats) -> Floats:
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


def case(seed: int, *, batch: int = 3, spread: float = 0.3, temperature: float | None = None) -> Case:
    """`spread` scales the head, and with it the logits; temperatures are random unless given."""
    rng = np.random.default_rng(seed)
    sequence = int(rng.integers(1, 6))
    temperatures = rng.uniform(0.5, 3.0, batch) if temperature is None else np.full(batch, temperature)
    inputs = {
        "skip": normal(rng, batch, sequence, HIDDEN),
        "branch": normal(rng, batch, sequence, HIDDEN),
        "last_index": rng.integers(0, sequence, batch),
        "temperature": temperatures.astype(np.float32),
    }
    head = spread * normal(rng, VOCABULARY, HIDDEN)
    return Case(inputs, 1 + 0.1 * normal(rng, HIDDEN), head)


def decoder(folder: Path, norm: NDArray[np.float32], head: NDArray[np.float32]) -> ir.Model:
    return model_from_text(DECODER, checkpoint_of(folder, {"norm": norm, "head": head}))


def fused(folder: Path, given: Case, *, label_mass: bool = False) -> ir.Model:
    model = decoder(folder, given.norm, given.head)
    assert fuse_score_head(model, CODE_IDS, BINS, label_mass=label_mass) == 1
    remove_dead_outputs(model)
    return model


@pytest.mark.parametrize("batch", range(1, 8))
def test_probs_mean_and_variance_equal_float64(tmp_path: Path, batch: int) -> None:
    given = case(batch, batch=batch)
    model, expected = fused(tmp_path, given), given.probs()
    for outputs in (run_onnxruntime(model, given.inputs), run_reference(model, given.inputs)):
        mean = expected @ np.array(BINS)
        variance = ((np.array(BINS) - mean[:, None]) ** 2 * expected).sum(axis=1)
        np.testing.assert_allclose(outputs["probs"], expected, atol=1e-6, rtol=0)
        np.testing.assert_allclose(outputs["mean"], mean, atol=5e-6, rtol=0)
        np.testing.assert_allclose(outputs["variance"], variance, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("spread", "temperature"), [(1e4, 1.0), (0.3, 1e-4), (1e4, 1e-4), (0.3, 1e6)])
def test_extreme_logits_and_temperatures_stay_distributions(
    tmp_path: Path, spread: float, temperature: float
) -> None:
    given = case(11, batch=7, spread=spread, temperature=temperature)
    outputs = run_onnxruntime(fused(tmp_path, given, label_mass=True), given.inputs)
    np.testing.assert_allclose(outputs["probs"], given.probs(), atol=1e-6, rtol=0)
    np.testing.assert_allclose(outputs["probs"].sum(axis=1), 1, atol=1e-6)
    assert (outputs["variance"] >= 0).all()
    assert ((outputs["mean"] >= 1) & (outputs["mean"] <= 5.000001)).all()
    assert ((outputs["label_mass"] >= 0) & (outputs["label_mass"] <= 1)).all()


def test_a_certain_answer_has_no_negative_variance(tmp_path: Path) -> None:
    """Σ s²q − μ² would cancel to below zero here."""
    given = case(5, batch=64, spread=200.0)
    variance = run_onnxruntime(fused(tmp_path, given), given.inputs)["variance"]
    assert (variance >= 0).all() and variance.min() < 1e-6


def test_label_mass_is_the_share_of_the_whole_vocabulary(tmp_path: Path) -> None:
    given = case(3, batch=5)
    model = fused(tmp_path, given, label_mass=True)
    expected = softmax(given.logits())[:, CODE_IDS].sum(axis=1)
    assert expected.max() < 0.9  # or a constant one would pass
    for outputs in (run_onnxruntime(model, given.inputs), run_reference(model, given.inputs)):
        np.testing.assert_allclose(outputs["label_mass"], expected, atol=1e-6, rtol=0)


def test_other_outputs_stay_and_the_full_head_goes(tmp_path: Path) -> None:
    given = case(0)
    model = fused(tmp_path, given)
    assert [v.name for v in model.graph.outputs] == ["probs", "mean", "variance", "present"]
    assert set(model.graph.initializers) == {"norm", "zreward.score_rows", "zreward.bins"}
    present = run_onnxruntime(model, given.inputs)["present"]
    np.testing.assert_array_equal(present, given.inputs["skip"] + given.inputs["branch"])


def test_the_node_lets_tensorrt_prefer_a_plugin(tmp_path: Path) -> None:
    model = fused(tmp_path, case(0), label_mass=True)
    node = next(n for n in model.graph if n.op_type == RUBRIC_EXPECTATION)
    assert node.domain == DOMAIN
    assert node.attributes["plugin_namespace"].as_string() == "zreward"
    assert node.attributes["plugin_version"].as_string() == "1"


def test_no_function_is_named_like_a_built_in_op() -> None:
    """TensorRT's importers match the op type and ignore the domain."""
    built_in = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    assert not built_in & {RUBRIC_EXPECTATION, LABEL_MASS}


def test_unexpected_graphs_are_refused(tmp_path: Path) -> None:
    given = case(0)
    without_logits = model_from_text("g (float[2] x) => (float[2] y) { y = Identity (x) }")
    with pytest.raises(ExportError, match="no output 'logits'"):
        fuse_score_head(without_logits, CODE_IDS, BINS)
    other_producer = model_from_text("g (float[2] x) => (float[2] logits) { logits = Identity (x) }")
    with pytest.raises(ExportError, match="comes from Identity, not from MatMul"):
        fuse_score_head(other_producer, CODE_IDS, BINS)
    weights = checkpoint_of(tmp_path, {"norm": given.norm})
    with pytest.raises(ExportError, match="not a weight of the checkpoint"):
        fuse_score_head(model_from_text(DECODER, weights), CODE_IDS, BINS)
    with pytest.raises(ExportError, match=r"outside the head's 50 rows"):
        fuse_score_head(decoder(tmp_path, given.norm, given.head), (0, 50), (1.0, 2.0))
