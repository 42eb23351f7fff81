"""Models of text with images, of numbers, and of anything else that is neither text nor sound."""

from __future__ import annotations

from typing import Any

from bincompile.models.corpus.transformers_families import IMAGES, Family, cases_of
from bincompile.models.corpus.transformers_inputs import (
    VOCABULARY,
    floats,
    integers,
    padding,
    pixels,
    together,
    tokens,
)

TEXT_AND_IMAGE = together(tokens(), pixels())
TEXT_FIRST = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
              "intermediate_size": 40}


def text(**settings: Any) -> dict[str, Any]:
    """The settings of a text tower."""
    return TEXT_FIRST | {"vocab_size": VOCABULARY, "max_position_embeddings": 64,
                         "projection_dim": 16, "pad_token_id": 0, "bos_token_id": 1,
                         "eos_token_id": 2} | settings


def vision(**settings: Any) -> dict[str, Any]:
    """The settings of a vision tower."""
    return TEXT_FIRST | {"image_size": 16, "patch_size": 4, "projection_dim": 16} | settings


def towers(**settings: Any) -> dict[str, Any]:
    """The settings of a model of two towers."""
    return {"text_config": text(), "vision_config": vision(), "projection_dim": 16} | settings


def bert_with(**settings: Any) -> dict[str, Any]:
    """The settings of BERT, for models that give it images or tables."""
    return TEXT_FIRST | {"vocab_size": VOCABULARY, "max_position_embeddings": 64,
                         "type_vocab_size": 2} | settings


