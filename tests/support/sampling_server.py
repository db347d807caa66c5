"""A server that samples, as vLLM documents its API, for tests; and ways in which it can fail.

It renders the request's template, tokenizes, gives the image as many placeholders as its own limits say, samples with
the model that it is given, and goes on after the answer, as vLLM would. It has never been compared with vLLM itself.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.utils.chat_template_utils import _compile_jinja_template

from zreward.training.model import RewardModel
from zreward.training.rollout import Sampling, sample_outputs
from zreward.training.sequences import Row

NAME = "reasoner"
FIELDS = {
    *("model", "messages", "chat_template", "return_token_ids", "n", "seed", "max_completion_tokens"),
    *(
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    ),
    *("logit_bias", "stop_token_ids"),
}
"""Of vLLM's ChatCompletionRequest, those that we use. vLLM passes over others; here they are a mistake."""

OWN = "{% for m in messages %}<|im_start|>user\n{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
"""A template of the server's own, which speaks for the user."""

Fault = Callable[["Handler"], None]


@dataclass
class Stub:
    """What the server knows and how it behaves.

    Attributes:
        rows: questions that may be asked, without outputs.
        faults: what happens to the next requests in place of an answer.
        change: what happens to every answer before it is sent.
        min_pixels: of the server's image processor; None as the contract has it.
        trusts_templates: whether it runs with --trust-request-chat-template.
        template: used in place of the request's.
        delays: seconds before an answer, by number of the request.
    """

    model: RewardModel
    tokenizer: Any
    rows: list[Row]
    folder: Path
    faults: list[Fault] = field(default_factory=list)
    change: Callable[[dict[str, Any]], None] = lambda answer: None
    min_pixels: int | None = None
    trusts_templates: bool = True
    template: str | None = None
    delays: dict[int, float] = field(default_factory=dict)
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.over = threading.Event()

    def completion(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and answer of /v1/chat/completions."""
        if unknown := set(body) - FIELDS:
            return 400, _error(f"unknown fields {unknown}")
        if body["model"] != NAME:
            return 404, _error(f"The model `{body['model']}` does not exist.")
        if not self.trusts_templates:
            return 400, _error(
                "Chat template is passed with request, but --trust-request-chat-template is not set."
            )
        (message,) = body["messages"]
        (picture,) = [part for part in message["content"] if part["type"] == "image_url"]
        parts = [part if part["type"] == "text" else {"type": "image"} for part in message["content"]]
        rendered = _compile_jinja_template(self.template or body["chat_template"]).render(
            messages=[{"role": message["role"], "content": parts}]
        )
        text_ids = self.tokenizer.encode(rendered, add_special_tokens=False).ids
        image = Image.open(io.BytesIO(base64.b64decode(picture["image_url"]["url"].partition("base64,")[2])))
        outputs = self._sampled(body, text_ids, image)
        choices = [
            {"index": index, "finish_reason": "length", "token_ids": list(output), "message": {"content": ""}}
            for index, output in enumerate(outputs)
        ]
        return 200, {"choices": choices, "prompt_token_ids": self._expanded(text_ids, image)}

    def _expanded(self, ids: list[int], image: Image.Image) -> list[int]:
        spec = self.model.contract.image
        height, width = smart_resize(
            image.height, image.width, spec.token_size, self.min_pixels or spec.min_pixels, spec.max_pixels
        )
        placeholder = self.model.collator.encoder.image_token_id
        place = ids.index(placeholder)
        return ids[:place] + [placeholder] * (height * width // spec.token_size**2) + ids[place + 1 :]

    def _sampled(self, body: dict[str, Any], ids: list[int], image: Image.Image) -> list[tuple[int, ...]]:
        """Outputs that go on after their answer up to the longest length."""
        encoder = self.model.collator.encoder
        length = body["max_completion_tokens"]
        with self.lock:
            known = [row for row in self.rows if _text_ids(encoder, row) == ids]
            if not known:
                return [(encoder.code_ids[0],) * length] * body["n"]
            path = self.folder / f"{len(self.requests)}-{body['seed']}.png"
            image.save(path)
            sampling = Sampling(body["n"], length, body["temperature"])
            groups = sample_outputs(self.model, [replace(known[0], image=path)], sampling, body["seed"], 8)
        return [
            (*(row.output or ()), *[encoder.code_ids[0]] * (length - len(row.output or ())))
            for row in groups[0]
        ]


class Handler(BaseHTTPRequestHandler):
    stub: Stub

    def do_GET(self) -> None:
        self.stub.keys.append(self.headers.get("Authorization"))
        self.answer(200, {"object": "list", "data": [{"id": NAME}, {"id": "another"}]})

    def do_POST(self) -> None:
        stub = self.stub
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with stub.lock:
            number = len(stub.requests)
            stub.requests.append(body)
            fault = stub.faults.pop(0) if stub.faults else None
            stub.at_once += 1
            stub.most_at_once = max(stub.most_at_once, stub.at_once)
        if fault is not None:
            fault(self)
        else:
            time.sleep(stub.delays.get(number, 0))
            status, answer = stub.completion(body)
            if status == 200:
                stub.change(answer)
            self.answer(status, answer)
        with stub.lock:
            stub.at_once -= 1

    def answer(self, status: int, answer: dict[str, Any] | bytes) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "code": 400}}


def _text_ids(encoder: Any, row: Row) -> list[int]:
    """A question with one placeholder, whatever the size of its image."""
    parts = (
        encoder.text_prefix_ids(row.prompt),
        encoder.image_span_ids(1),
        encoder.reasoning_question_ids(row.dimension, row.hint),
    )
    ids: list[int] = np.concatenate(parts).tolist()
    return ids


def drop(handler: Handler) -> None:
    """Close the connection without a word."""
    handler.close_connection = True


def break_off(handler: Handler) -> None:
    """Promise more than is sent."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices"')
    handler.close_connection = True


def fail(handler: Handler) -> None:
    handler.answer(503, _error("the engine is loading"))


def talk_html(handler: Handler) -> None:
    handler.answer(200, b"<html>welcome</html>")


def refuse(handler: Handler) -> None:
    handler.answer(400, _error("This model's maximum context length is 128 tokens."))


def refuse_in_plain_text(handler: Handler) -> None:
    handler.answer(401, b"no key, no tokens")


def stay_silent(handler: Handler) -> None:
    """Say nothing before the test is over."""
    handler.stub.over.wait()
    handler.close_connection = True


@contextmanager
def listening(stub: Stub) -> Iterator[None]:
    """The stub on a free port, whose address it then knows."""
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"stub": stub})) as server:
        server.daemon_threads = True
        server.block_on_close = False
        stub.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        stub.over.set()
        server.shutdown()
