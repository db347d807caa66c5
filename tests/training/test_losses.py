"""Each loss beside a float64 double loop over plain lists, and with the gradient checked by differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from zreward.training import losses

BINS = torch.arange(1.0, 5.5, 0.5, dtype=torch.float64)
SPAN = 4.0
PAIRS, GROUP = 3, 4


def batch(seed: int = 0, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """Random bin logits [P, J, G, K] and labels [P, J]; the labels of the first pair are tied."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(PAIRS, 2, group, len(BINS), generator=generator, dtype=torch.float64)
    labels = BINS[torch.randint(len(BINS), (PAIRS, 2), generator=generator)]
    labels[0, 1] = labels[0, 0]
    return logits, labels


def means_of(logits: Tensor) -> Tensor:
    return losses.expectation(logits.log_softmax(-1), BINS)


def loop_distribution(logits: Tensor) -> tuple[list[float], float]:
    values = logits.tolist()
    top = max(values)
    weights = [math.exp(value - top) for value in values]
    probs = [weight / sum(weights) for weight in weights]
    return probs, sum(p * s for p, s in zip(probs, BINS.tolist(), strict=True))


def loop_pairwise_errors(
    means: Tensor, labels: Tensor, valid: Tensor
) -> dict[tuple[int, int, int], list[float]]:
    """The errors of each sample against each valid sample of the other side."""
    found: dict[tuple[int, int, int], list[float]] = {}
    for p in range(means.shape[0]):
        for side in (0, 1):
            other = 1 - side
            wanted = float(labels[p, side]) - float(labels[p, other])
            for i in range(means.shape[2]):
                errors = []
                for k in range(means.shape[2]):
                    if valid[p, side, i] and valid[p, other, k]:
                        gap = float(means[p, side, i]) - float(means[p, other, k])
                        errors.append(abs(gap - wanted))
                found[p, side, i] = errors
    return found


@pytest.fixture(params=["all valid", "some failed", "a side failed"])
def valid(request: pytest.FixtureRequest) -> Tensor:
    mask = torch.ones(PAIRS, 2, GROUP, dtype=torch.bool)
    if request.param != "all valid":
        mask[1, 0, 2] = mask[2, 1, 0] = False
    if request.param == "a side failed":
        mask[2, 1] = False
    return mask


class TestTargets:
    def test_a_score_on_a_bin_is_all_on_it(self) -> None:
        for index, score in enumerate(BINS):
            expected = torch.zeros(len(BINS), dtype=torch.float64)
            expected[index] = 1
            assert torch.equal(losses.bin_targets(score[None], BINS)[0], expected)

    def test_expectation_is_the_score(self) -> None:
        scores = torch.tensor([1.0, 1.1, 2.25, 3.4, 4.99, 5.0], dtype=torch.float64)
        targets = losses.bin_targets(scores, BINS)
        torch.testing.assert_close(targets @ BINS, scores)
        torch.testing.assert_close(targets.sum(-1), torch.ones_like(scores))
        assert int((targets > 0).sum(-1).max()) == 2

    @pytest.mark.parametrize("score", [0.99, 5.01, math.nan, math.inf])
    def test_off_the_scale(self, score: float) -> None:
        with pytest.raises(ValueError, match="from 1 to 5"):
            losses.bin_targets(torch.tensor([2.0, score]), BINS.float())


