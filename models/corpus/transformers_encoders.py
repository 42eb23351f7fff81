"""Encoders of text: each token attends to all that are not padding."""

from __future__ import annotations

from typing import Any

from bincompile.models.corpus.transformers_families import CHUNKS, SLIDING, Family, cases_of
from bincompile.models.corpus.transformers_inputs import (
    VOCABULARY,
    integers,
    positional,
    together,
    tokens,
)

ROBERTA_TOKENS = tokens(pad=1)
SENTENCES = tokens(mask=False)


def bert_like(**settings: Any) -> dict[str, Any]:
    """The settings that encoders since BERT share, with some of their own."""
    return {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "intermediate_size": 40, "max_position_embeddings": 64,
            "type_vocab_size": 2} | settings


def xlm_like(**settings: Any) -> dict[str, Any]:
    """The settings that XLM and FlauBERT share."""
    return {"vocab_size": VOCABULARY, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_langs": 1,
            "max_position_embeddings": 64, "use_cache": False, "bos_index": 0, "eos_index": 1,
            "pad_index": 2, "unk_index": 3, "mask_index": 4, "pad_token_id": 2} | settings


DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"],
                "position_biased_input": False, "type_vocab_size": 0}
CANINE_SIZES = ((2, 8), (3, 8), (1, 8))  # chunks are counted in Python

