"""Preference losses of stage 3 and what is logged beside them.

Everything works on summed log-probabilities of whole completions (title tokens and EOS), one row per prompt,
column 0 the chosen candidate w, the other columns the rejected ones l. With the implicit rewards
`r = beta * (policy - reference)` and the margins `m_l = r_l - r_w`:

| loss | formula of a row |
| --- | --- |
| `softmax_dpo` | `log(1 + sum_l exp m_l)` |
| `pairwise_dpo` | mean over l of `log(1 + exp m_l)` |
| `dmpo` | `log(1 + exp(mean over l of m_l))` |
| `mppo` | `dmpo` without a reference: `r = beta * policy` |

With one rejected candidate the first three are the sigmoid loss of DPO, which has no function of its own.
Every one is computed from margins by softplus or logsumexp in at least float32: finite, value and gradient,
for any finite margin.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PREFERENCE_LOSSES = ("softmax-dpo", "dpo-pairwise", "dmpo", "mppo")
"""Names that `preference_loss` knows."""
REFERENCE_FREE = ("mppo",)
"""Those of them that read no reference."""
OF_ALL_ROWS = ("reward_chosen", "chosen_logp")
"""Figures of `preference_statistics` that rows without a rejected candidate count in."""


def softmax_dpo(
    policy_logps: Tensor,
    reference_logps: Tensor,
    beta: float,
    mask: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Softmax-DPO loss of each row (S-DPO, Chen et al. 2024).

    `-log sigmoid(-log sum_l exp(r_l - r_w))`, which equals the cross-entropy of the softmax over `r` with the
    chosen candidate as its class, `logsumexp(r) - r_w`. The paper writes the mean over the batch; here each
    row's loss is returned. The written-out exp/log form overflows once a margin passes 88 in float32; this
    form does not.

    Args:
        policy_logps: `[B, 1 + K]` summed log-probabilities under the policy, column 0 the chosen candidate.
        reference_logps: `[B, 1 + K]` the same under the frozen reference. It gets no gradient.
        beta: strength of the pull towards the reference (no unit); the papers use 0.1 to 1, larger is
            gentler.
        mask: bool `[B, 1 + K]`, true where a candidate exists; None means everywhere. Masked cells may hold
            anything, NaN and infinities too: they touch neither loss nor gradient. Column 0 must be true.
        label_smoothing: probability e, in [0, 0.5), that the label is wrong: the target puts 1 - e on the
            chosen candidate and shares e evenly among the rejected ones. With K = 1 that is conservative DPO
            (Mitchell 2023).

    Returns:
        The loss of each row `[B]`, in float32 (float64 where an input is float64). A row without any rejected
        candidate has loss 0.

    Raises:
        ValueError: if shapes differ, no rejected column is there, a row has no chosen candidate, or the label
            smoothing is out of range.
    """
    margins, rejected = _margins(policy_logps, reference_logps, beta, mask)
    chosen = margins.new_zeros(len(margins), 1)
    logits = torch.cat([chosen, margins.masked_fill(~rejected, -torch.inf)], dim=1)
    loss = torch.logsumexp(logits, dim=1)
    return loss - _check_smoothing(label_smoothing) * _row_mean(margins, rejected)


