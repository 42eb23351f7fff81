"""Encoders with decoders: attention to oneself, to those before, and across."""

from __future__ import annotations

from typing import Any

from bincompile.models.corpus.transformers_families import CHUNKS, SLIDING, Family, cases_of
from bincompile.models.corpus.transformers_inputs import (
    VOCABULARY,
    floats,
    integers,
    options,
    padding,
    together,
    tokens,
)

PAIRS = together(tokens(pad=1), tokens("decoder_", extra=2, mask=False))
BOTH_MASKED = together(tokens(pad=1), tokens("decoder_", pad=1, extra=2))
SAME_PAIRS = together(tokens(pad=1), tokens("decoder_", mask=False))
BOTH_PADDED = together(tokens(), tokens("decoder_", extra=1))


def bart_like(**settings: Any) -> dict[str, Any]:
    """The settings that models since BART share, with some of their own."""
    return {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 40,
            "decoder_ffn_dim": 40, "max_position_embeddings": 64, "use_cache": False,
            "pad_token_id": 1, "decoder_start_token_id": 2} | settings


def t5_like(**settings: Any) -> dict[str, Any]:
    """The settings that models since T5 share, with some of their own."""
    return {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2,
            "num_decoder_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12, "use_cache": False} | settings


def forecast_like(**settings: Any) -> dict[str, Any]:
    """The settings of transformers that forecast, with some of their own."""
    return {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2],
            "num_time_features": 1, "num_static_categorical_features": 1, "cardinality": [5],
            "embedding_dimension": [3], "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 40,
            "decoder_ffn_dim": 40, "use_cache": False} | settings


PAST = 10  # the context and the longest lag
SERIES = together(
    floats("past_values", PAST), floats("past_time_features", PAST, 1),
    padding("past_observed_mask", size=PAST), integers("static_categorical_features", 0, 5, 1),
    floats("future_values", 4), floats("future_time_features", 4, 1))
UNEVEN = ((2, 7), (3, 11), (1, 5))  # blocks of 4 are padded unless a length is a multiple
ONE_LENGTH = ((2, 1), (3, 1), (1, 1))

GEMMA = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8,
         "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40,
         "sliding_window": 4, "attn_logit_softcapping": 2.0}

FAMILIES = (
    Family("t5", "T5Model", t5_like(), BOTH_PADDED, 6, 4,
           unusual=("no scale", "one relative bias for all layers")),
    Family("mt5", "MT5ForConditionalGeneration",
           t5_like(feed_forward_proj="gated-gelu", tie_word_embeddings=False), BOTH_PADDED, 6, 4,
           like="t5"),
    Family("umt5", "UMT5Model", t5_like(), BOTH_PADDED, 6, 6,
           unusual=("relative bias of each layer",)),
    Family("longt5", "LongT5Model", t5_like(encoder_attention_type="local", local_radius=3),
           BOTH_PADDED, 6, 4, variants=("eager",), sizes=UNEVEN,
           unusual=("blocks of 4",)),
    Family("t5-encoder", "T5EncoderModel", t5_like(is_gated_act=True), tokens(), 2, 2,
           variants=("eager",), like="t5"),
    Family("bart", "BartModel", bart_like(), PAIRS, 6, 4),
    Family("mbart", "MBartModel", bart_like(), PAIRS, 6, 4, like="bart"),
    Family("pegasus", "PegasusModel", bart_like(), PAIRS, 6, 4, like="bart"),
    Family("pegasus_x", "PegasusXModel",
           bart_like(num_global_tokens=2, block_size=4, stagger_local_blocks=False),
           PAIRS, 7, 3, variants=("eager",), sizes=UNEVEN, unusual=("global tokens", "blocks"),
           unseen={"attention": "it runs an eighth one, which reaches no output"},
           declined=("scores of two sets of keys are joined",) * 2),
    Family("m2m_100", "M2M100Model", bart_like(), PAIRS, 6, 4, unusual=("tables of sines",)),
    Family("marian", "MarianModel", bart_like(), PAIRS, 6, 4, like="bart"),
    Family("blenderbot", "BlenderbotModel", bart_like(), PAIRS, 6, 4, like="bart"),
    Family("blenderbot_small", "BlenderbotSmallModel", bart_like(), PAIRS, 6, 4, like="bart"),
    Family("plbart", "PLBartModel", bart_like(), PAIRS, 6, 4, like="bart"),
    Family("mvp", "MvpModel", bart_like(), PAIRS, 6, 4, variants=("eager",), like="bart"),
    Family("fsmt", "FSMTModel",
           bart_like(langs=["en", "de"], src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY),
           BOTH_MASKED, 6, 4, variants=("eager",), unusual=("time before batch",)),
    Family("prophetnet", "ProphetNetModel",
           {"vocab_size": VOCABULARY, "hidden_size": 32, "num_encoder_layers": 2,
            "num_decoder_layers": 2, "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40,
            "max_position_embeddings": 64, "ngram": 2, "num_buckets": 8,
            "relative_max_distance": 12, "use_cache": False}, PAIRS, 8, 5, variants=("eager",),
           unusual=("two streams of queries",)),
    Family("led", "LEDModel", bart_like(attention_window=4, max_encoder_position_embeddings=64,
                                        max_decoder_position_embeddings=64),
           SAME_PAIRS, 6, 4, variants=("eager",), sizes=((2, 8), (3, 12), (1, 4)),
           unusual=("sliding chunks",), uncapturable=SLIDING, unseen=CHUNKS),
    Family("bigbird_pegasus", "BigBirdPegasusModel", bart_like(attention_type="original_full"),
           PAIRS, 6, 4, variants=("eager",), like="bart"),
    Family("nllb_moe", "NllbMoeModel",
           bart_like(encoder_sparse_step=0, decoder_sparse_step=0, num_experts=2), PAIRS, 6, 4,
           variants=("eager",), like="bart"),
    Family("trocr", "TrOCRForCausalLM",
           bart_like(decoder_layers=2, cross_attention_hidden_size=32), tokens(pad=1), 2, 2,
           variants=("eager",), like="bart"),
    Family("t5gemma", "T5GemmaModel", {"encoder": GEMMA, "decoder": GEMMA},
           together(BOTH_PADDED, options(use_cache=False)), 6, 2, variants=("eager",),
           unusual=("softcap", "window")),
    Family("time_series_transformer", "TimeSeriesTransformerModel", forecast_like(), SERIES, 6, 3,
           variants=("eager",), sizes=ONE_LENGTH),
    Family("informer", "InformerModel", forecast_like(attention_type="full"),
           SERIES, 6, 3, sizes=ONE_LENGTH, variants=("eager",), like="time_series_transformer",
           uncapturable="while torch exports it, it makes a mask that doesn't fit its scores"),
)

CASES = cases_of(FAMILIES)