FAMILIES = (
    Family("bert", "BertModel", bert_like(), tokens(), 2, 3),
    Family("bert-classifier", "BertForSequenceClassification", bert_like(num_labels=3),
           positional(together(tokens(), integers("token_type_ids", 0, 2, -1))), 2, 3, like="bert"),
    Family("bert-generation", "BertGenerationEncoder",
           {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "intermediate_size": 40, "max_position_embeddings": 64},
           tokens(), 2, 2, like="bert"),
    Family("roberta", "RobertaModel", bert_like(pad_token_id=1), ROBERTA_TOKENS, 2, 3,
           unusual=("positions counted from the tokens",), like="bert"),
    Family("roberta-prelayernorm", "RobertaPreLayerNormModel", bert_like(pad_token_id=1),
           ROBERTA_TOKENS, 2, 3, like="bert"),
    Family("xlm-roberta-xl", "XLMRobertaXLModel", bert_like(pad_token_id=1), ROBERTA_TOKENS, 2, 3,
           like="bert"),
    Family("distilbert", "DistilBertModel",
           {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40,
            "max_position_embeddings": 64}, tokens(), 2, 2),
    Family("albert", "AlbertModel", bert_like(embedding_size=16, num_hidden_groups=1), tokens(),
           2, 3, unusual=("one layer, twice",)),
    Family("electra", "ElectraModel", bert_like(embedding_size=16), tokens(), 2, 3, like="bert"),
    Family("deberta", "DebertaModel", bert_like(**DISENTANGLED), tokens(), 2, 1,
           variants=("eager",), unusual=("disentangled terms",)),
    Family("deberta_v2", "DebertaV2Model",
           bert_like(**DISENTANGLED, position_buckets=4, share_att_key=True,
                     norm_rel_ebd="layer_norm"), tokens(), 2, 1,
           variants=("eager",), unusual=("disentangled terms", "buckets of positions")),
    Family("deberta_v2-plain", "DebertaV2Model", bert_like(type_vocab_size=0), tokens(), 2, 2,
           variants=("eager",), like="bert"),
    Family("mpnet", "MPNetModel", bert_like(), ROBERTA_TOKENS, 2, 3, variants=("eager",),
           unusual=("one relative bias for all layers",)),
    Family("xlnet", "XLNetModel",
           {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 40,
            "use_mems_eval": False}, tokens(), 2, 1, variants=("eager",),
           unusual=("relative terms", "einsum")),
    Family("modernbert", "ModernBertModel",
           bert_like(local_attention=4, global_attn_every_n_layers=2, pad_token_id=0,
                     bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
           tokens(), 2, 1, unusual=("window", "fused projection")),
    Family("modernbert_decoder", "ModernBertDecoderModel",
           bert_like(local_attention=4, global_attn_every_n_layers=2, pad_token_id=0,
                     bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
                     use_cache=False), tokens(), 2, 1, like="modernbert"),
    Family("funnel", "FunnelModel",
           {"vocab_size": VOCABULARY, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 40,
            "block_sizes": [1, 1], "num_decoder_layers": 1, "max_position_embeddings": 64},
           tokens(), 3, 1, variants=("eager",), sizes=((2, 8), (3, 12), (1, 4)),
           unusual=("relative terms", "pooled queries")),
    Family("layoutlm", "LayoutLMModel", bert_like(max_2d_position_embeddings=64),
           together(tokens(), integers("bbox", 0, 1, -1, 4)), 2, 9, variants=("eager",),
           like="bert"),
    Family("esm", "EsmModel", bert_like(pad_token_id=1, mask_token_id=4,
                                        position_embedding_type="rotary", token_dropout=True),
           ROBERTA_TOKENS, 2, 1, unusual=("rope", "scale before rope")),
    Family("megatron-bert", "MegatronBertModel", bert_like(), tokens(), 2, 3, variants=("eager",),
           like="bert"),
    Family("roformer", "RoFormerModel", bert_like(embedding_size=16), tokens(), 2, 3,
           variants=("eager",), unusual=("interleaved rope",)),
    Family("nystromformer", "NystromformerModel",
           bert_like(num_landmarks=4, segment_means_seq_len=4, conv_kernel_size=3), tokens(), 2, 3,
           variants=("eager",), like="bert"),
    Family("squeezebert", "SqueezeBertModel",
           bert_like(embedding_size=32, q_groups=2, k_groups=2, v_groups=2, post_attention_groups=2,
                     intermediate_groups=2, output_groups=2), tokens(), 2, 3, variants=("eager",),
           unusual=("1x1 convolutions", "features before positions")),
    Family("convbert", "ConvBertModel", bert_like(embedding_size=16, head_ratio=2), tokens(), 2, 3,
           variants=("eager",), unusual=("a dynamic convolution beside attention",)),
    Family("rembert", "RemBertModel", bert_like(input_embedding_size=16), tokens(), 2, 3,
           variants=("eager",), like="bert"),
    Family("mobilebert", "MobileBertModel",
           bert_like(embedding_size=16, true_hidden_size=16, intra_bottleneck_size=16,
                     num_feedforward_networks=2), tokens(), 2, 3, like="bert"),
    Family("ibert", "IBertModel", bert_like(pad_token_id=1), ROBERTA_TOKENS, 2, 3,
           variants=("eager",), like="bert"),
    Family("xlm", "XLMModel", xlm_like(), tokens(pad=2), 2, 2, variants=("eager",)),
    Family("ernie", "ErnieModel", bert_like(use_task_id=True, task_type_vocab_size=3), tokens(),
           2, 4, like="bert"),
    Family("big_bird", "BigBirdModel", bert_like(attention_type="original_full"), tokens(), 2, 3,
           variants=("eager",), like="bert"),
    Family("longformer", "LongformerModel", bert_like(attention_window=4, pad_token_id=1),
           ROBERTA_TOKENS, 2, 3, variants=("eager",),
           sizes=((2, 8), (3, 12), (1, 4)), unusual=("sliding chunks",), uncapturable=SLIDING,
           unseen=CHUNKS),
    Family("canine", "CanineModel",
           bert_like(num_hash_functions=2, num_hash_buckets=16, local_transformer_stride=4,
                     upsampling_kernel_size=4, downsampling_rate=4), tokens(), 5, 4,
           variants=("eager",), sizes=CANINE_SIZES, unusual=("hashed tables", "chunks")),
    Family("tapas", "TapasModel", bert_like(type_vocab_sizes=[3, 8, 8, 2, 8, 8, 4]),
           together(tokens(), integers("token_type_ids", 0, 2, -1, 7)), 2, 9, variants=("eager",),
           like="bert"),
    Family("luke", "LukeModel", bert_like(pad_token_id=1, entity_vocab_size=20,
                                          entity_emb_size=16, use_entity_aware_attention=False),
           ROBERTA_TOKENS, 2, 3, variants=("eager",), like="bert"),
    Family("markuplm", "MarkupLMModel",
           bert_like(pad_token_id=1, max_depth=3, xpath_unit_hidden_size=8, tag_pad_id=1,
                     subs_pad_id=1, max_xpath_tag_unit_embeddings=20,
                     max_xpath_subs_unit_embeddings=20), ROBERTA_TOKENS, 2, 9,
           variants=("eager",), like="bert"),
    Family("bros", "BrosModel", bert_like(hidden_size=64, dim_bbox=8),
           together(tokens(), integers("bbox", 0, 10, -1, 8)), 2, 3, variants=("eager",),
           unusual=("bias from places on the page",)),
    Family("lilt", "LiltModel",
           bert_like(hidden_size=48, pad_token_id=1, channel_shrink_ratio=2,
                     max_2d_position_embeddings=64), ROBERTA_TOKENS, 4, 10, variants=("eager",),
           unusual=("sum of two attentions' scores",)),
    Family("splinter", "SplinterModel", bert_like(), tokens(), 2, 3, variants=("eager",),
           like="bert"),
    Family("roc_bert", "RoCBertModel",
           bert_like(pronunciation_vocab_size=20, pronunciation_embed_dim=8, shape_vocab_size=20,
                     shape_embed_dim=8), tokens(), 2, 5, like="bert"),
    Family("nomic_bert", "NomicBertModel", bert_like(), tokens(), 2, 2),
    Family("gte", "GteModel", bert_like(), tokens(), 2, 2, like="nomic_bert"),
    Family("jina_embeddings_v3", "JinaEmbeddingsV3Model", bert_like(), tokens(), 2, 2,
           like="nomic_bert"),
    Family("eurobert", "EuroBertModel", bert_like(pad_token_id=0), tokens(), 2, 1,
           like="nomic_bert"),
    Family("data2vec-text", "Data2VecTextModel", bert_like(pad_token_id=1), ROBERTA_TOKENS, 2, 3,
           like="bert"),
    Family("yoso", "YosoModel", bert_like(), tokens(), 0, 3, variants=("eager",)),
    Family("fnet", "FNetModel", bert_like(), tokens(mask=False), 0, 3, variants=("eager",)),
)

CASES = cases_of(FAMILIES)
