"""The five stages of a score, each a method: system text, prompt, vision, image prefix, questions.

Everything before the question is shared by the four dimensions, everything before the image by all candidates of a
prompt, and everything before the prompt by all prompts. The decoder therefore runs four times, each time from the
states (attention keys and values, convolution and DeltaNet states) that the last run left: over the system text, once
for an engine; over the prompt; over the image; and over the questions of all dimensions as one right-padded batch. Its
outputs are read at each row's last real position, which padding to the right cannot reach.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zreward.bundle import Bundle, EmbeddingInfo
from zreward.errors import BackendError
from zreward.image import Patches
from zreward.lengths import MAX_IMAGES
from zreward.prompt import Ids, PromptEncoder, image_positions, load_tokenizer, text_positions
from zreward.runtime.backends import OpenGraphs, Session, Tensor, open_graphs
from zreward.runtime.backends.options import GpuOptions

MAX_STATE_BYTES = 512 * 1024 * 1024  # of a batch's states: the same bound for large models

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class DecoderState:
    """What the decoder remembers of the tokens it has read, for a batch of rows.

    Attributes:
        arrays: state arrays by the name of the decoder input, first axis the rows; of NumPy or of a backend.
        length: tokens read so far.
        position: M-RoPE position of the next text token.
    """

    arrays: Mapping[str, Tensor]
    length: int
    position: int

    def repeated(self, times: int) -> DecoderState:
        """Each row `times` times in succession."""
        arrays = {name: np.repeat(array, times, axis=0) for name, array in self.arrays.items()}
        return DecoderState(arrays, self.length, self.position)


@dataclass(frozen=True)
class Answers:
    """Probabilities float32 [images, dimensions, bins], and label mass [images, dimensions] if exported."""

    probs: Floats
    label_mass: Floats | None


class Engine:
    """The graphs of one bundle, run stage by stage. Safe to call from several threads.

    Args:
        bundle: the bundle to run.
        provider: see `open_graphs`.
        threads: see `open_graphs`.
        gpu: see `open_graphs`.
        open_graph: opens the graph at a path, in place of `open_graphs` with all of these.

    Attributes:
        opened: the graphs, and what runs them.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        provider: str = "auto",
        threads: int | None = None,
        gpu: GpuOptions | None = None,
        open_graph: Callable[[Path], Session] | None = None,
    ) -> None:
        self.bundle = bundle
        self.contract = bundle.contract
        self.encoder = PromptEncoder(bundle.contract, load_tokenizer(bundle.path))
        self._embedding = _Embedding(bundle)
        self._shares_states = all(s.shape[0] == "state_batch" for s in bundle.manifest.states)
        self._questions, self._last_index = self._padded_questions()
        self._start = DecoderState(self._empty_states(), length=0, position=0)
        self._system_embeddings = self._embedding.rows(self.encoder.system_ids)
        self._system: DecoderState | None = None
        self._system_lock = threading.Lock()
        self.opened = (
            open_graphs(bundle, provider=provider, threads=threads, gpu=gpu)
            if open_graph is None
            else _opened_by(open_graph, bundle)
        )
        self._graphs = self.opened.sessions

    def system_state(self) -> DecoderState:
        """Run the text that stands in front of every prompt: one row."""
        if not len(self._system_embeddings):
            return self._start
        return self._read(self._start, self._system_embeddings)

    def prompt_state(self, prompt: str, system: DecoderState | None = None) -> DecoderState:
        """Run a prompt: one row.

        Args:
            prompt: the text that images were generated from.
            system: what `system_state` returned; by default the engine runs it once and keeps it.

        Raises:
            PromptError: the prompt is empty, too long, or contains control tokens.
        """
        ids = self.encoder.text_prefix_ids(prompt)
        n = len(self.encoder.system_ids)
        if not np.array_equal(ids[:n], self.encoder.system_ids):  # the prompt merges with the text before it
            return self._read(self._start, self._embedding.rows(ids))
        return self._read(system or self._kept_system_state(), self._embedding.rows(ids[n:]))

    def encode_image(self, patches: Patches) -> Floats:
        """Run the vision tower: float32 [tokens, hidden]."""
        graph = self._graphs["vision"]
        inputs: dict[str, NDArray[Any]] = {"pixel_values": patches.pixel_values}
        if "patch_positions" in graph.inputs:  # a tower that does not compute them from the grid
            inputs["patch_positions"] = patches.positions
        else:
            inputs["image_grid_thw"] = np.array([patches.grid_thw], dtype=np.int64)
        features: Floats = graph.run(["image_features"], inputs)[0]
        return features

    def image_state(
        self, prompt: DecoderState, features: Sequence[Floats], grid: tuple[int, int]
    ) -> DecoderState:
        """Run images of one size after one prompt: one row per image.

        Args:
            prompt: state of one row.
            features: per image, float32 [tokens, hidden].
            grid: height and width of each image in tokens.
        """
        closing = self._embedding.rows(self.encoder.image_span_ids(0))
        embeddings = np.stack([np.concatenate([f, closing]) for f in features])
        image, after = image_positions(prompt.position, *grid)
        positions = np.concatenate([image, text_positions(after, 1)], axis=1)
        state = prompt if self._shares_states else prompt.repeated(len(features))
        return self.advance(state, embeddings, positions, after + 1)

    def advance(
        self, state: DecoderState, embeddings: Floats, positions: Ids, next_position: int
    ) -> DecoderState:
        """Run embeddings of any tokens after `state`.

        Args:
            state: of as many rows as `embeddings`, or of fewer where the bundle's states serve several rows each.
            embeddings: float32 [rows, tokens, hidden].
            positions: M-RoPE positions [3, tokens], alike for all rows.
            next_position: that of the text token after them.
        """
        states = self.bundle.manifest.states
        inputs = self._inputs(state, embeddings, positions)
        outputs = self._graphs["decoder"].run([s.output for s in states], inputs)
        arrays = {s.input: output for s, output in zip(states, outputs, strict=True)}
        return DecoderState(arrays, state.length + embeddings.shape[1], next_position)

    def answer(self, images: DecoderState, dimensions: Sequence[int] | None = None) -> Answers:
        """Ask every dimension, or those at the given indices, of every row of `images`.

        The probabilities come as the graph gave them; `Scorer` checks that they are distributions.
        """
        asked = list(range(len(self.contract.dimensions)) if dimensions is None else dimensions)
        n_dimensions, n_images = len(asked), _rows(images)
        last_index = self._last_index[asked]
        questions = self._questions[asked, : last_index.max() + 1]
        state = images if self._shares_states else images.repeated(n_dimensions)
        embeddings = np.tile(questions, (n_images, 1, 1))
        positions = text_positions(state.position, embeddings.shape[1])
        names = ["probs", "label_mass"] if self.bundle.manifest.label_mass else ["probs"]
        inputs = self._inputs(state, embeddings, positions, keep_states=False)
        temperatures = np.array(self.contract.temperatures, dtype=np.float32)[asked]
        inputs["last_index"] = np.tile(last_index, n_images)
        inputs["temperature"] = np.tile(temperatures, n_images)
        outputs = self._graphs["decoder"].run(names, inputs)
        probs = outputs[0].reshape(n_images, n_dimensions, -1)
        mass = outputs[1].reshape(n_images, n_dimensions) if len(outputs) > 1 else None
        return Answers(probs, mass)

    def images_together(self, prompt: DecoderState, n_tokens: int) -> int:
        """How many images of `n_tokens` run as one batch: what memory and graphs allow, and at least one."""
        allowed = MAX_STATE_BYTES // self._image_state_bytes(prompt, n_tokens)
        return max(1, min(MAX_IMAGES, self.opened.images, allowed))

    def close(self) -> None:
        """Give back what the graphs hold; runs after it are errors."""
        self.opened.close()

    def forget_system_text(self) -> None:
        """Drop the state after the system text; the next prompt reads it again."""
        with self._system_lock:
            self._system = None

    def _image_state_bytes(self, prompt: DecoderState, n_tokens: int) -> int:
        """Bytes that an image of `n_tokens` takes while its questions run: its state, and one per question.

        Twice each, because the decoder returns the states that it is given.
        """
        past = prompt.length + n_tokens + 1
        row = sum(s.n_bytes(rows=1, past=past) for s in self.bundle.manifest.states)
        return 2 * row * (1 + len(self.contract.dimensions))

    def _kept_system_state(self) -> DecoderState:
        with self._system_lock:
            if self._system is None:
                self._system = self.system_state()
            return self._system

    def _read(self, state: DecoderState, text: Floats) -> DecoderState:
        """Run the embeddings of text, [tokens, hidden], after `state`."""
        positions = text_positions(state.position, len(text))
        return self.advance(state, text[None], positions, state.position + len(text))

    def _inputs(
        self, state: DecoderState, embeddings: Floats, positions: Ids, *, keep_states: bool = True
    ) -> dict[str, Tensor]:
        """What the decoder is given; `keep_states` says whether the new states will be read."""
        rows, tokens = embeddings.shape[:2]
        inputs: dict[str, Tensor] = {
            "inputs_embeds": embeddings,
            "position_ids": np.repeat(positions[:, None], rows, axis=1),
            "last_index": np.full(rows, tokens - 1, dtype=np.int64),
            "temperature": np.ones(rows, dtype=np.float32),
            **state.arrays,
        }
        asked = self._graphs["decoder"].inputs
        if "attention_mask" in asked:  # a graph that makes its mask from the lengths does not ask
            inputs["attention_mask"] = np.ones((rows, state.length + tokens), dtype=np.int64)
        if "keep_states" in asked:  # a graph that always returns them does not ask
            inputs["keep_states"] = np.array(keep_states, dtype=np.int64)
        return inputs

    def _empty_states(self) -> dict[str, NDArray[Any]]:
        return {
            s.input: np.zeros(s.sizes(rows=1, past=0), dtype=s.dtype) for s in self.bundle.manifest.states
        }

    def _padded_questions(self) -> tuple[Floats, NDArray[np.int64]]:
        """Embeddings of all questions, right-padded by their own last token, and their last positions."""
        questions = self.encoder.question_ids
        lengths = np.array([len(ids) for ids in questions], dtype=np.int64)
        padded = [np.pad(ids, (0, lengths.max() - len(ids)), mode="edge") for ids in questions]
        return np.stack([self._embedding.rows(ids) for ids in padded]), lengths - 1


