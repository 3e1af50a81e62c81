"""The cost expressions against counted numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import popc
from popc.analysis.capture import capture_dynamo, capture_module
from popc.analysis.findings import Region
from popc.analysis.regions import find_regions
from popc.passes.dense.fold_repeat_kv import fold_repeat_kv
from popc.planning import cost
from popc.planning.rewrite_plan import RewritePlan
from tests.helpers.forms import ATTENTIONS, D, Experts, heads, merged
from tests.helpers.models import CACHE, Gated, Plain, tiny_llama

CONFIG = popc.Config(
    policy="pop", sparsity=0.4, candidate=0.2, targets=("mlp", "attention", "experts")
)


def region_of(module: nn.Module, x: torch.Tensor) -> popc.Region:
    (region,) = find_regions(capture_module(module, (x,))).plan().regions
    return region


class Step(nn.Module):
    """A model's call with a cache."""

    def __init__(self, model: nn.Module, cache: object) -> None:
        super().__init__()
        self.model, self.cache = model, cache

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, **{CACHE: self.cache}).logits


class Cross(nn.Module):
    """Queries of one sequence, keys and values of another; four heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        q, k, v = heads(self.q(x)), heads(self.k(context)), heads(self.v(context))
        return self.o(merged(nn.functional.scaled_dot_product_attention(q, k, v)))


def counted(module: nn.Module, *args: torch.Tensor) -> int:
    """By torch, with attention as products: it does not count the CPU's fused kernel."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        module(*args)
    return counter.get_total_flops()


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 7)])
@pytest.mark.parametrize("mlp", [Gated, Plain])
def test_mlp_flops_are_the_counted_ones(mlp: type, batch: int, tokens: int) -> None:
    module, x = mlp(), torch.randn(batch, tokens, 16)
    dense = cost.region_cost(region_of(module, x)).dense
    assert dense.at(B=batch, T=tokens).flops == counted(module, x)


@pytest.mark.parametrize("name", ["thirds", "by head", "grouped", "grouped sdpa", "einsum"])
def test_attention_flops_are_the_counted_ones(name: str) -> None:
    module, x = ATTENTIONS[name][0](), torch.randn(2, 6, D)
    dense = cost.region_cost(region_of(module, x)).dense
    assert dense.at(B=2, T=6, S=6).flops == counted(module, x)


def test_an_einsum_that_only_lays_out_is_no_product() -> None:
    class Laid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
            weights = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
            y = torch.einsum("bhqd->bqhd", torch.einsum("bhqk,bhkd->bhqd", weights, v))
            return self.o(y.reshape(x.shape))

    module, x = Laid(), torch.randn(2, 6, D)
    dense = cost.region_cost(region_of(module, x)).dense
    assert dense.at(B=2, T=6, S=6).flops == counted(module, x)


def test_llama_flops_are_the_counted_ones() -> None:
    """All linears but the last are in a region; attention's products are counted too."""
    model, ids = tiny_llama(), torch.randint(1, 90, (2, 9))
    plan = popc.analyze(model, (), {"input_ids": ids})
    head = 2 * 2 * 9 * 64 * 96
    assert plan.cost(B=2, T=9, S=9).rows[-1].dense.flops == counted(model, ids) - head


def test_a_cached_step_costs_what_is_counted() -> None:
    """One token after eight: FLOPs by torch, bytes as the sizes of weights and of the cache."""
    model, ids = tiny_llama(), torch.randint(1, 90, (2, 9))
    plan = popc.analyze(model, (), {"input_ids": ids})
    total = plan.cost(B=2, T=1, S=9).rows[-1].dense
    with torch.no_grad():
        cache = model(ids[:, :8], use_cache=True)[CACHE]
    step = Step(model, cache)
    assert total.flops == counted(step, ids[:, 8:]) - 2 * 2 * 64 * 96
    linears = [m.weight for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    kept = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    assert kept[0].shape == (2, 2, 9, 16)
    assert total.bytes == sum(t.numel() * t.element_size() for t in (*linears, *kept))


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_decode_graph_has_the_prefill_graphs_cost(dynamic: bool | None) -> None:
    """Its keys are a cache's, with a length that is a symbol if the graph is dynamic; and a pass
    that reads them at their strides does not change it."""
    torch._dynamo.reset()
    model, ids = tiny_llama(), torch.randint(1, 90, (2, 9))
    expected = [cost.region_cost(r) for r in popc.analyze(model, (), {"input_ids": ids}).regions]
    torch._dynamo.reset()
    regions: list[Region] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[object]) -> object:
        captured = capture_dynamo(gm, inputs)
        regions.extend(find_regions(captured).regions)
        before = [cost.region_cost(region.record) for region in regions]
        assert fold_repeat_kv(captured, RewritePlan()).matches == 2
        assert before == expected
        return gm.forward

    with torch.no_grad():
        cache = model(ids[:, :8], use_cache=True)[CACHE]
        torch.compile(Step(model, cache), backend=backend, dynamic=dynamic)(ids[:, 8:])
    described = [replace(region).record for region in regions]  # anew, of the graph as it is now
    assert [cost.region_cost(record) for record in described] == expected