def pairwise_dpo(
    policy_logps: Tensor,
    reference_logps: Tensor,
    beta: float,
    mask: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO of the chosen candidate against each rejected one, `-log sigmoid(r_w - r_l)`, mean over the latter.

    What remains of several rejected candidates where a library takes pairs only. Arguments, result and errors
    as for `softmax_dpo`; with label smoothing e each pair is conservative DPO: e times the loss of the
    reversed pair, 1 - e times its own.
    """
    margins, rejected = _margins(policy_logps, reference_logps, beta, mask)
    pairs = F.softplus(margins) - _check_smoothing(label_smoothing) * margins
    return _row_mean(pairs, rejected)


def dmpo(
    policy_logps: Tensor,
    reference_logps: Tensor,
    beta: float,
    mask: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct multi-preference optimization (Bai et al. 2024): `-log sigmoid(r_w - mean over l of r_l)`.

    By Jensen's inequality never above `pairwise_dpo`. Arguments, result and errors as for `softmax_dpo`.
    """
    margins, rejected = _margins(policy_logps, reference_logps, beta, mask)
    mean = _row_mean(margins, rejected)
    loss = F.softplus(mean) - _check_smoothing(label_smoothing) * mean
    return loss.masked_fill(~rejected.any(dim=1), 0.0)


def mppo(
    policy_logps: Tensor, beta: float, mask: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Multi pair-wise preference optimization without a reference: `dmpo` with rewards `beta * policy`.

    Differs from the paper (Xie et al. 2024), whose reward is the mean likelihood of a token: the reward is
    the log-likelihood, as in the comparisons on recommendation data; per token with `length_normalize` of
    `preference_loss`. Arguments, result and errors as for `softmax_dpo`.
    """
    return dmpo(policy_logps, torch.zeros_like(policy_logps), beta, mask, label_smoothing)


def preference_loss(
    kind: str,
    policy_logps: Tensor,
    reference_logps: Tensor | None,
    beta: float,
    mask: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    length_normalize: bool = False,
    sft_weight: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of a name with its options, for each row.

    Args:
        kind: one of `PREFERENCE_LOSSES`.
        policy_logps: `[B, 1 + K]` as for `softmax_dpo`.
        reference_logps: the same; None only for a loss of `REFERENCE_FREE`.
        beta: as for `softmax_dpo`.
        mask: as for `softmax_dpo`.
        lengths: `[B, 1 + K]` tokens of every completion, EOS included; needed by the next two.
        length_normalize: whether log-probabilities are divided by the number of the completions' tokens, in
            the policy and in the reference, before rewards are formed. Ranking uses sums, so this is off by
            default.
        sft_weight: weight of the chosen completion's negative log-likelihood (nats a token), which is added:
            it works against the fall of the chosen likelihood (RPO).
        label_smoothing: as for `softmax_dpo`.

    Returns:
        `[B]`, as `softmax_dpo`.

    Raises:
        ValueError: as `softmax_dpo`; for an unknown name; where `lengths` or the reference are missing.
    """
    if kind not in PREFERENCE_LOSSES:
        raise ValueError(f"loss {kind!r} is unknown; wanted one of {', '.join(PREFERENCE_LOSSES)}")
    if (length_normalize or sft_weight) and lengths is None:
        raise ValueError("length_normalize and sft_weight need the completions' lengths; pass lengths=")
    if reference_logps is None and kind not in REFERENCE_FREE:
        raise ValueError(f"loss {kind!r} compares with a reference; pass reference_logps")
    dtype = torch.promote_types(policy_logps.dtype, torch.float32)
    policy = policy_logps.to(dtype)
    reference = None if reference_logps is None else reference_logps.to(dtype)
    # Masked cells may have no length: 1 keeps their gradient 0 instead of 0 / 0.
    num_tokens = torch.ones((), dtype=dtype) if lengths is None else lengths.clamp(min=1).to(dtype)
    if length_normalize:
        policy = policy / num_tokens
        reference = None if reference is None else reference / num_tokens
    if reference is None or kind in REFERENCE_FREE:
        loss = mppo(policy, beta, mask, label_smoothing)
    else:
        function = {"softmax-dpo": softmax_dpo, "dpo-pairwise": pairwise_dpo, "dmpo": dmpo}[kind]
        loss = function(policy, reference, beta, mask, label_smoothing)
    if sft_weight:
        loss = loss - sft_weight * policy_logps[:, 0].to(dtype) / num_tokens[:, 0]
    return loss


@torch.no_grad()
def preference_statistics(
    policy_logps: Tensor,
    reference_logps: Tensor | None,
    beta: float,
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """What is logged beside a loss; none of it measures ranking quality (log HR@1 on valid for that).

    The same for every loss and option, so that curves compare: rewards are of summed log-probabilities.

    Args:
        policy_logps: `[B, 1 + K]` summed log-probabilities under the policy, column 0 the chosen candidate.
        reference_logps: `[B, 1 + K]` the same under the reference; None: rewards are `beta * policy`, and
            there is no `kl`.
        beta: as in `softmax_dpo`.
        mask: as in `softmax_dpo`. Rows without a rejected candidate are left out of every mean but those of
            the chosen candidate.

    Returns:
        Scalars (float32 or float64), means over rows, each row counting once whatever its number of rejected
        candidates:
        `reward_chosen`, `reward_rejected` (mean over the row's rejected candidates), `margin` (chosen minus
        rejected), `reward_accuracy` (share of rows whose chosen reward is above *every* rejected one; ties
        count as wrong), `chosen_logp` and `rejected_logp` (policy, nats, summed over tokens) and `kl`: an
        estimate, in nats, of KL(policy || reference) *restricted and renormalized to the row's candidates*.
        It is exact on that finite set, but says nothing about text outside of it.
    """
    reference = torch.zeros_like(policy_logps) if reference_logps is None else reference_logps
    rewards, present = _rewards(policy_logps, reference, beta, mask)
    dtype = rewards.dtype
    rejected = present[:, 1:]
    is_compared = rejected.any(dim=1)
    mean_rejected = _row_mean(rewards[:, 1:], rejected)
    best_rejected = rewards[:, 1:].masked_fill(~rejected, -torch.inf).amax(dim=1)
    chosen = rewards[:, 0]

    def mean_compared(values: Tensor) -> Tensor:
        """Mean over the rows that have a rejected candidate."""
        return values.masked_fill(~is_compared, 0.0).sum() / is_compared.sum().clamp(min=1)

    statistics = {
        "reward_chosen": chosen.mean(),
        "reward_rejected": mean_compared(mean_rejected),
        "margin": mean_compared(chosen - mean_rejected),
        "reward_accuracy": mean_compared((chosen > best_rejected).to(dtype)),
        "chosen_logp": policy_logps[:, 0].to(dtype).mean(),
        "rejected_logp": mean_compared(_row_mean(policy_logps[:, 1:].to(dtype), rejected)),
    }
    if reference_logps is not None:
        kl = _candidate_kl(policy_logps.to(dtype), reference_logps.to(dtype), present)
        statistics["kl"] = mean_compared(kl)
    return statistics


def num_rows(name: str, mask: Tensor) -> int:
    """How many rows a figure of `preference_statistics` is a mean over.

    Args:
        name: of the figure.
        mask: bool `[B, 1 + K]`, as for `softmax_dpo`.
    """
    if name in OF_ALL_ROWS:
        return len(mask)
    return int(mask[:, 1:].any(dim=1).sum())


def _candidate_kl(policy_logps: Tensor, reference_logps: Tensor, present: Tensor) -> Tensor:
    """KL(policy || reference) over each row's present candidates, renormalized to them, `[B]` nats."""
    policy = policy_logps.masked_fill(~present, -torch.inf).log_softmax(dim=1)
    reference = reference_logps.masked_fill(~present, -torch.inf).log_softmax(dim=1)
    # Masked cells are -inf on both sides; filled with 0 they contribute exp(-inf) * 0 = 0.
    return (policy.exp() * (policy - reference).masked_fill(~present, 0.0)).sum(dim=1)


def _check_smoothing(value: float) -> float:
    if not 0 <= value < 0.5:
        raise ValueError(f"label_smoothing is {value}, want a probability from 0 to below 0.5")
    return value


def _row_mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean of each row over the cells that count, `[B]`; 0 where none does."""
    return values.masked_fill(~where, 0.0).sum(dim=1) / where.sum(dim=1).clamp(min=1)


def _margins(
    policy_logps: Tensor, reference_logps: Tensor, beta: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rejected rewards less the chosen one, 0 in masked cells, and where they count, `[B, K]` each."""
    rewards, present = _rewards(policy_logps, reference_logps, beta, mask)
    rejected = present[:, 1:]
    # The chosen reward is subtracted first: margins stay exact where the rewards themselves are huge.
    margins = (rewards[:, 1:] - rewards[:, :1]).masked_fill(~rejected, 0.0)
    return margins, rejected


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
