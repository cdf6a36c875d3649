"""Measure `mode=lora` against transformers' Trainer with peft LoRA: equal model, texts, schedule, seed and adapters.

usage: python scripts/bench_lora.py [--model smollm2_135m] [--steps 6] [--batch 4] [--length 256] [--rounds 2]
           [--random [--multiple 8]] [--out FILE.json] [overrides]
       python scripts/bench_lora.py --model llama2_7b --random --multiple 8 --batch 4 --length 1024 err=0.5   on a GPU

Both train in one process and in turns, each turn from the same compressed model, for as many steps in the same order.
A step is forward, backward, clipping and optimizer; the first steps of a turn do not count. Losses of every step stand
beside each other: they differ by rounding alone. With --random nothing is loaded or decomposed: random weights in the
model's shapes, a stand-in for ranks, and random tokens.
"""

import argparse
import tempfile
import time
import warnings
from copy import deepcopy
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from welore import metrics
from welore.batches import Batches, Rows, training_rows
from welore.bench import at_least, exit_status, subject, write
from welore.cache import Cache
from welore.config import Config, compose, to_config
from welore.errors import Refused
from welore.evaluate import frozen_weights_in
from welore.fit import fit
from welore.measure import WARM_UP_STEPS, Throughput, give_back, synchronize
from welore.modes import Lora, adapted, select
from welore.module import Tuner
from welore.records import read_history

# What transformers and peft do here, and mode=lora is to do too.
BOTH = {
    "mode.lora_on": "factors",
    "mode.norms": False,
    "task.training.accumulate": 1,
    "task.training.tokens": None,
    "trainer.recompute": False,
}
Turn = tuple[list[float], list[float]]  # seconds and loss of every step


def ours(model: PreTrainedModel, config: Config, rows: Rows) -> Turn:
    """A run of `mode=lora` as the runner makes it, without its evaluation."""
    torch.manual_seed(config.seed)
    training = config.task.training
    batches, parameters = Batches(rows, training, config.seed), select(model, config.mode)
    held_out = DataLoader([rows.batch(torch.tensor([0]))], batch_size=None)
    tuner = Tuner(model, config.mode, parameters, training, batches.steps)
    throughput = Throughput(training.accumulate)
    with tempfile.TemporaryDirectory() as folder, frozen_weights_in(model, config.model.autocast):
        fit(config.trainer, tuner, batches, held_out, Path(folder), config.model.autocast, [], throughput)
        history = read_history(Path(folder))
    losses = [line[metrics.TRAIN_LOSS.key] for line in history if metrics.TRAIN_LOSS.key in line]
    return throughput.seconds, losses


class InOrder(Trainer):
    """Takes the batches as they come."""

    def _get_train_sampler(self, *_) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class Clock(TrainerCallback):
    """The seconds of every step; the device is waited for."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, []

    def on_step_begin(self, *args, **kwargs) -> None:
        synchronize(self.device)
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - self.start)


def theirs(model: PreTrainedModel, config: Config, rows: Rows) -> Turn:
    """transformers' Trainer on a model of `get_peft_model`, with fused AdamW and our schedule."""
    torch.manual_seed(config.seed)
    training, mode, device = config.task.training, config.mode, next(model.parameters()).device
    batches = Batches(rows, training, config.seed)
    options = dict(r=mode.rank, lora_alpha=mode.alpha, lora_dropout=mode.dropout)
    model = get_peft_model(model, LoraConfig(target_modules=adapted(model, "factors"), **options))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=mode.lr, betas=tuple(mode.betas), eps=mode.eps, weight_decay=mode.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: training.lr_factor(step, batches.steps))
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=batches.steps,
            per_device_train_batch_size=1,
            max_grad_norm=training.clip or 0.0,
            bf16=config.model.autocast == "bfloat16",
            use_cpu=device.type == "cpu",
            logging_steps=1,
            logging_first_step=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=config.seed,
        )
        passes = [{"input_ids": batch["ids_BL"], "labels": batch["labels_BL"]} for batch in batches]
        trainer = InOrder(
            model,
            arguments,
            data_collator=lambda found: found[0],
            train_dataset=passes,
            optimizers=(optimizer, schedule),
            callbacks=[clock],
        )
        trainer.train()
    return clock.seconds, [line["loss"] for line in trainer.state.log_history if "loss" in line]


