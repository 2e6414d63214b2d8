"""One rank of two, run as a program by test_hf_distributed.py: `two_ranks.py RANK STORE FOLDER`.

Every case trains a tiny model on this rank's row of the batch and reports the mean of both ranks' losses; rank 0 writes
them all to FOLDER/results.json. A case that raises reports its message.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel

import moda_attn
import tiny
from moda_attn import ModaConfig
from moda_attn.analysis import generation_balance

WORLD = 2
STEPS = 3
LOW_RATE = 0.004  # steps of bfloat16 that do not multiply its rounding

#: Every mask, every way of aligning, with and without the prior: what each trains must take part in every step.
CONFIGS = {
    "default": ModaConfig(),
    "released": ModaConfig.released(),
    "fixed": ModaConfig(mask="fixed", align=("vision",), fuser_rank=2),
    "learned": ModaConfig(mask="learned", align=("text",), combine="split", basis="gram"),
    "none": ModaConfig(mask="none", location_prior=False, layers=(1,)),
    "prior": ModaConfig(mask="none", align=()),
    "mlp": ModaConfig(aligner="mlp2_gelu", location_prior=False),
    "three modalities": ModaConfig(num_modalities=3, align=(0, 1, 2), combine="split"),
}


def rows(*spelled: str) -> dict[str, Tensor]:
    """A batch, one row a rank; each supervises as many tokens, so that the mean of the losses is the whole loss."""
    x = tiny.inputs("llava-llama", list(spelled))
    labels = x["input_ids"].clone()
    labels[:, :-3] = -100
    return x | {"labels": labels}


def share(x: dict[str, Tensor], rank: int, images: tuple[int, ...]) -> dict[str, Tensor]:
    """What of the batch belongs to one rank, whose rows have that many images."""
    mine = {name: tensor[rank : rank + 1] for name, tensor in x.items() if name != "pixel_values"}
    first = sum(images[:rank])
    if images[rank]:
        mine["pixel_values"] = x["pixel_values"][first : first + images[rank]]
    return mine


def build(config: ModaConfig | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(7)  # some parameters start at random
    model = tiny.build(dtype=dtype).train()
    moda_attn.apply(model, config)
    tiny.randomise(model)
    freeze_vision(model)
    return model


def freeze_vision(model: nn.Module) -> None:
    """LLaVA itself leaves these without a gradient where no image comes."""
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)


def only_moda(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".moda." in name)
    return model


def train(
    model: nn.Module, x: dict[str, Tensor], *, ranks: int = WORLD, steps: int = STEPS, lr: float = 0.02
) -> list[float]:
    """Losses over a few steps, averaged over the ranks."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(**x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().float()
        if ranks > 1:
            dist.all_reduce(total)
        losses.append(total.item() / ranks)
    return losses


def shard(model: nn.Module, *, own_parts: bool = False, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    """As docs/fine-tune.md says: layers, then the model; MODA's parts first where their dtype is another one."""
    options: dict[str, Any] = {} if policy is None else {"mp_policy": policy}
    for layer in model.model.language_model.layers:
        for part in layer.self_attn.moda.children() if own_parts else ():
            fully_shard(part, **options)
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def fsdp1(model: nn.Module) -> nn.Module:
    """In torch's first FSDP, each layer of the decoder by itself."""
    layers = {type(layer) for layer in model.model.language_model.layers}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls itself deprecated
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=partial(transformer_auto_wrap_policy, transformer_layer_cls=layers),
            device_id=torch.device("cpu"),
            use_orig_params=True,
        )


def watched_by_the_trainer(rank: int, folder: Path, *, fsdp: bool = False) -> list[dict[str, Any]]:
    """What the Trainer has logged of the attention balance, measured at every step of a distributed training."""
    from transformers import Trainer, TrainingArguments

    from moda_attn.hf import BalanceCallback

    # What a launcher sets; the ranks have met already, so that nothing listens at the address.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ |= {"WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}
    whole = rows("TTITTT", "TITTTT")
    data = [{name: tensor[row] for name, tensor in whole.items()} for row in range(WORLD)]
    settings = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "per_device_train_batch_size": 1}
    settings["max_grad_norm"] = 0.0  # of a shard it would be another norm
    arguments = TrainingArguments(output_dir=str(folder / "run"), use_cpu=True, max_steps=STEPS, **settings)

    class Sharding(Trainer):
        """As the Trainer itself does with the first FSDP, which accelerate offers on GPUs alone."""

        def _wrap_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            wrapped, self.optimizer = fsdp1(model), None
            self.create_optimizer(wrapped)
            return wrapped

        def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
            prepared = super()._prepare_for_training(*args, **kwargs)
            self.model = self.model_wrapped
            return prepared

    trainer = (Sharding if fsdp else Trainer)(build(), arguments, train_dataset=data)
    trainer.add_callback(BalanceCallback(trainer, whole, every=1))
    trainer.train()
    assert isinstance(trainer.model_wrapped, FullyShardedDataParallel if fsdp else DistributedDataParallel)
    return [entry for entry in trainer.state.log_history if "balance/text/disparity" in entry]


