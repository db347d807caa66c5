"""The score contract: what a reward model is asked, and how its answer is read.

One `ScoreContract` drives training, distillation, evaluation, export and runtime. It is data (JSON
beside the weights, copied into every bundle, identified by its hash), so no other module knows a bin
value, a code, a prompt string or an image limit. Token ids are not part of it: they are resolved from
the codes by the tokenizer that the contract is used with (`zreward.prompt`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from zreward.errors import ContractError
from zreward.image import ImageSpec
from zreward.jsonfile import dataclass_from_json, read_json_object, write_json

CONTRACT_FILE = "contract.json"
CONTRACT_VERSION = 1

DEFAULT_BINS = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)
THINK, END_THINK = "<think>\n", "\n</think>\n\n"
"""What opens and closes a reasoning trace in the chat format of Qwen; with nothing between them, thinking is off."""

DEFAULT_CODES = ("1", "2", "3", "4", "5", "6", "7", "8", "9")


@dataclass(frozen=True)
class Dimension:
    """One rubric dimension.

    Attributes:
        name: key of the dimension in every result, a lower-case identifier.
        title: its name for people, also the heading of its rubric.
        rubric: what each level means; part of the system text.
        question: the short user text that asks for this dimension's code.
        temperature: the score logits are divided by it before the softmax (> 0).
    """

    name: str
    title: str
    rubric: str
    question: str
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name != self.name.lower():
            raise ContractError(
                f"dimension name {self.name!r} must be a lower-case identifier, such as 'realism'"
            )
        where = f"dimension {self.name!r}: temperature"
        object.__setattr__(self, "temperature", _finite_float(where, self.temperature))
        if self.temperature <= 0:
            raise ContractError(f"{where} must be > 0, not {self.temperature!r}")
        if not self.question.strip():
            raise ContractError(f"dimension {self.name!r}: the question is empty")


@dataclass(frozen=True)
class ChatTemplate:
    """The chat text around instruction, prompt, image and question.

    The sequence is `before_image` + `image_token` × n + `after_image` + `question`. Everything before
    `question` is shared by all dimensions of an image, and everything before the image by all
    candidates of a prompt. The default is the chat format of Qwen3.5 with thinking off: the answer
    starts after an empty think block.

    Attributes:
        before_image: text with the fields {system} and {prompt}; must end in a special token, so that
            tokens never merge across the boundary.
        image_token: the placeholder that stands once for each merged image patch.
        after_image: the special token that closes the image.
        question: text with the field {question}; what follows it is the model's answer.
    """

    before_image: str = (
        "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nPrompt: {prompt}\n<|vision_start|>"
    )
    image_token: str = "<|image_pad|>"
    after_image: str = "<|vision_end|>"
    question: str = "{question}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

    def __post_init__(self) -> None:
        _expect_fields("template.before_image", self.before_image, ("{system}", "{prompt}"))
        _expect_fields("template.question", self.question, ("{question}",))
        if not self.image_token:
            raise ContractError("template.image_token is empty")

    @property
    def reasoning_question(self) -> str:
        """`question` with its empty think block left open: a reasoning trace follows it.

        After the trace come `END_THINK` and the answer, as after `question` itself.

        Raises:
            ContractError: the question does not end in an empty think block, so nothing says where a trace would go.
        """
        empty = THINK + END_THINK
        if not self.question.endswith(empty):
            raise ContractError(
                f"template.question must end in an empty think block ({empty!r}) for a model that reasons before it "
                f"answers; it is {self.question!r}"
            )
        return self.question.removesuffix(END_THINK)


@dataclass(frozen=True)
class DriftLimits:
    """How far quantization may move the scores: an export refuses to write a bundle that exceeds a limit.

    The limits hold for every dimension and for the overall score, on a held-out set, against the model that
    was not quantized (`zreward.quant.report` defines each figure). The defaults are meant for a scale from 1 to
    5. Weights of 4 or 8 bits meet them; 8-bit products with one activation scale per tensor, which reverse
    4.3 % of the pairs of a small student (mean |Δμ| 0.070), do not.

    Attributes:
        mean_abs_difference: mean |Δμ|, in score points (> 0).
        p99_abs_difference: 99th percentile of |Δμ|, in score points (> 0).
        pair_flips: share of the same-prompt pairs that change their order (> 0, at most 1).
        mean_kl: mean KL(before ‖ after) of the score distributions, in nats (> 0).
    """

    mean_abs_difference: float = 0.03
    p99_abs_difference: float = 0.4
    pair_flips: float = 0.02
    mean_kl: float = 0.03

    def __post_init__(self) -> None:
        for limit in dataclasses.fields(self):
            where = f"drift.{limit.name}"
            value = _finite_float(where, getattr(self, limit.name))
            object.__setattr__(self, limit.name, value)
            if value <= 0:
                raise ContractError(f"{where} must be > 0, not {value!r}")
        if self.pair_flips > 1:
            raise ContractError(f"drift.pair_flips is a share and at most 1, not {self.pair_flips!r}")


def _finite_float(where: str, value: object) -> float:
    """`value` as a float, so that 1 and 1.0, or 0.0 and −0.0, are one contract with one hash."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ContractError(f"{where} must be a finite number, not {value!r}")
    return float(value) + 0.0


def _expect_fields(where: str, text: str, fields: tuple[str, ...]) -> None:
    for name in fields:
        if text.count(name) != 1:
            raise ContractError(f"{where} must contain {name} exactly once: {text!r}")


