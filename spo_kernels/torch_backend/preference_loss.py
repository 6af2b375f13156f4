"""Torch backend of ``preference_loss``: the kernels' launchers in plain torch.

fp32 arithmetic, fp64 where an input is fp64. Nothing is read back to the host and no loop runs over
pairs or tokens.
"""

import math

import torch
import torch.nn.functional as F

from spo_kernels.calls.checks import compute_dtype
from spo_kernels.calls.loss_table import LOSS_TYPES
from spo_kernels.calls.preference_loss import GRAD_ROWS, Form, LossOptions, PairData, Scored, Side
from spo_kernels.torch_backend import preference_terms as terms
from spo_kernels.torch_backend.segments import segments_of

# a row without its function fails here, at import
TERM_OF = {row.name: getattr(terms, row.name) for row in LOSS_TYPES}
# the first of GRAD_ROWS that a kind's slopes add to, where it is not that of the scores
_FIRST_GRAD_OF = {"policy": 2, "response": 4}
# integers that hold a float's bits, by its bytes
_BITS_OF = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def preference_loss_fwd(
    chosen: Side, rejected: Side, response: Side | None, data: PairData, call: LossOptions
) -> Scored:
    """Return losses, rewards and slopes. Inputs are checked and on one device."""
    sides = [chosen, rejected] if response is None else [chosen, rejected, response]
    dtype = compute_dtype(*(t for side in sides for t in (side.logps, side.ref)))
    tokens = [_Tokens(side.form, side.logps.device) for side in sides]
    tails = None
    if call.ld_alpha is not None:
        shared = torch.minimum(tokens[0].counts(), tokens[1].counts())
        tails = torch.stack([rows.tail_after(shared) for rows in tokens[:2]])
    # sums over tokens are fp64 until the reference's is subtracted: a score is rounded once
    plain = [rows.sum(side.logps, dtype) for side, rows in zip(sides, tokens, strict=True)]
    policy, refs = list(plain), [None] * len(sides)
    for i, (side, rows) in enumerate(zip(sides, tokens, strict=True)):
        weigh = (tails[i], call.ld_alpha) if tails is not None and i < 2 else None
        if weigh is not None:
            policy[i] = rows.sum(side.logps, dtype, weigh)
        if side.ref is not None:
            refs[i] = rows.sum(side.ref, dtype, weigh)
    scores = [
        (value if ref is None else value - ref).to(dtype)
        for value, ref in zip(policy, refs, strict=True)
    ]
    likely = None
    if chosen.log_sum_sq is not None:
        likely = [
            (value - rows.sum(side.log_sum_sq, dtype)).to(dtype)
            for value, side, rows in zip(plain[:2], sides, tokens, strict=False)
        ]
    counts = [None] * len(sides)
    if call.needs_lengths or likely is not None:
        counts[:2] = [_counts(side, rows) for side, rows in zip(sides[:2], tokens, strict=False)]
    if response is not None:
        counts[2] = _counts(response, tokens[2])
    # an output: not the caller's own tensor
    sums = torch.stack([value.to(dtype) for value in plain[:2]])
    plain = [*sums.unbind(), *(value.to(dtype) for value in plain[2:])]

    (c, slope_c), (r, slope_r) = (_divergence(score, call) for score in scores[:2])
    pair = _pair(c, r, scores, plain, policy, refs, counts, data, call)
    weight = _pair_weight(pair, likely, data, call)
    losses, grads, links = None, [None] * len(GRAD_ROWS), []
    for row, scale in zip(call.losses, call.weights, strict=True):
        if weight is not None:
            scale = scale * weight
        loss, *slopes = TERM_OF[row.name](pair, call.parameters)
        links.append((row, scale, slopes[2] if len(slopes) > 2 else None))
        losses = _add(losses, loss, scale)
        for i, slope in enumerate(slopes[:2], _FIRST_GRAD_OF.get(row.kind, 0)):
            if slope is not None:
                grads[i] = _add(grads[i], slope, scale)
    zero = torch.zeros_like(c)
    grads = [zero if grad is None else grad for grad in grads]
    if slope_c is not None:
        grads[0], grads[1] = grads[0] * slope_c, grads[1] * slope_r
    if weight is not None:
        # a pair that counts nothing has no part in the loss, whatever its own is
        losses, *grads = (value.masked_fill(weight == 0, 0.0) for value in (losses, *grads))
    rewards = call.parameters.beta * torch.stack(scores[:2])
    scored = Scored(losses, rewards, sums, torch.stack(grads), tails)
    return scored if not call.is_batch else scored._replace(**_links(links, call, c))


def _add(
    total: torch.Tensor | None, value: torch.Tensor, scale: float | torch.Tensor
) -> torch.Tensor:
    """Return ``total + scale * value``; a total of None counts as 0."""
    if isinstance(scale, torch.Tensor) or scale != 1.0:
        value = scale * value
    return value if total is None else total + value


