"""Fetch what a run reads from the hub, on a machine with a network, for machines without one that share its files.

    python scripts/download.py model=llama2_7b task=c4 err=0.3 mode=welore      the overrides of the run
    HF_HUB_OFFLINE=1 python run.py model=llama2_7b task=c4 err=0.3 mode=welore  the run, where there is no network

Everything goes into the cache of the hub's client, whose folder HF_HOME names: it must be one that all machines see.
"""

import sys
from collections.abc import Iterator, Sequence

from welore.config import Config, compose, to_config
from welore.errors import Refused
from welore.explain import explain
from welore.local_judge import Local


def main(arguments: Sequence[str]) -> int:
    """Print what was fetched, or that nothing had to be. The exit status: 2 where the hub refuses, or the config."""
    try:
        if not arguments or {"-h", "--help"} & set(arguments):
            raise Refused(__doc__.strip())
        fetched = list(fetch(to_config(compose(arguments))))
    except Exception as error:
        return explain(error)
    print("\n".join(f"fetched {what}" for what in fetched) or "nothing is needed: model and texts are on this machine")
    return 0


def fetch(config: Config) -> Iterator[str]:
    """What a run of this config reads from elsewhere, once it is here."""
    judges = [judge.source for judge in config.judges if isinstance(judge, Local)]
    calibration = [config.calibration] if config.needs else []
    for source in (config.model, config.task, *calibration, *judges):
        if (what := source.fetch()) is not None:
            yield what


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
