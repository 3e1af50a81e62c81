"""Tiny random models of transformers architectures, and what an expert would prune in each.

``mlp``, ``attention`` and ``experts`` count the regions that the modelling code holds, by data
flow: a region is prunable where only elementwise ops lie between its linears, channel by channel
or KV group by KV group. An MLP is any linear -> elementwise -> linear, a projector too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
)

from tests.helpers import zoo_multimodal as first

# Hidden 32, MLP 48, two layers, four heads on two KV heads: the fields a config has of these.
_SIZES = {
    name: value
    for value, names in (
        (32, "hidden_size d_model n_embd dim embed_dim"),
        (48, "intermediate_size n_inner ffn_dim d_ff dff ffn_hidden_size hidden_dim"),
        (48, "encoder_ffn_dim decoder_ffn_dim"),
        (24, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size"),
        (2, "num_hidden_layers num_layers n_layer n_layers"),
        (2, "encoder_layers decoder_layers num_decoder_layers"),
        (4, "num_attention_heads num_heads n_head n_heads attention_heads"),
        (4, "encoder_attention_heads decoder_attention_heads"),
        (2, "num_key_value_heads"),
        (8, "head_dim d_kv kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim rotary_dim"),
        (16, "kv_lora_rank q_lora_rank"),
        (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
        (2, "num_experts_per_tok moe_topk moe_k"),
        (1, "n_group topk_group n_shared_experts first_k_dense_replace"),
        (64, "max_position_embeddings n_positions max_seq_len"),
        (64, "max_source_positions max_target_positions"),
        (96, "vocab_size"),
        (16, "image_size"),
        (8, "patch_size"),
        (0, "pad_token_id decoder_start_token_id"),
        (1, "bos_token_id"),
        (None, "eos_token_id forced_eos_token_id"),
    )
    for name in names.split()
}


@dataclass(frozen=True)
class Entry:
    """One architecture: how to build it, and its prunable regions."""

    name: str
    make: Callable[[], nn.Module]
    kind: str
    mlp: int
    attention: int
    experts: int
    note: str
    inputs: first.InputGroup
    refused: tuple[int, int, int] = (0, 0, 0)
    traced_right: bool = True  # whether torch.compile alone gives the model's own numbers

    @property
    def expected(self) -> tuple[int, int, int]:
        """What popc finds: all but what it refuses, for the reason in ``note``."""
        whole = (self.mlp, self.attention, self.experts)
        return tuple(a - b for a, b in zip(whole, self.refused, strict=True))


def sizes(kind: str, **options: object) -> dict[str, object]:
    """The shared fields that this config declares, then ``options``."""
    blank = type(AutoConfig.for_model(kind))
    declared = {field.name for field in fields(blank)}
    return {**{name: value for name, value in _SIZES.items() if name in declared}, **options}


def build(auto: type, kind: str, **options: object) -> nn.Module:
    """The model with weights and biases large enough that pruning shows in the logits."""
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, **sizes(kind, **options))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 or not parameter.any():  # biases and gates are born zero
                parameter.normal_(0, 0.2)
    return model


def _entry(
    auto: type,
    label: str,
    name: str,
    inputs: first.InputGroup,
    counts: tuple[int, int, int],
    note: str,
    options: dict[str, object],
) -> Entry:
    kind = name.partition(":")[0]
    more = {key: options.pop(key) for key in ("refused", "traced_right") if key in options}
    return Entry(name, lambda: build(auto, kind, **options), label, *counts, note, inputs, **more)


_CONV = {"conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
_CONV |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
_SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
_DELTA = {
    **{"linear_num_key_heads": 4, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "layer_types": ["linear_attention", "full_attention"],
}


def causal(name, mlp=2, attention=2, experts=0, note="", inputs=first.text, **options) -> Entry:
    counts = (mlp, attention, experts)
    return _entry(AutoModelForCausalLM, "causal", name, inputs, counts, note, options)


def seq2seq(
    name, mlp=4, attention=6, note="", inputs=first.pair, auto=AutoModelForSeq2SeqLM, **options
) -> Entry:
    return _entry(auto, "seq2seq", name, inputs, (mlp, attention, 0), note, options)


def encoder(
    name, mlp=2, attention=2, note="", inputs=first.text, auto=AutoModel, **options
) -> Entry:
    return _entry(auto, "encoder", name, inputs, (mlp, attention, 0), note, options)


def vlm(name, mlp, attention, experts=0, note="", inputs=first.four, text=None, **options) -> Entry:
    counts = (mlp, attention, experts)
    options = {"image_token_id": first.IMAGE, "text_config": text, **options}
    return _entry(AutoModelForImageTextToText, "vlm", name, inputs, counts, note, options)


_MERGER = "the merger is an MLP too"
_SPLIT = "; refused: the pictures' attention breaks the graph to split them"
_PROJECTOR = "the projector is an MLP too"
_WHOLE = "the norm of q and k is over all heads"
_SHARED = "a dense layer, then a MoE with a shared expert"
_CLIP_TEXT = {"text_config": sizes("clip_text_model", eos_token_id=2)}
_CLIP = {"vision_config": sizes("clip_vision_model")}
_SIGLIP = {"vision_config": sizes("siglip_vision_model", vision_use_head=False)}
_IDEFICS = {"vision_config": sizes("idefics3_vision")}
_SMOL = {"vision_config": sizes("smolvlm_vision")}
_INTERN = {"vision_config": sizes("internvl_vision", image_size=[16, 16], patch_size=[8, 8])}
_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2]}
_QWEN = {"depth": 2, "num_heads": 4, "patch_size": 8}

ZOO: tuple[Entry, ...] = (
    # Decoders of one MLP and one attention in each layer.
    causal("llama"),
    causal("mistral"),
    causal("ministral"),
    causal("qwen2"),
    causal("qwen3"),
    causal("gemma"),
    causal("gemma2"),
    causal("gemma3_text"),
    causal("vaultgemma"),
    causal("phi"),
    causal("phi3"),
    causal("smollm3"),
    causal("olmo"),
    causal("olmo2", attention=0, note=_WHOLE),
    causal("olmo3", attention=0, note=_WHOLE),
    causal("granite"),
    causal("cohere", logit_scale=1.0),
    causal("cohere:norm", logit_scale=1.0, use_qk_norm=True, note="a norm of each head's own"),
    causal("cohere2", logit_scale=1.0),
    causal("starcoder2"),
    causal("stablelm"),
    causal("glm"),
    causal("glm4"),
    causal("nemotron"),
    causal("exaone4"),
    causal("ernie4_5"),
    causal("hunyuan_v1_dense"),
    causal("arcee"),
    causal("seed_oss"),
    causal("helium"),
    causal("apertus"),
    causal("nanochat"),
    causal("persimmon"),
    causal("moshi", note="gate and up are told apart by a view"),
    causal("modernbert-decoder"),
    causal("gpt2"),
    causal("gpt_neo", attention_types=[[["global", "local"], 1]]),
    causal("gpt_neox"),
    causal("gpt_neox_japanese"),
    causal("gpt_bigcode", attention=0, note="one KV head for all"),
    causal("gpt_bigcode:heads", multi_query=False),
    causal("gptj"),
    causal("codegen", note="q, v and k in four shards of the heads"),
    causal("opt"),
    causal("biogpt"),
    causal("xglm"),
    causal("ctrl"),
    causal("bloom"),
    causal("mpt"),
    causal("falcon", attention=0, note="one KV head for all"),
    causal("falcon:heads", multi_query=False, parallel_attn=False),
    causal("falcon:new", new_decoder_architecture=True, num_kv_heads=2),
    causal("bitnet", mlp=0, attention=0, note="norms before o and down"),
    causal("diffllama", attention=0, note="a head's output meets another head's"),
    causal("doge", attention=0, note="the mask is made of all heads' values"),
    # Experts.
    causal("mixtral", mlp=0, experts=2),
    causal("qwen2_moe", experts=2, note="shared experts, each with a gate of its own"),
    causal("qwen3_moe", mlp=0, experts=2),
    causal("olmoe", mlp=0, attention=0, experts=2, note=_WHOLE),
    causal("flex_olmo", mlp=0, attention=0, experts=2, note=_WHOLE),
    causal("granitemoe", mlp=0, experts=2),
    causal("granitemoeshared", experts=2, note="the shared expert's gate and up are one linear"),
    causal("gpt_oss", mlp=0, experts=2, note="sinks: one per head"),
    causal("glm4_moe", experts=1, note=_SHARED),
    causal("dots1", experts=1, note=_SHARED),
    causal("solar_open", experts=2, note="shared experts"),
    causal("ernie4_5_moe", experts=1, note=_SHARED),
    causal("hunyuan_v1_moe", experts=2, note="shared experts"),
    causal("phimoe", mlp=0, experts=2),
    causal("llama4_text", experts=2, note="every expert runs on every token, scaled; shared ones"),
    causal("minimax_m2", mlp=0, attention=0, experts=2, note=_WHOLE),
    causal(
        "jetmoe",
        mlp=0,
        attention=0,
        experts=2,
        note="experts make the queries and read o; refused: tokens are split by counts at run time",
        refused=(0, 0, 2),
    ),
    causal(
        "dbrx",
        mlp=0,
        experts=2,
        note="refused: the loop over experts breaks the graph, and gives it parts of weights",
        refused=(0, 0, 2),
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config={"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    causal(
        "deepseek_v2",
        experts=1,
        note="MLA: heads are born at q_b and kv_b; " + _SHARED,
        num_key_value_heads=4,
    ),
    causal(
        "deepseek_v3",
        experts=1,
        note="MLA: heads are born at q_b and kv_b; " + _SHARED,
        num_key_value_heads=4,
    ),
    # Layers without softmax attention.
    causal(
        "minimax", mlp=0, attention=1, experts=2, note="a lightning layer: its norm mixes heads"
    ),
    causal("qwen3_next", attention=1, experts=2, note="a delta layer; shared experts", **_DELTA),
    causal("bamba", attention=1, note="an SSM layer", attn_layer_indices=[1], **_SSM),
    causal("falcon_h1", note="an SSM beside each attention", mamba_d_ssm=64, **_SSM),
    causal(
        "lfm2",
        mlp=3,
        attention=1,
        note="a short convolution, whose output gate is a region; its channels are in a cache",
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    ),
    causal("mamba", mlp=0, attention=0, note="SSM"),
    causal(
        "rwkv",
        attention=0,
        note="the channel mix is an MLP; refused: the first call scales its weights in place",
        refused=(2, 0, 0),
    ),
    # Encoder and decoder.
    seq2seq("t5"),
    seq2seq("mt5"),
    seq2seq("umt5"),
    seq2seq(
        "longt5",
        note="local attention in the encoder; refused: the decoder's breaks the graph",
        refused=(0, 4, 0),
    ),
    seq2seq("bart"),
    seq2seq("mbart"),
    seq2seq("plbart"),
    seq2seq("pegasus"),
    seq2seq("marian"),
    seq2seq("m2m_100"),
    seq2seq("blenderbot"),
    seq2seq("whisper", inputs=first.sound, auto=AutoModelForSpeechSeq2Seq, num_mel_bins=8),
    seq2seq(
        "pix2struct",
        inputs=first.strips,
        auto=AutoModelForImageTextToText,
        text_config=sizes("pix2struct_text_model"),
        vision_config=sizes("pix2struct_vision_model", patch_embed_hidden_size=192, seq_len=8),
    ),
    # Encoders.
    encoder("bert"),
    encoder("roberta"),
    encoder("xlm-roberta"),
    encoder("camembert"),
    encoder("distilbert"),
    encoder("electra", embedding_size=32),
    encoder("albert", embedding_size=32, note="both layers share their weights"),
    encoder("mpnet"),
    encoder("deberta-v2", relative_attention=False),
    encoder("deberta-v2:relative", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    encoder("modernbert"),
    encoder("vit", inputs=first.picture),
    encoder("deit", inputs=first.picture),
    encoder("beit", inputs=first.picture),
    encoder("dinov2", inputs=first.picture),
    encoder("dinov2:swiglu", inputs=first.picture, use_swiglu_ffn=True),
    encoder(
        "swin",
        inputs=first.picture,
        depths=[2],
        num_heads=[4],
        patch_size=2,
        window_size=4,
    ),
    encoder(
        "siglip_vision_model",
        mlp=3,
        attention=3,
        note="the pooling head: an attention and an MLP",
        inputs=first.picture,
    ),
    encoder(
        "clip", mlp=4, attention=4, note="two towers", inputs=first.none, **_CLIP_TEXT, **_CLIP
    ),
    encoder("wav2vec2", inputs=first.wave, **_CONV),
    encoder("hubert", inputs=first.wave, **_CONV),
    encoder(
        "blip",
        mlp=4,
        attention=6,
        note="a tower; a text decoder with cross-attention",
        inputs=first.none,
        auto=AutoModelForImageTextToText,
        text_config=sizes("blip_text_model", encoder_hidden_size=32, sep_token_id=2),
        vision_config=sizes("blip_vision_model"),
    ),
    encoder(
        "blip-2",
        mlp=6,
        attention=7,
        note="the Q-Former: two self-attentions, one cross-attention; its cache isn't returned",
        inputs=first.four,
        auto=AutoModelForImageTextToText,
        text_config=sizes("opt"),
        num_query_tokens=4,
        image_token_index=first.IMAGE,
        vision_config=sizes("blip_2_vision_model"),
        qformer_config=sizes("blip_2_qformer", encoder_hidden_size=32),
    ),
    # A picture and a prompt.
    vlm("llava", 5, 4, note=_PROJECTOR, text=sizes("llama"), vision_feature_layer=-1, **_CLIP),
    vlm(
        "paligemma",
        4,
        4,
        note="torch.compile alone changes what the model gives",
        text=sizes("gemma"),
        projection_dim=32,
        traced_right=False,
        **_SIGLIP,
    ),
    vlm("gemma3", 4, 4, text=sizes("gemma3_text"), mm_tokens_per_image=4, **_SIGLIP),
    vlm("idefics3", 4, 4, inputs=first.tiles(4), text=sizes("llama"), scale_factor=1, **_IDEFICS),
    vlm("smolvlm", 4, 4, inputs=first.tiles(1), text=sizes("llama"), **_SMOL),
    vlm("internvl", 5, 4, note=_PROJECTOR, inputs=first.one, text=sizes("qwen2"), **_INTERN),
    vlm(
        "mllama",
        5,
        4,
        note="a self-attention, then a cross-attention, whose keys a projector makes",
        inputs=first.crossed,
        text=sizes("mllama_text_model", cross_attention_layers=[1]),
        vision_config=sizes(
            "mllama_vision_model",
            num_hidden_layers=1,
            num_global_layers=1,
            max_num_tiles=1,
            intermediate_layers_indices=[0],
            supported_aspect_ratios=[[1, 1]],
            vision_output_dim=64,
        ),
    ),
    vlm(
        "qwen2_vl",
        5,
        4,
        note=_MERGER + _SPLIT,
        refused=(0, 2, 0),
        inputs=first.patches,
        text=sizes("qwen2_vl_text", rope_parameters=_MROPE),
        vision_config={**_QWEN, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
    ),
    vlm(
        "qwen2_5_vl",
        5,
        4,
        note=_MERGER + _SPLIT,
        refused=(0, 2, 0),
        inputs=first.patches,
        text=sizes("qwen2_5_vl_text", rope_parameters=_MROPE),
        vision_config={**_QWEN, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48},
    ),
    vlm(
        "qwen3_vl",
        6,
        4,
        note="two mergers" + _SPLIT,
        refused=(0, 2, 0),
        inputs=first.patches,
        text=sizes("qwen3_vl_text", rope_parameters=_MROPE),
        vision_config={
            **_QWEN,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    ),
)
