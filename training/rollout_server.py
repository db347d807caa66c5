"""Outputs sampled by a vLLM server: a `Rollout` over HTTP, for models whose weights stay as they are.

A server begins a trace wherever another one ends, and transformers' `generate` waits for the longest of a batch. Only
token ids are taken from it: scores are read by our own forward pass over them, as everywhere. It is sent exact text and
an image of its final size, so that its chat template and its resizing have nothing to do, and an answer is refused
whose prompt is not, id for id, what training runs. Whether the served weights are the checkpoint's, nothing here tells.

The API is vLLM's, as read in its release 0.33.0 (paths below `vllm/`):

    /v1/models                  the names served: entrypoints/serve/engine/protocol.py (ModelList)
    /v1/chat/completions        request and answer: entrypoints/openai/chat_completion/protocol.py
      chat_template             refused unless the server runs with --trust-request-chat-template
                                (renderers/online_renderer.py); one that loops over the parts of a message gets them as
                                they were sent (renderers/hf.py, `_detect_content_format`)
      return_token_ids          since 0.10.2 (pull request 22587): `prompt_token_ids`, with the places that images take,
                                and `token_ids` of each choice with the token that ended it
      logit_bias                clamped to ±100 (sampling_params.py)
      seed                      of the first choice, from which the others count on (v1/engine/parallel_sampling.py)
      temperature, top_p, …     all are sent: their defaults are those of the model's generation_config.json
      mm_processor_kwargs       not sent: refused unless the server runs with --trust-request-mm-kwargs
      logprob_token_ids         not sent: the probabilities of all codes (pull request 43463), of weights without a hash

Qwen3.5 with images is served since 0.17.0 (model_executor/models/registry.py). The server does not know that an output
ends with its answer, since it takes four stop strings at most (envs.py, VLLM_MAX_STOP_STRINGS): the rest is cut here.
"""

from __future__ import annotations

import base64
import io
import json
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image
from transformers import GenerationConfig, Qwen3_5Config

from zreward.checkpoint import Checkpoint
from zreward.errors import BackendError, UsageError
from zreward.image import load_image, resized_size
from zreward.training.model import banned_ids
from zreward.training.rollout import Sampling, trimmed
from zreward.training.sequences import Collator, Row
from zreward.training.traces import TraceReader

_VERBATIM = (
    "{%- for message in messages -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endfor -%}"
)
"""A chat template that adds nothing to the text of a message, where the image has its placeholder already."""


@dataclass(frozen=True)
class Server:
    """Where a model is served, and how patiently it is asked.

    Attributes:
        url: such as http://localhost:8000.
        model: the name that it is served under.
        timeout_s: how long the server may be silent. The outputs of a question come together, after the last one.
        attempts: how often a question is asked while the connection breaks or the server fails (status 5xx).
        pause_s: before the second attempt; doubled before each further one.
        in_flight: questions asked at once, which the server batches.
    """

    url: str
    model: str
    timeout_s: float = 900.0
    attempts: int = 6
    pause_s: float = 1.0
    in_flight: int = 64

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UsageError(f"a server's address looks like http://localhost:8000, not {self.url!r}")
        object.__setattr__(self, "url", self.url.rstrip("/").removesuffix("/v1"))


