"""Models without weights: the shapes of a config on the meta device, with factors in the place of what a plan cuts."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from welore.errors import Refused
from welore.lowrank import LowRankLinear, replace
from welore.models import DTYPES, components

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
LEFT = 0.25  # of the ranks of an LRC in a stand-in for a plan


def on_meta(sizes: dict, dtype: str) -> PreTrainedModel:
    """A causal LM with these sizes (`model_type` and what its config takes), without storage."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes), dtype=DTYPES[dtype]).eval()


def factor(model: PreTrainedModel, ranks: dict[str, int | None]) -> None:
    """Put two factors without storage in the place of every weight that has a rank."""
    weights = components(model)
    if ranks.keys() != weights.keys():
        odd = sorted(ranks.keys() ^ weights.keys())[0]
        raise Refused(f"the ranks are of another model: {odd} is only in one. Give the ranks.json of a run with it.")
    for name, rank in ranks.items():
        if rank is not None:
            linear: nn.Linear = weights[name]
            sizes = linear.in_features, linear.out_features, rank, linear.bias is not None
            replace(model, name, LowRankLinear(*sizes, device="meta", dtype=linear.weight.dtype))


def stand_in(model: PreTrainedModel, err: float) -> dict[str, int | None]:
    """Ranks of the right err for a model whose spectra nobody has read: LRCs keep a quarter of theirs.

    LRCs are spread evenly over the layers of every component. Real plans differ: their LRCs keep the less the higher
    err is, so that a real model is larger than this at small err and smaller at large err.
    """
    left = min(LEFT, 1 - err)
    ranks, owed = {}, {}
    for name, linear in components(model).items():
        component = name.rpartition(".")[2]
        owed[component] = owed.get(component, 0.0) + err / (1 - left)
        cut = owed[component] >= 0.5
        owed[component] -= cut
        ranks[name] = max(1, int(left * min(linear.out_features, linear.in_features))) if cut else None
    return ranks
