"""``explain``: what the tables and the page say."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import popc
from popc import cli, models
from popc.analysis.plan import Plan, Skipped
from popc.report.explain import _REMEDIES, Explanation, explain, remedy
from popc.report.svg import Box, layers, picture
from tests.helpers.models import InnerNorm, Leaks, Plain, Softmaxed, TwoValues, tiny_llama

IDS = torch.arange(6)[None]


@pytest.fixture
def llama() -> Explanation:
    torch._dynamo.reset()
    config = popc.Config(policy="pop", sparsity=0.4, targets=("mlp",))
    return explain(tiny_llama(), input_ids=IDS, config=config)


def flat(explanation: Explanation, width: int = 400) -> str:
    """What is printed where no cell needs a second line, in single spaces."""
    from rich.console import Console

    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(explanation.table())
    return " ".join(capture.get().replace("│", " ").split())


class Page(HTMLParser):
    """Texts of a page; checks that tags nest and that nothing comes from outside."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert tag not in ("script", "link", "img", "iframe")
        assert not {name for name, _ in attrs} & {"src", "href", "xlink:href"}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def svg(page: str) -> ET.Element:
    """The picture: the SVG that holds the layers."""
    start = page.index('<svg viewBox="0 0 9')
    return ET.fromstring(page[start : page.index("</svg>", start) + 6])


def rects(picture: ET.Element, kind: str) -> list[float]:
    """Widths of the boxes of a kind."""
    drawn = [rect for group in picture.iter("g") for rect in group.iter("rect")]
    return [float(rect.attrib["width"]) for rect in drawn if rect.attrib["class"] == kind]


def test_regions_of_a_llama(llama: Explanation) -> None:
    text = flat(llama)
    # Gate and up of 160 rows, down of 160 columns, each 64 float32. At r = 0.4 and γ = 0.1, 104
    # are computed and 96 active: (2 * 104 + 96) / 480 of it, and lists of 3 int64 and a norm each.
    dense, read = 160 * 3 * 64 * 4, (2 * 104 + 96) * 64 * 4 + 104 * (3 * 8 + 4)
    sizes = f"{dense / 1e3:.1f} kB {read / 1e3:.1f} kB {read / dense:.0%}"
    for layer in (0, 1):
        place = rf"mlp model.layers.{layer}.mlp modeling_llama.py:"
        line = text[text.index(place) :]
        assert f"160 linear ×2 linear {sizes}" in line[:140]
        line = text[text.index(f"attention model.layers.{layer}.self_attn") :]
        assert "2 linear ×3 linear 49.2 kB 49.2 kB 100% not a target" in line[:140]
    assert "By pop at r = 0.4, a decode step" in text
    assert "4 regions, 5 refusals" in text


def test_refusals_of_a_llama_are_folded(llama: Explanation) -> None:
    text = flat(llama)
    line = text[text.index("model.layers.*.mlp.down_proj ×2") :]
    assert line.index("mean modeling_llama.py:") < line.index("those of model.layers.*.mlp")
    assert "lm_head the channels leave the graph" in text
    assert text.count("o_proj") == 1


@pytest.mark.parametrize(
    ("model", "kind", "op", "helps"),
    [
        (InnerNorm(), "mixes", "layer_norm", "keep layer_norm out of the way"),
        (Softmaxed(), "mixes", "softmax", "keep softmax out of the way"),
        (Leaks(), "leaves the graph", "gelu", "keep the channels inside"),
        (TwoValues(), "different values", "linear", "read the same value"),
    ],
)
def test_a_refusal_says_what_would_help(model: nn.Module, kind: str, op: str, helps: str) -> None:
    torch._dynamo.reset()
    explanation = explain(model, torch.randn(1, 3, 16))
    (skip,) = [skip for skip in explanation.plan.skipped if skip.name == "a"]
    assert skip.kind == kind
    assert skip.source.startswith("models.py:")
    assert helps in remedy(skip)
    text = flat(explanation)
    assert "0 regions" in text and "Nothing to prune" in text
    assert f"{op} {skip.source} {remedy(skip)}" in text


class Unknown(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.linalg.matrix_exp(self.a(x)[..., :40, :]))


