"""From prompt and contract to token ids and M-RoPE positions, in the three parts that the runtime shares.

    text prefix   system text, all rubrics, the user's prompt, start of the image   one per prompt
    image span    one placeholder per merged patch, end of the image                one per image
    question      names a dimension and opens the answer                            one per dimension

Training, the torch reference and the runtime all take their tokens from here.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from zreward.contract import END_THINK, ScoreContract
from zreward.errors import CheckpointError, ContractError, PromptError

TOKENIZER_FILE = "tokenizer.json"

_MAX_TOKEN_CHARACTERS = 256
"""No token of a Qwen tokenizer is longer; it bounds the text that is worth tokenizing to count tokens."""

Ids = NDArray[np.int64]


def load_tokenizer(directory: Path) -> Tokenizer:
    """The fast tokenizer of a checkpoint or bundle directory, without truncation and padding."""
    path = directory / TOKENIZER_FILE
    if not path.is_file():
        raise CheckpointError(
            f"no tokenizer at {path}; save the model's fast tokenizer there "
            "(`AutoTokenizer.from_pretrained(...).save_pretrained(DIRECTORY)`)"
        )
    try:
        tokenizer: Tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{path}: not a readable tokenizer ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class PromptEncoder:
    """Turns prompts into token ids for one contract and one tokenizer.

    Attributes:
        code_ids: the token id of each bin's code, in bin order.
        image_token_id: the id of the image placeholder.
        question_ids: per dimension, in contract order, the ids of its question (int64 [n]).

    Raises:
        ContractError: a code is not exactly one token of its own, tokens merge across the parts'
            boundaries, or the image placeholder occurs in a text.
    """

    def __init__(self, contract: ScoreContract, tokenizer: Tokenizer) -> None:
        self.contract = contract
        self._tokenizer = tokenizer
        template = contract.template
        # Split first: a rubric may hold the text "{prompt}", and a prompt the text "{system}".
        self._before_prompt, self._after_prompt = (
            part.replace("{system}", contract.system_text) for part in template.before_image.split("{prompt}")
        )
        self.image_token_id = self._single("template.image_token", template.image_token)
        self._after_image_id = self._single("template.after_image", template.after_image)
        self.question_ids = tuple(
            self._ids(template.question.replace("{question}", dimension.question))
            for dimension in contract.dimensions
        )
        self.code_ids = tuple(self._single(f"code of bin {b}", c) for b, c in self._codes())
        self._control_ids = {self.image_token_id, *tokenizer.get_added_tokens_decoder()}
        self._check_codes()
        self._check_boundaries()

    def text_prefix_ids(self, prompt: str) -> Ids:
        """Ids of everything before the image, int64 [n].

        Raises:
            PromptError: the prompt is not text, empty, longer than the contract allows, or contains a
                control token of the chat format.
        """
        self._check_prompt(prompt)
        return self._prefix_ids(prompt.strip())

    @cached_property
    def system_ids(self) -> Ids:
        """Ids of the text in front of the prompt but for its last token, which may merge with a prompt, int64 [n].

        The ids of a prefix begin with them, unless more of the text merges: whoever relies on it has to compare.
        """
        return self._ids(self._before_prompt)[:-1]

    def image_span_ids(self, n_tokens: int) -> Ids:
        """Ids of an image of `n_tokens` merged patches and the token that closes it, int64 [n + 1]."""
        span = np.full(n_tokens + 1, self.image_token_id, dtype=np.int64)
        span[-1] = self._after_image_id
        return span

    def sequence_ids(self, prompt: str, n_tokens: int, dimension: int) -> Ids:
        """The whole sequence that asks about one dimension, int64 [n]: the reference's input."""
        parts = (self.text_prefix_ids(prompt), self.image_span_ids(n_tokens), self.question_ids[dimension])
        return np.concatenate(parts)

    def direct_question_ids(self, dimension: int, hint: str = "") -> Ids:
        """`question_ids` of a dimension with a text after the question, int64 [n]."""
        if not hint:
            return self.question_ids[dimension]
        question = self.contract.dimensions[dimension].question + hint
        return self._ids(self.contract.template.question.replace("{question}", question))

    def answer_id(self, text: str) -> int:
        """The id of an answer other than the contract's codes.

        Raises:
            ContractError: it is not one token.
        """
        return self._single("an answer", text)

    def reasoning_question_ids(self, dimension: int, hint: str = "") -> Ids:
        """Ids of a question whose think block is open, int64 [n]: a trace is sampled from here.

        Args:
            hint: text after the question, for a model that is told something before it reasons.

        Raises:
            ContractError: the contract's template has no think block.
        """
        question = self.contract.dimensions[dimension].question + hint
        return self._ids(self.contract.template.reasoning_question.replace("{question}", question))

    def trace_ids(self, trace: str) -> Ids:
        """Ids of a written trace with what closes it, int64 [n]; the code of an answer follows."""
        return self._ids(trace + END_THINK)

    @cached_property
    def end_of_reasoning_id(self) -> int:
        """The id of the token that ends every trace.

        Raises:
            ContractError: it is not one token of this tokenizer.
        """
        return self._single("the end of a reasoning trace", END_THINK.strip())

    def text_of(self, ids: Ids) -> str:
        """The text of token ids, control tokens included."""
        text: str = self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        return text

    def _codes(self) -> zip[tuple[float, str]]:
        return zip(self.contract.bins, self.contract.codes, strict=True)

    def _prefix_ids(self, prompt: str) -> Ids:
        return self._ids(self._before_prompt + prompt + self._after_prompt)

    def _ids(self, text: str) -> Ids:
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # as above; a vocabulary of whole words without an unknown token
            raise ContractError(
                f"the tokenizer cannot encode the contract's text {text[:40]!r}… ({error}); "
                "use the tokenizer that the model was trained with"
            ) from None
        return np.array(ids, dtype=np.int64)

    def _single(self, what: str, text: str) -> int:
        ids = self._ids(text)
        if len(ids) != 1:
            raise ContractError(
                f"{what}: {text!r} is {len(ids)} tokens of this tokenizer and must be exactly one; "
                "choose other codes in the contract or use the tokenizer that the model was trained with"
            )
        return int(ids[0])

    def _check_codes(self) -> None:
        """Codes of different text can still be one token: by a normalizer, or as the unknown token."""
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        unknown_id = None if unknown is None else self._tokenizer.token_to_id(unknown)
        for code, code_id in zip(self.contract.codes, self.code_ids, strict=True):
            if code_id == unknown_id or self.code_ids.count(code_id) > 1:
                raise ContractError(
                    f"code {code!r} is not a token of its own in this tokenizer (it reads as "
                    f"{self._tokenizer.id_to_token(code_id)!r}); choose other codes in the contract"
                )

    def _check_boundaries(self) -> None:
        """Encoding the parts must equal encoding the whole text, up to and including the answer."""
        contract, template = self.contract, self.contract.template
        prompt = "a red fox in the snow"
        prefix = self._prefix_ids(prompt)
        opening = self._before_prompt + prompt + self._after_prompt
        for dimension, question in zip(contract.dimensions, self.question_ids, strict=True):
            if self.image_token_id in prefix or self.image_token_id in question:
                raise ContractError(
                    f"{template.image_token!r} stands for the image alone; remove it from the contract's "
                    f"instruction, rubrics, template and the question of {dimension.name!r}"
                )
            text = opening + template.image_token + template.after_image
            text += template.question.replace("{question}", dimension.question)
            parts = np.concatenate([prefix, self.image_span_ids(1), question])
            for code, code_id in zip(contract.codes, self.code_ids, strict=True):
                if not np.array_equal(self._ids(text + code), np.append(parts, code_id)):
                    raise ContractError(
                        f"dimension {dimension.name!r}, code {code!r}: tokens merge across the parts of the "
                        "template; let template.before_image end in a special token and template.question "
                        "in a line break"
                    )

    def _check_prompt(self, prompt: object) -> None:
        if not isinstance(prompt, str):
            raise PromptError(f"the prompt must be a string, not {type(prompt).__name__}")
        if not prompt.strip():
            raise PromptError("the prompt is empty; a score needs the text that the image was generated from")
        limit = self.contract.max_prompt_tokens
        if len(prompt) > limit * _MAX_TOKEN_CHARACTERS:
            raise PromptError(
                f"the prompt has {len(prompt):,} characters; the contract allows {limit} tokens, so shorten it"
            )
        try:
            prompt.encode("utf-8")
            ids = self._tokenizer.encode(prompt.strip(), add_special_tokens=False).ids
        except UnicodeEncodeError:
            raise PromptError("the prompt is not valid Unicode text (lone surrogates)") from None
        except Exception as error:
            raise PromptError(f"the tokenizer cannot encode the prompt ({error}); reword it") from None
        if len(ids) > limit:
            raise PromptError(f"the prompt has {len(ids)} tokens; the contract allows {limit}, so shorten it")
        control = next((i for i in ids if i in self._control_ids), None)
        if control is not None:
            token = self._tokenizer.id_to_token(control)
            raise PromptError(f"the prompt contains the control token {token!r}; remove it")


def text_positions(start: int, length: int) -> Ids:
    """M-RoPE positions of `length` text tokens from `start`, int64 [3, length] (time, height, width)."""
    positions = np.arange(start, start + length, dtype=np.int64)
    return np.broadcast_to(positions, (3, length)).copy()


def image_positions(start: int, height: int, width: int) -> tuple[Ids, int]:
    """M-RoPE positions of one image of `height` × `width` merged patches.

    Returns:
        int64 [3, height·width] (time stays at `start`), and the position of the token after the image:
        `start + max(height, width)`, as in transformers' Qwen3_5Model.get_rope_index.
    """
    grid = np.indices((1, height, width), dtype=np.int64).reshape(3, -1) + start
    return grid, start + max(height, width)
