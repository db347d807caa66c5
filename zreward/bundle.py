"""The bundle: a directory that holds an exported reward model and proves itself.

    manifest.json         what the bundle is, and the size and sha256 of every other file
    contract.json         the score contract
    tokenizer.json        the fast tokenizer
    vision.onnx[.data]    pixels of one image -> image features
    decoder.onnx[.data]   embeddings and states -> states, score distributions
    embedding.bin         token embedding, raw rows, memory-mapped by the runtime
    golden.json, golden/  inputs with the scores they must give

docs/bundle.md documents every field; assets/schemas/manifest.schema.json is the JSON Schema. Opening a
bundle checks structure, sizes, the hashes of small files and where the graphs read their weights from;
`check_files` hashes everything; `zreward.runtime.verify` also replays the golden inputs.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from zreward.contract import CONTRACT_FILE, ScoreContract
from zreward.errors import BundleError, ContractError
from zreward.hashing import file_sha256
from zreward.jsonfile import dataclass_from_json, read_json_object, write_json
from zreward.onnx_locations import external_locations
from zreward.prompt import TOKENIZER_FILE

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1
GOLDEN_FILE = "golden.json"

EMBEDDING_DTYPES = ("float32", "float16", "bfloat16")
STATE_DTYPES = ("float32", "float16")
STATE_AXES = ("batch", "state_batch", "past")
NARROW_TARGETS = ("cuda", "tensorrt")
"""Targets whose graphs compute in the type that weights are stored in; those of the others compute in float32."""

_HASH_ON_OPEN_BYTES = 32 * 1024 * 1024  # includes the tokenizer of a vocabulary of 250,000
# Nothing absolute, no "..", no hidden file, no character that a file system or runtime gives a meaning.
_FILE_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and sha256 (hex) of one file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class ModelInfo:
    """What was exported: `architecture` is the config's model_type, `parameters` counts the checkpoint's."""

    architecture: str
    parameters: int
    hidden_size: int


@dataclass(frozen=True)
class EmbeddingInfo:
    """The token embedding: raw little-endian rows; shape is (vocabulary, hidden)."""

    file: str
    dtype: str
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        if self.dtype not in EMBEDDING_DTYPES:
            raise BundleError(f"embedding dtype {self.dtype!r} is none of {', '.join(EMBEDDING_DTYPES)}")
        if min(self.shape) < 1:
            raise BundleError(f"embedding shape must be positive, not {self.shape}")


@dataclass(frozen=True)
class StateInfo:
    """One recurrent input of the decoder and the output that continues it.

    `shape` has integers and the names "batch", "state_batch" and "past" (positions so far, zero at the start). A batch
    of states named "state_batch" may be smaller than the batch of tokens: each state then serves as many consecutive
    rows as it takes.
    """

    input: str
    output: str
    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        if self.dtype not in STATE_DTYPES:
            raise BundleError(
                f"state {self.input!r}: dtype {self.dtype!r} is none of {', '.join(STATE_DTYPES)}"
            )
        if any(d not in STATE_AXES if isinstance(d, str) else d < 1 for d in self.shape):
            names = ", ".join(map(repr, STATE_AXES))
            raise BundleError(
                f"state {self.input!r}: shape {self.shape} must hold positive integers and {names}"
            )

    def sizes(self, *, rows: int, past: int) -> tuple[int, ...]:
        """The shape of `rows` states after `past` tokens."""
        named = {"batch": rows, "state_batch": rows, "past": past}
        return tuple(named[axis] if isinstance(axis, str) else axis for axis in self.shape)

    def n_bytes(self, *, rows: int, past: int) -> int:
        """What so many states take."""
        return math.prod(self.sizes(rows=rows, past=past)) * int(self.dtype.removeprefix("float")) // 8


@dataclass(frozen=True)
class GoldenInfo:
    """Replaying the golden inputs must give every bin probability within `tolerance`."""

    file: str
    tolerance: float


@dataclass(frozen=True)
class ParityInfo:
    """Bin probabilities of the bundle against transformers' full passes, at export.

    Attributes:
        max_difference: largest absolute difference of a bin probability.
        max_mean_difference: largest absolute difference of a score.
        n_images: how many images, each with all dimensions.
    """

    max_difference: float
    max_mean_difference: float
    n_images: int


@dataclass(frozen=True)
class GraphWork:
    """Multiply-adds of one graph; a row is a patch of the vision tower or a token of the decoder.

    Attributes:
        integer_per_row: of linear layers in whole numbers of 8 bits.
        float_per_row: of linear layers in floats.
        recurrent_per_row: of DeltaNet states and their convolutions, in floats.
        attention_per_pair: of attention layers, for one row that looks at one row; in floats.
        rounded_attention_per_pair: of those that may round their factors to bfloat16.
        integer_per_sequence: of what only the score head reads: linear layers in whole numbers of 8 bits,
        float_per_sequence: and in floats, the head included.
    """

    integer_per_row: int
    float_per_row: int
    recurrent_per_row: int
    attention_per_pair: int
    rounded_attention_per_pair: int
    integer_per_sequence: int
    float_per_sequence: int

    def __post_init__(self) -> None:
        negative = [name for name, value in dataclasses.asdict(self).items() if value < 0]
        if negative:
            raise BundleError(f"{negative[0]} is negative")


@dataclass(frozen=True)
class Work:
    """What the graphs multiply, see `GraphWork`: the bound of what can be measured."""

    vision: GraphWork
    decoder: GraphWork


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json; docs/bundle.md explains each field."""

    target: str
    weights: str
    contract_sha256: str
    model: ModelInfo
    graphs: Mapping[str, str]
    embedding: EmbeddingInfo
    states: tuple[StateInfo, ...]
    golden: GoldenInfo
    label_mass: bool
    versions: Mapping[str, str]
    files: Mapping[str, FileEntry]
    parity: ParityInfo | None = None
    quantization: Mapping[str, Any] | None = None
    work: Work | None = None

    def __post_init__(self) -> None:
        if set(self.graphs) != {"vision", "decoder"}:
            raise BundleError(f"graphs must name 'vision' and 'decoder', found {sorted(self.graphs)}")
        for name in self.graphs.values():
            if not name.endswith(".onnx"):  # a runtime may read another format by its suffix, unchecked
                raise BundleError(f"graph {name!r} is not named .onnx")
        if self.embedding.shape[1] != self.model.hidden_size:
            raise BundleError(
                f"embedding rows of {self.embedding.shape[1]} do not fit hidden_size {self.model.hidden_size}"
            )
        if not self.states:
            raise BundleError("states are empty; a decoder has at least one")
        if not math.isfinite(self.golden.tolerance) or self.golden.tolerance <= 0:
            raise BundleError(f"golden tolerance must be a positive number, not {self.golden.tolerance}")
        for name in self.files:
            _check_name(name)
        named = [*self.graphs.values(), self.embedding.file, self.golden.file, CONTRACT_FILE, TOKENIZER_FILE]
        for name in named:
            if name not in self.files:
                raise BundleError(f"file {name!r} is used but not listed under files")

    def to_dict(self) -> dict[str, Any]:
        return {"schema": "zreward.bundle", "version": MANIFEST_VERSION, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(data: object, where: str) -> Manifest:
        if not isinstance(data, Mapping):
            raise BundleError(f"{where}: expected an object, found {type(data).__name__}")
        data = dict(data)
        schema, version = data.pop("schema", None), data.pop("version", None)
        if schema != "zreward.bundle":
            raise BundleError(f"{where}: not a zreward bundle (schema is {schema!r})")
        if type(version) is not int or version != MANIFEST_VERSION:
            raise BundleError(
                f"{where}: bundle version {version!r} is not supported; this zreward reads version "
                f"{MANIFEST_VERSION}, so upgrade zreward or export the checkpoint again"
            )
        return dataclass_from_json(Manifest, data, where, BundleError)


@dataclass(frozen=True)
class GoldenItem:
    """One golden input: a prompt, an image file of the bundle, and probabilities [bins] by dimension."""

    prompt: str
    image: str
    probs: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Attributes:
        path: the directory.
        manifest: its parsed manifest.
        contract: its score contract, whose hash the manifest confirms.
        sha256: hex digest of manifest.json, which identifies the bundle and all its content.
    """

    path: Path
    manifest: Manifest
    contract: ScoreContract
    sha256: str

    @staticmethod
    def open(path: str | Path) -> Bundle:
        """Open and check a bundle directory.

        Raises:
            BundleError: not a bundle, an unsupported version, a missing or altered file, or a graph
                that reads outside the directory.
        """
        path = Path(path)
        manifest_path = path / MANIFEST_FILE
        if not path.is_dir() or not manifest_path.is_file():
            raise BundleError(
                f"{path}: not a bundle (no {MANIFEST_FILE}); make one with `zreward export CHECKPOINT -o {path}`"
            )
        manifest = Manifest.from_dict(read_json_object(manifest_path, BundleError), str(manifest_path))
        for name, entry in manifest.files.items():
            _check_file(path, name, entry, with_hash=entry.bytes <= _HASH_ON_OPEN_BYTES)
        for graph in manifest.graphs.values():
            _check_locations(path, graph, manifest)
        try:
            contract = ScoreContract.load(path)
        except ContractError as error:
            raise BundleError(str(error)) from None
        if contract.sha256 != manifest.contract_sha256:
            raise BundleError(
                f"{path}: {CONTRACT_FILE} is not the contract that the manifest was written for"
            )
        return Bundle(path, manifest, contract, file_sha256(manifest_path))

    def golden_items(self) -> tuple[GoldenItem, ...]:
        """The golden inputs and their probabilities, checked to be distributions of this contract."""
        path = self.path / self.manifest.golden.file
        data = read_json_object(path, BundleError)
        items = data.get("items")
        if set(data) != {"items"} or not isinstance(items, list) or not items:
            raise BundleError(f"{path}: expected the key 'items' alone, with at least one golden item")
        parsed = tuple(
            dataclass_from_json(GoldenItem, item, f"{path}: items[{index}]", BundleError)
            for index, item in enumerate(items)
        )
        for index, item in enumerate(parsed):
            self._check_golden(item, f"{path}: items[{index}]")
        return parsed

    def _check_golden(self, item: GoldenItem, where: str) -> None:
        if item.image not in self.manifest.files:
            raise BundleError(f"{where}: image {item.image!r} is not a file of the bundle")
        if tuple(item.probs) != self.contract.dimension_names:
            raise BundleError(f"{where}: dimensions {list(item.probs)} are not the contract's")
        for name, probs in item.probs.items():
            total = sum(probs)
            if len(probs) != len(self.contract.bins) or min(probs) < 0 or not abs(total - 1) < 1e-3:
                raise BundleError(f"{where}: {name} is not a distribution over the contract's bins")


def check_files(bundle: Bundle) -> None:
    """Hash every file of the bundle.

    Raises:
        BundleError: a file is missing, of another size, or altered.
    """
    for name, entry in bundle.manifest.files.items():
        _check_file(bundle.path, name, entry, with_hash=True)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write `manifest` into the bundle directory `path`."""
    write_json(path / MANIFEST_FILE, manifest.to_dict())


def file_entries(path: Path) -> dict[str, FileEntry]:
    """Size and hash of every file under `path` except the manifest, by POSIX path relative to it."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != MANIFEST_FILE)
    return {p.relative_to(path).as_posix(): FileEntry(p.stat().st_size, file_sha256(p)) for p in files}


def _check_name(name: str) -> None:
    if not _FILE_NAME.fullmatch(name):
        raise BundleError(
            f"file name {name!r} is refused: names in a bundle are relative paths of ASCII letters, digits "
            "and ._- that do not leave it"
        )


def _check_file(path: Path, name: str, entry: FileEntry, *, with_hash: bool) -> None:
    try:
        _check_content(path, name, entry, with_hash=with_hash)
    except OSError as error:  # no permission, a name too long, a failing disk
        raise BundleError(f"{path}: file {name!r} cannot be read ({error.strerror})") from None


def _check_content(path: Path, name: str, entry: FileEntry, *, with_hash: bool) -> None:
    file = path / name
    if not file.is_file():
        raise BundleError(f"{path}: file {name!r} is missing; copy the whole bundle again")
    if not file.resolve().is_relative_to(path.resolve()):
        raise BundleError(f"{path}: file {name!r} is a link that leaves the bundle")
    size = file.stat().st_size
    if size != entry.bytes:
        raise BundleError(
            f"{path}: file {name!r} has {size:,} bytes and should have {entry.bytes:,}; "
            "it was altered or cut short, so copy the bundle again"
        )
    if with_hash and file_sha256(file) != entry.sha256:
        raise BundleError(f"{path}: file {name!r} was altered (its sha256 differs); copy the bundle again")


def _check_locations(path: Path, graph: str, manifest: Manifest) -> None:
    for location in external_locations(path / graph):
        _check_name(location)
        if (PurePosixPath(graph).parent / location).as_posix() not in manifest.files:
            raise BundleError(f"{path}: {graph} reads its weights from {location!r}, which is not listed")
