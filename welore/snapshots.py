"""The weights of a model at chosen steps of its training: `snapshots/step_000123.safetensors` in the run folder."""

import re
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from welore import checkpoint
from welore.cache import whole
from welore.errors import Refused
from welore.modes import Mode

SNAPSHOTS = "snapshots"


class Snapshots(Callback):
    """Writes the model after each of the given optimizer steps; step 0 is the model before the first of them.

    A snapshot is the model as the run would end there: adapters are merged into what they adapt, and frozen weights
    have the dtype that they are stored in, whatever training casts them to. Beside it lie `config.json` and the
    tokenizer. A run that is cut short and goes on writes the rest, and what it does again comes out the same.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, mode: Mode, after: list[int], run_folder: Path):
        self.mode, self.tokenizer, self.after = mode, tokenizer, set(after)
        self.folder = run_folder / SNAPSHOTS
        self.weights = named_weights(model)  # the stored ones: while it trains the model may hold casts of them

    def on_train_start(self, trainer, module) -> None:
        if trainer.global_step == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._write(module.model, 0)

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        if (index + 1) % trainer.accumulate_grad_batches == 0:
            self._write(module.model, trainer.global_step)

    @torch.no_grad()
    def _write(self, model: PreTrainedModel, step: int) -> None:
        if step not in self.after:
            return
        ended = deepcopy(model)
        for name, weight in self.weights.items():
            ended.get_parameter(name).data = weight.detach().clone()
        self.mode.finish(ended)
        if not (self.folder / "config.json").exists():
            checkpoint.describe(ended, self.folder)
            self.tokenizer.save_pretrained(self.folder)
        with whole(self.folder / file_name(step)) as part:
            save_file({name: weight.cpu().contiguous() for name, weight in named_weights(ended).items()}, part)
            part.chmod((self.folder / "config.json").stat().st_mode)  # else readable by their owner alone


def named_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every parameter by its name; tied ones once, under the first of their names."""
    return dict(model.named_parameters())


def file_name(step: int) -> str:
    return f"step_{step:06d}.safetensors"


def steps(run_folder: Path) -> list[int]:
    """The steps after which a run has left a snapshot, in order; 0 is the untrained model."""
    found = (
        re.fullmatch(r"step_(\d{6,})\.safetensors", path.name) for path in (run_folder / SNAPSHOTS).glob("step_*")
    )
    numbers = sorted(int(match[1]) for match in found if match)
    if not numbers:
        raise Refused(
            f"{run_folder} holds no snapshots. Give the folder of a run that was trained with "
            f"task/training=pretrain or pretrain_laptop, or with task.training.snapshot_every=N."
        )
    return numbers


def load(run_folder: Path, step: int) -> dict[str, Tensor]:
    """The weights after a step, by name, on the CPU."""
    known = steps(run_folder)
    if step not in known:
        raise Refused(f"{run_folder} holds no snapshot of step {step}. It holds those of {known}.")
    file = run_folder / SNAPSHOTS / file_name(step)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise Refused(f"{file} is damaged or not whole ({error}). Repeat its run with force=true.") from error


def model_at(run_folder: Path, step: int, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model after a step, in eval mode on the CPU."""
    state = load(run_folder, step)
    model = checkpoint.blank(run_folder / SNAPSHOTS, trust_remote_code)
    weights = named_weights(model)
    _check_same(weights, state, run_folder / SNAPSHOTS / file_name(step))
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(state[name])
    return model.eval()


def _check_same(weights: dict[str, Tensor], state: dict[str, Tensor], file: Path) -> None:
    """Refuse weights whose names or shapes are not those of the model."""
    if odd := sorted(weights.keys() ^ state.keys()):
        fault = f"{len(odd)} names differ, such as {odd[0]}"
    elif odd := [name for name in weights if weights[name].shape != state[name].shape]:
        shapes = f"{tuple(state[odd[0]].shape)}, and there it is {tuple(weights[odd[0]].shape)}"
        fault = f"{len(odd)} shapes differ: {odd[0]} is {shapes}"
    else:
        return
    raise Refused(
        f"{file} is of another model than the config.json beside it: {fault}. Put the snapshots, config.json and "
        f"tokenizer of one run together."
    )
