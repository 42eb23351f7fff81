"""Models of images and films."""

from __future__ import annotations

from typing import Any

from bincompile.models.corpus.transformers_families import IMAGES, Family, cases_of
from bincompile.models.corpus.transformers_inputs import floats, pixels, together


def vit_like(**settings: Any) -> dict[str, Any]:
    """The settings that most vision transformers share, with some of their own."""
    return {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 40, "image_size": 16, "patch_size": 4} | settings


def swin_like(**settings: Any) -> dict[str, Any]:
    """The settings that models with shifted windows share: 2 stages, 1 + 2 layers."""
    return {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 2,
            "image_size": 16, "patch_size": 2, "mlp_ratio": 1.0} | settings


def pyramid_like(**settings: Any) -> dict[str, Any]:
    """The settings that models of 2 stages with fewer keys than queries share."""
    return {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1],
            "hidden_sizes": [16, 32], "num_attention_heads": [2, 4], "mlp_ratios": [1, 1],
            "patch_sizes": [7, 3], "strides": [4, 2]} | settings


RESNET = {"backbone": None, "use_timm_backbone": False, "use_pretrained_backbone": False,
          "backbone_config": {"model_type": "resnet", "embedding_size": 8, "depths": [1, 1],
                              "hidden_sizes": [8, 16], "layer_type": "basic",
                              "out_features": ["stage2"]}}
DETECTOR = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40,
            "num_queries": 5}
CONSTANT = ("the first layer of the decoder computes queries and keys from parameters alone",)