class ServerRollout:
    """A `Rollout` that a server samples.

    Args:
        collator: makes the prompts that the server has to run.
        ends: ids that end an output, as the checkpoint's generation config has them.
        banned: ids that no output may contain (`zreward.training.model.banned_ids`).
    """

    def __init__(self, server: Server, collator: Collator, ends: list[int], banned: list[int]) -> None:
        self._server, self._collator, self._encoder = server, collator, collator.encoder
        self._ends, self._banned = ends, banned
        self._reader = TraceReader(collator.encoder)
        self._picture = lru_cache(maxsize=64)(self._encoded)  # the questions of an image follow each other
        self._preparing = threading.Lock()

    def __call__(self, questions: Sequence[Row], sampling: Sampling, seed: int) -> list[list[Row]]:
        """Sample a group of outputs for each question.

        Raises:
            BackendError: the server cannot be reached, refuses, or answers with anything but outputs of this prompt.
            ImageError, PromptError, UsageError: a question cannot be asked.
        """
        pool = ThreadPoolExecutor(self._server.in_flight)
        try:
            seeds = np.random.SeedSequence(seed).generate_state(len(questions)).tolist()
            asked = [pool.submit(self._group, *own, sampling) for own in zip(questions, seeds, strict=True)]
            for future in wait(asked, return_when=FIRST_EXCEPTION).done:
                future.result()  # raises what went wrong, while others are still under way
            return [future.result() for future in asked]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _group(self, question: Row, seed: int, sampling: Sampling) -> list[Row]:
        """The outputs of one question."""
        with self._preparing:  # one at a time: a batch has all the pixels of its image
            prompt = self._collator.batch([replace(question, output=())]).joined_ids[0].numpy()
            picture = self._picture(question.image)
        places = np.flatnonzero(prompt == self._encoder.image_token_id)
        if places[-1] - places[0] + 1 != len(places):
            raise UsageError("a server is asked about one image at a time")
        parts: list[dict[str, Any]] = [
            {"type": "text", "text": self._encoder.text_of(prompt[: places[0] + 1])},
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": self._encoder.text_of(prompt[places[-1] + 1 :])},
        ]
        answer = ask(self._server, "/v1/chat/completions", self._request(parts, seed, sampling))
        self._check_prompt(_ids(answer, "prompt_token_ids", self._server), prompt.tolist())
        return [replace(question, output=output) for output in self._outputs(answer, sampling.group_size)]

    def _request(self, parts: list[dict[str, Any]], seed: int, sampling: Sampling) -> dict[str, Any]:
        return {
            "model": self._server.model,
            "messages": [{"role": "user", "content": parts}],
            "chat_template": _VERBATIM,
            "return_token_ids": True,
            "n": sampling.group_size,
            "seed": seed,
            "max_completion_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logit_bias": {str(token): -100.0 for token in self._banned},
            "stop_token_ids": self._ends,
        }

    def _check_prompt(self, found: list[int], expected: list[int]) -> None:
        """The server ran the very prompt that training runs."""
        if found == expected:
            return
        url, image, spec = self._server.url, self._encoder.image_token_id, self._collator.contract.image
        if found.count(image) != expected.count(image):
            size = json.dumps({"size": {"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels}})
            raise BackendError(
                f"{url} makes {found.count(image)} tokens of an image, and the contract {expected.count(image)}; "
                f"start the server with --mm-processor-kwargs '{size}'"
            )
        pairs = enumerate(zip(found, expected, strict=False))
        place = next((i for i, (theirs, ours) in pairs if theirs != ours), min(len(found), len(expected)))
        theirs, ours = (self._named(ids[place : place + 1]) for ids in (found, expected))
        raise BackendError(
            f"{url} ran another prompt: its token {place} is {theirs}, and the contract's is {ours}; serve the "
            "checkpoint with its own tokenizer, and without --chat-template-content-format, which changes the text"
        )

    def _named(self, ids: list[int]) -> str:
        return f"{ids[0]} ({self._encoder.text_of(np.array(ids, dtype=np.int64))!r})" if ids else "missing"

    def _outputs(self, answer: dict[str, Any], count: int) -> list[tuple[int, ...]]:
        """The outputs of an answer, each up to its score or its end."""
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != count:
            came = len(choices) if isinstance(choices, list) else "none"
            raise BackendError(f"{self._server.url}: {count} outputs were asked for, and {came} came")
        outputs = [_ids(choice, "token_ids", self._server) for choice in choices]
        if broken := {choice.get("finish_reason") for choice in choices} - {"stop", "length"}:
            raise BackendError(
                f"{self._server.url} broke outputs off, by {broken}; see its log, and run again"
            )
        if banned := set().union(*outputs) & set(self._banned):
            raise BackendError(
                f"{self._server.url}: outputs hold {banned}, which stand for images and which logit_bias forbids; "
                "take another version of vLLM"
            )
        return [trimmed(output, self._reader, self._ends) for output in outputs]

    def _encoded(self, path: Path) -> str:
        """An image in its final size as a data URL."""
        rgb = load_image(path)
        height, width = resized_size(rgb.height, rgb.width, self._collator.contract.image)
        file = io.BytesIO()
        rgb.resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG", compress_level=1)
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def check_served(server: Server) -> None:
    """Refuse a server that does not know the model, before anything is loaded for it.

    Raises:
        BackendError: it cannot be reached, or serves other names.
    """
    listed = ask(server, "/v1/models").get("data")
    names = [card.get("id") for card in listed if isinstance(card, dict)] if isinstance(listed, list) else []
    if server.model not in names:
        raise BackendError(
            f"{server.url} serves {', '.join(map(repr, names)) or 'nothing'}, and not {server.model!r}; name what it "
            "serves (served_model), or start it with --served-model-name"
        )


def server_rollout(server: Server, checkpoint: Checkpoint, collator: Collator) -> ServerRollout:
    """A rollout of a checkpoint that a server has loaded; no weight is read here."""
    config = Qwen3_5Config.from_pretrained(checkpoint.path)
    try:
        generation = GenerationConfig.from_pretrained(checkpoint.path)
    except OSError:  # there is none: the model's own config then says what ends a text
        generation = GenerationConfig.from_model_config(config)
    end = generation.eos_token_id
    ends = [end] if isinstance(end, int) else list(end or ())
    return ServerRollout(server, collator, ends=ends, banned=banned_ids(SimpleNamespace(config=config)))


def ask(server: Server, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """One question over HTTP, asked again while the connection breaks or the server fails.

    The key of a server that wants one is read from VLLM_API_KEY, as vLLM itself does.

    Raises:
        BackendError: no attempt succeeded, the server refuses or is silent for too long, or this is no JSON.
    """
    key = os.environ.get("VLLM_API_KEY")
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = Request(server.url + path, None if body is None else json.dumps(body).encode(), headers)
    fault = ""
    for attempt in range(server.attempts):
        time.sleep(server.pause_s * 2 ** (attempt - 1) if attempt else 0)
        try:
            with urlopen(request, timeout=server.timeout_s) as response:
                return _parsed(server, response.read())
        except HTTPError as error:
            fault = f"status {error.code}: {_message(error)}"
            if error.code < 500:
                raise BackendError(f"{server.url}{path} refuses, with {fault}") from None
        except (OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, URLError) else error
            fault = f"{type(reason).__name__}: {reason}"
            if isinstance(reason, TimeoutError):
                raise BackendError(
                    f"{server.url} said nothing for {server.timeout_s:g} s; lower sampling.max_new_tokens or "
                    "group_size, or see the server's log"
                ) from None
    raise BackendError(
        f"{server.url} gave no answer in {server.attempts} attempts ({fault}); see that the server runs, and run again"
    )


def _parsed(server: Server, content: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(content)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise BackendError(
            f"{server.url} answered {content[:60]!r}, which is no object of JSON; is this the address of a vLLM server?"
        )
    return answer


def _message(error: HTTPError) -> str:
    """What the body of an error says: vLLM's `error.message`, or its beginning."""
    try:
        content = error.read()
        return str(json.loads(content)["error"]["message"])
    except (OSError, HTTPException):
        return "a message that broke off"
    except (ValueError, KeyError, TypeError):
        return content[:200].decode("utf-8", errors="replace").strip()


def _ids(holder: Any, name: str, server: Server) -> list[int]:
    ids = holder.get(name) if isinstance(holder, dict) else None
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise BackendError(f"{server.url}: the answer has no {name}; take vLLM 0.17 or newer")
    return ids
