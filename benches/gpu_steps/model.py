"""A patched tiny LLaVA: trains to the same losses and generates the same tokens as on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import moda_attn
import tiny
from gpu_steps import Result, run

#: Largest relative difference of a loss: float32 on both sides, other orders of summation, a few steps of training.
TOLERANCE = 1e-3


def train(device: str, steps: int) -> tuple[list[float], list[list[int]]]:
    """Losses of a few steps of training, then generated tokens."""
    model = tiny.build("llava-llama").to(device).train()
    moda_attn.apply(model, moda_attn.ModaConfig())
    inputs = {name: tensor.to(device) for name, tensor in tiny.inputs("llava-llama", ["TTITTTT", "TITTTTI"]).items()}
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    losses = []
    for _ in range(steps):
        loss = model(**inputs, labels=labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        tokens: Tensor = model.eval().generate(**inputs, max_new_tokens=6, do_sample=False)
    return losses, tokens[:, inputs["input_ids"].shape[1] :].tolist()


def model(device: str, quick: bool) -> Iterator[Result]:
    """Losses and tokens here and on the CPU."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    steps = 2 if quick else 8
    here, tokens = train(device, steps)
    yield {"losses": here, "tokens": tokens}
    cpu, cpu_tokens = train("cpu", steps)
    worst = max(abs(a - b) / abs(b) for a, b in zip(here, cpu, strict=True))
    good = worst <= TOLERANCE and tokens == cpu_tokens and here[-1] < here[0]
    yield {
        "outcome": "passed" if good else "failed",
        "losses": here,
        "losses_cpu": cpu,
        "tokens": tokens,
        "tokens_cpu": cpu_tokens,
        "summary": f"loss {here[0]:.4f} to {here[-1]:.4f}, at most {worst:.1e} from the CPU's; "
        f"{'the same' if tokens == cpu_tokens else 'OTHER'} tokens",
    }


if __name__ == "__main__":
    run(model)
