"""The classifier of preference degrees: a linear layer whose forward is ``degree_loss``."""

import torch
from torch import nn

from spo_kernels import DegreeLossOutput, degree_loss


class DegreeHead(nn.Linear):
    """Linear head ``[K, H]``, or ``[2K, H]`` when chosen and rejected have a head each.

    It is called as a module, since sharding engines gather the weights of modules that are called.
    """

    def __init__(
        self,
        hidden_size: int,
        num_degrees: int,
        *,
        share: bool = True,
        center_views: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
    ):
        self.num_degrees = num_degrees
        self.share = share
        self.center_views = center_views
        self.backend = backend
        rows = num_degrees if share else 2 * num_degrees
        # half-precision weights would not keep the small steps of the optimizer
        super().__init__(hidden_size, rows, device=device, dtype=torch.float32)

    def reset_parameters(self) -> None:
        """Start from zero: alike on every rank, and no random number of the run is used up."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(
        self,
        hidden: torch.Tensor,  # [N, H]
        removal_levels: torch.Tensor,  # [N] int8
        segment_offsets: torch.Tensor,  # [S + 1], chosen responses first
    ) -> DegreeLossOutput:
        """Return the degree loss of every response."""
        if self.share:
            return self._loss(hidden, removal_levels, segment_offsets, self.weight, self.bias)
        middle = segment_offsets.numel() // 2
        sides = (segment_offsets[: middle + 1], segment_offsets[middle:])
        parts = [
            self._loss(hidden, removal_levels, offsets, weight, bias)
            for offsets, weight, bias in zip(
                sides, self.weight.chunk(2), self.bias.chunk(2), strict=True
            )
        ]
        return DegreeLossOutput(*(torch.cat(pair) for pair in zip(*parts, strict=True)))

    def _loss(
        self,
        hidden: torch.Tensor,
        removal_levels: torch.Tensor,
        segment_offsets: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
    ) -> DegreeLossOutput:
        return degree_loss(
            hidden,
            removal_levels,
            segment_offsets,
            weight,
            bias,
            center_views=self.center_views,
            backend=self.backend,
        )