FAMILIES = (
    Family("clip", "CLIPModel", towers(), TEXT_AND_IMAGE, 4, 3,
           unusual=("logits of two towers",)),
    Family("clip-text", "CLIPTextModel", text(), tokens(), 2, 2, like="clip"),
    Family("clip-vision", "CLIPVisionModel", vision(), pixels(), 2, 1, sizes=IMAGES, like="clip"),
    Family("siglip", "SiglipModel", towers(), TEXT_AND_IMAGE, 5, 3,
           unusual=("pooling attention of nn.MultiheadAttention",)),
    Family("siglip-vision", "SiglipVisionModel", vision(), pixels(), 3, 1, sizes=IMAGES,
           like="siglip"),
    Family("blip-text", "BlipTextModel", text(is_decoder=False, encoder_hidden_size=32), tokens(),
           2, 2, variants=("eager",), like="blip"),
    Family("blip-vision", "BlipVisionModel", vision(), pixels(), 2, sizes=IMAGES,
           variants=("eager",), like="blip"),
    Family("blip", "BlipModel", towers(), TEXT_AND_IMAGE, 4, 2, variants=("eager",)),
    Family("x_clip", "XCLIPModel",
           towers(projection_dim=32, text_config=text(projection_dim=32), prompt_layers=1,
                  prompt_num_attention_heads=4, vision_config=vision(
                      projection_dim=32, num_frames=2, mit_hidden_size=32,
                      mit_intermediate_size=40, mit_num_attention_heads=4)),
           together(tokens(), pixels(frames=2)), 8, 3, variants=("eager",),
           unusual=("messages between frames",)),
    Family("chinese_clip", "ChineseCLIPModel", towers(), TEXT_AND_IMAGE, 4, 4, like="clip"),
    Family("altclip", "AltCLIPModel", towers(), TEXT_AND_IMAGE, 4, 4, like="clip"),
    Family("clipseg", "CLIPSegModel", towers(), TEXT_AND_IMAGE, 4, 3, like="clip"),
    Family("owlvit", "OwlViTModel", towers(), TEXT_AND_IMAGE, 4, 3, like="clip"),
    Family("groupvit-text", "GroupViTTextModel", text(), tokens(), 2, 2, variants=("eager",),
           like="clip"),
    Family("flava-image", "FlavaImageModel", vision(), pixels(), 2, sizes=IMAGES,
           variants=("eager",), like="clip"),
    Family("git-vision", "GitVisionModel", vision(), pixels(), 2, 1, sizes=IMAGES,
           variants=("eager",), like="clip"),
    Family("vilt", "ViltModel", bert_with(image_size=16, patch_size=4, max_image_length=16),
           TEXT_AND_IMAGE, 2, 5, variants=("eager",),
           uncapturable="an image is resized to a size read from its mask"),
    Family("visual_bert", "VisualBertModel", bert_with(visual_embedding_dim=16),
           together(tokens(), floats("visual_embeds", 5, 16)), 2, 5, variants=("eager",),
           like="bert"),
    Family("lxmert", "LxmertModel",
           {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4,
            "intermediate_size": 40, "l_layers": 1, "x_layers": 1, "r_layers": 1,
            "visual_feat_dim": 16, "visual_pos_dim": 4, "max_position_embeddings": 64},
           together(tokens(), floats("visual_feats", 5, 16), floats("visual_pos", 5, 4)), 6, 3,
           variants=("eager",), unusual=("across in both directions",)),
    Family("layoutlmv3", "LayoutLMv3Model",
           bert_with(pad_token_id=1, input_size=16, patch_size=4, coordinate_size=4, shape_size=8,
                     has_relative_attention_bias=True, has_spatial_attention_bias=True,
                     rel_pos_bins=8, max_rel_pos=12, rel_2d_pos_bins=8, max_rel_2d_pos=12,
                     max_2d_position_embeddings=64),
           together(tokens(pad=1), integers("bbox", 0, 1, -1, 4), pixels()), 2, 12,
           variants=("eager",), unusual=("scores divided before and after",)),
    Family("perceiver", "PerceiverModel",
           {"num_latents": 6, "d_latents": 32, "d_model": 16, "num_blocks": 1,
            "num_self_attends_per_block": 2, "num_self_attention_heads": 4,
            "num_cross_attention_heads": 2},
           together(floats("inputs", -1, 16), padding("attention_mask")), 3,
           variants=("eager",), unusual=("queries of parameters",)),
    Family("blip_2-qformer", "Blip2QFormerModel",
           text(encoder_hidden_size=24, cross_attention_frequency=2),
           together(floats("query_embeds", 5, 32), floats("encoder_hidden_states", -1, 24),
                    padding("encoder_attention_mask")), 3, variants=("eager",)),
    Family("llava-text", "LlavaForConditionalGeneration",
           {"text_config": text(model_type="llama", num_key_value_heads=2, use_cache=False),
            "vision_config": vision(model_type="clip_vision_model"),
            "image_token_index": VOCABULARY - 1}, tokens(vocabulary=VOCABULARY - 1), 2, 1),
    Family("patchtst", "PatchTSTModel",
           {"num_input_channels": 3, "context_length": 16, "patch_length": 4, "patch_stride": 4,
            "d_model": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 40},
           floats("past_values", 16, 3), 2, sizes=IMAGES, unusual=("a channel is a row",)),
    Family("patchtsmixer", "PatchTSMixerModel",
           {"num_input_channels": 3, "context_length": 16, "patch_length": 4, "patch_stride": 4,
            "d_model": 16, "num_layers": 2}, floats("past_values", 16, 3), 0,
           variants=("eager",), sizes=IMAGES, unusual=("softmax gates without attention",)),
    Family("timesfm", "TimesFmModel",
           {"patch_length": 4, "context_length": 16, "horizon_length": 4, "num_hidden_layers": 2,
            "hidden_size": 32, "intermediate_size": 40, "head_dim": 8, "num_attention_heads": 4,
            "freq_size": 3},
           together(floats("past_values", 16), integers("past_values_padding", 0, 1, 16),
                    integers("freq", 0, 3, 1)), 2, 1, sizes=IMAGES,
           unusual=("a scale for each feature",)),
    Family("decision_transformer-full", "DecisionTransformerModel",
           {"vocab_size": 1, "hidden_size": 32, "n_layer": 2, "n_head": 4, "state_dim": 6,
            "act_dim": 3, "max_ep_len": 64, "n_positions": 64, "n_ctx": 64, "use_cache": False},
           together(floats("states", -1, 6), floats("actions", -1, 3), floats("rewards", -1, 1),
                    floats("returns_to_go", -1, 1), integers("timesteps", 0, 20, -1),
                    padding("attention_mask")), 2, 2, like="gpt2"),
    Family("mgp_str", "MgpstrModel",
           {"image_size": [16, 16], "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "mlp_ratio": 1.0}, pixels(), 2, variants=("eager",),
           sizes=IMAGES),
)

CASES = cases_of(FAMILIES)
