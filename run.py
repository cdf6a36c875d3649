"""Run one combination, or with -m a sweep of them: python run.py model=llama2_7b err=0.3 mode=welore task=c4"""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from welore import processes
from welore.config import spell_out, to_config
from welore.errors import Interrupted
from welore.explain import Failed, conclude, explain
from welore.report import summary


def run(cfg: DictConfig) -> None:
    config, folder = to_config(cfg), Path(HydraConfig.get().runtime.output_dir)
    from welore.runner import run

    record = run(config, folder)
    if processes.index() == 0:
        print(summary(record, folder), flush=True)


def main() -> int:
    """The exit status of one run, or of a sweep, in which a cell that fails does not stop the others."""
    failed: dict[str, int] = {}

    @hydra.main(version_base="1.3", config_path="conf", config_name="config")
    def cell(cfg: DictConfig) -> None:
        try:
            run(cfg)
        except Exception as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:  # now, for the sweep may go on for hours
                overrides = " ".join(HydraConfig.get().overrides.task)
                failed[overrides] = explain(error, overrides)
            raise

    try:
        sys.argv[1:] = spell_out(sys.argv[1:])
        cell()
    except Failed as sweep:
        return conclude(sweep.cells)
    except (Exception, Interrupted, KeyboardInterrupt) as error:
        return conclude(failed) if failed and isinstance(error, Exception) else explain(error)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors are explained here, not by Hydra
    sys.exit(main())
