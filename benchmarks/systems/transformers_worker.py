"""transformers in float32, one full forward pass per question: what people do without a runtime of their own.

The environment is this project's with the extras `cpu` and `export`:

    pip install -e '.[cpu,export]' -c constraints.txt

Settings: `torch.inference_mode`, SDPA attention, no cache, logits of the last position only. Its Gated DeltaNet runs
as a loop over chunks in torch, because the packages with fused kernels are for CUDA.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3_5ForConditionalGeneration
from transformers.utils import logging as transformers_logging
from worker import Floats, Job, Loaded, Parts, serve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    packages = ("transformers", "torch", "numpy")
    serve("transformers", packages, lambda: load(arguments.checkpoint, arguments.threads))


def load(checkpoint: Path, threads: int) -> Loaded:
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # it warns that its DeltaNet is slow here; it is
    model = Qwen3_5ForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()

    def run(job: Job, parts: Parts) -> Floats:
        with parts.timed("passes"):
            logits = [one_pass(model, job, index) for index in range(job.n_questions)]
        return job.probabilities(np.stack(logits))

    settings = {"dtype": "float32", "attention": "sdpa", "passes": "one per question", "threads": threads}
    return Loaded(run, settings)


@torch.inference_mode()
def one_pass(model: Qwen3_5ForConditionalGeneration, job: Job, index: int) -> Floats:
    """Logits of the codes, [bins]."""
    ids = torch.from_numpy(np.concatenate([job.prefix_ids, job.question_ids(index)]))[None]
    logits = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == job.image_token_id).int(),
        pixel_values=torch.from_numpy(job.pixel_values),
        image_grid_thw=torch.from_numpy(job.image_grid_thw),
        use_cache=False,
        logits_to_keep=1,
    ).logits[0, -1]
    codes: Floats = logits[torch.from_numpy(job.code_ids)].numpy()
    return codes


if __name__ == "__main__":
    main()
