"""Models of which nothing but shapes is known: without storage, or with random weights where time and memory count."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from welore.errors import Refused
from welore.lowrank import LowRankLinear, replace
from welore.models import DTYPES, Model, Random, components

_LLAMA2 = dict(model_type="llama", vocab_size=32000, max_position_embeddings=4096, rms_norm_eps=1e-5)
# Of models behind a hub name, so that their sizes can be computed without a network. No weights are tied.
SHAPES = {
    "llama2_7b": _LLAMA2
    | dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "llama2_13b": _LLAMA2
    | dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
    "mistral_7b": _LLAMA2
    | dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
    | dict(num_key_value_heads=8, model_type="mistral"),
    "smollm2_135m": dict(model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536)
    | dict(num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True),
}
# What an LRC of a stand-in keeps of its ranks, by err: LLaMA-2-7B then has the parameters of the paper's Table 7.
LEFT = {0.3: 0.469, 0.5: 0.3583, 0.7: 0.2509}
# Of a component: the share of its weights that are LRCs, and the share of its ranks that each of these keeps.
Cut = tuple[float, float]
WHOLE: Cut = (0.0, 1.0)
# LRCs such that 1.2B parameters are in them and 3.1B in the other weights, as the first version says (Figure 5). What
# they keep are then two unknowns, which err 0.5 and the parameters of Table 7 settle. o is cut like q and k, of which
# over 90 % is removed; v and down are whole, and most of up.
ATTENTION_LEFT, MLP_LEFT = 0.0976, 0.3657
SPLIT_ERR = 0.5
SPLIT: dict[str, Cut] = {
    "q_proj": (1.0, ATTENTION_LEFT),
    "k_proj": (1.0, ATTENTION_LEFT),
    "o_proj": (1.0, ATTENTION_LEFT),
    "gate_proj": (1.0, MLP_LEFT),
    "up_proj": (0.25, MLP_LEFT),
}
PLANS = EVEN, PAPER = ("even", "paper")
PLANS_HELP = (
    "even: all LRCs keep the same share of their ranks (that of the published H200 figures); paper: N-LRCs have 2.5 "
    "times the parameters of the LRCs, as in LLaMA-2-7B at err 0.5"
)


def sizes_of(model: Model) -> dict:
    """The sizes of a model option, which are known without its weights."""
    if isinstance(model, Random):
        return model.config
    if model.name not in SHAPES:
        raise Refused(
            f"model={model.name} has no sizes in welore/shapes.py, which holds {', '.join(SHAPES)}. Write "
            f"model=tiny with model.config.hidden_size and the like."
        )
    return SHAPES[model.name]


def on_meta(sizes: dict, dtype: str) -> PreTrainedModel:
    """A causal LM with these sizes (`model_type` and what its config takes), without storage."""
    return drawn(sizes, dtype, torch.device("meta"))


def drawn(sizes: dict, dtype: str, device: torch.device) -> PreTrainedModel:
    """The same with the random weights of a model that nobody has trained."""
    with device:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes), dtype=DTYPES[dtype]).eval()


def factor(model: PreTrainedModel, ranks: dict[str, int | None]) -> None:
    """Put two factors of no meaning in the place of every weight that has a rank, where the weight is."""
    weights = components(model)
    if ranks.keys() != weights.keys():
        odd = sorted(ranks.keys() ^ weights.keys())[0]
        raise Refused(f"the ranks are of another model: {odd} is only in one. Give the ranks.json of a run with it.")
    for name, rank in ranks.items():
        if rank is not None:
            linear: nn.Linear = weights[name]
            sizes = linear.in_features, linear.out_features, rank, linear.bias is not None
            replace(model, name, LowRankLinear(*sizes, device=linear.weight.device, dtype=linear.weight.dtype))


def stand_in(model: PreTrainedModel, err: float, multiple: int = 1, plan: str = EVEN) -> dict[str, int | None]:
    """Ranks of the right err for a model whose spectra nobody has read, the nearest multiples of `multiple`.

    `even`: every LRC keeps the same share of its ranks, and every component has as many LRCs. In a real plan attention
    is cut more than the MLP, so that of as many parameters fewer are in LRCs. `paper` is such a plan: its LRCs and
    N-LRCs have the parameters that the paper says of LLaMA-2-7B at err 0.5, and it is known at no other err. Which
    layers are cut is not published: in both plans they are spread evenly.
    """
    weights = components(model)
    cuts = _cuts(weights, err, plan)
    ranks, owed = {}, {}
    for name, linear in weights.items():
        component = name.rpartition(".")[2]
        share, left = cuts.get(component, WHOLE)
        owed[component] = owed.get(component, 0.0) + share
        cut = owed[component] >= 0.5
        owed[component] -= cut
        most = min(linear.out_features, linear.in_features)
        rank = min(most, multiple * max(1, round(left * most / multiple)))
        ranks[name] = rank if cut else None
    return ranks


def _cuts(weights: dict[str, nn.Linear], err: float, plan: str) -> dict[str, Cut]:
    """How each component is cut; `paper` has its err where all weights have as many ranks, as LLaMA-2's have."""
    if plan == EVEN:
        left = min(_left(err), 1 - err)
        return {name.rpartition(".")[2]: (err / (1 - left), left) for name in weights}
    ranks = {min(linear.out_features, linear.in_features) for linear in weights.values()}
    if err != SPLIT_ERR or len(ranks) > 1:
        alone = f"Ask for err {SPLIT_ERR:g} alone, or write" if err != SPLIT_ERR else "Write"
        raise Refused(
            f"the plan of the paper is known for LLaMA-2's shapes at err={SPLIT_ERR}, not for err={err:g} and weights "
            f"of {', '.join(map(str, sorted(ranks)))} ranks. {alone} --plan even."
        )
    return SPLIT


def _left(err: float) -> float:
    """Between the values of `LEFT` on a line, beyond them the nearest."""
    known = sorted(LEFT)
    err = min(max(err, known[0]), known[-1])
    low = max(key for key in known[:-1] if key <= err)
    high = known[known.index(low) + 1]
    return LEFT[low] + (LEFT[high] - LEFT[low]) * (err - low) / (high - low)
