from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from charter.train.losses import neutral_rewards, soft_dpo_loss, soft_preference_loss

TERMS = [torch.tensor(values) for values in ([-4.0, -2.0], [-3.0, -6.0], [-3.5, -2.5], [-3.5, -5.0])]


def standard(chosen: torch.Tensor, rejected: torch.Tensor, *reference: torch.Tensor, beta: float) -> torch.Tensor:
    return -logsigmoid(beta * ((chosen - rejected) - (reference[0] - reference[1])))


def test_certain_labels_are_standard_dpo() -> None:
    chosen, rejected, ref_chosen, ref_rejected = TERMS
    expected = standard(chosen, rejected, ref_chosen, ref_rejected, beta=0.1)
    swapped = standard(rejected, chosen, ref_rejected, ref_chosen, beta=0.1)
    torch.testing.assert_close(soft_dpo_loss(*TERMS, torch.ones(2), beta=0.1), expected)
    torch.testing.assert_close(soft_dpo_loss(*TERMS, torch.zeros(2), beta=0.1), swapped)


def test_minimum_is_at_the_log_odds_of_the_label() -> None:
    margin = torch.zeros(1, requires_grad=True)
    probability = torch.tensor([0.8])
    optimiser = torch.optim.SGD([margin], lr=2.0)
    for _ in range(200):
        optimiser.zero_grad()
        soft_preference_loss(margin, probability).sum().backward()
        optimiser.step()
    torch.testing.assert_close(torch.sigmoid(margin.detach()), probability, atol=1e-4, rtol=0)


def test_unscored_rewards_are_neutral_within_their_group() -> None:
    nan = torch.nan
    rewards = torch.tensor([[nan, 1.0], [4.0, nan], [nan, nan], [2.0, 5.0], [nan, 1.0], [nan, 2.0]])
    filled = neutral_rewards(rewards.roll(-4, 0)[:2].repeat(2, 1), group=2)
    torch.testing.assert_close(filled, torch.tensor([[0.0, 1.0], [0.0, 2.0]]).repeat(2, 1))
    filled = neutral_rewards(rewards[:4], group=4)
    expected = torch.tensor([[3.0, 1.0], [4.0, 3.0], [nan, nan], [2.0, 5.0]])
    torch.testing.assert_close(filled, expected, equal_nan=True)
