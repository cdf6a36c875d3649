"""Run one combination, or with -m a sweep of them: python run.py model=llama2_7b err=0.3 mode=welore task=c4"""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from welore.config import register, spell_out, to_config
from welore.errors import Interrupted
from welore.explain import explain
from welore.report import summary


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    config, folder = to_config(cfg), Path(HydraConfig.get().runtime.output_dir)
    from welore.runner import run

    print(summary(run(config, folder), folder), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors are explained here, not by Hydra
    register()
    try:
        sys.argv[1:] = spell_out(sys.argv[1:])
        main()
    except (Exception, Interrupted, KeyboardInterrupt) as error:
        sys.exit(explain(error))