class TestRewards:
    def test_pointwise(self) -> None:
        logits, labels = batch()
        got = losses.pointwise_reward(means_of(logits), labels, SPAN)
        for p, j, i in np.ndindex(PAIRS, 2, GROUP):
            _, mean = loop_distribution(logits[p, j, i])
            assert got[p, j, i].item() == pytest.approx(1 - abs(mean - float(labels[p, j])) / SPAN, abs=1e-12)

    def test_pairwise(self, valid: Tensor) -> None:
        logits, labels = batch()
        means = means_of(logits)
        got = losses.pairwise_reward(means, labels, SPAN, valid)
        for place, errors in loop_pairwise_errors(means, labels, valid).items():
            expected = 1 - sum(errors) / (len(errors) * SPAN) if errors else 0.0
            assert got[place].item() == pytest.approx(expected, abs=1e-12)

    def test_sum_and_floor(self, valid: Tensor) -> None:
        logits, labels = batch()
        logits[~valid] = math.nan
        got = losses.rewards(means_of(logits), labels, SPAN, pointwise=0.7, pairwise=0.4, valid_pjg=valid)
        means = torch.where(valid, means_of(logits), 0.0)
        separate = 0.7 * losses.pointwise_reward(means, labels, SPAN)
        separate = separate + 0.4 * losses.pairwise_reward(means, labels, SPAN, valid)
        torch.testing.assert_close(got[valid], separate[valid])
        assert (got[~valid] == -0.4).all()
        assert not got.requires_grad

    def test_no_reward_is_below_the_floor(self) -> None:
        """The worst that a sample can do: the far ends of the scale the wrong way round."""
        means = torch.tensor([[[1.0], [5.0]]])
        got = losses.rewards(means, torch.tensor([[5.0, 1.0]]), SPAN, pointwise=0.7, pairwise=0.4)
        assert got.tolist() == [[[pytest.approx(-0.4)], [pytest.approx(-0.4)]]]

    def test_perfect_samples_get_the_highest(self) -> None:
        labels = torch.tensor([[2.0, 4.5]])
        got = losses.rewards(labels[..., None].expand(1, 2, 3), labels, SPAN, pointwise=0.7, pairwise=0.4)
        torch.testing.assert_close(got, torch.full_like(got, 1.1))


class TestAdvantages:
    def test_against_loop(self) -> None:
        rewards = torch.rand(PAIRS, 2, GROUP, dtype=torch.float64)
        got = losses.group_advantages(rewards, epsilon=1e-3)
        for p, j in np.ndindex(PAIRS, 2):
            group = rewards[p, j].tolist()
            mean = sum(group) / GROUP
            deviation = math.sqrt(sum((r - mean) ** 2 for r in group) / GROUP)
            for i in range(GROUP):
                assert got[p, j, i].item() == pytest.approx((group[i] - mean) / (deviation + 1e-3), abs=1e-12)

    def test_equal_rewards_and_single_samples_teach_nothing(self) -> None:
        assert (losses.group_advantages(torch.full((2, 2, 5), 0.3)) == 0).all()
        assert (losses.group_advantages(torch.rand(2, 2, 1)) == 0).all()


class TestDirectLosses:
    def test_pointwise(self, valid: Tensor) -> None:
        logits, labels = batch()
        targets = losses.bin_targets(labels, BINS)
        got = losses.pointwise_loss(logits.log_softmax(-1), targets, valid)
        total = 0.0
        for p, j, i in np.ndindex(PAIRS, 2, GROUP):
            if valid[p, j, i]:
                probs, _ = loop_distribution(logits[p, j, i])
                total -= math.log(probs[BINS.tolist().index(float(labels[p, j]))]) / (2 * GROUP)
        assert got.item() == pytest.approx(total / PAIRS, abs=1e-12)

    def test_pairwise(self, valid: Tensor) -> None:
        logits, labels = batch()
        means = means_of(logits)
        got = losses.pairwise_loss(means, labels, SPAN, valid)
        errors = loop_pairwise_errors(means, labels, valid)
        total = sum(sum(errors[p, j, i]) for p, j, i in errors) / (2 * GROUP**2 * SPAN)
        assert got.item() == pytest.approx(total / PAIRS, abs=1e-12)

    def test_one_sample_a_side(self) -> None:
        logits, labels = batch(group=1)
        means = means_of(logits)
        expected = ((means[:, 0, 0] - means[:, 1, 0]) - (labels[:, 0] - labels[:, 1])).abs().mean() / SPAN
        torch.testing.assert_close(losses.pairwise_loss(means, labels, SPAN), expected)

    @pytest.mark.parametrize("side_failed", [False, True])
    def test_failed_samples_leave_no_nan_in_the_gradient(self, side_failed: bool) -> None:
        logits, labels = batch()
        mask = torch.ones(PAIRS, 2, GROUP, dtype=torch.bool)
        mask[1, 0, slice(None) if side_failed else 2] = False
        logits[~mask] = math.nan
        logits.requires_grad_()
        log_probs = logits.log_softmax(-1)
        clean = torch.where(mask[..., None], log_probs, 0.0)
        loss = losses.pointwise_loss(log_probs.detach(), losses.bin_targets(labels, BINS), mask)
        assert math.isfinite(loss.item())
        total = losses.pointwise_loss(clean, losses.bin_targets(labels, BINS), mask)
        total = total + losses.pairwise_loss(losses.expectation(clean, BINS), labels, SPAN, mask)
        assert math.isfinite(total.item())

    def test_gradients(self, valid: Tensor) -> None:
        logits, labels = batch()
        targets = losses.bin_targets(labels, BINS)

        def direct(values: Tensor) -> Tensor:
            log_probs = values.log_softmax(-1)
            pairwise = losses.pairwise_loss(losses.expectation(log_probs, BINS), labels, SPAN, valid)
            return losses.pointwise_loss(log_probs, targets, valid) + pairwise

        assert gradcheck(direct, logits.requires_grad_())