class _Embedding:
    """The token embedding as a memory-mapped table: rows are read as they are asked for."""

    def __init__(self, bundle: Bundle) -> None:
        info: EmbeddingInfo = bundle.manifest.embedding
        self._is_bfloat16 = info.dtype == "bfloat16"
        dtype = np.dtype(np.uint16 if self._is_bfloat16 else info.dtype)
        path = bundle.path / info.file
        if path.stat().st_size != dtype.itemsize * info.shape[0] * info.shape[1]:
            raise BackendError(f"{path}: its size does not fit the shape {info.shape} in the manifest")
        self._table = np.memmap(path, dtype=dtype, mode="r", shape=info.shape)

    def rows(self, ids: Ids) -> Floats:
        """Embeddings of `ids` [n], float32 [n, hidden].

        Raises:
            BackendError: an id beyond the table, which means that tokenizer and model do not belong together.
        """
        if len(ids) and int(ids.max()) >= len(self._table):
            raise BackendError(
                f"token id {int(ids.max())} is beyond the embedding's {len(self._table)} rows; "
                "the bundle's tokenizer does not belong to its model"
            )
        rows = np.asarray(self._table[ids])
        if self._is_bfloat16:
            return (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.astype(np.float32, copy=False)


def _opened_by(open_graph: Callable[[Path], Session], bundle: Bundle) -> OpenGraphs:
    graphs = {name: open_graph(bundle.path / file) for name, file in bundle.manifest.graphs.items()}
    return OpenGraphs("given", "opened by the caller", graphs)


def _rows(state: DecoderState) -> int:
    return next(iter(state.arrays.values())).shape[0]
