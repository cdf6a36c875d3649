"""Factors refined layer by layer, towards what the dense layer puts out.

The layer gets what the compressed layers before it put out, and is fitted to the output of the dense model in the
metric of the loss: 1/2 E[d^T E[gg^T] d] for an output that is off by d, with g the gradient of the loss there.
That is again a loss increase in nats (second order, one layer at a time), and no gradient leaves the layer.

Shape suffixes: B = windows, L = tokens of one, D = hidden size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from welore.calibrate import Stream
from welore.errors import Refused
from welore.moments import Metric, Needs, times
from welore.optim import AdamW


@dataclass
class Refine:
    """No refinement: factors stay as they were decomposed."""

    name: str

    @property
    def needs(self) -> Needs:
        return Needs.NOTHING

    @property
    def refines(self) -> bool:
        return False


@dataclass
class Blockwise(Refine):
    """AdamW on the factors of one layer at a time, `epochs` times over the calibration windows (AA-SVD)."""

    epochs: int
    lr: float

    def __post_init__(self):
        if self.epochs < 1 or self.lr <= 0:
            raise Refused(f"refine has epochs={self.epochs}, lr={self.lr}. Write 1 or more epochs and lr > 0.")

    @property
    def needs(self) -> Needs:
        return Needs.GRADIENTS

    @property
    def refines(self) -> bool:
        return True

    def fit(
        self,
        stream: Stream,
        number: int,
        own: list[Tensor],
        dense: list[Tensor],
        parameters: list[nn.Parameter],
        metric: Metric,
    ) -> tuple[float, float]:
        """Fit the parameters of layer `number`, in place, unless that helps nothing; nats per token before and after.

        `own` are the hidden states that enter the layer and `dense` what should come out, batch by batch.
        """
        before = self._mean_loss(stream, number, own, dense, metric)
        original = [parameter.detach().clone() for parameter in parameters]
        optimizer = AdamW(parameters, lr=self.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
        steps = self.epochs * len(own)
        generator = torch.Generator().manual_seed(number)
        for parameter in parameters:
            parameter.requires_grad_(True)
        for step, batch in enumerate(self._order(len(own), generator)):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * (1 - step / steps)
            with torch.enable_grad():
                self._loss(stream, number, own[batch], dense[batch], metric).backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.release()
        for parameter in parameters:
            parameter.requires_grad_(False)
        after = self._mean_loss(stream, number, own, dense, metric)
        if not after < before:
            for parameter, value in zip(parameters, original, strict=True):
                parameter.data.copy_(value)
        return before, min(before, after)

    def _order(self, batches: int, generator: torch.Generator) -> Iterator[int]:
        for _ in range(self.epochs):
            yield from torch.randperm(batches, generator=generator).tolist()

    @staticmethod
    def _loss(stream: Stream, number: int, own_BLD: Tensor, dense_BLD: Tensor, metric: Metric) -> Tensor:
        off_TD = (stream.through(number, own_BLD).float() - dense_BLD.to(stream.device).float()).flatten(0, 1)
        return 0.5 * (times(off_TD, metric) * off_TD).sum(1).mean()

    @torch.no_grad()
    def _mean_loss(self, stream: Stream, number: int, own: list[Tensor], dense: list[Tensor], metric: Metric) -> float:
        losses = [self._loss(stream, number, o, d, metric) for o, d in zip(own, dense, strict=True)]
        return float(torch.stack(losses).mean())
