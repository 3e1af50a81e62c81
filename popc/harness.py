"""A model class for EleutherAI's lm-evaluation-harness: ``--model popc``.

The harness finds models in a table of its own and has no plug-ins, so it is started from here, with
all the arguments of ``lm_eval``::

    python -m popc.harness run --model popc --model_args pretrained=FOLDER,sparsity=0.4 --tasks ...

``model_args`` are those of the harness's ``hf`` model and the fields of :class:`popc.Config`;
``targets`` are joined by ``+``.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from transformers import DynamicCache

import popc
from popc.compat import cache_keyword
from popc.errors import ModelError

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ModelError(f"{error}: pip install 'popc[lm-eval]'") from error


@register_model("popc")
class PopcLM(HFLM):
    """A causal language model of transformers, pruned while it decodes.

    A prefill is dense. So continuations are not scored in one call, as the harness does: the
    context is prefilled, and each later token decoded on its own, one request at a time.

    Raises:
        ConfigError: an option of popc's is not allowed.
    """

    def __init__(self, pretrained: Any, **arguments: Any) -> None:
        names = {field.name for field in fields(popc.Config)}
        options = {name: arguments.pop(name) for name in names & arguments.keys()}
        if isinstance(options.get("targets"), str):
            options["targets"] = tuple(options["targets"].split("+"))
        config = popc.Config(**options)
        super().__init__(pretrained, backend="causal", **arguments)
        self._model: Any = popc.compile(self.model, config)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        likelihoods = []
        for _, context, continuation in track(requests, "decoding", disable=disable_tqdm):
            ids = torch.tensor([(context + continuation)[-(self.max_length + 1) :]])
            ids = ids.to(self.device)
            logits = self._decoded(ids[:, :-1], ids.shape[1] - len(continuation))
            expected = ids[0, -len(continuation) :]
            likely = logits.log_softmax(-1).gather(1, expected[:, None]).sum()
            likelihoods.append((float(likely), bool((logits.argmax(-1) == expected).all())))
        return likelihoods

    @torch.no_grad()
    def _decoded(self, ids: Tensor, prompt: int) -> Tensor:
        """Float32 logits ``[n, V]`` of the last of ``prompt`` tokens and of each later one."""
        cache = {cache_keyword(self.model.forward): DynamicCache()}
        logits = [self.model(ids[:, :prompt], **cache, use_cache=True).logits[0, -1]]
        for token in ids[:, prompt:].split(1, dim=1):
            logits.append(self.model(token, **cache, use_cache=True).logits[0, -1])
        return torch.stack(logits).float()


def main() -> None:
    """The harness's own command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
