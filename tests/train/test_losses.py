from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from charter.train.losses import soft_dpo_loss, soft_preference_loss

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
