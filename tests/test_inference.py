"""Generation is that of transformers; FLOPs and bytes are those of the tensors there."""

import pytest
import torch

from welore.config import compose, to_config
from welore.errors import Refused
from welore.fuse import fuse
from welore.inference import (
    Writer,
    cache_bytes,
    compiled,
    decode_bytes,
    decode_flops,
    generate,
    generate_replayed,
    prefill_flops,
    prefill_parts,
    product_flops,
    race,
    read_replayed,
)
from welore.lowrank import factored_ranks
from welore.models import components, count_bytes, count_parameters, flops_per_token
from welore.ranks import Budget
from welore.shapes import PLANS, SHAPES, factor, on_meta, stand_in

IDS_BL = torch.arange(24).view(2, 12) * 11 % 259


def test_tokens_with_a_cache_are_those_of_transformers(compressed):
    tokens, timing = generate(compressed, IDS_BL, 6)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, suppress_tokens=None, pad_token_id=258)
    theirs = compressed.generate(IDS_BL, attention_mask=torch.ones_like(IDS_BL), **options, eos_token_id=None)
    assert torch.equal(tokens, theirs[:, 12:])
    assert timing.prefill > 0 and len(timing.steps) == 4


def test_a_cache_of_fixed_size_changes_no_token(compressed):
    tokens, _ = generate(compressed, IDS_BL, 7)
    replayed, timing = generate_replayed(compressed, IDS_BL, 7)
    assert torch.equal(tokens, replayed) and len(timing.steps) == 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "compressed", "fused"])
def test_a_compiled_model_writes_the_same_tokens(kind, pristine, compressed, cpp_compiler):
    model = pristine[0] if kind == "dense" else compressed
    if kind == "fused":
        fuse(model)
    found = compiled(model, IDS_BL, 7, 2)
    assert found.same == 7
    # Compiling is not in the speed.
    assert min(found.prefill_seconds, found.decode_seconds) > 10 * IDS_BL.numel() / found.prefill


def test_a_writer_goes_on_from_the_prompt_every_time(compressed):
    steps = []

    def step(**inputs):
        steps.append(inputs["input_ids"])
        return compressed(**inputs)

    writer = Writer(compressed, IDS_BL, 7, step)
    first, second = writer.write(), writer.write()
    assert torch.equal(first[0], second[0]) and torch.equal(first[0], generate(compressed, IDS_BL, 7)[0])
    assert len(steps) == 12  # all but the prefill


def test_a_race_gives_every_model_a_speed(compressed, pristine):
    speeds = race({"dense": pristine[0], "compressed": compressed}, IDS_BL, 4, 2)
    assert all(speed.prefill > 0 and speed.decode > 0 for speed in speeds.values()) and len(speeds) == 2


def test_the_first_token_of_a_replayed_prefill_is_that_of_the_model(compressed):
    tokens, taken = read_replayed(compressed, IDS_BL, 3)
    assert torch.equal(tokens, generate(compressed, IDS_BL, 4)[0][:, 0]) and len(taken) == 3


def test_the_parts_of_a_prefill_follow_what_it_reads(compressed):
    """Products grow with the tokens, attention with their square."""
    short, long = (prefill_parts(compressed, torch.zeros(1, length, dtype=torch.long)) for length in (256, 4096))
    assert min(short.values()) > 0
    assert long["attention"] / short["attention"] > 2 * long["products"] / short["products"]


def counted(run):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def test_flops_are_those_that_torch_counts(compressed):
    compressed.set_attn_implementation("eager")  # plain products, which the counter of torch sees whole, mask or not
    whole = 2 * 2 * 12 * 12 * 64 * 2  # 2 FLOPs, 2 products, 2 sequences, one layer
    layers = compressed.config.num_hidden_layers
    found = counted(lambda: compressed(input_ids=IDS_BL, logits_to_keep=1))
    causal = layers * whole // 2
    assert found - causal == 2 * prefill_flops(compressed, 12)
    assert found - layers * whole == 2 * product_flops(compressed, 12)
    cache = compressed(input_ids=IDS_BL, use_cache=True).past_key_values
    found = counted(lambda: compressed(input_ids=IDS_BL[:, :1], past_key_values=cache))
    assert found == 2 * decode_flops(compressed, 13)
    assert decode_flops(compressed, 0) == flops_per_token(compressed)


