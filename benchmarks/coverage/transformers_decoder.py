"""Decoder-only language models of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.coverage.case import Case
from benchmarks.coverage.tiny import SIZES, case, installed, labelled

_GROUPED: Mapping[str, Any] = {**SIZES, "num_key_value_heads": 2}
_EXPERTS: Mapping[str, Any] = {
    **_GROUPED,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "decoder_sparse_step": 1,
}
_LATENT: Mapping[str, Any] = {
    **SIZES,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
    "kv_lora_rank": 12,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
_STATE: Mapping[str, Any] = {**SIZES, "state_size": 8, "conv_kernel": 3, "expand": 2}
_STATE_HEADS: Mapping[str, Any] = {
    **_STATE,
    "num_heads": 4,
    "head_dim": 16,
    "n_groups": 1,
    "chunk_size": 4,
}

# Name, class, settings; the input is token ids with labels.
_ROWS: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("gpt2", "GPT2LMHeadModel", SIZES),
    ("openai-gpt", "OpenAIGPTLMHeadModel", SIZES),
    ("gpt_bigcode", "GPTBigCodeForCausalLM", SIZES),
    (
        "gpt_neo",
        "GPTNeoForCausalLM",
        {**SIZES, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    ),
    ("gptj", "GPTJForCausalLM", {**SIZES, "rotary_dim": 4}),
    ("gpt_neox", "GPTNeoXForCausalLM", SIZES),
    ("codegen", "CodeGenForCausalLM", {**SIZES, "rotary_dim": 4}),
    ("ctrl", "CTRLLMHeadModel", {**SIZES, "dff": 64}),
    ("llama", "LlamaForCausalLM", _GROUPED),
    ("mistral", "MistralForCausalLM", _GROUPED),
    ("mixtral", "MixtralForCausalLM", _EXPERTS),
    ("qwen2", "Qwen2ForCausalLM", _GROUPED),
    ("qwen2_moe", "Qwen2MoeForCausalLM", _EXPERTS),
    ("qwen3", "Qwen3ForCausalLM", {**_GROUPED, "head_dim": 8}),
    ("qwen3_moe", "Qwen3MoeForCausalLM", {**_EXPERTS, "head_dim": 8}),
    ("gemma", "GemmaForCausalLM", {**_GROUPED, "head_dim": 8}),
    ("gemma2", "Gemma2ForCausalLM", {**_GROUPED, "head_dim": 8}),
    ("gemma3", "Gemma3ForCausalLM", {**_GROUPED, "head_dim": 8}),
    ("phi", "PhiForCausalLM", _GROUPED),
    ("phi3", "Phi3ForCausalLM", _GROUPED),
    ("phimoe", "PhimoeForCausalLM", _EXPERTS),
    ("falcon", "FalconForCausalLM", SIZES),
    ("bloom", "BloomForCausalLM", SIZES),
    ("mpt", "MptForCausalLM", {**SIZES, "max_seq_len": 40}),
    ("opt", "OPTForCausalLM", {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    ("stablelm", "StableLmForCausalLM", _GROUPED),
    ("olmo", "OlmoForCausalLM", _GROUPED),
    ("olmo2", "Olmo2ForCausalLM", _GROUPED),
    ("olmo3", "Olmo3ForCausalLM", _GROUPED),
    ("olmoe", "OlmoeForCausalLM", _EXPERTS),
    ("cohere", "CohereForCausalLM", _GROUPED),
    ("cohere2", "Cohere2ForCausalLM", _GROUPED),
    ("granite", "GraniteForCausalLM", _GROUPED),
    ("granitemoe", "GraniteMoeForCausalLM", _EXPERTS),
    ("starcoder2", "Starcoder2ForCausalLM", _GROUPED),
    ("xglm", "XGLMForCausalLM", {**SIZES, "ffn_dim": 64}),
    ("biogpt", "BioGptForCausalLM", SIZES),
    ("persimmon", "PersimmonForCausalLM", SIZES),
    ("glm", "GlmForCausalLM", {**_GROUPED, "head_dim": 8}),
    ("glm4", "Glm4ForCausalLM", {**_GROUPED, "head_dim": 8}),
    ("nemotron", "NemotronForCausalLM", _GROUPED),
    ("helium", "HeliumForCausalLM", {**_GROUPED, "head_dim": 8}),
    ("smollm3", "SmolLM3ForCausalLM", _GROUPED),
    ("arcee", "ArceeForCausalLM", _GROUPED),
    ("exaone4", "Exaone4ForCausalLM", _GROUPED),
    ("ernie4_5", "Ernie4_5ForCausalLM", _GROUPED),
    ("seed_oss", "SeedOssForCausalLM", {**_GROUPED, "head_dim": 8}),
    ("diffllama", "DiffLlamaForCausalLM", _GROUPED),
    ("bitnet", "BitNetForCausalLM", _GROUPED),
    ("apertus", "ApertusForCausalLM", _GROUPED),
    ("gpt_oss", "GptOssForCausalLM", {**_EXPERTS, "head_dim": 8}),
    ("jetmoe", "JetMoeForCausalLM", {**_EXPERTS, "kv_channels": 8, "num_key_value_heads": 2}),
    ("deepseek_v2", "DeepseekV2ForCausalLM", _LATENT),
    ("deepseek_v3", "DeepseekV3ForCausalLM", _LATENT),
    ("minicpm3", "MiniCPM3ForCausalLM", _LATENT),
    ("mamba", "MambaForCausalLM", _STATE),
    ("mamba2", "Mamba2ForCausalLM", _STATE_HEADS),
    ("falcon_mamba", "FalconMambaForCausalLM", _STATE),
    ("rwkv", "RwkvForCausalLM", {**SIZES, "context_length": 40, "attention_hidden_size": 32}),
    ("xlstm", "xLSTMForCausalLM", {**SIZES, "num_heads": 4, "chunk_size": 10, "use_cache": False}),
    (
        "recurrent_gemma",
        "RecurrentGemmaForCausalLM",
        {**_GROUPED, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
    ),
    (
        "jamba",
        "JambaForCausalLM",
        {
            **_EXPERTS,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_d_conv": 3,
            "use_mamba_kernels": False,
        },
    ),
    (
        "bamba",
        "BambaForCausalLM",
        {
            **_GROUPED,
            "attn_layer_indices": [1],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_chunk_size": 4,
        },
    ),
    (
        "lfm2",
        "Lfm2ForCausalLM",
        {**_GROUPED, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    ),
    (
        "qwen3_next",
        "Qwen3NextForCausalLM",
        {
            **_EXPERTS,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    ("modernbert_decoder", "ModernBertDecoderForCausalLM", SIZES),
)


def cases() -> tuple[Case, ...]:
    """One case a row, when transformers is installed."""
    return tuple(case(*row, labelled) for row in _ROWS) if installed() else ()
