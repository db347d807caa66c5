"""The gold standard: transformers' own forward pass of a checkpoint, one full pass per dimension.

Slow and plain on purpose. Every parity figure compares with this. It shares the contract, the tokens and
the pixels with the runtime, and nothing else: positions, attention masks and the language head are
transformers'. The only module of the core that imports torch.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Qwen3_5ForConditionalGeneration
from transformers.utils import logging as transformers_logging

from zreward.checkpoint import Checkpoint
from zreward.contract import ScoreContract
from zreward.image import ImageInput, preprocess
from zreward.prompt import PromptEncoder, load_tokenizer


class ReferenceModel:
    """A checkpoint run by transformers in float32 on the CPU.

    Args:
        path: the checkpoint directory, with tokenizer and contract.
        contract: another contract than the one beside the weights.
    """

    def __init__(self, path: str | Path, contract: ScoreContract | None = None) -> None:
        checkpoint = Checkpoint.open(path)
        self.contract = contract or checkpoint.contract()
        self.encoder = PromptEncoder(self.contract, load_tokenizer(checkpoint.path))
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()  # it warns that its DeltaNet is slow here; it is
        model = Qwen3_5ForConditionalGeneration.from_pretrained(
            checkpoint.path, dtype=torch.float32, attn_implementation="sdpa"
        )
        self.model = model.eval()

    def __enter__(self) -> ReferenceModel:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        del self.model

    def probabilities(self, prompt: str, image: ImageInput) -> NDArray[np.float64]:
        """Bin probabilities of every dimension by full forward passes, float64 [dimensions, bins]."""
        patches = preprocess(image, self.contract.image)
        rows = [
            self._one_pass(prompt, patches.pixel_values, patches.grid_thw, patches.n_tokens, index)
            for index in range(len(self.contract.dimensions))
        ]
        return np.stack(rows)

    @torch.inference_mode()
    def _one_pass(
        self,
        prompt: str,
        pixel_values: NDArray[np.float32],
        grid_thw: tuple[int, int, int],
        n_tokens: int,
        dimension: int,
    ) -> NDArray[np.float64]:
        ids = torch.from_numpy(self.encoder.sequence_ids(prompt, n_tokens, dimension))[None]
        logits = self.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == self.encoder.image_token_id).int(),
            pixel_values=torch.from_numpy(pixel_values),
            image_grid_thw=torch.tensor([grid_thw]),
            use_cache=False,
            logits_to_keep=1,
        ).logits[0, -1]
        codes = logits[list(self.encoder.code_ids)].double()
        temperature = self.contract.dimensions[dimension].temperature
        probabilities: NDArray[np.float64] = torch.softmax(codes / temperature, dim=0).numpy()
        return probabilities
