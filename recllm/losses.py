"""The preference loss of stage 3 (Softmax-DPO) and what is logged beside it.

Everything works on summed log-probabilities of whole completions (title tokens and EOS), one row per prompt,
column 0 the chosen candidate. DPO is the special case of one rejected candidate, so it has no function of its
own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_dpo(
    policy_logps: Tensor,
    reference_logps: Tensor,
    beta: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Softmax-DPO loss of each row (S-DPO, Chen et al. 2024).

    With the implicit rewards `r_l = beta * (policy_l - reference_l)` and w the chosen candidate, the loss is
    `-log sigmoid(-log sum_{l != w} exp(r_l - r_w))`, which equals the cross-entropy of the softmax over `r`
    with the chosen candidate as its class, `logsumexp(r) - r_w`. The paper writes the mean over the batch;
    here each row's loss is returned. The written-out exp/log form overflows once a margin passes 88 in
    float32; this form does not.

    Args:
        policy_logps: `[B, 1 + K]` summed log-probabilities under the policy, column 0 the chosen candidate.
        reference_logps: `[B, 1 + K]` the same under the frozen reference. It gets no gradient.
        beta: strength of the pull towards the reference (no unit); the papers use 0.1 to 1, larger is
            gentler.
        mask: bool `[B, 1 + K]`, true where a candidate exists; None means everywhere. Masked cells may hold
            anything, NaN and infinities too: they touch neither loss nor gradient. Column 0 must be true.

    Returns:
        The loss of each row `[B]`, in float32 (float64 where an input is float64). A row without any rejected
        candidate has loss 0.

    Raises:
        ValueError: if shapes differ, no rejected column is there, or a row has no chosen candidate.
    """
    rewards, present = _rewards(policy_logps, reference_logps, beta, mask)
    # Shifted by the chosen reward first: margins stay exact where the rewards themselves are huge.
    margins = (rewards - rewards[:, :1]).masked_fill(~present, -torch.inf)
    return torch.logsumexp(margins, dim=1)


@torch.no_grad()
def preference_statistics(
    policy_logps: Tensor,
    reference_logps: Tensor,
    beta: float,
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """What is logged beside the loss; none of it measures ranking quality (log HR@1 on valid for that).

    Args:
        policy_logps: `[B, 1 + K]` summed log-probabilities under the policy, column 0 the chosen candidate.
        reference_logps: `[B, 1 + K]` the same under the reference.
        beta: as in `softmax_dpo`.
        mask: as in `softmax_dpo`. Rows without a rejected candidate are left out of every mean but those of
            the chosen candidate.

    Returns:
        Scalars (float32 or float64), means over rows, each row counting once whatever its number of rejected
        candidates:
        `reward_chosen`, `reward_rejected` (mean over the row's rejected candidates), `margin` (chosen minus
        rejected), `reward_accuracy` (share of rows whose chosen reward is above *every* rejected one; ties
        count as wrong), `chosen_logp` (policy, nats, summed over tokens) and `kl`: an estimate, in nats, of
        KL(policy || reference) *restricted and renormalized to the row's candidates*. It is exact on that
        finite set, but says nothing about text outside of it.
    """
    rewards, present = _rewards(policy_logps, reference_logps, beta, mask)
    dtype = rewards.dtype
    rejected = present[:, 1:]
    count = rejected.sum(dim=1)
    compared = count > 0
    chosen = rewards[:, 0]
    mean_rejected = rewards[:, 1:].masked_fill(~rejected, 0.0).sum(dim=1) / count.clamp(min=1)
    best_rejected = rewards[:, 1:].masked_fill(~rejected, -torch.inf).amax(dim=1)

    policy = policy_logps.to(dtype).masked_fill(~present, -torch.inf).log_softmax(dim=1)
    reference = reference_logps.to(dtype).masked_fill(~present, -torch.inf).log_softmax(dim=1)
    # Masked cells are -inf on both sides; filled with 0 they contribute exp(-inf) * 0 = 0.
    kl = (policy.exp() * (policy - reference).masked_fill(~present, 0.0)).sum(dim=1)

    def over_compared(values: Tensor) -> Tensor:
        return values.masked_fill(~compared, 0.0).sum() / compared.sum().clamp(min=1)

    return {
        "reward_chosen": chosen.mean(),
        "reward_rejected": over_compared(mean_rejected),
        "margin": over_compared(chosen - mean_rejected),
        "reward_accuracy": over_compared((chosen > best_rejected).to(dtype)),
        "chosen_logp": policy_logps[:, 0].to(dtype).mean(),
        "kl": over_compared(kl),
    }


def _rewards(
    policy_logps: Tensor, reference_logps: Tensor, beta: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Implicit rewards `[B, 1 + K]` in at least float32 with masked cells at 0, and the mask."""
    shape = tuple(policy_logps.shape)
    if policy_logps.dim() != 2 or shape[1] < 2:
        raise ValueError(f"policy_logps has shape {shape}, want [B, 1 + K] with K >= 1")
    if tuple(reference_logps.shape) != shape:
        raise ValueError(
            f"reference_logps has shape {tuple(reference_logps.shape)}, want {shape} as policy_logps"
        )
    if mask is None:
        present = torch.ones(shape, dtype=torch.bool, device=policy_logps.device)
    else:
        if tuple(mask.shape) != shape:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, want {shape} as policy_logps")
        present = mask.to(device=policy_logps.device, dtype=torch.bool)
        if not bool(present[:, 0].all()):
            raise ValueError(
                "mask is false in column 0 of a row, want every row to have its chosen candidate there"
            )
    dtype = torch.promote_types(torch.promote_types(policy_logps.dtype, reference_logps.dtype), torch.float32)
    # Filled *before* any arithmetic: a NaN that is multiplied by zero later would still poison the gradient.
    policy = policy_logps.to(dtype).masked_fill(~present, 0.0)
    reference = reference_logps.detach().to(policy).masked_fill(~present, 0.0)
    return beta * (policy - reference), present
