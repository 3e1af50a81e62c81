"""Real text to measure on: the Wikipedia articles in gensim's test data."""

from __future__ import annotations

import bz2
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import torch

from popc.errors import ModelError
from popc.files import key_of, write_whole
from popc.models import cache_folder, package_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORTEST = 3000  # characters of plain text; what is shorter is a stub or a redirect


def wikipedia_articles() -> list[str]:
    """The plain text of about 90 English Wikipedia articles, in the dump's order.

    Raises:
        ModelError: gensim's data or the markup parser is not installed.
    """
    package = package_folder("gensim", "pip install --no-deps gensim==4.4.0")
    dump = next(iter((package / "test" / "test_data").glob("enwiki-*-shortened.bz2")), None)
    if dump is None:
        raise ModelError("gensim's test data hold no Wikipedia dump: install gensim==4.4.0")
    kept = cache_folder() / f"{key_of(dump)}.json"
    try:
        return list(json.loads(kept.read_text()))
    except (OSError, ValueError):
        articles = _parse(dump)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, json.dumps(articles))
    except OSError:
        pass  # only slower next time
    return articles


def windows(
    tokenizer: PreTrainedTokenizerBase, count: int, length: int = 512, skip: int = 0
) -> torch.Tensor:
    """``[count, length]`` int64: the first ``length`` tokens of each of ``count`` articles.

    Args:
        skip: how many articles of that length come before them.

    Raises:
        ModelError: there are not so many articles of that length.
    """
    rows = []
    for article in wikipedia_articles():
        ids = tokenizer(article[: 12 * length], return_tensors="pt").input_ids[0]
        if len(ids) >= length:
            rows.append(ids[:length])
        if len(rows) == skip + count:
            return torch.stack(rows[skip:])
    asked = f"{skip + count} windows of {length} tokens asked for"
    raise ModelError(f"{asked}, the text has {len(rows)}")


def _parse(dump: Path) -> list[str]:
    try:
        import mwparserfromhell
    except ImportError as error:
        raise ModelError(f"{error}: pip install 'popc[demo]'") from error
    articles = []
    with bz2.open(dump) as stream:
        for _, element in ElementTree.iterparse(stream):
            if not element.tag.endswith("}text"):
                continue
            markup = element.text or ""
            element.clear()
            if markup.lower().startswith("#redirect"):
                continue
            plain = str(mwparserfromhell.parse(markup).strip_code())
            plain = re.sub(r"\n{3,}", "\n\n", plain).strip()
            if len(plain) >= SHORTEST:
                articles.append(plain)
    return articles