def real_start(config: Config, device: torch.device, arguments: argparse.Namespace) -> tuple[PreTrainedModel, Rows]:
    cache = Cache(Path(config.outputs) / ".cache")
    model = subject(config, device, random=False, multiple=arguments.multiple)
    _, tokenizer = config.model.load(cache.folder)
    return model, training_rows(config.task, tokenizer, cache, config.seed)


def random_start(config: Config, device: torch.device, arguments: argparse.Namespace) -> tuple[PreTrainedModel, Rows]:
    torch.manual_seed(config.seed)
    model = subject(config, device, random=True, multiple=arguments.multiple)
    rows, vocabulary = arguments.steps * arguments.batch, model.get_input_embeddings().weight.shape[0]
    ids_BL = torch.randint(0, vocabulary, (rows, arguments.length), dtype=torch.int32)
    return model, Rows(ids_BL, torch.full((rows,), arguments.length))


def check_alike(config: Config, arguments: argparse.Namespace) -> None:
    """Refuse overrides that one of the two would not follow, or that the figures would not tell."""
    if type(config.mode) is not Lora:
        raise Refused(f"mode={config.mode.name} is not what stands beside it, which is peft's LoRA. Write mode=lora.")
    sizes = {f"task.training.{key}": getattr(arguments, key) for key in ("steps", "batch", "length")}
    for key, wanted in (BOTH | sizes).items():
        if (found := attrgetter(key)(config)) != wanted:
            raise Refused(
                f"{key}={_written(found)} is of one alone, and what is compared has {_written(wanted)}. Leave it out: "
                f"--steps, --batch and --length say how much each trains, and mode.rank, alpha, dropout and lr how."
            )


def _written(value: Any) -> str:
    """As an override of run.py."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2_135m", help="an option of conf/model")
    parser.add_argument(
        "--steps", type=at_least(WARM_UP_STEPS + 1), default=6, help="of each turn, of which two warm up"
    )
    parser.add_argument("--batch", type=at_least(1), default=4, help="sequences of a step")
    parser.add_argument("--length", type=at_least(2), default=256, help="tokens of a sequence")
    parser.add_argument("--rounds", type=at_least(1), default=2, help="turns of each")
    parser.add_argument("--random", action="store_true", help="random weights in the model's shapes")
    parser.add_argument("--multiple", type=at_least(1), default=1, help="of which ranks are, with --random")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench_lora.json"), help="where the figures go")
    parser.add_argument("overrides", nargs="*", help="overrides of run.py, such as err=0.5 mode.rank=16")
    arguments = parser.parse_args()
    sizes = [f"task.training.{key}={getattr(arguments, key)}" for key in ("steps", "batch", "length")]
    fixed = ["mode=lora", "task.training.tokens=null", "task.training.accumulate=1", "trainer.progress=false"]
    config = to_config(compose([f"model={arguments.model}", *sizes, *fixed, *arguments.overrides]))
    check_alike(config, arguments)
    device = config.trainer.place()
    start, rows = (random_start if arguments.random else real_start)(config, device, arguments)
    taken: dict[str, list[Turn]] = {"ours": [], "transformers and peft": []}
    warnings.simplefilter("ignore")  # hints about workers and names that do not concern these runs
    for _ in range(arguments.rounds):
        for name, run in zip(taken, (ours, theirs), strict=True):
            give_back(device)
            taken[name].append(run(deepcopy(start), config, rows))
    tokens = arguments.batch * arguments.length
    seconds = {name: [s for turn, _ in turns for s in turn[WARM_UP_STEPS:]] for name, turns in taken.items()}
    rates = {name: tokens / median(found) for name, found in seconds.items()}
    losses = {name: turns[0][1] for name, turns in taken.items()}
    for step, pair in enumerate(zip(*losses.values(), strict=True)):
        print(f"step {step + 1}: loss " + "   ".join(f"{n} {v:.4f}" for n, v in zip(losses, pair, strict=True)))
    one, other = rates.values()
    print("   ".join(f"{n} {rate:.1f} tokens/s" for n, rate in rates.items()) + f"   ratio {one / other:.3f}")
    shape = {key: getattr(arguments, key) for key in ("batch", "length", "steps", "rounds", "random", "multiple")}
    shape |= {"model": config.model.name, "asked": config.asked}
    write(arguments.out, {"tokens_per_second": rates, "losses": losses, "shape": shape}, device)
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
