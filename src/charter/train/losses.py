"""Losses as pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def soft_preference_loss(margin: Tensor, probability: Tensor) -> Tensor:
    """Cross-entropy between a soft preference label and the Bradley-Terry model.

    Args:
        margin: shape ``(batch,)``, reward of the chosen minus reward of the rejected answer, in nats.
        probability: shape ``(batch,)``, probability in [0, 1] that the chosen answer is better.

    Returns:
        Shape ``(batch,)``, nats a pair. At probability 1 it is ``-log sigmoid(margin)``.

    Source: Bai et al. 2022, Constitutional AI, section 4.1 (soft labels); Bradley and Terry 1952.
    """
    probability = probability.to(margin.dtype)
    return -probability * logsigmoid(margin) - (1 - probability) * logsigmoid(-margin)


def soft_dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    probability: Tensor,
    *,
    beta: float,
) -> Tensor:
    """Direct preference optimisation with a soft label a pair.

    Args:
        policy_chosen: shape ``(batch,)``, summed log-probability of the chosen answer under the policy, in nats.
        policy_rejected: the same for the rejected answer.
        reference_chosen: shape ``(batch,)``, the same under the frozen reference.
        reference_rejected: the same for the rejected answer.
        probability: shape ``(batch,)``, probability in [0, 1] that the chosen answer is better. At 1 the loss is
            standard DPO; at 0 it is standard DPO with the pair swapped.
        beta: strength of the pull towards the reference; above 0.

    Returns:
        Shape ``(batch,)``, nats a pair.

    Source: Rafailov et al. 2023, equation 7; conservative DPO (Mitchell 2023) for labels short of 1.
    """
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return soft_preference_loss(torch.mul(margin, beta), probability)


def neutral_rewards(rewards: Tensor, *, group: int) -> Tensor:
    """Fill in rewards that are missing so that they neither gain nor lose within their group of answers.

    Args:
        rewards: shape ``(answers, rewards)``; NaN where an answer is unscored. One prompt's answers stand together.
        group: answers a prompt.

    Returns:
        The same shape. An answer that some rewards scored gets, for the others, the mean of the scored answers of its
        group (0 where none is); an answer that none scored stays NaN, which TRL gives no advantage.
    """
    grouped = rewards.view(-1, group, rewards.size(1))
    mean = grouped.nanmean(dim=1, keepdim=True).nan_to_num(0.0)
    filled = torch.where(grouped.isnan(), mean, grouped).view_as(rewards)
    return torch.where(rewards.isnan().all(dim=1, keepdim=True), rewards, filled)
