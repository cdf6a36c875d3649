"""What is looked at in the checkpoints of a run, beyond what the run itself measures."""

from dataclasses import dataclass
from typing import ClassVar

from welore.errors import Refused


@dataclass
class Probe:
    """Nothing. What probes find is added to the folder of a run, and changes nothing that the run has measured."""

    examines: ClassVar[bool] = False
    name: str


@dataclass
class Emergence(Probe):
    """Spectra, gradients and curvature of every weight of some `layers` (null for all), at up to `snapshots` of a run.

    Gradients are of a fixed batch of `windows` sequences of `length` tokens of the validation text, and of a second
    one, disjoint, for the floor of noise. `ranks` are the r of subspaces, `thresholds` the k below which normalized
    singular values are counted, `kept` the shares of its ranks that a weight is truncated to, one weight at a time, at
    the last checkpoint. Of so many last checkpoints as `curvature_at` the `eigenvalues` largest eigenvalues of each
    weight's Hessian and Gauss-Newton are found on the first `curvature_windows` sequences in `steps` Lanczos steps
    each; their trace is estimated from `samples`. Beside them stand the gradients of as many sequences of the second
    batch, and of all of it, the large one: some times as many `windows` tell the two apart.
    """

    examines: ClassVar[bool] = True
    layers: list[int] | None
    snapshots: int
    windows: int
    length: int
    ranks: list[int]
    thresholds: list[float]
    kept: list[float]
    curvature_at: int
    curvature_windows: int
    eigenvalues: int
    steps: int
    samples: int

    def __post_init__(self):
        least = {"snapshots": 1, "windows": 1, "length": 2, "curvature_at": 0, "curvature_windows": 1}
        for key, value in (least | {"eigenvalues": 2, "samples": 1}).items():
            if getattr(self, key) < value:
                raise Refused(f"probe.{key}={getattr(self, key)} looks at nothing. Write {value} or more.")
        if self.curvature_windows > self.windows:
            raise Refused(
                f"probe.curvature_windows={self.curvature_windows} are taken from the probe.windows={self.windows} "
                f"sequences of the batch. Write at most as many."
            )
        if self.steps <= self.eigenvalues:
            raise Refused(
                f"probe.steps={self.steps} Lanczos steps find no {self.eigenvalues} eigenvalues and the one after "
                f"them. Write twice as many steps or more."
            )
        for key in ("thresholds", "kept"):
            if not all(0 < share < 1 for share in getattr(self, key)):
                raise Refused(f"probe.{key}={getattr(self, key)} are not all between 0 and 1. Write such as [0.25].")
        if any(rank < 1 for rank in self.ranks):
            raise Refused(f"probe.ranks={self.ranks} are not all ranks of a subspace. Write such as [4, 16].")

    def chosen(self, steps: list[int]) -> list[int]:
        """Up to `snapshots` of the steps, evenly by their place, the first and the last among them."""
        if len(steps) <= self.snapshots:
            return steps
        if self.snapshots == 1:
            return steps[-1:]
        places = {round(i * (len(steps) - 1) / (self.snapshots - 1)) for i in range(self.snapshots)}
        return [steps[place] for place in sorted(places)]
