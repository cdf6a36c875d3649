"""The LightningModule of every mode, and what is kept of it when a run is cut short."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from transformers import PreTrainedModel

from welore import metrics, processes
from welore.cache import digest
from welore.compress import digests
from welore.errors import Refused
from welore.evaluate import causal_loss, first_not_finite
from welore.measure import Flops, Throughput, peak_memory
from welore.modes import Mode
from welore.sparse import KeptZeros
from welore.tasks import Training


class Tuner(LightningModule):
    """Trains `parameters` of a model with the optimizer of a mode and the schedule of a task, `besides` with AdamW.

    Only what trains is put into a checkpoint, and `base`, the digest of the rest, which is made again from its source.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mode: Mode,
        parameters: list[nn.Parameter],
        training: Training,
        steps: int,
        zeros: KeptZeros | None = None,
        besides: Sequence[nn.Parameter] = (),
        base: str = "",
    ):
        super().__init__()
        self.model, self.mode, self.parameters_to_train, self.besides = model, mode, parameters, list(besides)
        self.training_config, self.steps = training, steps
        self.zeros = zeros  # of pruned weights, which no step may fill
        self.base = base
        self.loss = causal_loss(model)
        self.strict_loading = False
        self.tokens_seen = 0
        self.random: list[Tensor] = []
        self._step_loss = 0.0
        # Of the first pass alone; not where processes may share a weight, for each would count its part.
        self.flops = Flops() if processes.count() == 1 else None
        self.flops_per_token: float | None = None

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        with self.flops or nullcontext():
            total, _ = self.loss(batch["ids_BL"], batch["labels_BL"])
        # A mean over the tokens of the whole step; Lightning divides by the number of passes and that of processes.
        loss = total / batch["scored"] * self.training_config.accumulate * processes.count()
        self._pass = loss.detach(), batch
        return loss

    def backward(self, loss: Tensor, *arguments: Any, **options: Any) -> None:
        with self.flops or nullcontext():
            super().backward(loss, *arguments, **options)

    def on_after_backward(self) -> None:
        """Read the loss after both passes: read between them, it leaves a GPU idle until the second is launched."""
        if self.flops is not None:
            total, self.flops = self.flops.total, None  # later passes are not slowed
            self.flops_per_token = None if total is None else total / self._pass[1]["ids_BL"].numel()
        loss, batch = float(self._pass[0]), self._pass[1]
        if self._anywhere(not math.isfinite(loss)):
            raise FloatingPointError(f"the loss of step {self.global_step} is {self._not_finite(loss, batch)}")
        self._step_loss += loss / self.training_config.accumulate
        self.tokens_seen += int(batch["real"])

    def _anywhere(self, here: bool) -> bool:
        """Whether it is so in any process: what one of them raises alone leaves the others waiting for its share."""
        if processes.count() == 1:
            return here
        return bool(self.trainer.strategy.reduce(torch.tensor(int(here), device=self.device), reduce_op="max"))

    def _not_finite(self, loss: float, batch: dict[str, Tensor]) -> str:
        if processes.count() > 1:  # a layer that is cut is whole only where all of them compute it
            return f"not finite in at least one of {processes.count()} processes"
        with self.trainer.precision_plugin.forward_context():  # which Lightning opens around training_step alone
            return f"{loss}; it starts in {first_not_finite(self.model, batch['ids_BL'])}"

    def on_train_batch_end(self, outputs, batch, index) -> None:
        if (index + 1) % self.training_config.accumulate:
            return
        # Lightning does so between the next two passes: until then gradients would lie beside all that is saved.
        self.optimizers(use_pl_optimizer=False).zero_grad(set_to_none=True)
        self.log(metrics.TRAIN_LOSS.key, self._step_loss, prog_bar=True, sync_dist=processes.count() > 1)
        self.log(metrics.TRAIN_LR.key, self.learning_rate)
        self.log(metrics.TRAIN_TOKENS.key, float(self.tokens_seen))
        self.log(metrics.TRAIN_PEAK_GIB.key, self.peak.gib)
        throughput = next(c for c in self.trainer.callbacks if isinstance(c, Throughput))
        if (rate := throughput.tokens_per_second()) is not None:
            self.log(metrics.TRAIN_TOKENS_PER_SECOND.key, rate, prog_bar=True)
        self._step_loss = 0.0

    def on_train_start(self) -> None:
        if self.random:
            torch.set_rng_state(self.random[0].cpu())
            if self.device.type == "cuda" and len(self.random) > 1:
                torch.cuda.set_rng_state(self.random[1].cpu(), self.device)
        with peak_memory(self.device) as self.peak:
            self.model.train()

    def on_train_batch_start(self, batch, index) -> None:
        if index % self.training_config.accumulate == 0:
            self.mode.begin_step(self.global_step, self.optimizers(use_pl_optimizer=False))

    def on_before_optimizer_step(self, optimizer) -> None:
        self.learning_rate = optimizer.param_groups[0]["lr"]

    def on_validation_epoch_start(self) -> None:
        self._validation = torch.zeros(2, dtype=torch.float64)

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        total, scored = self.loss(batch["ids_BL"], batch["labels_BL"])
        self._validation += torch.tensor([float(total), float(scored)], dtype=torch.float64)

    def on_validation_epoch_end(self) -> None:
        nats, tokens = self._validation.tolist()
        mean = nats / tokens
        perplexity = math.exp(mean) if mean < 700 else math.inf
        self.log(metrics.VALIDATION_PERPLEXITY.key, perplexity, prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.mode.optimizer(self.parameters_to_train)
        if self.besides:
            optimizer.add(self.besides, self.training_config.lr)
        if self.zeros is not None:
            optimizer.register_step_post_hook(self.zeros)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.training_config.lr_factor(step, self.steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        if self.training_config.clip:
            stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(stepped, self.training_config.clip)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = self._trained()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["base"] = self.base
        checkpoint["tokens_seen"] = self.tokens_seen
        checkpoint["flops_per_token"] = self.flops_per_token
        on_gpu = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        checkpoint["random"] = [torch.get_rng_state(), *on_gpu]  # for dropout

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tokens_seen, self.random = checkpoint["tokens_seen"], checkpoint["random"]
        # Of the first pass of the run; unknown where it began before they were counted.
        self.flops, self.flops_per_token = None, checkpoint.get("flops_per_token")
        if missing := self._trained() - checkpoint["state_dict"].keys():
            raise Refused(f"the checkpoint lacks {sorted(missing)[:3]}: it is of another run. Write force=true.")
        if (base := checkpoint.get("base", self.base)) != self.base:  # a checkpoint of before there was one goes on
            raise Refused(
                f"the checkpoint was trained upon weights with the digest {base}, and those that do not train have "
                f"{self.base} now: what was made again came out otherwise, as it may on another kind of GPU or CPU, "
                f"with another torch, or without the factors in the cache. Go on where it was trained, or write "
                f"force=true to train from the start."
            )

    def _trained(self) -> set[str]:
        """Names of all that the mode trains, also of what it has frozen for the moment."""
        chosen = {id(parameter) for parameter in (*self.parameters_to_train, *self.besides)}
        return {name for name, parameter in self.named_parameters() if id(parameter) in chosen}


Known = dict[Tensor, tuple[int, str]]


def known_digests(model: PreTrainedModel, weights: Mapping[str, str]) -> Known:
    """The digest of each parameter, and where its content lies: `base_digest` hashes none again that is still there.

    The model's own buffers count as known without being hashed: they follow from its config, rotary frequencies by
    functions whose last bit is that of a processor. It keeps all of them alive, or what a mode makes could take the
    place of what it drops.
    """
    known = {p: (p.data_ptr(), weights[name]) for name, p in model.named_parameters() if name in weights}
    return known | {buffer: (buffer.data_ptr(), "") for buffer in model.buffers()}


def base_digest(model: PreTrainedModel, trained: Iterable[nn.Parameter], known: Known) -> str:
    """The content of all that does not train once a mode has prepared the model.

    With the buffers of the mode, for there some keep the singular vectors between which they train, and decomposed
    again these may have other signs.
    """
    chosen = {id(parameter) for parameter in trained}
    rest = {name: p for name, p in model.named_parameters() if id(p) not in chosen} | dict(model.named_buffers())
    old = {name: known[t][1] for name, t in rest.items() if t in known and known[t][0] == t.data_ptr()}
    found = old | digests({name: tensor for name, tensor in rest.items() if name not in old})
    return digest(*(part for name in sorted(found) for part in (name, found[name])))
