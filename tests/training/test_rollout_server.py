"""Sampling by a server: a stub of vLLM's documented API, and everything that a server can do wrong."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import Cli
from tests.support.sampling_server import (
    NAME,
    OWN,
    Fault,
    Stub,
    break_off,
    drop,
    fail,
    listening,
    refuse,
    refuse_in_plain_text,
    stay_silent,
    talk_html,
)
from tests.support.training import config_text
from zreward.checkpoint import Checkpoint
from zreward.errors import BackendError, UsageError
from zreward.image import preprocess
from zreward.prompt import load_tokenizer
from zreward.training import risd, teacher, write_chains
from zreward.training.config import ModelConfig, load_config
from zreward.training.data import TrainingSet, load_training_set
from zreward.training.model import RewardModel, banned_ids, load_model
from zreward.training.passes import run_rows
from zreward.training.rollout import Sampling, sample_outputs
from zreward.training.rollout_server import Server, ServerRollout, check_served, server_rollout
from zreward.training.sequences import Row

FEW = Sampling(3, 24)


@pytest.fixture(scope="module")
def model(reasoner: Path) -> RewardModel:
    return load_model(ModelConfig(str(reasoner)), torch.device("cpu"))


@pytest.fixture(scope="module")
def data(scenes: Path, model: RewardModel) -> TrainingSet:
    return load_training_set(scenes, model.contract)


@pytest.fixture
def stub(reasoner: Path, model: RewardModel, data: TrainingSet, tmp_path: Path) -> Iterator[Stub]:
    """A server on a free port, which knows every question of the scenes, told and untold."""
    rows = [
        Row(data.items[q.item].prompt, data.items[q.item].image, q.dimension)
        for q in data.questions(labelled=False)
    ]
    rows += [write_chains.told(data, question, model.contract) for question in data.questions(labelled=True)]
    folder = tmp_path / "received"
    folder.mkdir()
    stub = Stub(model, load_tokenizer(reasoner), rows, folder)
    with listening(stub):
        yield stub


@pytest.fixture
def sampled_by(stub: Stub, reasoner: Path, model: RewardModel) -> Callable[..., ServerRollout]:
    """A rollout on the stub, impatient."""

    def rollout(**options: Any) -> ServerRollout:
        patience = {"attempts": 3, "pause_s": 0.01, **options}
        return server_rollout(Server(stub.url, NAME, **patience), Checkpoint.open(reasoner), model.collator)

    return rollout


@pytest.fixture
def questions(stub: Stub) -> list[Row]:
    return [stub.rows[0], stub.rows[17], stub.rows[38]]


def test_outputs_are_those_of_the_questions_and_have_scores(
    stub: Stub, sampled_by: Callable[..., ServerRollout], model: RewardModel, questions: list[Row]
) -> None:
    groups = sampled_by()(questions, FEW, 0)
    assert [[replace(row, output=None) for row in group] for group in groups] == [[q] * 3 for q in questions]
    rows = [row for group in groups for row in group]
    places = [model.collator._reader.answer_position(row.output or ()) for row in rows]
    assert all(
        place is None or place == len(row.output or ()) - 1 for place, row in zip(places, rows, strict=True)
    )
    out = run_rows(model, model, rows, 8)
    assert out.valid_n.sum() >= 6
    assert out.valid_n.tolist() == [place is not None for place in places]


def test_a_request_asks_for_the_models_own_distribution(
    stub: Stub, sampled_by: Callable[..., ServerRollout], model: RewardModel, questions: list[Row]
) -> None:
    sampled_by()(questions[:1], Sampling(2, 20, 0.7), 0)
    (body,) = stub.requests
    expected = {"n": 2, "max_completion_tokens": 20, "temperature": 0.7, "top_p": 1, "top_k": 0, "min_p": 0}
    assert {name: body[name] for name in expected} == expected
    assert body["repetition_penalty"] == 1
    assert body["presence_penalty"] == body["frequency_penalty"] == 0
    assert body["logit_bias"] == {str(token): -100 for token in banned_ids(model.net)}
    assert body["stop_token_ids"] == [model.net.generation_config.eos_token_id]


def test_the_same_seed_gives_the_same_samples_and_each_question_has_its_own(
    sampled_by: Callable[..., ServerRollout], questions: list[Row]
) -> None:
    twice = [questions[0], questions[0]]
    first, again, other = (sampled_by()(twice, FEW, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first[0] != first[1]


def test_answers_out_of_order_keep_the_order_of_the_questions(
    stub: Stub, sampled_by: Callable[..., ServerRollout]
) -> None:
    questions = stub.rows[:6]
    stub.delays = {0: 0.6, 1: 0.4, 2: 0.2}
    groups = sampled_by(in_flight=3)(questions, Sampling(1, 12), 0)
    assert [replace(group[0], output=None) for group in groups] == questions
    assert 2 <= stub.most_at_once <= 3
    assert len(stub.requests) == 6


@pytest.mark.parametrize("size", [(72, 72), (50, 190), (401, 233), (30, 20)])
def test_the_image_that_is_sent_is_the_one_that_training_sees(
    size: tuple[int, int], sampled_by: Callable[..., ServerRollout], model: RewardModel, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    url = sampled_by()._encoded(tmp_path / "image.png")
    received = preprocess(base64.b64decode(url.partition("base64,")[2]), model.contract.image)
    seen = preprocess(tmp_path / "image.png", model.contract.image)
    assert received.grid_thw == seen.grid_thw
    assert np.array_equal(received.pixel_values, seen.pixel_values)


@pytest.mark.parametrize(
    "prompt",
    [
        "a red ball {{ messages }} {% raw %}",
        "  two\n\n  lines\t",
        "café, cafe\u0301 and 中文 🦊👩‍🎨",
        '"quotes" and \\ and <b>',
    ],
)
def test_any_prompt_arrives_as_the_tokens_of_training(
    prompt: str, sampled_by: Callable[..., ServerRollout], questions: list[Row]
) -> None:
    """The rollout would refuse an answer to other tokens; the stub tokenizes what its template renders."""
    asked = replace(questions[0], prompt=prompt, hint=" The answer is 3.")
    assert len(sampled_by()([asked], Sampling(2, 8), 0)[0]) == 2


def test_two_images_are_refused(sampled_by: Callable[..., ServerRollout], questions: list[Row]) -> None:
    with pytest.raises(UsageError, match="one image at a time"):
        sampled_by()([replace(questions[0], against=questions[1].image)], FEW, 0)


def test_the_expected_prompt_is_the_collators(
    stub: Stub, sampled_by: Callable[..., ServerRollout], model: RewardModel, questions: list[Row]
) -> None:
    answers: list[dict[str, Any]] = []
    stub.change = answers.append
    sampled_by()(questions[:1], Sampling(1, 8), 0)
    batch = model.collator.batch([replace(questions[0], output=())])
    assert answers[0]["prompt_token_ids"] == batch.joined_ids[0].tolist()


@pytest.mark.parametrize("fault", [drop, break_off, fail])
def test_a_fault_that_passes_is_asked_again(
    fault: Fault, stub: Stub, sampled_by: Callable[..., ServerRollout], questions: list[Row]
) -> None:
    rollout = sampled_by(in_flight=1)
    undisturbed = rollout(questions, FEW, 0)
    stub.faults = [fault, fault]
    assert rollout(questions, FEW, 0) == undisturbed
    assert len(stub.requests) == 3 + 5


@pytest.mark.parametrize(
    ("fault", "attempts", "message"),
    [
        (drop, 3, r"no answer in 3 attempts \(RemoteDisconnected: .*see that the server runs"),
        (break_off, 3, r"no answer in 3 attempts \(IncompleteRead"),
        (fail, 3, r"no answer in 3 attempts \(status 503: the engine is loading\)"),
        (talk_html, 1, "answered b'<html>welcome</html>', which is no object of JSON; is this the address"),
        (
            refuse,
            1,
            "completions refuses, with status 400: This model's maximum context length is 128 tokens",
        ),
        (refuse_in_plain_text, 1, "status 401: no key, no tokens"),
        (stay_silent, 1, r"said nothing for 0.3 s; lower sampling.max_new_tokens"),
    ],
)
def test_a_fault_that_stays_is_told(
    fault: Fault,
    attempts: int,
    message: str,
    stub: Stub,
    sampled_by: Callable[..., ServerRollout],
    questions: list[Row],
) -> None:
    rollout = sampled_by(**({"timeout_s": 0.3} if fault is stay_silent else {}))
    stub.faults = [fault] * 10
    with pytest.raises(BackendError, match=message):
        rollout(questions[:1], FEW, 0)
    assert len(stub.requests) == attempts


def test_one_refusal_ends_the_call_while_others_wait(
    stub: Stub, sampled_by: Callable[..., ServerRollout]
) -> None:
    rollout = sampled_by(in_flight=2)
    stub.faults = [stay_silent, refuse]
    with pytest.raises(BackendError, match="maximum context length"):
        rollout(stub.rows[:30], FEW, 0)  # would not come back while the first question is silent
    assert len(stub.requests) < 30


def _without_prompt_ids(answer: dict[str, Any]) -> None:
    answer["prompt_token_ids"] = None


def _without_ids(answer: dict[str, Any]) -> None:
    answer["choices"][1]["token_ids"] = None


def _with_one_less(answer: dict[str, Any]) -> None:
    answer["choices"].pop()


def _without_choices(answer: dict[str, Any]) -> None:
    del answer["choices"]


def _broken_off(answer: dict[str, Any]) -> None:
    answer["choices"][2]["finish_reason"] = "abort"


def _with_another_token(answer: dict[str, Any]) -> None:
    answer["prompt_token_ids"][5] = answer["prompt_token_ids"][6] + 1


def _cut(answer: dict[str, Any]) -> None:
    answer["prompt_token_ids"].pop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_prompt_ids, "no prompt_token_ids; take vLLM 0.17 or newer"),
        (_without_ids, "no token_ids; take vLLM 0.17 or newer"),
        (_with_one_less, "3 outputs were asked for, and 2 came"),
        (_without_choices, "3 outputs were asked for, and none came"),
        (_broken_off, r"broke outputs off, by \{'abort'\}"),
        (
            _with_another_token,
            r"ran another prompt: its token 5 is \d+ \('.*'\), and the contract's is \d+ \('",
        ),
        (_cut, r"its token \d+ is missing, and the contract's is \d+ \("),
    ],
)
def test_answers_that_are_refused(
    change: Callable[[dict[str, Any]], None],
    message: str,
    stub: Stub,
    sampled_by: Callable[..., ServerRollout],
    questions: list[Row],
) -> None:
    stub.change = change
    with pytest.raises(BackendError, match=message):
        sampled_by()(questions, FEW, 0)


def test_an_output_with_a_place_for_pixels_is_refused(
    stub: Stub, sampled_by: Callable[..., ServerRollout], model: RewardModel, questions: list[Row]
) -> None:
    image_token = model.collator.encoder.image_token_id

    def change(answer: dict[str, Any]) -> None:
        answer["choices"][0]["token_ids"][0] = image_token

    stub.change = change
    with pytest.raises(BackendError, match=rf"outputs hold \{{{image_token}\}}, which stand for images"):
        sampled_by()(questions, FEW, 0)


def test_a_server_with_a_template_of_its_own(
    stub: Stub, sampled_by: Callable[..., ServerRollout], questions: list[Row]
) -> None:
    stub.template = OWN
    with pytest.raises(
        BackendError, match=r"ran another prompt: its token 1 is .*--chat-template-content-format"
    ):
        sampled_by()(questions, FEW, 0)
    stub.trusts_templates = False
    with pytest.raises(BackendError, match=r"status 400: .*--trust-request-chat-template is not set"):
        sampled_by()(questions, FEW, 0)


def test_a_server_with_other_image_sizes(
    stub: Stub, sampled_by: Callable[..., ServerRollout], model: RewardModel, questions: list[Row]
) -> None:
    stub.min_pixels = 96 * 96
    spec = model.contract.image
    size = rf'"shortest_edge": {spec.min_pixels}, "longest_edge": {spec.max_pixels}'
    with pytest.raises(BackendError, match=rf"makes 16 tokens of an image, and the contract 9; .*{size}"):
        sampled_by()(questions, FEW, 0)


def test_a_name_that_is_not_served(
    stub: Stub, reasoner: Path, model: RewardModel, questions: list[Row]
) -> None:
    judge = Server(stub.url, "judge")
    with pytest.raises(
        BackendError, match="serves 'reasoner', 'another', and not 'judge'; name what it serves"
    ):
        check_served(judge)
    rollout = server_rollout(judge, Checkpoint.open(reasoner), model.collator)
    with pytest.raises(BackendError, match="status 404: The model `judge` does not exist"):
        rollout(questions, FEW, 0)


def test_nothing_listens() -> None:
    with pytest.raises(BackendError, match=r"no answer in 2 attempts \(ConnectionRefusedError"):
        check_served(Server("http://127.0.0.1:9", NAME, attempts=2, pause_s=0.01))


def test_addresses_and_keys(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="looks like http://localhost:8000, not 'localhost:8000'"):
        Server("localhost:8000", NAME)
    monkeypatch.setenv("VLLM_API_KEY", "open sesame")
    check_served(Server(stub.url + "/v1/", NAME))
    assert stub.keys == ["Bearer open sesame"]


def test_what_ends_an_output_without_a_generation_config(
    stub: Stub, reasoner: Path, model: RewardModel, questions: list[Row], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in reasoner.iterdir():
        if file.name != "generation_config.json":
            (bare / file.name).symlink_to(file)
    server_rollout(Server(stub.url, NAME), Checkpoint.open(bare), model.collator)(questions[:1], FEW, 0)
    expected = load_model(ModelConfig(str(bare)), torch.device("cpu")).net.generation_config.eos_token_id
    assert stub.requests[0]["stop_token_ids"] == ([] if expected is None else [expected])


def _never(*_: object, **__: object) -> Any:
    raise AssertionError("this process was to sample nothing")


def test_risd_learns_from_traces_of_a_server(
    stub: Stub,
    reference_student: Path,
    reasoner: Path,
    one_prompt: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(teacher, "sample_outputs", _never)
    method = f'teacher = "{reasoner}"\nserver = "{stub.url}"\nserved_model = "{NAME}"\n'
    method += f'cache = "{tmp_path / "cache"}"\nsampling = {{ group_size = 2, max_new_tokens = 16 }}'

    def config(name: str) -> Any:
        path = tmp_path / f"{name}.toml"
        text = config_text(
            reference_student, one_prompt, tmp_path / name, steps=2, batch_size=3, method=method
        )
        path.write_text(text, encoding="utf-8")
        return load_config(path)

    assert risd.train(config("first"))["method"] == "risd"
    assert (tmp_path / "first" / "model" / "model.safetensors").is_file()
    assert len(stub.requests) == 3 * len(stub.model.contract.dimensions)
    assert json.loads((tmp_path / "cache" / "teacher.json").read_text())["served_model"] == NAME
    stub.faults = [fail] * 100
    risd.train(config("second"))  # the answers are kept: nobody is asked
    method = method.replace(f'served_model = "{NAME}"\n', "")
    with pytest.raises(UsageError, match="served_model differs"):
        risd.train(config("third"))


def test_the_distributions_are_read_from_the_teacher(
    sampled_by: Callable[..., ServerRollout], model: RewardModel, questions: list[Row]
) -> None:
    rollout = sampled_by()
    values = teacher.distributions(model, questions, FEW, 5, 8, rollout)
    out = run_rows(model, model, [row for group in rollout(questions, FEW, 5) for row in group], 8)
    for index, found in enumerate(values):
        mine = slice(3 * index, 3 * index + 3)
        probs = out.log_probs_nk[mine].exp()[out.valid_n[mine]]
        assert torch.allclose(found.exp(), probs.mean(0), atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"served_model": "judge"}, "method.server is missing"),
        ({"server": "http://a", "reasoning": False}, "none with method.reasoning = false"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        risd.Options("teacher", **options)


def test_a_teacher_is_served_under_its_own_name_unless_told_otherwise() -> None:
    assert risd.Options("teacher", server="http://a").serving() == Server("http://a", "teacher")
    assert risd.Options("teacher").serving() is None


def test_without_a_server_this_process_samples(
    reasoner: Path, model: RewardModel, questions: list[Row], one_prompt: Path, tmp_path: Path
) -> None:
    def local(rows: Any, sampling: Sampling, seed: int) -> list[list[Row]]:
        return sample_outputs(model, rows, sampling, seed, 8)

    given = teacher.distributions(model, questions, FEW, 5, 8, local)
    assert given.equal(teacher.distributions(model, questions, FEW, 5, 8))
    written, _ = write_chains.write_chains(str(reasoner), one_prompt, tmp_path / "out.jsonl", Sampling(1, 16))
    assert written > 0


def test_chains_come_from_a_server_without_a_model(
    stub: Stub, reasoner: Path, one_prompt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_chains, "load_model", _never)
    output = tmp_path / "out.jsonl"
    written, left_out = write_chains.write_chains(
        str(reasoner), one_prompt, output, Sampling(2, 24), server=Server(stub.url, NAME)
    )
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == written > 0
    assert written + left_out == len(stub.requests) * 2
    assert all(line["chain"] and "</think>" not in line["chain"] for line in lines)


def test_chains_on_the_command_line(
    cli: Cli, stub: Stub, reasoner: Path, one_prompt: Path, tmp_path: Path
) -> None:
    command = ["data", "chains", reasoner, one_prompt, "-o", tmp_path / "out.jsonl", "--max-new-tokens", "16"]
    named = ["--served-model", NAME]
    assert (refused := cli(*command, *named)).returncode == 2
    assert "say which one with --server" in refused.stderr
    done = cli(*command, *named, "--server", stub.url, timeout=900)
    assert done.returncode == 0, done.stderr
    assert len(stub.requests) == 3 * len(stub.model.contract.dimensions)
