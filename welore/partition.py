"""WeLore's division into LRC and N-LRC, with something else cut than the LRCs: for the question of who learns."""

from dataclasses import dataclass, replace

from welore.budget import Budget, Plan, check_option, tally
from welore.errors import Refused
from welore.ranks import Evidence, Welore, apply_threshold, solve_threshold
from welore.svd import Spectrum

CUTS = ("nlrc", "nothing")


@dataclass
class Partition(Welore):
    """The LRCs and N-LRCs are those of WeLore at the given budget; what is factored is another matter.

    `cut=nlrc` leaves every LRC dense and factors every N-LRC by one threshold, so that the model keeps as many
    parameters as WeLore's would. `cut=nothing` leaves every weight dense. The damage done to the LRCs themselves is
    ranks=welore.
    """

    cut: str

    def __post_init__(self):
        super().__post_init__()
        check_option("ranks.cut", self.cut, CUTS)

    @property
    def cuts(self) -> bool:
        return self.cut != "nothing"

    def plan(self, spectra: dict[str, Spectrum], budget: Budget, evidence: Evidence | None = None) -> Plan:
        lrc = super().plan(spectra, budget, evidence)
        ranks: dict[str, int | None] = dict.fromkeys(spectra)
        threshold = None
        if self.cuts:
            others = {name: spectrum for name, spectrum in spectra.items() if name not in lrc.factored}
            keep = _keep_of_others(lrc, spectra, others)
            threshold = solve_threshold(others, Budget(keep=keep), self.normalize, "never")
            ranks |= apply_threshold(others, threshold, self.normalize, "never", self.multiple).ranks
        return replace(tally(ranks, spectra, threshold=threshold), lrc=lrc.factored)


def _keep_of_others(lrc: Plan, spectra: dict[str, Spectrum], others: dict[str, Spectrum]) -> float:
    """The share of their parameters that the N-LRCs may keep where they lose as many as the LRCs have lost."""
    dense = {name: spectrum.shape[0] * spectrum.shape[1] for name, spectrum in spectra.items()}
    removed, available = (1 - lrc.keep) * sum(dense.values()), sum(dense[name] for name in others)
    if not 0 < removed < available:
        raise Refused(
            f"ranks.cut=nlrc has to remove {removed:,.0f} parameters, as WeLore does, from N-LRCs that hold "
            f"{available:,}. Ask for an err or keep at which there are both LRCs and N-LRCs and something is saved."
        )
    return 1 - removed / available