class Dropped(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(nn.functional.dropout(self.a(x), 0.5, training=True))


@pytest.mark.parametrize(
    ("model", "kind"), [(Unknown(), "unknown op"), (Dropped(), "training")], ids=lambda v: str(v)
)
def test_kinds_of_refusal(model: nn.Module, kind: str) -> None:
    torch._dynamo.reset()
    plan = popc.analyze(model, (torch.randn(1, 40, 16),))
    assert [skip.kind for skip in plan.skipped if skip.name == "a"] == [kind]


def test_a_remedy_for_every_kind() -> None:
    for kind in _REMEDIES:
        assert remedy(Skipped("a", "why", "aten.mean.dim", kind=kind))
        assert "{" not in remedy(Skipped("a", "why", kind=kind))
    assert remedy(Skipped("a", "why")) == ""


def test_what_breaks_the_graph_is_reported() -> None:
    text = flat(Explanation(Plan(breaks=["a call of print"])))
    assert "the model a call of print" in text
    assert "TORCH_LOGS=graph_breaks" in text


def test_str_is_plain(llama: Explanation) -> None:
    lines = str(llama).splitlines()
    assert max(map(len, lines)) <= 160
    assert "\x1b" not in str(llama)


def test_the_page_stands_alone(llama: Explanation) -> None:
    html = llama.html()
    assert "http:" not in html and "https:" not in html and "url(#" in html
    page = Page(html)
    for region in llama.plan.regions:
        assert region.name in page.texts
    assert {"LlamaForCausalLM", "lm_head", "mean"} <= set(" ".join(page.texts).split())
    assert page.tags.count("table") == 2
    assert "prefers-color-scheme: dark" in html
    assert llama._repr_html_() in html


def test_the_picture(llama: Explanation) -> None:
    drawn = svg(llama.html())
    labels = [text.text for text in drawn.iter("text") if text.attrib.get("class") == "layer"]
    assert labels == ["model.layers.0", "model.layers.1", "lm_head"]
    mlp, unread = rects(drawn, "mlp"), rects(drawn, "unread")
    shares = [read.share for read in llama.reads if read.region.kind == "mlp"]
    assert len(mlp) == len(rects(drawn, "attention")) == 2
    assert len(rects(drawn, "refused")) == 1  # o_proj and down_proj are in their regions' boxes
    for whole, part, share in zip(mlp, unread, shares, strict=True):
        assert part / whole == pytest.approx(1 - share, abs=0.01)
    titles = [title.text or "" for title in drawn.iter("title")]
    assert any("mlp model.layers.1.mlp: 160 units" in title for title in titles)


def test_text_is_escaped() -> None:
    bad = '<b>"&[/red]'
    skip = Skipped(bad, bad, bad, bad, "unknown op")
    explanation = Explanation(Plan(skipped=[skip]), title=bad)
    assert "<b>" not in explanation.html()
    assert bad in Page(explanation.html()).texts
    assert f"popc: {bad}: 0 regions" in flat(explanation)
    box = Box("refused", bad, 4000, 0.0, bad)
    drawn = ET.fromstring(picture({bad: [box]}))
    assert [title.text for title in drawn.iter("title")] == [bad]


def test_layers_are_paths_up_to_a_number() -> None:
    names = ["embed", "model.layers.0.mlp", "model.layers.0.moe.experts.3.up", "head.out.proj"]
    by_layer = layers(Box("mlp", name, 1, 0.0, "") for name in names)
    assert [(layer, len(boxes)) for layer, boxes in by_layer.items()] == [
        ("embed", 1),
        ("model.layers.0", 2),
        ("head.out", 1),
    ]


def test_model_sparsity_is_resolved() -> None:
    torch._dynamo.reset()
    config = popc.Config(policy="pop", model_sparsity=0.1)
    explanation = explain(tiny_llama(), input_ids=IDS, config=config)
    assert explanation.config.model_sparsity is None
    assert explanation.config.sparsity > 0.1


def test_command(tmp_path: Path) -> None:
    torch._dynamo.reset()
    _, tokenizer = models.load_model()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    out = tmp_path / "page.html"
    asked = ["explain", str(tmp_path), "--html", str(out), "--sparsity", "0.4"]
    result = CliRunner().invoke(cli.app, asked)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())  # lines break where the path's length has them break
    assert "4 regions, 5 refusals" in said
    assert "r = 0.4" in said
    result = CliRunner().invoke(cli.app, [*asked[:-2], "--weights", "int8", "--bits", "4.25"])
    assert result.exit_code == 0, result.output
    # Of 8.5 bits; on the way, weights of 32 have become planes of the compiled model's own.
    assert "By graded at r = 0.5, a decode step" in " ".join(result.output.split())
    assert "model.layers.1.mlp" in Page(out.read_text(encoding="utf-8")).texts
