"""``torch.compile(backend="popc")``: sessions are told by the cache's tensors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import StaticCache

import popc
from tests.helpers.generation import TOLERANCE, oracle_run, prompt, run, tokens
from tests.helpers.models import tiny_llama
from tests.helpers.oracle import relative

pytestmark = pytest.mark.usefixtures("fresh_compiler")

OPTIONS = {"policy": "pop", "sparsity": 0.5, "candidate": 0.2, "codegen": "eager"}


def test_found_by_its_entry_point_alone() -> None:
    program = (
        "import sys, torch\n"
        "assert 'popc' in torch.compiler.list_backends()\n"
        "assert 'popc' not in sys.modules\n"
        "from torch import nn\n"
        "mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)).eval()\n"
        "options = {'sparsity': 0.4, 'codegen': 'eager'}\n"
        "x = torch.randn(1, 4, 8)\n"
        "with torch.no_grad():\n"
        "    y = torch.compile(mlp, backend='popc', options=options)(x)\n"
        "    assert torch.allclose(y, mlp(x), atol=1e-6)\n"
        "assert 'popc' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("static", [False, True])
def test_is_the_oracle(static: bool) -> None:
    model, ids = tiny_llama(), tokens()
    config = popc.Config(**OPTIONS)
    expected = oracle_run(model, config, ids, 10)
    compiled = torch.compile(model, backend="popc", options=OPTIONS)
    cache = StaticCache(config=model.config, max_cache_len=20) if static else None
    assert relative(run(compiled, ids, 10, cache=cache), expected) < TOLERANCE


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}], ids=str)
def test_generates_what_popc_compile_does(how: dict) -> None:
    model, ids = tiny_llama(), prompt()
    how = {"max_new_tokens": 8, "do_sample": False, **how}
    expected = popc.compile(tiny_llama(), **OPTIONS).generate(ids, **how)
    dense = model.generate(ids, **how)
    model.compile(backend="popc", options=OPTIONS)
    for _ in range(2):  # the second time the static cache is used again
        assert torch.equal(model.generate(ids, **how), expected)
    assert not torch.equal(expected, dense)


def test_bad_option_is_named() -> None:
    compiled = torch.compile(tiny_llama(), backend="popc", options={"sparsity": 2})
    with torch.no_grad(), pytest.raises(Exception, match=r"sparsity=2 is not allowed"):
        compiled(prompt())
