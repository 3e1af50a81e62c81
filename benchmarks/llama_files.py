"""Write a transformers Llama as GGUF, and have llama.cpp quantise it."""

from __future__ import annotations

import ctypes
import logging
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor
from transformers import LlamaConfig

from popc.errors import ModelError

# llama.cpp's formats, and what its file types are called in its header.
FORMATS = {
    "F16": "LLAMA_FTYPE_MOSTLY_F16",
    "Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0",
    "Q5_K_M": "LLAMA_FTYPE_MOSTLY_Q5_K_M",
    "Q4_K_M": "LLAMA_FTYPE_MOSTLY_Q4_K_M",
    "Q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0",
    "Q3_K_M": "LLAMA_FTYPE_MOSTLY_Q3_K_M",
}


def llama_cpp() -> Any:
    """The module of llama-cpp-python, which then prints nothing: what fails is raised.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import llama_cpp
    except ImportError as error:
        hint = "pip install 'popc[peers]', which builds llama.cpp and takes some minutes"
        raise ModelError(f"llama-cpp-python can't be imported ({error}): {hint}") from error
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL + 1)
    return llama_cpp


def write_f16(model: Any, path: Path) -> None:
    """Write a ``LlamaForCausalLM`` as GGUF: matrices as float16, vectors as float32.

    The file has no tokenizer: it takes and gives token ids.

    Raises:
        ModelError: the model is of another kind, or has something that a GGUF llama has not.
    """
    config = model.config
    if not isinstance(config, LlamaConfig) or config.rope_parameters["rope_type"] != "default":
        raise ModelError("only a Llama with plain rotary embeddings can be written as GGUF")
    staging = path.with_suffix(".part")
    writer = gguf.GGUFWriter(staging, "llama")
    _add_config(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embeddings where there is no other matrix
        there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if there is None:
            raise ModelError(f"GGUF has no name for the parameter {name!r} of a llama")
        if ".attn_q." in there:
            tensor = interleave_rotary(tensor, config.num_attention_heads)
        if ".attn_k." in there:
            tensor = interleave_rotary(tensor, config.num_key_value_heads)
        kind = np.float16 if tensor.dim() > 1 else np.float32
        writer.add_tensor(there, tensor.float().numpy().astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(staging, path)


def _add_config(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def interleave_rotary(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection (or its bias) in llama.cpp's order.

    A head's rotary embedding turns pairs of values. transformers pairs value i with value
    i + half of the head, llama.cpp 2 i with 2 i + 1.

    Args:
        weight: ``[heads * head_dim, ...]``.
    """
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def quantize(source: Path, path: Path, kind: str, threads: int) -> None:
    """Have llama.cpp quantise a file to a format of :data:`FORMATS`, without calibration.

    Raises:
        ModelError: llama.cpp refuses.
    """
    llama = llama_cpp()
    staging = path.with_suffix(".part")
    options = llama.llama_model_quantize_default_params()
    options.ftype, options.nthread = getattr(llama, FORMATS[kind]), threads
    failed = llama.llama_model_quantize(
        str(source).encode(), str(staging).encode(), ctypes.byref(options)
    )
    if failed:
        raise ModelError(f"llama.cpp could not quantise {source.name} to {kind}")
    os.replace(staging, path)