def test_bytes_of_the_cache_are_those_of_its_tensors(compressed):
    cache = compressed(input_ids=IDS_BL, use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == cache_bytes(compressed.config, 2, 12, 4)
    embedding = compressed.get_input_embeddings().weight
    tied = compressed.get_output_embeddings().weight is embedding
    assert decode_bytes(compressed, 2, 12) == held + count_bytes(compressed) - (0 if tied else embedding.nbytes)


def test_shapes_with_the_ranks_of_a_run_are_the_model_of_the_run(model, compress):
    plan = compress(model, Budget(err=0.3))
    bare = on_meta(to_config(compose(["model=tiny"])).model.config, "float32")
    factor(bare, plan.ranks)
    assert count_parameters(bare) == count_parameters(model) and factored_ranks(bare) == factored_ranks(model)
    assert next(bare.parameters()).is_meta


@pytest.mark.parametrize(
    "name, millions", [("llama2_7b", 6738.416), ("llama2_13b", 13015.864), ("mistral_7b", 7241.732)]
)
def test_known_shapes_have_the_published_parameters(name, millions):
    assert count_parameters(on_meta(SHAPES[name], "bfloat16")) / 1e6 == pytest.approx(millions, abs=1e-3)


@pytest.mark.parametrize(("err", "millions"), [(0.3, 5794.25), (0.5, 4543.67), (0.7, 3072.84)])
def test_a_stand_in_has_the_parameters_of_the_papers_table_7(err, millions):
    model = on_meta(SHAPES["llama2_7b"], "bfloat16")
    factor(model, stand_in(model, err))
    assert count_parameters(model) / 1e6 == pytest.approx(millions, rel=1e-3)


@pytest.mark.parametrize("multiple", [1, 8])
def test_the_stand_in_of_the_paper_has_all_that_is_published_of_its_plan(multiple):
    """Of LLaMA-2-7B at err 0.5, in billions of parameters as they are printed, and ratios within 2 % of 1."""
    model = on_meta(SHAPES["llama2_7b"], "bfloat16")
    ranks = stand_in(model, 0.5, multiple, "paper")
    before = {name: module.weight.numel() for name, module in components(model).items()}
    factor(model, ranks)
    after = {name: sum(p.numel() for p in module.parameters()) for name, module in components(model).items()}
    cut = [name for name, rank in ranks.items() if rank is not None]
    lrc, n_lrc = sum(after[name] for name in cut), sum(after[name] for name in ranks if name not in cut)
    assert sum(4096 - ranks[name] for name in cut) / (4096 * len(ranks)) == pytest.approx(0.5, abs=1e-3)
    assert count_parameters(model) / 1e6 == pytest.approx(4543.67, rel=5e-4)  # Table 7
    assert (round(lrc / 1e9, 1), round(n_lrc / 1e9, 1)) == (1.2, 3.1)  # a panel of Figure 5 of the first version
    assert lrc / sum(before[name] for name in cut) == pytest.approx(0.35, abs=0.02)  # the abstract, in one reading
    assert all(rank < 0.5 * 4096 for rank in ranks.values() if rank is not None)  # Section 3.1
    assert all(ranks[name] < 0.1 * 4096 for name in ranks if name.endswith(("q_proj", "k_proj")))  # B.1
    assert not any(name.endswith(("v_proj", "down_proj")) for name in cut)  # Section 3 of the first version


@pytest.mark.parametrize(("name", "err"), [("llama2_7b", 0.3), ("mistral_7b", 0.5)])
def test_the_plan_of_the_paper_is_refused_where_it_is_not_known(name, err):
    with pytest.raises(Refused, match="plan of the paper is known for LLaMA-2's shapes at err=0.5"):
        stand_in(on_meta(SHAPES[name], "bfloat16"), err, plan="paper")


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("multiple", [8, 64])
def test_a_stand_in_of_aligned_ranks_is_about_the_same(multiple, plan):
    model = on_meta(SHAPES["llama2_7b"], "bfloat16")
    free, found = stand_in(model, 0.5, plan=plan), stand_in(model, 0.5, multiple, plan)
    for name, rank in free.items():
        assert found[name] is rank is None or (found[name] % multiple == 0 and abs(found[name] - rank) <= multiple / 2)


@pytest.mark.parametrize("err", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_stand_in_has_the_err_that_was_asked_for(err):
    model = on_meta(SHAPES["smollm2_135m"], "float32")
    full = {name: min(m.out_features, m.in_features) for name, m in components(model).items()}
    ranks = stand_in(model, err)
    removed = sum(full[name] - rank for name, rank in ranks.items() if rank is not None)
    assert removed / sum(full[name] for name in ranks) == pytest.approx(err, abs=0.02)
