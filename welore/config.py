"""The root config: what one run is. Types live beside the code that reads them, values in conf/*.yaml."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from welore import (
    adapters,
    allocate,
    chosen,
    conversations,
    facts,
    harness,
    judges,
    local_judge,
    loggers,
    models,
    modes,
    paid_judge,
    partition,
    parts,
    pretraining,
    probe,
    prune,
    quizzes,
    ranks,
    refine,
    rules,
    scratch,
    steppers,
    summaries,
    svd,
    tasks,
    trainer,
)
from welore.cache import digest
from welore.errors import Refused
from welore.moments import Needs

CONF = Path(__file__).parent.parent / "conf"

BUDGETS = ("err", "keep", "bytes", "flops")
# Nothing in these may change a result, so they are no part of the fingerprint.
INFRASTRUCTURE = ("trainer", "logger", "probe", "group", "force", "save", "outputs")
# Modes that step every number of a weight by itself, so that each process can step its own.
ELEMENTWISE = (modes.Lrc, modes.NLrc, modes.Full, chosen.Chosen, modes.Lora, adapters.Adapter)

SCHEMAS = {
    "model/pretrained": models.Pretrained,
    "model/random": models.Random,
    "model/scratch": scratch.Scratch,
    "svd/plain": svd.Plain,
    "svd/fwsvd": svd.Fwsvd,
    "svd/asvd": svd.Asvd,
    "svd/whitened": svd.Whitened,
    "svd/kfac": svd.Kfac,
    "ranks/welore": ranks.Welore,
    "ranks/partition": partition.Partition,
    "ranks/uniform": ranks.Uniform,
    "ranks/given": ranks.Given,
    "ranks/owl": rules.Owl,
    "ranks/stable_rank": rules.StableRank,
    "ranks/effective_rank": rules.EffectiveRank,
    "ranks/relative_energy": rules.RelativeEnergy,
    "ranks/sensitivity": rules.Sensitivity,
    "ranks/lagrange": allocate.Lagrange,
    "refine/none": refine.Refine,
    "refine/block": refine.Blockwise,
    "prune/none": prune.Prune,
    "prune/magnitude": prune.Magnitude,
    "prune/wanda": prune.Wanda,
    "prune/sparsegpt": prune.SparseGpt,
    "mode/none": modes.Untrained,
    "mode/lrc": modes.Lrc,
    "mode/nlrc": modes.NLrc,
    "mode/full": modes.Full,
    "mode/lora": modes.Lora,
    "mode/galore": modes.GaLore,
    "mode/adapter": adapters.Adapter,
    "mode/randlora": adapters.RandLora,
    "mode/osf": adapters.Osf,
    "mode/fira": steppers.Fira,
    "mode/apollo": steppers.Apollo,
    "mode/muon": steppers.Muon,
    "mode/lrc_8bit": steppers.Lrc8bit,
    "mode/nlrc_8bit": steppers.NLrc8bit,
    "mode/lora_8bit": steppers.Lora8bit,
    "mode/full_8bit": steppers.Full8bit,
    "mode/sv": parts.SingularValues,
    "mode/lora_xs": parts.LoraXs,
    "mode/lisa": parts.Lisa,
    "mode/chosen": chosen.Chosen,
    "task/package": tasks.PackageTask,
    "task/hub": tasks.HubTask,
    "task/commonsenseqa": quizzes.CommonsenseQa,
    "task/svamp": quizzes.Svamp,
    "task/boolq": quizzes.BoolQ,
    "task/coinflip": quizzes.CoinFlip,
    "task/strategyqa": quizzes.StrategyQa,
    "task/date": quizzes.DateUnderstanding,
    "task/objects": quizzes.ObjectTracking,
    "task/triviaqa": facts.TriviaQa,
    "task/freebaseqa": facts.FreebaseQa,
    "task/lm_eval": harness.Harness,
    "task/mt_bench": conversations.MtBench,
    "task/cnn_dailymail": summaries.CnnDailyMail,
    "calibration/package": tasks.PackageCalibration,
    "calibration/hub": tasks.HubCalibration,
    "task/protocol": tasks.Protocol,
    "task/training": tasks.Training,
    "task/pretraining": pretraining.Pretraining,
    "judge/none": judges.Judge,
    "judge/openai": paid_judge.OpenAi,
    "judge/local": local_judge.Local,
    "probe/none": probe.Probe,
    "probe/emergence": probe.Emergence,
    "trainer/alone": trainer.Trainer,
    "trainer/ddp": trainer.Ddp,
    "trainer/fsdp": trainer.Fsdp,
    "logger/none": loggers.Logger,
    "logger/wandb": loggers.Wandb,
}


@dataclass
class Config:
    """One run. Exactly one budget is given: `err` (share of ranks to remove), or a share to keep, of the
    parameters of the compressible weights (`keep`), or of all `bytes` or `flops` of the model."""

    model: models.Model
    svd: svd.Svd
    ranks: ranks.Ranks
    refine: refine.Refine
    prune: prune.Prune
    mode: modes.Mode
    task: tasks.Task
    calibration: tasks.Calibration
    judge: judges.Judge
    probe: probe.Probe
    trainer: trainer.Trainer
    logger: loggers.Logger
    err: float | None
    keep: float | None
    bytes: float | None
    flops: float | None
    seed: int
    group: str | None
    force: bool
    save: bool
    outputs: str

    def __post_init__(self):
        if self.mode.refactors and self.prune.prunes and self.prune.where == "all":
            raise Refused(
                f"mode={self.mode.name} takes the factors of LRCs apart anew, which would fill what prune.where=all "
                f"has zeroed in them. Write prune.where=nlrc, or another mode."
            )
        if not self.mode.trains and self.task.training.snapshots(steps=1):
            raise Refused(
                f"mode={self.mode.name} trains nothing, and task/training={self.task.training.name} asks for "
                f"snapshots of the training. Write mode=full, or task.training.snapshot_every=null."
            )
        if self.trainer.together and self.mode.takes_turns:
            raise Refused(
                f"mode={self.mode.name} trains other parameters from step to step, and trainer={self.trainer.name} "
                f"agrees with its processes once on what trains. Write trainer=gpu, or another mode."
            )
        if self.mode.trains and self.trainer.shards:
            self._check_shards()
        if self.mode.trains and not self.task.teaches:
            raise Refused(
                f"task={self.task.name} has nothing to train on, and mode={self.mode.name} trains. Write mode=none. "
                f"To measure a tuned model, tune it on another task with save=true and give its folder: model=FOLDER."
            )
        if self.probe.examines and self.mode.trains:
            self._check_watched()
        if self.calibration.rounds > 1 and not self.needs:
            raise Refused(
                f"calibration.rounds={self.calibration.rounds}, and svd={self.svd.name} with ranks={self.ranks.name} "
                f"needs no statistics. Write calibration.rounds=1, or an option that needs some, such as svd=kfac."
            )
        self._check_budget()

    def _check_budget(self) -> None:
        if isinstance(self.ranks, ranks.Given):
            self.err = self.keep = self.bytes = self.flops = None  # the file is the budget
            return
        given = {key: getattr(self, key) for key in BUDGETS if getattr(self, key) is not None}
        if len(given) != 1:
            raise Refused(
                f"the budget is {given or 'not given'}: give exactly one of {', '.join(BUDGETS)}, such as err=0.3 or "
                f"keep=0.8."
            )
        if self.err is not None and not 0 <= self.err < 1:
            hint = f" For {self.err:g} % write err={self.err / 100:g}." if 1 < self.err < 100 else ""
            raise Refused(f"err={self.err} is not a fraction in [0, 1).{hint or ' For 30 % write err=0.3.'}")
        for key in ("keep", "bytes", "flops"):
            value = getattr(self, key)
            if value is not None and not 0 < value <= 1:
                raise Refused(f"{key}={value} is not a fraction in (0, 1]. To keep 80 % write {key}=0.8.")

    def _check_shards(self) -> None:
        """Refuse what needs a weight, or its gradient, whole while it trains."""
        needs_whole = {
            f"mode={self.mode.name}": type(self.mode) not in ELEMENTWISE,
            f"prune={self.prune.name}": self.prune.prunes,
            f"task/training={self.task.training.name}": isinstance(self.task.training, pretraining.Pretraining),
        }
        for what, whole in needs_whole.items():
            if whole:
                raise Refused(
                    f"{what} needs weights whole while they train, and trainer={self.trainer.name} cuts them into "
                    f"shards. Write trainer=ddp."
                )

    def _check_watched(self) -> None:
        """Refuse to train for hours what the probe could not look at afterwards."""
        if not self.task.training.snapshots(1):
            raise Refused(
                f"probe={self.probe.name} looks at snapshots, and task/training={self.task.training.name} leaves no "
                f"snapshots. Write task/training=pretrain_laptop, or mode=none to probe the model as it is loaded."
            )
        if self.err != 0:
            raise Refused(
                f"probe={self.probe.name} looks at dense weights, and this run cuts the model before it trains it. "
                f"Write err=0."
            )

    @property
    def budget(self) -> ranks.Budget:
        return ranks.Budget(self.err, self.keep, self.bytes, self.flops)

    @property
    def needs(self) -> Needs:
        """The statistics that this run takes of the model before it compresses it."""
        predict = Needs.GRADIENTS if self.calibration.predict else Needs.NOTHING
        refit = Needs.INPUTS if self.svd.sequential != "none" else Needs.NOTHING
        return max(self.svd.needs, self.ranks.needs, self.refine.needs, self.prune.needs, predict, refit)

    @property
    def judges(self) -> tuple[judges.Judge, ...]:
        """Who rates the answers; nobody where the task has right answers of its own."""
        return (self.judge,) if self.task.judged else ()

    @property
    def asked(self) -> str:
        return "given" if isinstance(self.ranks, ranks.Given) else str(self.budget)


def to_config(cfg: DictConfig) -> Config:
    """The typed config behind a composed one, checked."""
    return Config(**{f.name: _plain(cfg[f.name]) for f in fields(Config)})


def _plain(node: Any) -> Any:
    return OmegaConf.to_object(node) if OmegaConf.is_config(node) else node


def science(config: Config) -> dict[str, Any]:
    """What a result depends on: the config without its infrastructure, and the content behind its paths.

    Local texts count by content, wherever they lie. A run that trains nothing does not depend on how it would have
    trained, nor on the seed; one that needs no statistics not on the texts that they would have come from; one whose
    answers nobody judges not on the judge.
    """
    chosen = {key: value for key, value in asdict(config).items() if key not in INFRASTRUCTURE}
    if not config.model.runs_code:
        chosen["model"].pop("trust_remote_code", None)
    chosen["identity"] = {"model": config.model.identity(), "task": config.task.identity()}
    del chosen["task"]["path"]
    if config.needs:
        del chosen["calibration"]["path"]
        chosen["identity"]["calibration"] = config.calibration.identity()
    else:
        del chosen["calibration"]
    if not chosen["task"].get("protocol", {}).get("as_is", True):
        del chosen["task"]["protocol"]["as_is"]  # runs from before there was such a choice are these
    if not isinstance(config.ranks, allocate.Lagrange) and chosen["ranks"].get("multiple") == 1:
        del chosen["ranks"]["multiple"]  # likewise
    del chosen["judge"]
    for judge in config.judges:
        chosen["judge"] = judge.science()
    if not config.mode.trains:
        del chosen["task"]["training"], chosen["seed"]
    if isinstance(config.ranks, ranks.Given):
        chosen["identity"]["ranks"] = ranks.read_ranks(Path(config.ranks.path))
    return chosen


def fingerprint(config: Config) -> str:
    """The name of a run: the same for run.py, a multirun and the cell of a table that ask for the same thing."""
    return digest(json.dumps(science(config), sort_keys=True))[:10]


def register() -> None:
    """Make the schemas and the resolvers of conf/ known to Hydra."""
    store = ConfigStore.instance().store
    store(name="schema", node=Config)
    for path, schema in SCHEMAS.items():
        group, _, name = path.rpartition("/")
        store(group=f"schema/{group}" if group else "schema", name=name, node=schema)
    resolvers = {
        "fingerprint": lambda *, _root_: _unless_refused(_root_, fingerprint),
        "asked": lambda *, _root_: _unless_refused(_root_, lambda config: config.asked),
        "unless": _unless,
        "task_path": lambda name, *, _root_: _root_.task.path if _root_.task.name == name else None,
        "published_steps": lambda *, _root_: OmegaConf.select(_root_, "task.published_steps", default=None),
        "times": lambda value, factor: value * factor,
        "over": lambda value, divisor: value / divisor if divisor else 0.0,
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)


def _unless(*others_and_value: Any) -> Any:
    """The last argument, or None where one of those before it is given."""
    *others, value = others_and_value
    return value if all(other is None for other in others) else None


def _unless_refused(cfg: DictConfig, name: Callable[[Config], str]) -> str:
    """Part of a run folder's name. Hydra wants it before the job begins, where a bad cell would end a whole sweep; the
    job itself checks the same config first of all."""
    try:
        return name(to_config(cfg))
    except (Refused, OmegaConfBaseException):
        return "refused"


def compose(overrides: Sequence[str]) -> DictConfig:
    """The config of one cell, exactly as run.py composes it."""
    if GlobalHydra.instance().is_initialized():  # inside run.py, whose files are the same
        return hydra_compose("config", spell_out(overrides))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra_compose("config", spell_out(overrides))


def spell_out(overrides: Sequence[str]) -> list[str]:
    """`model=PATH` for a folder, a GGUF file or a hub name, written as the group option that loads it.

    A value with a slash or the suffix .gguf is a path; the name of such a model is its last part.
    """
    spelled = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "model" and ("/" in value or value.endswith(".gguf")):
            if "," in value:
                raise Refused(
                    f"model={value}: a sweep over paths is written model=path model.path=A,B model.name=a,b."
                )
            name = Path(value).name.removesuffix(".gguf").replace(" ", "-") or "model"
            spelled += ["model=path", f"model.path={_quoted(value)}", f"model.name={name}"]
        else:
            spelled.append(f"{key}={_quoted(value)}" if value else override)
    return spelled


def _quoted(value: str) -> str:
    """A path that holds `=`, as every run folder does, in the quotes that Hydra's grammar wants around it."""
    is_path = "/" in value and "=" in value and not any(mark in value for mark in "'\"[]{}(),")
    return f"'{value}'" if is_path else value


# At import: a worker of a launcher composes in a process of its own, in which nobody else would do it.
register()
