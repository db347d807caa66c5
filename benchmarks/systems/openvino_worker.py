"""OpenVINO on the CPU, exported and compressed by optimum-intel: weights of 8 or 4 bits, activations rounded in groups.

    python3.11 -m venv build/openvino
    build/openvino/bin/pip install optimum-intel==2.2.0 transformers==5.2.0 openvino==2026.4.1 nncf==3.4.0 torch==2.13.0
    build/openvino/bin/pip uninstall -y torchvision   # where torch is the CPU build, which it does not go with

The environment is a separate one: optimum-intel exports Qwen3.5 with transformers 5.2 alone. The float model is
exported once into the cache folder (`OVModelForVisualCausalLM`), and compressed there once for each kind of weights:
`int8` is optimum-intel's default for 8 bits, `int4` its default for 4 bits (asymmetric, groups of 128, no data) in
the language model, with 8 bits in embeddings, head and vision tower.

What OpenVINO is given beyond what optimum-intel's own `forward` does, all in its favour:

- Activations are rounded in groups of 128, which took 5 to 15 % less processor time than its default of 32 (0.8B
  shape, 512×512); groups of a whole row took more. Everything else is its default: an 8-bit KV cache where the weights
  are compressed, float32 elsewhere.
- The exported graph computes logits at every position. Here a Gather in front of the head picks the positions that
  are read: one for each question, and none for the prefix.
- The prefix runs once. Its states (attention keys and values, convolution and DeltaNet states) stay in the infer
  request, and the questions continue from them as one right-padded batch: `beam_idx` = [0, 0, 0, 0] makes a row of
  each out of the one row. The probabilities are, bit for bit, those of saving the states with `query_state()` and
  setting them again, for each question alone or repeated for the batch, and nothing is copied.
- The vision tower's mask has one row instead of one for each patch; with one image it masks nothing. That saves 7 %
  of the tower at 1024×1024.

With `--full-passes` nothing is shared: image and whole sequence run once for each question.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from numpy.typing import NDArray
from openvino import opset13
from optimum.intel.openvino import OVModelForVisualCausalLM, OVWeightQuantizationConfig
from worker import KEEP, Floats, Ids, Job, Loaded, Parts, serve

WEIGHTS: dict[str, dict[str, Any]] = {
    "float": {},
    "int8": {"bits": 8},
    "int4": {"bits": 4, "sym": False, "group_size": 128, "group_size_fallback": "adjust"},
}
PACKAGES = ("openvino", "optimum-intel", "nncf", "transformers", "torch", "numpy")
VISION_PARTS = ("vision_embeddings", "vision_embeddings_pos", "vision_embeddings_merger")
REPORTED = (
    "INFERENCE_NUM_THREADS",
    "NUM_STREAMS",
    "INFERENCE_PRECISION_HINT",
    "KV_CACHE_PRECISION",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--weights", choices=WEIGHTS, default="int8")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--group-size", type=int, default=128, help="of the dynamic quantization")
    parser.add_argument("--full-passes", action="store_true", help="share nothing between the questions")
    parser.add_argument("--keep", choices=KEEP, default="nothing", help="states to start from")
    parser.add_argument("--convert", action="store_true", help="fill the cache and end")
    arguments = parser.parse_args()
    if arguments.convert:
        convert(arguments.checkpoint, arguments.cache, arguments.weights)
    else:
        serve("openvino", PACKAGES, lambda: load(arguments))


def load(arguments: argparse.Namespace) -> Loaded:
    torch.set_num_threads(arguments.threads)
    folder = converted(arguments.checkpoint, arguments.cache, arguments.weights)
    if not folder.is_dir():  # in a process of its own, whose memory goes back
        command = [sys.executable, __file__, *sys.argv[1:], "--convert"]
        if subprocess.run(command).returncode:
            sys.exit(f"the conversion to {arguments.weights} failed, for the reason above")
    config = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": arguments.threads,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(arguments.group_size),
    }
    model = Model(folder, config)
    settings = {
        "weights": {"name": arguments.weights, **WEIGHTS[arguments.weights]},
        "kept": arguments.keep,
        "passes": "one per question" if arguments.full_passes else "prefix once, questions as one batch",
        "threads": arguments.threads,
        "compiled": model.compiled_properties(),
    }
    if arguments.full_passes:
        return Loaded(model.run_full_passes, settings)
    return Loaded(partial(model.run_shared, keep=arguments.keep), settings)


class Model:
    """The compiled graphs, driven for one image and several questions."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self._parts = OVModelForVisualCausalLM.from_pretrained(folder, compile=False, ov_config=config)
        for name in VISION_PARTS:
            getattr(self._parts, name).compile()
        graph = self._parts.language_model.model
        read_logits_at(graph)
        self._compiled = openvino.Core().compile_model(graph, "CPU", config)
        self._request = self._compiled.create_infer_request()
        self._kept: dict[str, openvino.Tensor] = {}

    def run_shared(self, job: Job, parts: Parts, *, keep: str) -> Floats:
        """All questions as one batch, from the states that were kept. There is one prompt."""
        n_prefix, n_kept = len(job.prefix_ids), job.n_kept_ids(keep)
        if n_kept and not self._kept:
            self.read_text(job, n_kept)
        with parts.timed("vision"):
            features = self.vision(job)
        with parts.timed("prefix"):
            embeddings = self.embed_prefix(job, features)
            self._request.reset_state()
            if n_kept:
                for state in self._request.query_state():
                    state.state = self._kept[state.name]
            positions = job.prefix_positions[:, n_kept:]
            nothing = np.zeros((1, 0))
            self.step(embeddings[:, n_kept:], positions, past=n_kept, read=nothing, source=np.zeros(1))
        with parts.timed("suffixes"):
            logits = self.step(
                self.embed(job.suffix_ids),
                job.suffix_positions,
                past=n_prefix,
                read=job.suffix_lengths[:, None] - 1,
                source=np.zeros(job.n_questions),
            )
        return job.probabilities(logits[:, 0, job.code_ids])

    def read_text(self, job: Job, n: int) -> None:
        """Run the first n tokens and copy the states that they leave."""
        embeddings, positions = self.embed(job.prefix_ids[None]), job.prefix_positions
        self._request.reset_state()
        self.step(embeddings[:, :n], positions[:, :n], past=0, read=np.zeros((1, 0)), source=np.zeros(1))
        for state in self._request.query_state():
            self._kept[state.name] = openvino.Tensor(state.state.data.copy())

    def run_full_passes(self, job: Job, parts: Parts) -> Floats:
        codes = []
        for index in range(job.n_questions):
            with parts.timed("vision"):
                features = self.vision(job)
            with parts.timed("passes"):
                question = job.question_ids(index)
                parts_of_sequence = [self.embed_prefix(job, features), self.embed(question[None])]
                embeddings = np.concatenate(parts_of_sequence, axis=1)
                question_positions = job.suffix_positions[:, : len(question)]
                positions = np.concatenate([job.prefix_positions, question_positions], axis=1)
                self._request.reset_state()
                last = np.array([[embeddings.shape[1] - 1]])
                logits = self.step(embeddings, positions, past=0, read=last, source=np.zeros(1))
                codes.append(logits[0, 0, job.code_ids])
        return job.probabilities(np.stack(codes))

    def vision(self, job: Job) -> NDArray[np.float32]:
        """Image features [tokens, hidden]: optimum-intel's `get_vision_embeddings` with the small mask."""
        parts, grid = self._parts, torch.from_numpy(job.image_grid_thw)
        n_patches = len(job.pixel_values)
        hidden = torch.from_numpy(parts.vision_embeddings(job.pixel_values)[0])
        hidden = hidden + parts.fast_pos_embed_interpolate(grid)
        features: NDArray[np.float32] = parts.vision_embeddings_merger(
            pixel_values=hidden.reshape(n_patches, -1),
            attention_mask=np.zeros((1, 1, n_patches), np.float32),
            rotary_pos_emb=parts.rot_pos_emb(grid).reshape(n_patches, -1),
        )[0]
        return features

    def embed(self, ids: Ids) -> NDArray[np.float32]:
        embeddings: NDArray[np.float32] = self._parts.get_text_embeddings(ids)
        return embeddings

    def embed_prefix(self, job: Job, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Embeddings of the prefix with the image in its place, [1, tokens, hidden]."""
        embeddings = np.array(self.embed(job.prefix_ids[None]))
        embeddings[0, job.prefix_ids == job.image_token_id] = features
        return embeddings

    def step(
        self,
        embeddings: NDArray[np.float32],
        positions: Ids,
        *,
        past: int,
        read: NDArray[Any],
        source: NDArray[Any],
    ) -> NDArray[np.float32]:
        """Run [rows, tokens, hidden] after `past` tokens; row i continues the states of row `source[i]`.

        Returns:
            logits [rows, k, vocabulary] at the positions `read` [rows, k].
        """
        rows, tokens = embeddings.shape[:2]
        # The first of Qwen3.5's four positions is of text, and for the mask alone.
        text = np.arange(past, past + tokens)[None]
        inputs = {
            "inputs_embeds": embeddings,
            "attention_mask": np.ones((rows, past + tokens), np.int64),
            "position_ids": np.repeat(np.concatenate([text, positions])[:, None], rows, axis=1),
            "beam_idx": source.astype(np.int32),
            "logits_at": read.astype(np.int64),
        }
        logits: NDArray[np.float32] = self._request.infer(inputs, share_inputs=True)["logits"]
        return logits

    def compiled_properties(self) -> dict[str, str]:
        values = {name: self._compiled.get_property(name) for name in REPORTED}
        return {
            name: value.get_type_name() if isinstance(value, openvino.Type) else str(value)
            for name, value in values.items()
        }


def read_logits_at(graph: openvino.Model) -> None:
    """Give the language model an input `logits_at` [rows, k]: its logits become those of these positions."""
    head = graph.output("logits").get_node().input_value(0).get_node()
    if head.get_type_name() != "MatMul":
        raise SystemExit(f"the logits come from a {head.get_type_name()}, not from the head's MatMul")
    positions = opset13.parameter([-1, -1], np.int64, name="logits_at")
    positions.output(0).get_tensor().set_names({"logits_at"})
    axis = opset13.constant(1, dtype=np.int64)
    picked = opset13.gather(head.input_value(0), positions, axis, batch_dims=1)
    head.input(0).replace_source_output(picked.output(0))
    graph.add_parameters([positions])
    graph.validate_nodes_and_infer_types()


def converted(checkpoint: Path, cache: Path, weights: str) -> Path:
    """The folder in the cache for these weights of this checkpoint, made by these versions."""
    identity = hashlib.sha256((checkpoint / "config.json").read_bytes())
    for file in sorted(checkpoint.glob("*.safetensors")):
        status = file.stat()
        identity.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    identity.update(" ".join(version(name) for name in PACKAGES).encode())
    return cache / f"openvino-{identity.hexdigest()[:12]}-{weights}"


def convert(checkpoint: Path, cache: Path, weights: str) -> None:
    """Export the floats, or compress them; a folder that is there is whole."""
    if weights == "float":
        model = OVModelForVisualCausalLM.from_pretrained(
            checkpoint, export=True, compile=False, load_in_8bit=False
        )
    else:
        floats = converted(checkpoint, cache, "float")
        if not floats.is_dir():
            convert(checkpoint, cache, "float")
        quantization = OVWeightQuantizationConfig(**WEIGHTS[weights])
        model = OVModelForVisualCausalLM.from_pretrained(
            floats, compile=False, quantization_config=quantization
        )
    folder = converted(checkpoint, cache, weights)
    unfinished = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    unfinished.rename(folder)


if __name__ == "__main__":
    main()
