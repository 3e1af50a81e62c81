"""Hand-written attention and experts: found or refused, and pruned equal to the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import popc
from popc import sessions
from popc.testing.oracle import MaskedAnywhere
from tests.helpers.forms import ATTENTIONS, D, Decoder, Experts, heads, merged
from tests.helpers.models import Gated
from tests.helpers.oracle import relative

CONFIG = popc.Config(
    policy="pop",
    sparsity=0.5,
    candidate=0.25,
    targets=("mlp", "attention", "experts"),
    codegen="eager",
)


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("batch", [1, 3])
def test_attention(name: str, batch: int) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    make, units, reason = ATTENTIONS[name]
    module, x = make().eval(), torch.randn(batch, 6, D)
    plan = popc.analyze(module, (x,))
    counts = [region.units for region in plan.regions if region.kind == "attention"]
    assert counts == ([units] if units else []), plan
    if not units:
        assert any(reason in skip.reason for skip in plan.skipped), plan.skipped
    if not units or name == "torch's":  # the oracle can't look into torch's
        return
    # No token is masked from another: an encoder, pruned within its one pass.
    compiled = popc.compile(module, CONFIG)
    with torch.no_grad():
        y, dense = compiled(x), module(x)
        oracle = MaskedAnywhere(module, compiled.popc_plan, CONFIG)
        with oracle:
            oracle.begin(True)
            expected = module(x)
    # Not where keys are of another sequence: it can't be told there.
    one_pass = name != "crossed"
    assert compiled.popc_plan.regions[0].one_pass == one_pass
    assert (relative(expected, dense) > 1e-2) == one_pass
    assert relative(y, expected) < 1e-4


@pytest.mark.parametrize("make", [lambda: Experts("picked"), lambda: Experts("all"), Gated])
@pytest.mark.parametrize("batch", [1, 2])
def test_decode_with_a_cache_of_tensors(make, batch: int) -> None:
    """The session is told by the cache's tensors alone."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    module: nn.Module = Decoder(make()).eval()
    x = torch.randn(batch, 9, D)
    compiled = torch.compile(
        module,
        backend="popc",
        options={
            "policy": "pop",
            "sparsity": 0.5,
            "candidate": 0.25,
            "targets": CONFIG.targets,
            "codegen": "eager",
        },
    )
    plan = popc.analyze(module, (x[:, :6],))
    assert plan.count("attention") == 1
    assert len(plan.regions) == 2

    def decode(call, begin=lambda measuring: None):
        begin(True)
        y, past = call(x[:, :6])
        out = [y]
        for at in range(6, 9):
            begin(False)
            y, past = call(x[:, at : at + 1], past)
            out.append(y)
        return out

    with torch.no_grad():
        pruned, dense = decode(compiled), decode(module)
        oracle = MaskedAnywhere(module, plan, CONFIG)
        with oracle:
            expected = decode(module, oracle.begin)
    for step, (a, b) in enumerate(zip(pruned, expected, strict=True)):
        assert relative(a, b) < 1e-4, step
    assert relative(expected[-1], dense[-1]) > 1e-2


class Flex(nn.Module):
    """Flex attention, with a block mask of its own or one that is given."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: torch.Tensor, mask: object = None) -> torch.Tensor:
        q, k, v = map(heads, self.a(x).chunk(3, -1))
        return self.o(merged(flex_attention(q, k, v, block_mask=mask)))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("masked", [False, True])
def test_flex_attention_is_found_where_it_traces(masked: bool) -> None:
    torch._dynamo.reset()
    module, x = Flex().eval(), torch.randn(1, 6, D)

    def causal(b, h, q, k):
        return q >= k

    masks = (create_block_mask(causal, None, None, 6, 6, device="cpu"),) if masked else ()
    compiled = popc.compile(module, policy="pop", sparsity=0.5, targets=("attention",))
    with torch.no_grad():
        assert relative(compiled(x, *masks), module(x, *masks)) < 1e-5
    if masked:
        assert [(r.kind, r.units) for r in compiled.popc_plan.regions] == [("attention", 4)]
    else:
        assert any("vmap" in skip.reason for skip in compiled.popc_plan.skipped)


class Beside(nn.Module):
    """One of two consumers flattens the rows that both read, as GPT-2's linears do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.left = nn.Linear(D, 24), nn.Linear(24, D)
        self.right, self.bias = nn.Parameter(torch.randn(24, D) / 5), nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.up(x))
        flat = torch.addmm(self.bias, h.reshape(-1, 24), self.right)
        return self.left(h) + flat.unflatten(0, x.shape[:2])


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_consumers_that_flatten_rows_read_the_same_value(scope: str) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    model, x = Beside().eval(), torch.randn(2, 5, D)
    (region,) = popc.analyze(model, (x,)).regions
    assert (region.kind, region.units, len(region.consumers)) == ("mlp", 24, 2)
    options = {"policy": "pop", "sparsity": 0.5, "scope": scope, "codegen": "eager"}
    compiled = popc.compile(model, **options)
    session = sessions.Session()
    with torch.no_grad(), sessions.use(session):
        torch.testing.assert_close(compiled(x), model(x))
        token = torch.randn(2, 1, D)
        got = compiled(token)
        if scope == "sequence":  # rows can't be told apart in one of them: it stays dense
            assert not session.units.regions
            torch.testing.assert_close(got, model(token))
            return
        masked = MaskedAnywhere(model, popc.analyze(model, (x,)), popc.Config(**options))
        masked.begin(True)
        with masked:
            model(x)
        masked.begin(False)
        with masked:
            expected = model(token)
    assert masked.masked > 0
    torch.testing.assert_close(got, expected)
