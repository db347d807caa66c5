"""Where a score is read in an output, and what is read there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zreward.training.model import RewardModel
from zreward.training.traces import TraceReader, UntilAnswer, closed_set


@pytest.fixture(scope="module")
def reader(student_model: RewardModel) -> TraceReader:
    return TraceReader(student_model.collator.encoder)


def ids(model: RewardModel, text: str) -> list[int]:
    """Token ids of any text."""
    return model.collator.encoder._ids(text).tolist()


class TestPosition:
    def test_written_trace(self, reader: TraceReader, student_model: RewardModel) -> None:
        encoder = student_model.collator.encoder
        trace = encoder.trace_ids("red ball behind two cubes").tolist()
        assert reader.answer_position([*trace, encoder.code_ids[4]]) == len(trace)
        assert reader.answer_position([*trace, encoder.code_ids[4], 17, 18]) == len(trace)
        assert reader.trace_text([*trace, encoder.code_ids[4]]) == "red ball behind two cubes"

    def test_an_answer_that_is_no_code_is_where_the_score_is_read(
        self, reader: TraceReader, student_model: RewardModel
    ) -> None:
        output = ids(student_model, "fine\n</think>\n\nThe score is 7")
        place = reader.answer_position(output)
        assert place is not None
        assert student_model.collator.encoder.text_of(np.array([output[place]])).strip() in "The"

    @pytest.mark.parametrize(
        "text",
        ["", "no end 7", "7", "fine\n</think>", "fine\n</think>\n\n", "</think>\n\n\n\n"],
    )
    def test_nothing_is_parsed_out_of_text(
        self, reader: TraceReader, student_model: RewardModel, text: str
    ) -> None:
        assert reader.answer_position(ids(student_model, text)) is None

    def test_the_first_end_counts(self, reader: TraceReader, student_model: RewardModel) -> None:
        output = ids(student_model, "a\n</think>\n\n3 or so\n</think>\n\n9")
        place = reader.answer_position(output)
        assert place is not None
        assert output[place] == student_model.collator.encoder.code_ids[2]

    def test_generation_stops_row_by_row(self, reader: TraceReader, student_model: RewardModel) -> None:
        done = ids(student_model, "a\n</think>\n\n3")
        running = ids(student_model, "a b c d e f g h")[: len(done)]
        prompt = [[1, 2, 3]] * 2
        rows = torch.tensor([p + o for p, o in zip(prompt, (done, running), strict=True)])
        assert UntilAnswer(reader, 3)(rows, torch.empty(0)).tolist() == [True, False]


class TestClosedSet:
    @given(st.integers(0, 2**16))
    def test_against_the_full_softmax(self, seed: int) -> None:
        logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(seed)) * 4
        codes = [3, 9, 1, 30]
        got = closed_set(logits, codes)
        probs = logits.double().softmax(-1)[:, codes]
        torch.testing.assert_close(got.off_scale_n.double(), 1 - probs.sum(-1), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            got.log_probs_nk.double().exp(), probs / probs.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4
        )

    def test_computed_in_float32(self) -> None:
        logits = torch.randn(2, 8).bfloat16()
        assert closed_set(logits, [0, 1]).log_probs_nk.dtype == torch.float32

    def test_the_mass_has_no_gradient(self) -> None:
        logits = torch.randn(2, 8, requires_grad=True)
        got = closed_set(logits, [0, 1])
        assert got.log_probs_nk.requires_grad
        assert not got.off_scale_n.requires_grad