FAMILIES = (
    Family("vit", "ViTModel", vit_like(), pixels(), 2, sizes=IMAGES),
    Family("deit", "DeiTModel", vit_like(), pixels(), 2, sizes=IMAGES, like="vit"),
    Family("beit", "BeitModel", vit_like(use_relative_position_bias=True), pixels(), 2, 2,
           sizes=IMAGES, unusual=("relative bias from a resized table",)),
    Family("data2vec-vision", "Data2VecVisionModel",
           vit_like(use_shared_relative_position_bias=True), pixels(), 2, 2, sizes=IMAGES,
           like="beit"),
    Family("swin", "SwinModel", swin_like(), pixels(), 3, 3, variants=("eager",), sizes=IMAGES,
           unusual=("windows", "relative bias from an indexed table")),
    Family("swinv2", "Swinv2Model", swin_like(), pixels(), 3, 3, variants=("eager",),
           sizes=IMAGES, unusual=("cosine", "learned scale")),
    Family("swin2sr", "Swin2SRModel", swin_like(image_size=8, patch_size=1, upscale=2), pixels(8),
           3, 3, variants=("eager",), sizes=IMAGES, like="swinv2"),
    Family("donut-swin", "DonutSwinModel", swin_like(), pixels(), 3, 3, variants=("eager",),
           sizes=IMAGES, like="swin"),
    Family("maskformer-swin", "MaskFormerSwinModel", swin_like(), pixels(), 3, 3,
           variants=("eager",), sizes=IMAGES, like="swin"),
    Family("segformer", "SegformerModel", pyramid_like(), pixels(32), 2, sizes=IMAGES,
           variants=("eager",), unusual=("fewer keys than queries",)),
    Family("glpn", "GLPNModel", pyramid_like(), pixels(32), 2, sizes=IMAGES, variants=("eager",),
           like="segformer"),
    Family("pvt", "PvtModel",
           pyramid_like(image_size=32, patch_sizes=[4, 2], sequence_reduction_ratios=[2, 1]),
           pixels(32), 2, sizes=IMAGES, variants=("eager",)),
    Family("pvt_v2", "PvtV2Model", pyramid_like(image_size=32), pixels(32), 2, sizes=IMAGES,
           variants=("eager",), like="pvt"),
    Family("dinov2", "Dinov2Model", vit_like(), pixels(), 2, sizes=IMAGES, like="vit"),
    Family("dinov2_with_registers", "Dinov2WithRegistersModel", vit_like(num_register_tokens=2),
           pixels(), 2, sizes=IMAGES, like="vit"),
    Family("dinov3_vit", "DINOv3ViTModel", vit_like(num_register_tokens=2), pixels(), 2,
           sizes=IMAGES, unusual=("rope on the patches alone",)),
    Family("vit_mae", "ViTMAEModel", vit_like(mask_ratio=0.25),
           together(pixels(), floats("noise", 16)), 2, sizes=IMAGES,
           unusual=("patches chosen by sorting",)),
    Family("vit_msn", "ViTMSNModel", vit_like(), pixels(), 2, sizes=IMAGES, like="vit"),
    Family("vitdet", "VitDetModel",
           vit_like(use_relative_position_embeddings=True, window_block_indices=[0], window_size=2,
                    pretrain_image_size=16, mlp_ratio=1), pixels(), 2, 4, variants=("eager",),
           sizes=IMAGES, unusual=("relative terms of rows and columns",)),
    Family("ijepa", "IJepaModel", vit_like(), pixels(), 2, sizes=IMAGES, like="vit"),
    Family("yolos", "YolosModel",
           vit_like(image_size=[16, 16], num_detection_tokens=5), pixels(), 2, sizes=IMAGES,
           like="vit"),
    Family("dpt", "DPTModel", vit_like(backbone_out_indices=[0, 1], is_hybrid=False), pixels(), 2,
           sizes=IMAGES, like="vit"),
    Family("mobilevit", "MobileViTModel",
           {"image_size": 32, "patch_size": 2, "hidden_sizes": [16, 16, 16],
            "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16], "num_attention_heads": 4,
            "mlp_ratio": 1.0, "output_stride": 8}, pixels(32), 9, variants=("eager",),
           sizes=IMAGES),
    Family("mobilevitv2", "MobileViTV2Model",
           {"image_size": 32, "patch_size": 2, "base_attn_unit_dims": [8, 8, 8],
            "n_attn_blocks": [1, 1, 1], "width_multiplier": 0.125, "output_stride": 8},
           pixels(32), 0, variants=("eager",), sizes=IMAGES,
           unusual=("softmax without attention",)),
    Family("hiera", "HieraModel",
           {"embed_dim": 16, "image_size": [32, 32], "patch_size": [7, 7], "patch_stride": [4, 4],
            "patch_padding": [3, 3], "depths": [1, 2], "num_heads": [2, 4], "mlp_ratio": 1.0,
            "embed_dim_multiplier": 2.0, "num_query_pool": 1, "query_stride": [2, 2],
            "masked_unit_size": [4, 4], "masked_unit_attention": [True, False]}, pixels(32), 3,
           sizes=IMAGES, unusual=("windows", "pooled queries"), variants=("eager",)),
    Family("videomae", "VideoMAEModel", vit_like(num_frames=4, tubelet_size=2),
           pixels(frames=4), 2, sizes=IMAGES, like="vit"),
    Family("timesformer", "TimesformerModel", vit_like(num_frames=3), pixels(frames=3), 4,
           variants=("eager",), sizes=IMAGES, unusual=("over time, then over space",)),
    Family("vivit", "VivitModel", vit_like(num_frames=4, tubelet_size=[2, 4, 4]),
           pixels(frames=4), 2, sizes=IMAGES, like="vit"),
    Family("vjepa2", "VJEPA2Model",
           {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 1.0,
            "crop_size": 16, "patch_size": 4, "frames_per_clip": 4, "tubelet_size": 2,
            "pred_hidden_size": 32, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1,
            "pred_num_mask_tokens": 2}, pixels(frames=4, name="pixel_values_videos"), 3,
           sizes=IMAGES, unusual=("rope of three directions",),
           unseen={"look_ups": "a gather of mask tokens chooses among copies of one row"}),
    Family("sam-vision", "SamVisionModel",
           vit_like(output_channels=8, window_size=2, global_attn_indexes=[1], mlp_dim=40,
                    num_pos_feats=4), pixels(), 2, 4, sizes=IMAGES,
           unusual=("relative terms of rows and columns",), like="vitdet"),
    Family("aimv2-vision", "Aimv2VisionModel", vit_like(), pixels(), 3, 1, sizes=IMAGES,
           unusual=("pooling attention",)),
    Family("detr", "DetrModel", DETECTOR | RESNET, pixels(32), 6, sizes=IMAGES,
           variants=("eager",),
           declined=CONSTANT),
    Family("conditional_detr", "ConditionalDetrModel", DETECTOR | RESNET, pixels(32), 6,
           sizes=IMAGES, unusual=("queries of two parts",), variants=("eager",), like="detr",
           declined=CONSTANT),
    Family("table-transformer", "TableTransformerModel", DETECTOR | RESNET, pixels(32), 6,
           variants=("eager",), sizes=IMAGES, like="detr",
           declined=CONSTANT),
    Family("dab_detr", "DabDetrModel",
           {k: v for k, v in DETECTOR.items() if k != "d_model"} | RESNET | {"hidden_size": 32},
           pixels(32), 6, sizes=IMAGES, variants=("eager",), like="detr",
           declined=CONSTANT),
    Family("focalnet", "FocalNetModel",
           {"embed_dim": 8, "image_size": 16, "patch_size": 4, "hidden_sizes": [8, 16],
            "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3]}, pixels(), 0,
           variants=("eager",), sizes=IMAGES),
    Family("poolformer", "PoolFormerModel",
           {"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2,
            "patch_sizes": [7, 3], "strides": [4, 2], "padding": [2, 1]}, pixels(32), 0,
           variants=("eager",), sizes=IMAGES, like="focalnet"),
)

CASES = cases_of(FAMILIES)
