"""llama.cpp on the CPU, through the C interface that llama-cpp-python binds: weights of 4, 8 or 16 bits.

    python3.11 -m venv build/llamacpp
    build/llamacpp/bin/pip install scikit-build-core cmake ninja
    build/llamacpp/bin/pip download --no-deps --no-build-isolation --no-binary :all: -d build llama-cpp-python==0.3.36
    tar xf build/llama_cpp_python-0.3.36.tar.gz -C build
    CMAKE_ARGS=-DGGML_NATIVE=ON build/llamacpp/bin/pip install build/llama_cpp_python-0.3.36
    build/llamacpp/bin/pip install torch==2.13.0 transformers==5.23.0 \\
        build/llama_cpp_python-0.3.36/vendor/llama.cpp/gguf-py
    build/llamacpp/bin/pip install --no-deps build/llama_cpp_python-0.3.36/vendor/llama.cpp   # its converter

The source distribution holds llama.cpp itself and its converter, which knows Qwen3.5 (`qwen35`, vision tower included).
The decoder is converted into the cache folder in float32 and from there with llama.cpp's quantizer in its default
mixtures: `q4_0` and `q8_0` are what it makes of these names. The converter is told two things that a checkpoint without
a known tokenizer and without an image processor's config does not tell it, and nothing in it is changed.

With `float` everything is float32, for the check of this file: the probabilities of a random checkpoint of the 0.8B
shape at 512×512 are within 3e-5 of transformers' (KL 4e-9), those of a small one within 7e-5. There, KL is 6e-4 with
`bf16`, 0.03 with `q8_0` and 0.4 with `q4_0`.

What llama.cpp is given, all in its favour, with what was seen with one thread on a Zen 4 (AVX-512 with VNNI and
bfloat16) at 512×512, 804 tokens of prefix:

- It is compiled for this processor, with a BLAS library left out as by default. Q4_0 is then repacked for 8-bit
  products; on x86 Q8_0 is not, and took a quarter longer. `bf16` has the shortest prefix of all.
- The vision tower is bfloat16 with flash attention, 2.0 to 2.3 s: float16 3.0 s, 8 bits 2.9 s; without flash attention
  2.6 s.
- The image reaches it as the pixels that the job's patches were made of. That llama.cpp normalizes them is outside the
  measurement, as for the others.
- The prefix is one batch of embeddings, image and text, with M-RoPE positions. It is worked on in micro-batches of 256
  tokens and without flash attention in the decoder: 5 % faster than all at once with flash attention at 512×512, 8 %
  at 1024×1024.
- The questions continue from the prefix as one batch of sequences, padded to one length so that it is not split.
  `llama_memory_seq_cp` gives each the states of the prefix; the cache of keys and values is unified, so that these are
  shared rather than copied. A cache for each sequence took as long.
- Logits are computed for the last token of each question alone.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp as mtmd
from numpy.typing import NDArray
from worker import KEEP, Floats, Ids, Job, Loaded, Parts, serve

WEIGHTS = {
    "float": {"text": "F32", "vision": "F32"},
    "bf16": {"text": "BF16", "vision": "BF16"},
    "q8_0": {"text": "Q8_0", "vision": "BF16"},
    "q4_0": {"text": "Q4_0", "vision": "BF16"},
}
FTYPES = {
    "F32": "ALL_F32",
    "F16": "MOSTLY_F16",
    "BF16": "MOSTLY_BF16",
    "Q8_0": "MOSTLY_Q8_0",
    "Q4_0": "MOSTLY_Q4_0",
}
QUANTIZED = ("Q8_0", "Q4_0")  # types that llama.cpp's own quantizer makes, where it is the decoder
VISION = tuple(name for name in FTYPES if name != "Q4_0")  # the converter makes no other
PACKAGES = ("llama-cpp-python", "gguf", "numpy")
IMAGE_MEAN, IMAGE_STD = 0.5, 0.5  # of every channel; `pixels` checks it


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--weights", choices=WEIGHTS, default="q4_0")
    parser.add_argument("--vision", choices=VISION, help="type of the vision tower's weights")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--flash-attention", choices=("both", "text", "vision", "none"), default="vision")
    parser.add_argument("--ubatch", type=int, default=256, help="tokens of the prefix worked on at once")
    parser.add_argument("--keep", choices=KEEP, default="nothing", help="states to start from")
    parser.add_argument("--convert", choices=("text", "vision"), help="fill the cache and end")
    arguments = parser.parse_args()
    arguments.vision = arguments.vision or WEIGHTS[arguments.weights]["vision"]
    if arguments.convert == "text":
        weights = WEIGHTS[arguments.weights]["text"]
        convert_text(arguments.checkpoint, arguments.cache, weights, arguments.threads)
    elif arguments.convert == "vision":
        convert_vision(arguments.checkpoint, arguments.cache, arguments.vision)
    else:
        serve("llamacpp", PACKAGES, lambda: load(arguments))


def load(arguments: argparse.Namespace) -> Loaded:
    text = converted(arguments.checkpoint, arguments.cache, "text", WEIGHTS[arguments.weights]["text"])
    vision = converted(arguments.checkpoint, arguments.cache, "vision", arguments.vision)
    for file, part in ((text, "text"), (vision, "vision")):
        if not file.exists():  # in a process of its own, whose memory goes back
            command = [sys.executable, __file__, *sys.argv[1:], "--convert", part]
            if subprocess.run(command).returncode:
                sys.exit(f"the conversion to {file.name} failed, for the reason above")
    flash = arguments.flash_attention
    model = Model(
        text,
        vision,
        threads=arguments.threads,
        flash_text=flash in ("both", "text"),
        flash_vision=flash in ("both", "vision"),
        keep=arguments.keep,
        ubatch=arguments.ubatch,
    )
    settings = {
        "weights": {"text": WEIGHTS[arguments.weights]["text"], "vision": arguments.vision},
        "kept": arguments.keep,
        "passes": "prefix once, questions as one batch",
        "threads": arguments.threads,
        "flash_attention": flash,
        "ubatch": arguments.ubatch,
        "build": llama_cpp.llama_print_system_info().decode().strip(),
    }
    return Loaded(model.run, settings, model.prepare)


class Model:
    """The weights, and for each size of image what is made before its first run."""

    def __init__(
        self,
        text: Path,
        vision: Path,
        *,
        threads: int,
        flash_text: bool,
        flash_vision: bool,
        keep: str,
        ubatch: int,
    ) -> None:
        self.threads, self.flash_text, self.keep, self.ubatch = threads, flash_text, keep, ubatch
        llama_cpp.llama_backend_init()
        self.model = some(
            llama_cpp.llama_model_load_from_file(str(text).encode(), llama_cpp.llama_model_default_params()),
            f"cannot load {text}",
        )
        parameters = mtmd.mtmd_context_params_default()
        parameters.use_gpu = False
        parameters.n_threads = threads
        parameters.print_timings = False
        parameters.warmup = False  # the benchmark has its own
        parameters.flash_attn_type = flash_attention(flash_vision)
        self.tower = some(
            mtmd.mtmd_init_from_file(str(vision).encode(), self.model, parameters), f"cannot load {vision}"
        )
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(text).tensors}
        self._table = tensors["token_embd.weight"]
        self._sessions: dict[tuple[int, ...], Session] = {}

    def prepare(self, job: Job) -> None:
        self._sessions[session_key(job)] = Session(self, job)

    def run(self, job: Job, parts: Parts) -> Floats:
        return self._sessions[session_key(job)].run(job, parts)

    def embed(self, ids: Ids) -> NDArray[np.float32]:
        """Rows of the embedding table, [tokens, hidden], as llama.cpp would look them up."""
        rows: NDArray[np.float32] = gguf.quants.dequantize(self._table.data[ids], self._table.tensor_type)
        return rows


class Session:
    """A context and the image of one job."""

    def __init__(self, model: Model, job: Job) -> None:
        self._model, self._n_kept = model, job.n_kept_ids(model.keep)
        self._image = image_chunk(model.tower, pixels(job))
        n_image, expected = mtmd.mtmd_input_chunk_get_n_tokens(self._image), image_positions(job).sum()
        if n_image != expected:
            raise SystemExit(f"llama.cpp makes {n_image} tokens of the image, the job has {expected}")
        n_tokens = len(job.prefix_ids) + job.suffix_ids.size
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_seq_max = job.n_questions + 1
        parameters.n_ctx = parameters.n_batch = n_tokens
        parameters.n_ubatch = max(model.ubatch, job.suffix_ids.size)  # the questions are not split
        parameters.n_threads = parameters.n_threads_batch = model.threads
        parameters.n_outputs_max = parameters.n_seq_max
        parameters.kv_unified = True  # the questions read the same keys and values, which nothing copies
        parameters.flash_attn_type = flash_attention(model.flash_text)
        self._context = some(llama_cpp.llama_init_from_model(model.model, parameters), "no context")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._kept = job.n_questions  # the sequence of what is kept
        if self._n_kept:
            embeddings = model.embed(job.prefix_ids[: self._n_kept])
            self._decode(Batch.of_prefix(embeddings, job.prefix_positions[:, : self._n_kept], self._kept))

    def run(self, job: Job, parts: Parts) -> Floats:
        with parts.timed("vision"):
            features = self._vision(int(image_positions(job).sum()))
        with parts.timed("prefix"):
            embeddings = np.empty((len(job.prefix_ids), features.shape[1]), np.float32)
            image = image_positions(job)
            embeddings[~image] = self._model.embed(job.prefix_ids[~image])
            embeddings[image] = features
            for sequence in range(job.n_questions):
                llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)
            if self._n_kept:
                llama_cpp.llama_memory_seq_cp(self._memory, self._kept, 0, -1, -1)
            rest = slice(self._n_kept, None)
            self._decode(Batch.of_prefix(embeddings[rest], job.prefix_positions[:, rest], 0))
        with parts.timed("suffixes"):
            for sequence in range(1, job.n_questions):
                llama_cpp.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)
            self._decode(Batch.of_questions(job))
            logits = np.stack([self._logits(index)[job.code_ids] for index in last_tokens(job)])
        return job.probabilities(logits)

    def _vision(self, n_tokens: int) -> NDArray[np.float32]:
        """Image features [tokens, hidden]."""
        if mtmd.mtmd_encode_chunk(self._model.tower, self._image):
            raise SystemExit("llama.cpp cannot encode the image")
        hidden = llama_cpp.llama_model_n_embd_inp(self._model.model)
        return np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(self._model.tower), (n_tokens, hidden))

    def _decode(self, batch: Batch) -> None:
        if status := llama_cpp.llama_decode(self._context, batch.struct):
            raise SystemExit(f"llama_decode ended with {status}")
        llama_cpp.llama_synchronize(self._context)

    def _logits(self, index: int) -> NDArray[np.float32]:
        """Logits [vocabulary] of a token of the last batch."""
        size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model.model))
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, index), (size,))


@dataclass(frozen=True)
class Batch:
    """A `llama_batch` and the arrays that it points to."""

    struct: llama_cpp.llama_batch
    arrays: tuple[Any, ...]

    @staticmethod
    def of_prefix(embeddings: NDArray[np.float32], positions: Ids, sequence: int) -> Batch:
        """Embeddings [tokens, hidden] of one sequence at M-RoPE positions [3, tokens]; nothing is read."""
        n = len(embeddings)
        fourth = np.zeros((1, n), np.int64)  # llama.cpp has room for one more coordinate
        everywhere = np.concatenate([positions, fourth])
        return Batch._make(n, everywhere, np.full(n, sequence), np.zeros(n), embeddings=embeddings)

    @staticmethod
    def of_questions(job: Job) -> Batch:
        """All questions, padded to one length; each is a sequence, and its last token is read.

        The position of a token of text is one number for all coordinates.
        """
        rows, longest = job.suffix_ids.shape
        positions = np.tile(job.suffix_positions[0], rows)
        read = np.zeros(rows * longest)
        read[last_tokens(job)] = 1
        sequences = np.repeat(np.arange(rows), longest)
        return Batch._make(rows * longest, positions, sequences, read, tokens=job.suffix_ids)

    @staticmethod
    def _make(
        n: int,
        positions: Ids,
        sequences: NDArray[Any],
        read: NDArray[Any],
        *,
        tokens: Ids | None = None,
        embeddings: NDArray[np.float32] | None = None,
    ) -> Batch:
        arrays: dict[str, NDArray[Any]] = {
            "pos": np.ascontiguousarray(positions, np.int32),
            "n_seq_id": np.ones(n, np.int32),
            "logits": read.astype(np.int8),
        }
        if tokens is not None:
            arrays["token"] = np.ascontiguousarray(tokens, np.int32)
        if embeddings is not None:
            arrays["embd"] = np.ascontiguousarray(embeddings, np.float32)
        struct = llama_cpp.llama_batch(n_tokens=n)
        types = dict(llama_cpp.llama_batch._fields_)
        for name, array in arrays.items():
            setattr(struct, name, array.ctypes.data_as(types[name]))
        ids = sequences.astype(np.int32)
        one = ctypes.POINTER(ctypes.c_int32)
        addresses = ids.ctypes.data + ids.itemsize * np.arange(n)
        pointers = (one * n)(*(ctypes.cast(int(address), one) for address in addresses))
        struct.seq_id = pointers
        return Batch(struct, (arrays, ids, pointers))


def session_key(job: Job) -> tuple[int, ...]:
    return (*job.image_grid_thw[0].tolist(), len(job.prefix_ids), *job.suffix_ids.shape)


def image_positions(job: Job) -> NDArray[np.bool_]:
    """Which tokens of the prefix are image."""
    found: NDArray[np.bool_] = job.prefix_ids == job.image_token_id
    return found


def last_tokens(job: Job) -> list[int]:
    """Where in the batch of padded questions each of them ends."""
    rows, longest = job.suffix_ids.shape
    ends: list[int] = (np.arange(rows) * longest + job.suffix_lengths - 1).tolist()
    return ends


def pixels(job: Job) -> NDArray[np.uint8]:
    """The image [height, width, 3] that the job's patches were made of."""
    _, height, width = job.image_grid_thw[0].tolist()
    side, merge = int((job.pixel_values.shape[1] // 6) ** 0.5), job.merge_size
    # Rows run over blocks of merged patches and inside them, columns over channel, frame, y and x.
    blocks = (height // merge, width // merge, merge, merge, 3, 2, side, side)
    first_frame = job.pixel_values.reshape(blocks)[:, :, :, :, :, 0]
    image = first_frame.transpose(0, 2, 5, 1, 3, 6, 4).reshape(height * side, width * side, 3)
    values = (image * IMAGE_STD + IMAGE_MEAN) * 255
    whole = np.rint(values)
    if np.abs(values - whole).max() > 0.01:
        raise SystemExit(f"the pixels are not normalized with mean {IMAGE_MEAN} and deviation {IMAGE_STD}")
    return whole.astype(np.uint8)


def image_chunk(tower: Any, image: NDArray[np.uint8]) -> Any:
    """The image in llama.cpp's hands: normalized, and not resized where its sides fit."""
    height, width, _ = image.shape
    data = image.tobytes()
    buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
    bitmap = some(mtmd.mtmd_bitmap_init(width, height, buffer), "no bitmap")
    marker = mtmd.mtmd_default_marker()
    text = mtmd.mtmd_input_text(text=marker, text_len=len(marker), add_special=False, parse_special=True)
    chunks = mtmd.mtmd_input_chunks_init()
    bitmaps = (ctypes.c_void_p * 1)(bitmap)
    if mtmd.mtmd_tokenize(tower, chunks, ctypes.byref(text), bitmaps, 1):
        raise SystemExit("llama.cpp cannot prepare the image")
    mtmd.mtmd_bitmap_free(bitmap)
    for index in range(mtmd.mtmd_input_chunks_size(chunks)):
        chunk = mtmd.mtmd_input_chunks_get(chunks, index)
        if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
            return chunk
    raise SystemExit("llama.cpp makes no image of the image")


def flash_attention(on: bool) -> int:
    return int(llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if on else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED)


def some(handle: Any, otherwise: str) -> Any:
    """A handle of the C library, which is null where its words on stderr say why."""
    if not handle:
        raise SystemExit(f"llama.cpp: {otherwise}, for the reason above")
    return handle


def converted(checkpoint: Path, cache: Path, part: str, weights: str) -> Path:
    """The file in the cache for these weights of this checkpoint, made by these versions."""
    identity = hashlib.sha256((checkpoint / "config.json").read_bytes())
    for file in sorted(checkpoint.glob("*.safetensors")):
        status = file.stat()
        identity.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    identity.update(" ".join(version(name) for name in PACKAGES).encode())
    return cache / f"llamacpp-{identity.hexdigest()[:12]}-{part}-{weights}.gguf"


def convert_text(checkpoint: Path, cache: Path, weights: str, threads: int) -> None:
    """Write the decoder in floats, or quantize that; a file that is there is whole."""
    file = converted(checkpoint, cache, "text", weights)
    if weights not in QUANTIZED:
        write_gguf(text_converter(), checkpoint, file, weights)
        return
    floats = converted(checkpoint, cache, "text", "F32")
    if not floats.exists():
        convert_text(checkpoint, cache, "F32", threads)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = int(gguf.LlamaFileType[FTYPES[weights]]), threads
    unfinished = file.with_suffix(".partial")
    names = str(floats).encode(), str(unfinished).encode()
    if llama_cpp.llama_model_quantize(*names, ctypes.byref(parameters)):
        raise SystemExit(f"llama.cpp cannot quantize {floats}, for the reason above")
    unfinished.rename(file)


def convert_vision(checkpoint: Path, cache: Path, weights: str) -> None:
    write_gguf(vision_converter(), checkpoint, converted(checkpoint, cache, "vision", weights), weights)


def write_gguf(converter: Any, checkpoint: Path, file: Path, weights: str) -> None:
    unfinished = file.with_suffix(".partial")
    converter(checkpoint, gguf.LlamaFileType[FTYPES[weights]], unfinished).write()
    unfinished.rename(file)


def text_converter() -> Any:
    """llama.cpp's converter of the decoder, with the checkpoint's tokens taken as they are.

    Its own way asks for the name of a tokenizer that it knows. Only ids are given to the model, so what text would
    become does not matter.
    """
    from conversion.qwen import Qwen3_5TextModel

    class Decoder(Qwen3_5TextModel):  # type: ignore[misc]
        model_arch = Qwen3_5TextModel.model_arch
        no_mtp = True

        def set_vocab(self) -> None:
            tokenizer = json.loads((self.dir_model / "tokenizer.json").read_text(encoding="utf-8"))
            names = {id_: text for text, id_ in tokenizer["model"]["vocab"].items()}
            names |= {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
            merges = tokenizer["model"]["merges"]
            size = self.hparams["vocab_size"]
            writer = self.gguf_writer
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre("qwen2")
            writer.add_token_list([names.get(id_, f"[PAD{id_}]") for id_ in range(size)])
            kinds = gguf.TokenType.NORMAL, gguf.TokenType.UNUSED
            writer.add_token_types([kinds[id_ not in names] for id_ in range(size)])
            writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])

    return Decoder


def vision_converter() -> Any:
    """llama.cpp's converter of the vision tower, told the normalization that a contract has by default."""
    from conversion.qwen3vl import Qwen3VLVisionModel

    class Tower(Qwen3VLVisionModel):  # type: ignore[misc]
        model_arch = Qwen3VLVisionModel.model_arch

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.preprocessor_config = {"image_mean": [IMAGE_MEAN] * 3, "image_std": [IMAGE_STD] * 3}

    return Tower


if __name__ == "__main__":
    main()
