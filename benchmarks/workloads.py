"""The shapes every provider runs on, and the tensors of one shape.

Symbols: N rows scored, H hidden, V vocab. Inputs are ``random`` (logit standard deviation 1, labels
uniform) or ``peaked`` (5.7, labels drawn from the softmax), since trained models are peaked.
"""

import dataclasses

import torch

_PEAKED_STD = 5.7
_DRAW_ELEMENTS = 1 << 25

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Workload:
    """One shape with its dtype, which inputs train, and how its logits are distributed."""

    shape: str
    rows: int
    hidden: int
    vocab: int
    dtype: str = "bf16"
    trainable: bool = False
    peaked: bool = False

    @property
    def name(self) -> str:
        head = "trainable" if self.trainable else "frozen"
        kind = "peaked" if self.peaked else "random"
        return f"{self.shape}-n{self.rows}-{self.dtype}-{head}-{kind}"

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients a forward + backward returns, whoever computes them."""
        elements = self.rows * self.hidden + self.trainable * self.vocab * self.hidden
        return elements * DTYPES[self.dtype].itemsize


@dataclasses.dataclass(frozen=True)
class Tensors:
    """What every provider of a workload is given: the same tensors."""

    hidden: torch.Tensor  # [N, H]
    weight: torch.Tensor  # [V, H]
    labels: torch.Tensor  # [N] int64
    upstream: torch.Tensor  # [N] fp32, the gradient that arrives at the log-probs

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [tensor for tensor in (self.hidden, self.weight) if tensor.requires_grad]


# (H, V) of models people train
MODEL_SHAPES = {
    "qwen05": (896, 151936),
    "llama1b": (2048, 128256),
    "gemma1b": (1152, 262144),
    "llama8b": (4096, 128256),
    "trl7244": (4096, 151936),
}
BAR = Workload("bar", 2048, 512, 32000, "fp32")
TINY = Workload("tiny", 24, 16, 300, "fp32")
ACCURACY = Workload("accuracy", 512, 256, 8192)


def both_heads(workload: Workload) -> list[Workload]:
    """Return the workload with a frozen and with a trainable head."""
    return [dataclasses.replace(workload, trainable=trainable) for trainable in (False, True)]


def cpu_grid() -> list[Workload]:
    """Return the model shapes at a size a CPU finishes: an eighth of the vocabulary, few rows."""
    grid = []
    for shape in ("qwen05", "gemma1b"):
        hidden, vocab = MODEL_SHAPES[shape]
        grid += both_heads(Workload(f"{shape}/8", 256, hidden, vocab // 8, "fp32", peaked=True))
    return grid


def cpu_sweep() -> list[Workload]:
    """Return N by fours at one shape: the GPU's 256 to 131072 with N, H and V scaled down."""
    sweep = []
    for rows in (64, 256, 1024, 4096):
        sweep += both_heads(Workload("sweep", rows, 256, 8192, "fp32"))
    return sweep


def gpu_grid(*, long: bool) -> list[Workload]:
    """Return the GPU workloads in order of value; ``long`` adds the remaining shapes and sizes.

    One shape at four N already in the default form: the pictures over N.
    """
    first = [("trl7244", 8192), ("qwen05", 8192)]
    first += [("trl7244", rows) for rows in (2048, 256, 32768)]
    grid = [workload for shape, rows in first for workload in _peaked(shape, rows)]
    if long:
        for rows in (2048, 8192, 32768, 131072, 256):
            for shape in MODEL_SHAPES:
                if (shape, rows) not in first:
                    grid += _peaked(shape, rows)
    return grid


def _peaked(shape: str, rows: int) -> list[Workload]:
    return both_heads(Workload(shape, rows, *MODEL_SHAPES[shape], peaked=True))


def make_tensors(workload: Workload, device: str, *, seed: int = 0) -> Tensors:
    """Return the workload's tensors, the same for the same seed on the same kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    N, H, V = workload.rows, workload.hidden, workload.vocab
    dtype = DTYPES[workload.dtype]

    def normal(*shape: int, scale: float) -> torch.Tensor:
        value = torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)
        return value.mul_(scale).to(dtype)

    hidden = normal(N, H, scale=1.0)
    weight = normal(V, H, scale=(_PEAKED_STD if workload.peaked else 1.0) * H**-0.5)
    if workload.peaked:
        labels = torch.empty(N, dtype=torch.int64, device=device)
        step = max(1, _DRAW_ELEMENTS // V)
        for start in range(0, N, step):
            logits = (hidden[start : start + step] @ weight.T).float()
            # the largest logit plus Gumbel noise is a draw from the softmax
            noise = torch.empty_like(logits).exponential_(generator=generator).log_()
            labels[start : start + step] = (logits - noise).argmax(-1)
    else:
        labels = torch.randint(V, (N,), generator=generator, device=device)
    upstream = torch.randn(N, generator=generator, device=device) * 0.1
    return Tensors(
        hidden.requires_grad_(), weight.requires_grad_(workload.trainable), labels, upstream
    )
