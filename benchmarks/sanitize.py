"""``python -m benchmarks.sanitize``: every kernel on toy shapes, under compute-sanitizer.

Without ``--only-launch`` this starts itself under each asked tool and reads its verdict; a machine
without compute-sanitizer, or on which it cannot attach, is left out with a sentence. With it, it
launches and returns: what runs under a tool, and what runs without one first, so that kernels are
compiled outside the tool.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import torch

from benchmarks.results import ROOT
from spo_kernels import (
    bradley_terry_loss,
    degree_loss,
    linear_logprob,
    linear_preference_loss,
    listwise_preference_loss,
    preference_loss,
    unpaired_preference_loss,
)
from spo_kernels.calls.plan import OUTPUTS

TOOLS = ("memcheck", "initcheck", "racecheck")
_ERRORS_FOUND = 99
# what it prints where it is installed but of no use
_CANNOT_RUN = ("Device not supported", "Unable to", "no CUDA-capable device")
_STRATEGIES = {
    "score": (),
    "direction": ("hidden", "lora_a"),
    "resident": ("hidden", "weight", "bias", "lora_a", "lora_b"),
    "recompute": ("hidden", "weight", "bias", "lora_a", "lora_b"),
}
# dtype, H, V, extras: rows of 16 bytes take the tensor memory accelerator where there is one
_SHAPES = (
    (torch.bfloat16, 48, 300, True),
    (torch.bfloat16, 48, 300, False),
    (torch.bfloat16, 33, 130, True),
    (torch.float16, 48, 300, True),
    (torch.float32, 33, 130, True),
)
# of its own pair alone, with a third response, sorted over the batch, with a batch statistic
_PAIR_LOSSES = ("sigmoid", "nll", "aot", "aqfl")


def main(arguments: list[str] | None = None) -> int:
    """Launch every kernel under compute-sanitizer; 1 where a tool found something."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=["memcheck"])
    parser.add_argument("--device", default="cuda", help="cpu: triton's interpreter")
    parser.add_argument("--seconds", type=float, default=600.0, help="limit of each process")
    parser.add_argument("--only-launch", action="store_true", help="launch, without a tool")
    options = parser.parse_args(arguments)
    if options.only_launch:
        for name in launches(options.device):
            print(name, flush=True)
        return 0
    program = sanitizer()
    if program is None:
        print("compute-sanitizer left out: it is not installed. It is part of the CUDA toolkit.")
        return 0
    # fills triton's cache: under a tool each of its processes would be slower
    if run_under([], options)[0] != 0:
        return 1
    failed = [tool for tool in options.tools if not passes(program, tool, options)]
    return 1 if failed else 0


def sanitizer() -> str | None:
    """Return the program, looked for on the path and in the CUDA toolkit."""
    found = shutil.which("compute-sanitizer")
    if found is None:
        folders = ("bin", "compute-sanitizer")
        places = os.pathsep.join(f"/usr/local/cuda/{folder}" for folder in folders)
        found = shutil.which("compute-sanitizer", path=places)
    return found


def passes(program: str, tool: str, options: argparse.Namespace) -> bool:
    """Return whether a tool found nothing; where it does not work here that is said instead."""
    command = [program, "--tool", tool, "--error-exitcode", str(_ERRORS_FOUND)]
    # the compiler's processes launch no kernel
    command += ["--target-processes", "application-only", "--print-limit", "20"]
    code, lines = run_under(command, options)
    own_lines = (line for line in lines if line.startswith("====="))
    reason = next((line for line in own_lines if any(text in line for text in _CANNOT_RUN)), None)
    if code not in (0, _ERRORS_FOUND) and reason is not None:
        print(f"{tool} left out: {reason.strip()}", flush=True)
        return True
    print(f"{tool}: {'something' if code else 'nothing'} found", flush=True)
    return code == 0


def run_under(command: list[str], options: argparse.Namespace) -> tuple[int, list[str]]:
    """Launch everything behind a command's words; return exit status and output, show a fault."""
    own = [sys.executable, "-m", "benchmarks.sanitize", "--only-launch", "--device", options.device]
    # each tensor its own allocation: a read past its end does not land in a neighbour
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            [*command, *own],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=options.seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        print(f"{' '.join(command[:3]) or 'the launches'}: out of time after {options.seconds:g} s")
        return 1, []
    lines = done.stdout.splitlines()
    if done.returncode != 0:
        print("\n".join(lines[-60:]), flush=True)
    return done.returncode, lines


def launches(device: str) -> Iterator[str]:
    """Run every op once for each way it takes through the kernels; yield what ran."""
    for parts in (_linear_logprob, _linear_preference, _preference, _other_losses, _degree):
        for name in parts(device):
            if device.startswith("cuda"):
                # a fault shows here, not three ops later
                torch.cuda.synchronize()
            yield name