def test_a_cross_attention_makes_its_keys_of_the_context() -> None:
    x, context = torch.randn(2, 3, D), torch.randn(2, 7, D)
    module = Cross()
    (region,) = find_regions(capture_module(module, (x, context))).plan().regions
    dense = cost.region_cost(region).dense
    assert dense.at(B=2, T=3, S=7).flops == counted(module, x, context)


@pytest.mark.parametrize("mlp", [Gated, Plain])
def test_dense_bytes_are_the_weights(mlp: type) -> None:
    module, x = mlp(bias=False), torch.randn(1, 1, 16)
    dense = cost.region_cost(region_of(module, x)).dense
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    assert dense.at(B=1, T=1).bytes == size


def test_biases_of_producers_are_read_with_their_rows() -> None:
    module, x = Plain(bias=True), torch.randn(1, 1, 16)
    dense, pruned = cost.region_cost(region_of(module, x), CONFIG)
    parameters = [module.a.weight, module.a.bias, module.c.weight]
    assert dense.at(B=1, T=1).bytes == sum(p.numel() * p.element_size() for p in parameters)
    counts = CONFIG.counts(40)
    assert pruned.weights == 4 * (counts.live * (16 + 1) + counts.active * 16)


def test_attention_reads_keys_and_values_of_its_kv_heads() -> None:
    module, x = ATTENTIONS["grouped sdpa"][0](), torch.randn(2, 6, D)
    context = cost.region_cost(region_of(module, x)).dense.context
    assert context.subs({cost.B: 2, cost.S: 6}) == 2 * (2 * 6 * 2 * 4) * 4  # k, v: B·S·heads·d


def test_pruned_bytes_are_rows_columns_and_lists() -> None:
    """As the decode graph reads them: live rows, active columns, int64 lists, float32 norms."""
    region = region_of(Gated(), torch.randn(1, 1, 16))
    counts = CONFIG.counts(40)
    pruned = cost.region_cost(region, CONFIG).pruned
    rows, columns = 2 * counts.live * 16 * 4, counts.active * 16 * 4
    lists = 3 * counts.live * 8 + counts.live * 4
    assert pruned.at(B=1, T=1).bytes == rows + columns + lists
    flops = 2 * 16 * (2 * counts.live + counts.active)
    assert pruned.at(B=1, T=1).flops == flops