class TestPolicy:
    def sequences(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        log_probs, sampled, reference = -torch.rand(3, 5, 6, generator=generator, dtype=torch.float64) * 2
        mask = torch.arange(6) < torch.tensor([6, 3, 1, 5, 2])[:, None]
        advantages = torch.tensor([1.2, -0.7, 0.0, -1.5, 0.4], dtype=torch.float64)
        return log_probs, sampled, reference, mask, advantages

    @pytest.mark.parametrize("clip", [None, 0.2])
    @pytest.mark.parametrize("beta", [0.0, 0.3])
    def test_against_loop(self, clip: float | None, beta: float) -> None:
        log_probs, sampled, reference, mask, advantages = self.sequences()
        got = losses.policy_loss(
            log_probs, sampled, advantages, mask, reference_log_probs_nt=reference, beta=beta, clip=clip
        )
        total = 0.0
        for n in range(5):
            for t in range(6):
                if not mask[n, t]:
                    continue
                ratio = math.exp(float(log_probs[n, t]) - float(sampled[n, t]))
                gain = ratio * float(advantages[n])
                if clip is not None:
                    gain = min(gain, min(max(ratio, 1 - clip), 1 + clip) * float(advantages[n]))
                gap = float(reference[n, t]) - float(log_probs[n, t])
                total += gain - beta * (math.exp(gap) - gap - 1)
        assert got.item() == pytest.approx(-total / 5, abs=1e-12)

    def test_first_update_is_the_plain_policy_gradient(self) -> None:
        log_probs, _, _, mask, advantages = self.sequences()
        log_probs.requires_grad_()
        losses.policy_loss(log_probs, log_probs.detach(), advantages, mask).backward()
        expected = -torch.where(mask, advantages[:, None], 0.0) / 5
        torch.testing.assert_close(log_probs.grad, expected)

    def test_gradients(self) -> None:
        log_probs, sampled, reference, mask, advantages = self.sequences()

        def loss(values: Tensor) -> Tensor:
            return losses.policy_loss(
                values, sampled, advantages, mask, reference_log_probs_nt=reference, beta=0.3, clip=None
            )

        assert gradcheck(loss, log_probs.requires_grad_())

    def test_padding_does_not_count(self) -> None:
        log_probs, sampled, reference, mask, advantages = self.sequences()
        for values in (log_probs, sampled, reference):
            values[~mask] = -math.inf
        log_probs.requires_grad_()
        loss = losses.policy_loss(
            log_probs, sampled, advantages, mask, reference_log_probs_nt=reference, beta=0.3
        )
        loss.backward()
        assert math.isfinite(loss.item())
        assert (log_probs.grad[~mask] == 0).all()

    def test_a_kl_term_needs_a_reference(self) -> None:
        log_probs, sampled, _, mask, advantages = self.sequences()
        with pytest.raises(ValueError, match="reference"):
            losses.policy_loss(log_probs, sampled, advantages, mask, beta=0.1)


class TestDistillation:
    def test_against_loop(self) -> None:
        logits, _ = batch()
        teacher = logits[:, 0].reshape(-1, len(BINS))
        student = logits[:, 1].reshape(-1, len(BINS))
        got = losses.distillation_loss(teacher.log_softmax(-1), student.log_softmax(-1))
        total = 0.0
        for t, s in zip(teacher, student, strict=True):
            (p, _), (q, _) = loop_distribution(t), loop_distribution(s)
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert got.item() == pytest.approx(total / len(teacher), abs=1e-12)

    def test_gradient_reaches_the_student_alone(self) -> None:
        logits, _ = batch()
        teacher, student = logits[:, 0].flatten(0, 1).requires_grad_(), logits[:, 1].flatten(0, 1).clone()
        student.requires_grad_()
        losses.distillation_loss(teacher.log_softmax(-1), student.log_softmax(-1)).backward()
        assert teacher.grad is None
        expected = (student.softmax(-1) - teacher.softmax(-1)) / len(student)
        torch.testing.assert_close(student.grad, expected.detach())

    def test_a_bin_without_mass(self) -> None:
        teacher = torch.tensor([[0.0, -math.inf]])
        student = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
        loss = losses.distillation_loss(teacher, student)
        loss.backward()
        assert loss.item() == pytest.approx(math.log(2))
        assert torch.isfinite(student.grad).all()

    def test_on_policy(self) -> None:
        generator = torch.Generator().manual_seed(2)
        student, sampled, teacher = -torch.rand(3, 4, 5, generator=generator, dtype=torch.float64)
        mask = torch.arange(5) < torch.tensor([5, 2, 1, 0])[:, None]
        got = losses.on_policy_distillation_loss(student.requires_grad_(), sampled, teacher, mask)
        total = 0.0
        for n in range(4):
            length = int(mask[n].sum())
            for t in range(length):
                total += float(teacher[n, t] - sampled[n, t]) * float(student[n, t].detach()) / length
        assert got.item() == pytest.approx(-total / 4, abs=1e-12)
        got.backward()
        advantage = torch.where(mask, teacher - sampled, 0.0)
        torch.testing.assert_close(student.grad, -advantage / mask.sum(-1, keepdim=True).clamp(min=1) / 4)


class TestSupervised:
    def test_scores(self) -> None:
        logits, labels = batch()
        log_probs, targets = logits[:, :, 0].log_softmax(-1), losses.bin_targets(labels, BINS)
        torch.testing.assert_close(
            losses.score_cross_entropy(log_probs, targets),
            torch.nn.functional.cross_entropy(log_probs.flatten(0, 1), targets.flatten(0, 1)),
        )

    def test_sequences(self) -> None:
        values = torch.tensor([[-1.0, -2.0, -math.inf], [-4.0, -math.inf, -math.inf]])
        mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        assert losses.sequence_cross_entropy(values, mask).item() == pytest.approx(7 / 3)

    def test_preference(self) -> None:
        logits = torch.tensor([[1.0, 0.2], [-0.5, 0.7], [0.3, 0.3]], dtype=torch.float64)
        preferred = torch.tensor([1, 1, 0])
        expected = 0.0
        for (yes, no), better in zip(logits.tolist(), preferred.tolist(), strict=True):
            p = math.exp(yes) / (math.exp(yes) + math.exp(no))
            expected -= math.log(p if better else 1 - p) / 3
        assert losses.preference_loss(logits, preferred).item() == pytest.approx(expected, abs=1e-12)


TEACHER = torch.linspace(-1, 1, 3 * len(BINS), dtype=torch.float64).reshape(3, -1).log_softmax(-1)

GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "distillation": lambda x: losses.distillation_loss(TEACHER, x[0].log_softmax(-1)),
    "preference": lambda x: losses.preference_loss(x[0, :, :2], torch.tensor([1, 0, 1])),
    "scores": lambda x: losses.score_cross_entropy(
        x.log_softmax(-1), losses.bin_targets(torch.full((2, 3), 2.25, dtype=torch.float64), BINS)
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradcheck(name: str) -> None:
    values = torch.randn(2, 3, len(BINS), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert gradcheck(GRADIENTS[name], values.requires_grad_())