@dataclass(frozen=True)
class ScoreContract:
    """What is asked of a reward model and how the answer is read.

    Attributes:
        name: a label for people.
        bins: the score values, strictly increasing.
        codes: one answer text per bin; each must be exactly one token of the model's tokenizer.
        dimensions: the rubric dimensions, in the order of every result.
        instruction: the opening of the system text; the rubrics follow it.
        template: the chat text around them.
        image: the image budget, patching and normalization.
        max_prompt_tokens: longer prompts are refused, never cut.
        drift: how far quantization may move the scores.

    Raises:
        ContractError: where a field is missing, unknown, of the wrong type or inconsistent.
    """

    name: str
    bins: tuple[float, ...]
    codes: tuple[str, ...]
    dimensions: tuple[Dimension, ...]
    instruction: str
    template: ChatTemplate = field(default_factory=ChatTemplate)
    image: ImageSpec = field(default_factory=ImageSpec)
    max_prompt_tokens: int = 1024
    drift: DriftLimits = field(default_factory=DriftLimits)

    def __post_init__(self) -> None:
        if self.max_prompt_tokens < 1:
            raise ContractError(f"max_prompt_tokens must be at least 1, not {self.max_prompt_tokens}")
        object.__setattr__(self, "bins", tuple(_finite_float("each bin", b) for b in self.bins))
        object.__setattr__(self, "codes", tuple(self.codes))
        object.__setattr__(self, "dimensions", tuple(self.dimensions))
        if len(self.bins) < 2 or any(b >= c for b, c in zip(self.bins, self.bins[1:], strict=False)):
            raise ContractError(f"bins must be at least two strictly increasing numbers, not {self.bins}")
        if len(self.codes) != len(self.bins):
            raise ContractError(f"{len(self.codes)} codes for {len(self.bins)} bins: one code per bin")
        if not all(isinstance(code, str) and code for code in self.codes):
            raise ContractError(f"codes must be texts that are not empty: {self.codes}")
        if len(set(self.codes)) != len(self.codes):
            raise ContractError(f"codes must be distinct: {self.codes}")
        names = self.dimension_names
        if not names or len(set(names)) != len(names):
            raise ContractError(f"dimensions must be at least one, with distinct names: {names}")
        try:
            self._canonical_json()
        except UnicodeEncodeError as error:
            raise ContractError(f"a text of the contract is not valid Unicode ({error.reason})") from None

    @staticmethod
    def default(image: ImageSpec | None = None) -> ScoreContract:
        """The Z-Reward contract: four dimensions, nine half-point bins, digits as codes."""
        from zreward.rubrics import INSTRUCTION, RUBRICS

        return ScoreContract(
            name="zreward-default",
            bins=DEFAULT_BINS,
            codes=DEFAULT_CODES,
            dimensions=RUBRICS,
            instruction=INSTRUCTION,
            image=image or ImageSpec(),
        )

    @property
    def dimension_names(self) -> tuple[str, ...]:
        return tuple(dimension.name for dimension in self.dimensions)

    @property
    def temperatures(self) -> tuple[float, ...]:
        return tuple(dimension.temperature for dimension in self.dimensions)

    def with_temperatures(self, values: Sequence[float]) -> ScoreContract:
        """The same contract with one temperature per dimension, in order.

        Raises:
            ContractError: their number is another one, or one is not a positive number.
        """
        if len(values) != len(self.dimensions):
            raise ContractError(f"{len(values)} temperatures for {len(self.dimensions)} dimensions")
        dimensions = tuple(
            dataclasses.replace(dimension, temperature=value)
            for dimension, value in zip(self.dimensions, values, strict=True)
        )
        return dataclasses.replace(self, dimensions=dimensions)

    @property
    def system_text(self) -> str:
        """The instruction followed by every dimension's title and rubric."""
        rubrics = [f"{dimension.title}\n{dimension.rubric}" for dimension in self.dimensions]
        return "\n\n".join([self.instruction, *rubrics])

    @property
    def sha256(self) -> str:
        """Hex digest of the canonical JSON (sorted keys, no white space, UTF-8)."""
        return hashlib.sha256(self._canonical_json()).hexdigest()

    def _canonical_json(self) -> bytes:
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return text.encode("utf-8")

    def dimension(self, name: str) -> Dimension:
        for dimension in self.dimensions:
            if dimension.name == name:
                return dimension
        raise ContractError(f"no dimension {name!r}; this contract has {', '.join(self.dimension_names)}")

    def to_dict(self) -> dict[str, Any]:
        return {"schema": "zreward.contract", "version": CONTRACT_VERSION, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(data: object, *, where: str = "contract") -> ScoreContract:
        """Read the JSON form strictly: unknown, missing and mistyped fields are errors."""
        if not isinstance(data, Mapping):
            raise ContractError(f"{where}: expected an object, found {type(data).__name__}")
        data = dict(data)
        schema, version = data.pop("schema", None), data.pop("version", None)
        if schema != "zreward.contract":
            raise ContractError(f"{where}: not a score contract (schema is {schema!r})")
        if type(version) is not int or version != CONTRACT_VERSION:
            raise ContractError(
                f"{where}: contract version {version!r} is not supported; this zreward reads version "
                f"{CONTRACT_VERSION}, so upgrade zreward or write the contract again"
            )
        return dataclass_from_json(ScoreContract, data, where, ContractError)

    def save(self, directory: Path) -> Path:
        """Write `contract.json` into `directory`, replacing it in one step."""
        path = directory / CONTRACT_FILE
        write_json(path, self.to_dict())
        return path

    @staticmethod
    def load(path: Path) -> ScoreContract:
        """Read a contract file, or the `contract.json` of a directory."""
        if path.is_dir():
            path = path / CONTRACT_FILE
        if not path.is_file():
            raise ContractError(
                f"no score contract at {path}; write the default one with `zreward contract CHECKPOINT`"
            )
        return ScoreContract.from_dict(read_json_object(path, ContractError), where=str(path))