@pytest.mark.parametrize("name", ["thirds", "grouped sdpa"])
def test_pruned_heads_are_whole_units(name: str) -> None:
    """q, k and v of live KV groups, o's columns of active ones; the cache is read in full."""
    region = replace(region_of(ATTENTIONS[name][0](), torch.randn(2, 6, D)), one_pass=False)
    config = popc.Config(policy="pop", sparsity=0.5, candidate=0.0, targets="attention")
    dense, pruned = cost.region_cost(region, config)
    counts = config.counts(region.units)
    assert (counts.live, counts.active) == (region.units // 2, region.units // 2)
    rows = sum(counts.live * p.channels for p in region.producers)
    columns = region.columns[: counts.active].size
    assert pruned.weights == 4 * (rows * (D + 1) + columns * D)
    assert pruned.lists == 8 * (rows + columns) + 4 * counts.live
    assert pruned.context == dense.context
    assert dense.flops - pruned.flops == 2 * cost.B * cost.T * D * (rows + columns)


def test_in_one_pass_all_rows_are_computed() -> None:
    """An encoder's own pass scores: only the columns of its output linear are left out."""
    region = region_of(ATTENTIONS["thirds"][0](), torch.randn(2, 6, D))
    assert region.one_pass
    dense, pruned = cost.region_cost(region, CONFIG)
    active = CONFIG.counts(4).active
    assert dense.weights - pruned.weights == (4 - active) * 4 * D * 4
    assert pruned.lists == 8 * D + 4 * 4  # all columns, and a norm for each of four heads


def test_pruned_flops_are_those_of_the_gathers() -> None:
    module, x = Gated(), torch.randn(2, 1, 16)
    counts = CONFIG.counts(40)
    rows, columns = torch.arange(counts.live), torch.arange(counts.active)

    class Gathered(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = (x @ part.weight[rows].T for part in (module.a, module.b))
            return (module.act(a) * b)[..., columns] @ module.c.weight[:, columns].T

    pruned = cost.region_cost(region_of(module, x), CONFIG).pruned
    assert pruned.at(B=2, T=1).flops == counted(Gathered(), x)


@pytest.mark.parametrize("r", [0.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.4, 1.0])
def test_shares_are_the_counts_where_nothing_is_rounded(r: float, gamma: float) -> None:
    region = region_of(Gated(), torch.randn(1, 1, 16))
    exact = cost.region_cost(region, popc.Config(policy="pop", sparsity=r, candidate=gamma)).pruned
    assert cost.region_cost(region).pruned.at(B=3, T=1, r=r, gamma=gamma) == exact.at(B=3, T=1)


def test_each_sequence_reads_what_its_own_lists_name() -> None:
    region = region_of(Gated(), torch.randn(1, 1, 16))
    batch = cost.region_cost(region, CONFIG).pruned.at(B=1, T=1)
    config = popc.Config.of(CONFIG, {"scope": "sequence"})
    per_sequence = cost.region_cost(region, config).pruned.at(B=4, T=1)
    assert per_sequence == (4 * batch.flops, 4 * batch.bytes)
    reason = cost.saves(region, config, B=4)
    assert reason is not None and "of weights more than dense" in reason


def test_expressions_hold_their_symbols_alone_and_fall_with_r() -> None:
    region = region_of(Gated(), torch.randn(1, 1, 16))
    pruned = cost.region_cost(region).pruned
    known = {cost.B, cost.T, cost.S, cost.r, cost.gamma}
    assert pruned.flops.free_symbols | pruned.bytes.free_symbols <= known
    sizes = [pruned.at(B=1, T=1, r=r, gamma=0.1) for r in (0.1, 0.3, 0.5, 0.7)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


def test_an_experts_token_reads_the_experts_it_meets() -> None:
    x = torch.randn(1, 1, D)
    dense = cost.region_cost(region_of(Experts("picked"), x)).dense
    one = (24 + 12) * D * 4
    assert dense.at(B=1, T=1).bytes == 2 * one
    assert dense.at(B=8, T=1).bytes == 4 * one  # there are four


def test_what_costs_more_than_it_saves_is_left_dense() -> None:
    """One input channel: a row is shorter than its place in a list."""
    torch._dynamo.reset()
    narrow = nn.Sequential(nn.Linear(1, 40, bias=False), nn.ReLU(), nn.Linear(40, 1, bias=False))
    x = torch.randn(1, 4, 1)
    reason = cost.saves(region_of(narrow, x), CONFIG)
    assert reason is not None and "of lists to save" in reason
    compiled = popc.compile(narrow.eval(), CONFIG, codegen="eager")
    with torch.no_grad(), pytest.warns(UserWarning, match="nothing to prune"):
        compiled(x)
    skipped = compiled.popc_plan.skipped
    assert [skip.reason for skip in skipped if "lists" in skip.reason] == [reason]
    assert cost.saves(region_of(Gated(), torch.randn(1, 1, 16)), CONFIG) is None


def test_the_table_of_a_plan() -> None:
    plan = popc.analyze(tiny_llama())
    table = plan.cost(config=CONFIG)
    *rows, total = table.rows
    assert [row.kind for row in rows] == ["attention", "mlp"] * 2
    assert total.dense.bytes == sum(row.dense.bytes for row in rows)
    assert total.pruned.bytes < total.dense.bytes
    left = plan.cost(config=popc.Config(policy="pop")).rows[0]
    assert (left.note, left.pruned) == ("its kind is no target", left.dense)
    assert "model.layers.1.mlp" in str(table)