def preference_loss_bwd(
    grad_losses: torch.Tensor,
    scored: Scored,
    forms: tuple[Form, Form, Form | None],
    call: LossOptions,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of the three responses' log-probs, None where not needed."""
    grads = scored.grads * grad_losses
    if call.is_batch:
        upstream = grad_losses.to(grads.dtype)
        for i, row in enumerate(call.losses):
            if row.kind == "ranked":
                grads[:2].add_(scored.rank_grads[i] * upstream.take(scored.ranks[i]))
            elif row.kind == "statistic":
                loss_slope, statistic_slope = scored.stats[i]
                # inf * 0 is NaN: the product is 0 where either factor is 0
                moved = (loss_slope * upstream).masked_fill(upstream == 0, 0.0).sum()
                shared = (moved * statistic_slope).masked_fill(statistic_slope == 0, 0.0)
                grads[0].add_(shared)
                grads[1].sub_(shared)
    *scores, plain_c, plain_r, third = grads.unbind()
    plains = (plain_c + scores[0], plain_r + scores[1], third)
    out = []
    for i, (form, needed) in enumerate(zip(forms, needs, strict=True)):
        if not needed:
            out.append(None)
            continue
        if not form.has_tokens:
            out.append(plains[i].to(form.dtype))
            continue
        rows = _Tokens(form, grads.device)
        value = rows.spread(plains[i])
        if scored.tails is not None and i < 2:
            beyond = rows.is_tail(scored.tails[i])
            less = rows.spread((1.0 - call.ld_alpha) * scores[i])
            value = torch.where(beyond, value - less, value)
        out.append(rows.masked(value).to(form.dtype))
    return tuple(out)


class _Tokens:
    """Where each pair's tokens of one response are."""

    def __init__(self, form: Form, device: torch.device):
        self.form, self.device = form, device
        self.counted = form.mask
        if form.mask is not None and form.mask.dtype != torch.bool:
            self.counted = form.mask != 0
        self.segments = None
        if form.has_tokens and form.offsets is not None:
            # the last slot takes the tokens that no response holds
            self.segments = segments_of(form.offsets, form.shape.numel())

    def masked(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return ``tokens``, or values that broadcast to them, 0 where they do not count."""
        if self.counted is None:
            return tokens
        # bits times 0 or 1, the cheapest product that leaves no NaN at a token that does not count
        bits = tokens.view(_BITS_OF[tokens.element_size()])
        return (bits * self.counted).view(tokens.dtype)

    def sum(
        self,
        values: torch.Tensor,
        dtype: torch.dtype,
        weigh: tuple[torch.Tensor, float] | None = None,
    ) -> torch.Tensor:
        """Return the fp64 sum of each pair's tokens ``[P]``; sums are returned, in ``dtype``."""
        if values.dim() == 1:
            return values.to(dtype)
        # a sum over strided rows would round in another order
        values = self.masked(values.contiguous())
        if weigh is not None:
            values = values.double()
            values = torch.where(self.is_tail(weigh[0]), weigh[1] * values, values)
        return self._total(values, torch.float64)

    def counts(self) -> torch.Tensor:
        """Return how many tokens of each pair count ``[P]`` int64."""
        return self._total(self._ones(), torch.int64)

    def _ones(self) -> torch.Tensor:
        """Return True at each token that counts ``[B, T]``."""
        if self.counted is not None:
            return self.counted
        return torch.ones(self.form.shape, dtype=torch.bool, device=self.device)

    def _total(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self.segments is None:
            return values.sum(1, dtype=dtype)
        out = torch.zeros(self.form.pairs + 1, dtype=dtype, device=self.device)
        return out.index_add_(0, self.segments, values.reshape(-1).to(dtype))[:-1]

    def tail_after(self, shared: torch.Tensor) -> torch.Tensor:
        """Return the first flat token after the first ``shared`` ones that count ``[P]``."""
        running = F.pad(self._ones().reshape(-1).cumsum(0), (1, 0))
        if self.form.offsets is not None:
            starts, ends = self.form.offsets[:-1], self.form.offsets[1:]
        else:
            T = self.form.shape[1]
            starts = torch.arange(self.form.pairs, device=self.device) * T
            ends = starts + T
        # the running count is sorted, so the first token beyond the shared ones is a search
        tail = torch.searchsorted(running[1:].contiguous(), running[starts] + shared, right=True)
        return torch.minimum(tail, ends)

    def is_tail(self, tail: torch.Tensor) -> torch.Tensor:
        """Return which tokens lie at or after their pair's ``tail``, in the shape of the tokens."""
        places = torch.arange(self.form.shape.numel(), device=self.device)
        return places.view(self.form.shape) >= self.spread(tail)

    def spread(self, value: torch.Tensor) -> torch.Tensor:
        """Return ``[P]`` values at each of their pair's tokens, 0 at no pair's."""
        if self.segments is None:
            return value.unsqueeze(1).expand(self.form.shape)
        return F.pad(value, (0, 1))[self.segments].view(self.form.shape)


def _counts(side: Side, rows: _Tokens) -> torch.Tensor | None:
    """Return the completion lengths ``[P]``, None where they were not given."""
    if side.lengths is not None:
        return side.lengths
    return None if side.mask is None else rows.counts()


def _pair(
    c: torch.Tensor,
    r: torch.Tensor,
    scores: list[torch.Tensor],
    plain: list[torch.Tensor],
    policy: list[torch.Tensor],
    refs: list[torch.Tensor | None],
    counts: list[torch.Tensor | None],
    data: PairData,
    call: LossOptions,
) -> terms.Pair:
    """Gather the inputs of the loss types' functions."""
    dtype = c.dtype
    P, has_response = c.numel(), len(plain) > 2
    reward_c = reward_r = None
    if data.reward_chosen is not None:
        reward_c, reward_r = data.reward_chosen.to(dtype), data.reward_rejected.to(dtype)
    ratio = ref_ratio = None
    if any(row.kind == "ranked" for row in call.losses):
        ratio = policy[0].to(dtype) - policy[1].to(dtype)
        ref_ratio = torch.zeros_like(c)
        if refs[0] is not None:
            ref_ratio = refs[0].to(dtype) - refs[1].to(dtype)
    # an empty completion has score 0 and must not divide by 0
    lengths = [None if count is None else count.clamp(min=1).to(dtype) for count in counts]
    share_c = share_cr = share_x = None
    if call.is_batch:
        if counts[0] is not None:
            share_c = _share(counts[0].sum(), P, dtype)
        if reward_c is not None and counts[0] is not None and counts[1] is not None:
            share_cr = _share(counts[0].sum() + counts[1].sum(), P, dtype)
        if has_response and counts[2] is not None:
            share_x = _share(counts[2].sum(), P, dtype)
    return terms.Pair(
        c=c,
        r=r,
        pc=plain[0],
        pr=plain[1],
        ratio=ratio,
        ref_ratio=ref_ratio,
        len_c=lengths[0],
        len_r=lengths[1],
        x=scores[2] if has_response else None,
        px=plain[2] if has_response else None,
        len_x=lengths[2] if has_response else None,
        reward_c=reward_c,
        reward_r=reward_r,
        share_c=share_c,
        share_cr=share_cr,
        share_x=share_x,
    )


def _share(tokens: torch.Tensor, P: int, dtype: torch.dtype) -> torch.Tensor:
    """Return P / tokens, the factor that turns a mean over pairs into one over tokens."""
    return P / tokens.clamp(min=1).to(dtype)


def _divergence(c: torch.Tensor, call: LossOptions) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return f' of a log-ratio and its slope, None for the identity."""
    if call.divergence == "reverse_kl":
        return c, None
    if call.divergence == "js_divergence":
        return math.log(2.0) - terms.softplus(-c), torch.sigmoid(-c)
    power = -1.0 if call.divergence == "forward_kl" else call.divergence_power
    exponent = power * c
    cut = exponent.clamp(max=terms.LARGEST_EXPONENT)
    slope = torch.exp(cut).masked_fill(exponent > terms.LARGEST_EXPONENT, 0.0)
    return torch.expm1(cut) / power, slope


def _pair_weight(
    pair: terms.Pair, likely: list[torch.Tensor] | None, data: PairData, call: LossOptions
) -> torch.Tensor | None:
    """Return the weight of each pair ``[P]``, without a gradient."""
    weight = None if data.weights is None else data.weights.to(pair.c.dtype)
    if likely is not None:
        likelihood = torch.exp(likely[0] / pair.len_c + likely[1] / pair.len_r)
        weight = likelihood if weight is None else weight * likelihood
    if call.parameters.min_reward_margin > 0:
        margin = (pair.reward_c - pair.reward_r).abs()
        # a NaN reward must not pass for a filtered pair
        is_near = margin < call.parameters.min_reward_margin
        kept = torch.ones_like(margin).masked_fill(is_near, 0.0)
        weight = kept if weight is None else weight * kept
    return weight


def _links(links: list, call: LossOptions, like: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return ranks, rank_grads and stats of the batch types of the mix."""
    found = {}
    if any(row.kind == "ranked" for row, _, _ in links):
        none = torch.zeros(2, like.numel(), dtype=torch.int64, device=like.device)
        found["ranks"] = torch.stack(
            [link.ranks if row.kind == "ranked" else none for row, _, link in links]
        )
        none = none.to(like.dtype)
        found["rank_grads"] = torch.stack(
            [
                _add(None, link.slopes, scale) if row.kind == "ranked" else none
                for row, scale, link in links
            ]
        )
    if any(row.kind == "statistic" for row, _, _ in links):
        stats = found["stats"] = like.new_zeros(len(links), 2, like.numel())
        for i, (row, scale, link) in enumerate(links):
            if row.kind == "statistic":
                stats[i, 0] = scale * link.loss_slope
                stats[i, 1] = call.parameters.beta * link.statistic_slope
    return found