BATCHES = {"images": (rows("TTITTT", "TITTTT"), (1, 1)), "one rank without": (rows("TTITTT", "TTTTTTT"), (1, 0))}
#: Every configuration where it is hardest, one where it is easy.
GRID = [("images", "default"), *(("one rank without", name) for name in CONFIGS)]


def checkpointed(model: nn.Module, reentrant: bool) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def ddp_cases(rank: int) -> dict[str, Callable[[], Any]]:
    x = share(BATCHES["images"][0], rank, BATCHES["images"][1])

    def trained(batch: str, name: str) -> list[float]:
        # Without unused parameters, which is the default: the second step raises when one took no part in the first.
        return train(DistributedDataParallel(build(CONFIGS[name])), share(BATCHES[batch][0], rank, BATCHES[batch][1]))

    def with_checkpoints(reentrant: bool) -> list[float]:
        return train(DistributedDataParallel(checkpointed(build(), reentrant), static_graph=True), x)

    def applied_late() -> None:
        model = tiny.build().train()
        freeze_vision(model)
        wrapped = DistributedDataParallel(model)
        moda_attn.apply(model)
        train(wrapped, x)

    grid = {f"ddp/{batch}/{name}": partial(trained, batch, name) for batch, name in GRID}
    return grid | {
        "ddp/reentrant checkpoints": partial(with_checkpoints, True),
        "ddp/checkpoints": partial(with_checkpoints, False),
        "ddp/applied late": applied_late,
    }


def fsdp_cases(rank: int, folder: Path) -> dict[str, Callable[[], Any]]:
    low = torch.bfloat16
    x = share(BATCHES["images"][0], rank, BATCHES["images"][1])
    x_low = x | {"pixel_values": x["pixel_values"].to(low)}
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)

    def trained(batch: str, name: str) -> list[float]:
        return train(shard(build(CONFIGS[name])), share(BATCHES[batch][0], rank, BATCHES[batch][1]))

    def saved() -> list[float]:
        """The next loss of a model, and that of another one which loaded what the first had saved."""
        model, other = (shard(only_moda(build())) for _ in range(2))
        train(model, x)
        moda_attn.save_pretrained(model, folder / "sharded")
        dist.barrier()
        moda_attn.load_pretrained(other, folder / "sharded")
        return train(model, x, steps=1) + train(other, x, steps=1)

    def applied_late() -> None:
        model = tiny.build()
        for layer in model.model.language_model.layers:
            fully_shard(layer)
        moda_attn.apply(model)

    grid = {f"fsdp/{batch}/{name}": partial(trained, batch, name) for batch, name in GRID}

    def balance_in_fsdp1(model: nn.Module) -> list[float]:
        """Of a model and, sharded by the first FSDP, of the same one; and the layers that were found."""
        whole = moda_attn.attention_balance(model, **x)
        sharded = moda_attn.attention_balance(fsdp1(model), **x)
        return [whole.of(0).disparity, sharded.of(0).disparity, len(sharded.layers)]

    return grid | {
        "fsdp1/balance": lambda: balance_in_fsdp1(build()),
        "fsdp1/balance of an unpatched model": lambda: balance_in_fsdp1(tiny.build()),
        "fsdp1/generation": lambda: generation_balance(fsdp1(build()), **x, max_new_tokens=2),
        "fsdp/reentrant checkpoints": lambda: train(shard(checkpointed(build(), True)), x),
        "fsdp/checkpoints": lambda: train(shard(checkpointed(build(), False)), x),
        "fsdp/own parts": lambda: train(shard(build(), own_parts=True), x),
        "fsdp/bfloat16": lambda: train(shard(build(dtype=low), own_parts=True), x_low, lr=LOW_RATE),
        "fsdp/mixed precision": lambda: train(shard(build(), policy=policy), x, lr=LOW_RATE),
        "fsdp/saved": saved,
        "fsdp/balance": lambda: moda_attn.attention_balance(shard(build()), **x).of(0).disparity,
        "fsdp/applied late": applied_late,
        "fsdp/removed": lambda: moda_attn.remove(shard(build())),
    }


def main(rank: int, store: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    results: dict[str, Any] = {}
    watched = partial(watched_by_the_trainer, rank, folder)
    cases = {
        **ddp_cases(rank),
        **fsdp_cases(rank, folder),
        "trainer": watched,
        "trainer/fsdp1": partial(watched, fsdp=True),
    }
    for name, case in cases.items():
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            try:
                results[name] = case()
            except (RuntimeError, ValueError) as error:
                results[name] = f"{type(error).__name__}: {error}"
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
    # A thread of gloo's may still hold the last tensors; where the interpreter ends before it lets go of them, torch
    # aborts the process (pytorch/pytorch#179291). All results are written.
    os._exit(0)
