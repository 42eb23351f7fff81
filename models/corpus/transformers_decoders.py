"""Decoders of transformers: each token attends to those before it."""

from __future__ import annotations

from typing import Any

from bincompile.models.corpus.transformers_families import Family, cases_of
from bincompile.models.corpus.transformers_inputs import VOCABULARY, positional, tokens

LEFT = tokens(side="left")


def llama_like(**settings: Any) -> dict[str, Any]:
    """The settings that most decoders since Llama share, with some of their own."""
    return {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40,
            "max_position_embeddings": 64, "pad_token_id": 0, "use_cache": False} | settings


def gpt_like(**settings: Any) -> dict[str, Any]:
    """The settings that decoders since GPT-2 share, with some of their own."""
    return {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
            "n_ctx": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "use_cache": False} | settings


MULTI_LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 12,
                "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 2,
           "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 2}
BOTH_LAYERS = ["sliding_attention", "full_attention"]

FAMILIES = (
    Family("gpt2", "GPT2Model", gpt_like(), tokens(), 2, 2, unusual=("fused addmm projection",)),
    Family("gpt2-scaled", "GPT2LMHeadModel",
           gpt_like(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
           tokens(mask=False), 2, 2, unusual=("scale by layer", "baddbmm", "tied head"),
           like="gpt2"),
    Family("openai-gpt", "OpenAIGPTModel", gpt_like(), tokens(), 2, 2, variants=("eager",),
           like="gpt2"),
    Family("gpt_neo", "GPTNeoModel",
           {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
            "attention_types": [[["global", "local"], 1]], "window_size": 4,
            "max_position_embeddings": 64, "intermediate_size": 40, "use_cache": False},
           tokens(), 2, 2, variants=("eager",), unusual=("no scale", "window")),
    Family("gptj", "GPTJModel", gpt_like(rotary_dim=4), tokens(), 2, 3, variants=("eager",),
           unusual=("interleaved rope, gathered from a table",)),
    Family("codegen", "CodeGenModel", gpt_like(rotary_dim=4), tokens(), 2, 3,
           variants=("eager",), unusual=("projection fused for 4 devices", "rope from a table"),
           like="gptj"),
    Family("gpt_neox", "GPTNeoXModel", llama_like(rotary_pct=0.5), LEFT, 2, 1,
           unusual=("rope on a part of the features", "fused per head")),
    Family("gpt_bigcode", "GPTBigCodeModel", gpt_like(multi_query=True), tokens(), 2, 2,
           unusual=("one key head",)),
    Family("opt", "OPTModel",
           {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 40,
            "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 16,
            "use_cache": False}, tokens(pad=1), 2, 2, unusual=("scale on q",)),
    Family("biogpt", "BioGptModel", llama_like(), tokens(pad=1), 2, 2, like="opt"),
    Family("xglm", "XGLMModel",
           {"vocab_size": VOCABULARY, "d_model": 32, "num_layers": 2, "attention_heads": 4,
            "ffn_dim": 40, "max_position_embeddings": 64, "use_cache": False}, tokens(pad=1), 2, 2,
           variants=("eager",), unusual=("table of sines",)),
    Family("ctrl", "CTRLModel", gpt_like(dff=40), tokens(), 2, 2, variants=("eager",),
           unusual=("table of sines",)),
    Family("bloom", "BloomModel", gpt_like(hidden_size=32), tokens(), 2, 1, variants=("eager",),
           unusual=("alibi", "baddbmm")),
    Family("falcon", "FalconModel", llama_like(num_kv_heads=2, new_decoder_architecture=True),
           tokens(), 2, 1, unusual=("grouped keys",)),
    Family("falcon-alibi", "FalconModel",
           llama_like(alibi=True, multi_query=True, parallel_attn=False), tokens(), 2, 1,
           unusual=("alibi", "one key head"), like="falcon"),
    Family("mpt", "MptModel",
           {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64,
            "use_cache": False}, tokens(), 2, 1, variants=("eager",), unusual=("alibi",)),
    Family("llama", "LlamaForCausalLM", llama_like(), LEFT, 2, 1,
           unusual=("grouped keys", "rope")),
    Family("mistral", "MistralModel", llama_like(sliding_window=4), tokens(), 2, 1,
           unusual=("window",)),
    Family("qwen2", "Qwen2Model",
           llama_like(use_sliding_window=True, sliding_window=4, layer_types=BOTH_LAYERS[::-1]),
           positional(LEFT), 2, 1, unusual=("window in one layer",), like="mistral"),
    Family("qwen3", "Qwen3Model", llama_like(head_dim=16), tokens(), 2, 1,
           unusual=("heads wider than the model", "norm of q and k")),
    Family("gemma", "GemmaModel", llama_like(num_key_value_heads=1, head_dim=8), LEFT, 2, 1,
           unusual=("one key head",), like="llama"),
    Family("gemma2", "Gemma2Model",
           llama_like(head_dim=8, sliding_window=4, query_pre_attn_scalar=16,
                      attn_logit_softcapping=2.0), tokens(), 2, 1, variants=("eager",),
           unusual=("softcap", "window", "scale of its own")),
    Family("gemma3", "Gemma3TextModel",
           llama_like(head_dim=8, sliding_window=4, query_pre_attn_scalar=16,
                      layer_types=BOTH_LAYERS), tokens(), 2, 1,
           unusual=("norm of q and k", "two ropes")),
    Family("phi", "PhiModel", llama_like(partial_rotary_factor=0.5, qk_layernorm=True), LEFT, 2, 1,
           unusual=("rope on a part of the features",)),
    Family("phi3", "Phi3Model", llama_like(sliding_window=5), tokens(), 2, 1,
           unusual=("fused projection", "window")),
    Family("olmo2", "Olmo2Model", llama_like(), tokens(), 2, 1, unusual=("norm over all heads",),
           like="qwen3"),
    Family("olmo3", "Olmo3Model", llama_like(sliding_window=4, layer_types=BOTH_LAYERS), tokens(),
           2, 1, like="qwen3"),
    Family("cohere", "CohereModel", llama_like(use_qk_norm=True), tokens(), 2, 1,
           unusual=("interleaved rope",)),
    Family("cohere2", "Cohere2Model", llama_like(sliding_window=4, layer_types=BOTH_LAYERS),
           tokens(), 2, 1, unusual=("no rope in one layer",), like="cohere"),
    Family("starcoder2", "Starcoder2Model", llama_like(sliding_window=4), tokens(), 2, 1,
           like="mistral"),
    Family("gpt_oss", "GptOssModel",
           llama_like(head_dim=8, sliding_window=4, num_local_experts=4, num_experts_per_tok=2,
                      layer_types=BOTH_LAYERS), tokens(), 2, 5, variants=("eager",),
           unusual=("sinks", "biases of experts in tables")),
    Family("granite", "GraniteModel", llama_like(attention_multiplier=0.3), tokens(), 2, 1,
           unusual=("scale of its own",), like="llama"),
    Family("persimmon", "PersimmonModel", llama_like(num_key_value_heads=4), tokens(), 2, 1,
           like="phi"),
    Family("stablelm", "StableLmModel", llama_like(qk_layernorm=True), tokens(), 2, 1,
           unusual=("a norm for each head",), like="phi"),
    Family("glm", "GlmModel", llama_like(head_dim=8), tokens(), 2, 1, like="cohere"),
    Family("helium", "HeliumModel", llama_like(head_dim=8), LEFT, 2, 1, like="cohere"),
    Family("smollm3", "SmolLM3Model", llama_like(no_rope_layers=[1, 0]), tokens(), 2, 1,
           like="llama"),
    Family("exaone4", "Exaone4Model", llama_like(sliding_window=4, layer_types=BOTH_LAYERS),
           tokens(), 2, 1, like="qwen3"),
    Family("deepseek_v2", "DeepseekV2Model", llama_like(**MULTI_LATENT, **EXPERTS, head_dim=4),
           tokens(), 2, 1, unusual=("latent keys and values", "complex rope")),
    Family("deepseek_v3", "DeepseekV3Model", llama_like(**MULTI_LATENT, **EXPERTS), tokens(), 2, 1,
           unusual=("latent keys and values",), like="deepseek_v2"),
    Family("diffllama", "DiffLlamaModel", llama_like(), tokens(), 4, 1,
           unusual=("difference of two attentions",)),
    Family("mixtral", "MixtralModel", llama_like(num_local_experts=4), tokens(), 2, 1,
           unusual=("experts",), like="mistral"),
    Family("imagegpt", "ImageGPTModel", gpt_like(), tokens(mask=False), 2, 2, variants=("eager",),
           like="gpt2"),
    Family("decision_transformer", "DecisionTransformerGPT2Model", gpt_like(), tokens(), 2, 2,
           like="gpt2"),
)

CASES = cases_of(FAMILIES)