def _linear_logprob(device: str) -> Iterator[str]:
    N, R = 37, 5
    for dtype, H, V, extras in _SHAPES:
        for strategy, needs in _STRATEGIES.items():
            tensors = {"hidden": _normal(N, H, device=device, dtype=dtype)}
            tensors["weight"] = _normal(V, H, device=device, dtype=dtype)
            lora, options = None, {}
            if extras:
                tensors["bias"] = _normal(V, device=device, dtype=dtype)
                tensors["lora_a"] = _normal(N, R, device=device, dtype=dtype)
                tensors["lora_b"] = _normal(V, R, device=device, dtype=dtype)
                lora = (tensors["lora_a"], tensors["lora_b"])
                options = {"softcap": 5.0, "temperature": 1.3}
            leaves = [tensors[name].requires_grad_() for name in needs if name in tensors]
            labels = torch.randint(V, (N,), device=device)
            labels[3] = -100
            out = linear_logprob(
                tensors["hidden"],
                tensors["weight"],
                labels,
                bias=tensors.get("bias"),
                lora=lora,
                outputs=OUTPUTS if extras else ("logps",),
                strategy=strategy,
                backend="triton",
                **options,
            )
            if leaves:
                torch.autograd.grad(out.logps.sum(), leaves, retain_graph=extras)
                if extras:
                    total = out.entropy.sum() + out.mean_logits.sum()
                    torch.autograd.grad(total, leaves)
            yield f"linear_logprob {dtype} H {H} V {V} {strategy}"


def _linear_preference(device: str) -> Iterator[str]:
    P, T, H, V = 2, 19, 48, 300
    for strategy in ("pairwise", "recompute"):
        hidden = _normal(2 * P, T, H, device=device, dtype=torch.bfloat16).requires_grad_()
        weight = _normal(V, H, device=device, dtype=torch.bfloat16).requires_grad_()
        labels = torch.randint(V, (2 * P, T), device=device)
        out = linear_preference_loss(hidden, weight, labels, strategy=strategy, backend="triton")
        torch.autograd.grad(out.loss, (hidden, weight))
        yield f"linear_preference_loss {strategy}"


def _preference(device: str) -> Iterator[str]:
    P, T = 21, 50
    for has_tokens in (False, True):
        for loss_type in _PAIR_LOSSES:
            shape = (P, T) if has_tokens else (P,)
            sides = ("chosen", "rejected", *(("response",) if loss_type == "nll" else ()))
            leaves, options = [], {}
            for side in sides:
                leaf, ref = (-_normal(*shape, device=device).abs() for _ in range(2))
                leaves.append(leaf.requires_grad_())
                options[f"{side}_logps"], options[f"ref_{side}_logps"] = leaf, ref
                if has_tokens:
                    options[f"{side}_mask"] = torch.rand(P, T, device=device) > 0.3
                else:
                    options[f"{side}_lengths"] = torch.randint(1, T, (P,), device=device)
            if loss_type == "sigmoid":
                options["pair_weights"] = torch.rand(P, device=device)
            out = preference_loss(**options, loss_type=loss_type, backend="triton")
            torch.autograd.grad(out.losses.sum(), leaves, allow_unused=True)
            yield f"preference_loss {loss_type} {'tokens' if has_tokens else 'sums'}"


def _other_losses(device: str) -> Iterator[str]:
    S, N = 7, 61
    offsets = torch.tensor([0, 3, 3, 20, 31, 40, 60, N], device=device)
    desirable = torch.arange(S, device=device) % 2 == 0
    for loss_type in ("kto", "bco"):
        for segments in (None, offsets):
            size = S if segments is None else N
            logps = _normal(size, device=device).requires_grad_()
            ref = _normal(size, device=device)
            kl = {}
            if loss_type == "kto":
                kl = {"kl_logps": _normal(S, device=device)}
                kl["ref_kl_logps"] = _normal(S, device=device)
            out = unpaired_preference_loss(
                logps,
                ref,
                desirable,
                loss_type=loss_type,
                segment_offsets=segments,
                backend="triton",
                **kl,
            )
            torch.autograd.grad(out.losses.sum(), logps)
            yield f"unpaired_preference_loss {loss_type} {'sums' if segments is None else 'tokens'}"
    for loss_type in ("neural_ndcg", "lipo_lambda"):
        logps = _normal(5, 9, device=device).requires_grad_()
        labels, mask = torch.rand(5, 9, device=device), torch.rand(5, 9, device=device) > 0.2
        out = listwise_preference_loss(
            logps, labels, loss_type=loss_type, mask=mask, backend="triton"
        )
        torch.autograd.grad(out.losses.sum(), logps)
        yield f"listwise_preference_loss {loss_type}"
    rewards = [_normal(9, device=device).requires_grad_() for _ in range(2)]
    margins = torch.rand(9, device=device)
    out = bradley_terry_loss(*rewards, margins, center_rewards_coefficient=0.1, backend="triton")
    torch.autograd.grad(out.losses.sum(), rewards)
    yield "bradley_terry_loss"


def _degree(device: str) -> Iterator[str]:
    N, H, K = 75, 70, 4
    offsets = torch.tensor([0, 3, 3, 40, N], device=device)
    for dtype in (torch.bfloat16, torch.float32):
        for center in (False, True):
            hidden = _normal(N, H, device=device, dtype=dtype).requires_grad_()
            levels = torch.randint(K, (N,), device=device).to(torch.int8)
            head = [_normal(K, H, device=device), _normal(K, device=device)]
            leaves = [hidden, *(tensor.requires_grad_() for tensor in head)]
            out = degree_loss(hidden, levels, offsets, *head, center_views=center, backend="triton")
            torch.autograd.grad(out.losses.sum(), leaves)
            yield f"degree_loss {dtype} center {center}"


def _normal(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(dtype)


if __name__ == "__main__":
    raise SystemExit(main())
