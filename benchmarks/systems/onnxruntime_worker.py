"""onnxruntime on the CPU with the graphs that mobius-onnx builds: what an export without this project's passes runs at.

The environment is this project's with the extras `cpu` and `export`:

    pip install -e '.[cpu,export]' -c constraints.txt

`mobius.build(checkpoint, dtype="f32", execution_provider="default")` is what `mobius build --config DIR --ep default`
calls: vision encoder, embedding and decoder with its states as inputs and outputs. In `int4` onnxruntime's own
`MatMulNBitsQuantizer` rounds every matrix of vision encoder and decoder to nearest in symmetric blocks of 32, and the
products round activations to 8 bits (accuracy level 4). The embedding stays float32, and so does everything in
`float`, which is for the check of this file: of a small random checkpoint, probabilities are within 5e-6 of
transformers'.

What the graphs are given beyond that, all in their favour:

- Transposes of weights are done once, in the file; mobius leaves them to the runtime, where the quantizer would find
  no constant matrix.
- The decoder computes logits at every position. Here a GatherND in front of the head picks those that are read.
- The prefix runs once. Its states, repeated for each question, go into one right-padded batch.

onnxruntime-genai was not run; 0.18.0 supports the model, by its model builder (`Qwen3_5ForConditionalGeneration`) and
its library (model type `qwen3_5`).
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import shutil
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from worker import KEEP, Floats, Ids, Job, Loaded, Parts, serve

PARTS_OF_MODEL = ("vision_encoder", "embedding", "decoder")
BLOCK = 32
PACKAGES = ("onnxruntime", "mobius-onnx", "onnx", "onnx-ir", "numpy")

Arrays = dict[str, NDArray[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--weights", choices=("float", "int4"), default="int4")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--keep", choices=KEEP, default="nothing", help="states to start from")
    parser.add_argument("--convert", action="store_true", help="fill the cache and end")
    arguments = parser.parse_args()
    if arguments.convert:
        convert(arguments.checkpoint, arguments.cache, arguments.weights)
    else:
        serve("onnxruntime", PACKAGES, lambda: load(arguments))


def load(arguments: argparse.Namespace) -> Loaded:
    folder = converted(arguments.checkpoint, arguments.cache, arguments.weights)
    if not folder.is_dir():  # in a process of its own, whose memory goes back
        command = [sys.executable, __file__, *sys.argv[1:], "--convert"]
        if subprocess.run(command).returncode:
            sys.exit(f"the conversion to {arguments.weights} failed, for the reason above")
    model = Model(folder, arguments.threads)
    settings = {
        "weights": arguments.weights,
        **({"block": BLOCK, "symmetric": True, "accuracy_level": 4} if arguments.weights == "int4" else {}),
        "kept": arguments.keep,
        "passes": "prefix once, questions as one batch",
        "threads": arguments.threads,
    }
    return Loaded(partial(model.run, keep=arguments.keep), settings)


class Model:
    """The three sessions, driven for one image and several questions."""

    def __init__(self, folder: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._vision, self._embedding, self._decoder = (
            onnxruntime.InferenceSession(
                folder / part / "model.onnx", options, providers=["CPUExecutionProvider"]
            )
            for part in PARTS_OF_MODEL
        )
        self._outputs = [value.name for value in self._decoder.get_outputs()]
        self._kept: Arrays = {}

    def run(self, job: Job, parts: Parts, *, keep: str) -> Floats:
        """All questions as one batch, from the states that were kept. There is one prompt."""
        n_kept = job.n_kept_ids(keep)
        if n_kept and not self._kept:
            nothing = np.zeros((0, self._hidden_size()), np.float32)
            embeddings = self._embed(job.prefix_ids[None, :n_kept], nothing)
            self._kept = self._step(embeddings, job.prefix_positions[:, :n_kept], self._no_states(), past=0)[
                1
            ]
        with parts.timed("vision"):
            images = {"pixel_values": job.pixel_values, "image_grid_thw": job.image_grid_thw}
            features = self._vision.run(["image_features"], images)[0]
        with parts.timed("prefix"):
            embeddings = self._embed(job.prefix_ids[None, n_kept:], features)
            states = self._kept if n_kept else self._no_states()
            _, states = self._step(embeddings, job.prefix_positions[:, n_kept:], states, past=n_kept)
        with parts.timed("suffixes"):
            states = {name: np.repeat(state, job.n_questions, axis=0) for name, state in states.items()}
            logits, _ = self._step(
                self._embed(job.suffix_ids, features),
                job.suffix_positions,
                states,
                past=len(job.prefix_ids),
                read=job.suffix_lengths[:, None] - 1,
            )
        return job.probabilities(logits[:, 0, job.code_ids])

    def _embed(self, ids: Ids, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Embeddings [rows, tokens, hidden], with the image's features in the place of its tokens."""
        inputs = {"input_ids": ids, "image_features": features}
        embeddings: NDArray[np.float32] = self._embedding.run(["inputs_embeds"], inputs)[0]
        return embeddings

    def _step(
        self,
        embeddings: NDArray[np.float32],
        positions: Ids,
        states: Arrays,
        *,
        past: int,
        read: Ids | None = None,
    ) -> tuple[NDArray[np.float32], Arrays]:
        """Run [rows, tokens, hidden] after `past` tokens, from their states.

        Returns:
            logits [rows, k, vocabulary] at the positions `read` [rows, k], by default none, and the states after.
        """
        rows, tokens = embeddings.shape[:2]
        read = np.zeros((rows, 0), np.int64) if read is None else read
        inputs = {
            "inputs_embeds": embeddings,
            "attention_mask": np.ones((rows, past + tokens), np.int64),
            "position_ids": np.repeat(positions[:, None], rows, axis=1),
            "logits_at": read[..., None],
            **states,
        }
        results = dict(zip(self._outputs, self._decoder.run(self._outputs, inputs), strict=True))
        logits = results.pop("logits")
        return logits, {
            name.replace("present.", "past_key_values."): state for name, state in results.items()
        }

    def _no_states(self) -> Arrays:
        """States before the first token, of one row."""
        shapes = {
            value.name: value.shape
            for value in self._decoder.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        lengths = {"batch": 1, "past_sequence_len": 0}
        return {
            name: np.zeros([lengths.get(size, size) for size in shape], np.float32)
            for name, shape in shapes.items()
        }

    def _hidden_size(self) -> int:
        shapes = {value.name: value.shape for value in self._decoder.get_inputs()}
        return int(shapes["inputs_embeds"][2])


def converted(checkpoint: Path, cache: Path, weights: str) -> Path:
    """The folder in the cache for these weights of this checkpoint, made by these versions."""
    identity = hashlib.sha256((checkpoint / "config.json").read_bytes())
    for file in sorted(checkpoint.glob("*.safetensors")):
        status = file.stat()
        identity.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    identity.update(" ".join(version(name) for name in PACKAGES).encode())
    return cache / f"onnxruntime-{identity.hexdigest()[:12]}-{weights}"


def convert(checkpoint: Path, cache: Path, weights: str) -> None:
    """Build the graphs, and round their matrices; a folder that is there is whole."""
    import mobius

    logging.getLogger("mobius").setLevel(logging.ERROR)
    package = mobius.build(str(checkpoint), dtype="f32", execution_provider="default")
    for part in PARTS_OF_MODEL:
        fold_transposes(package[part])
    read_logits_at(package["decoder"])
    folder = converted(checkpoint, cache, weights)
    unfinished = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    package.save(str(unfinished), progress_bar=False)
    del package
    if weights == "int4":
        for part in ("vision_encoder", "decoder"):
            quantize(unfinished / part)
    unfinished.rename(folder)


def fold_transposes(model: Any) -> None:
    """Replace each transpose of a weight by the transposed weight."""
    import onnx_ir as ir

    graph = model.graph
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.const_value is None:
            continue
        name = f"{weight.name}.transposed"
        if name not in graph.initializers:
            array = np.ascontiguousarray(weight.const_value.numpy().T)
            graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
        ir.convenience.replace_all_uses_with(node.outputs[0], graph.initializers[name])
        graph.remove(node, safe=True)
        if not weight.uses():
            del graph.initializers[weight.name]


def read_logits_at(model: Any) -> None:
    """Give the decoder an input `logits_at` [rows, k, 1]: its logits become those of these positions."""
    import onnx_ir as ir

    graph = model.graph
    head = next(value for value in graph.outputs if value.name == "logits").producer()
    if head.op_type != "MatMul":
        raise SystemExit(f"the logits come from a {head.op_type}, not from the head's MatMul")
    positions = ir.Value(
        name="logits_at", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "k", 1])
    )
    graph.inputs.append(positions)
    pick = ir.node("GatherND", [head.inputs[0], positions], {"batch_dims": 1})
    graph.insert_before(head, pick)
    head.replace_input_with(0, pick.outputs[0])
    head.outputs[0].shape = ir.Shape(["batch", "k", head.inputs[1].shape[1]])


def quantize(folder: Path) -> None:
    """Round the matrices of the graph in `folder` to 4 bits, in place."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    path = folder / "model.onnx"
    quantizer = MatMulNBitsQuantizer(str(path), block_size=BLOCK, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    shutil.rmtree(folder)
    folder.mkdir()
    quantizer.model.save_model_to_file(str(path), use_external_data_format=True)


if __name__ == "__main__":
    main()
