"""Vision transformers of timm, tiny.

timm imports torchvision, and for its data sets Pillow, though its models use neither; torchvision
has to fit the torch it stands beside. Where torchvision is missing, stand-ins take the place of
the two modules that timm names while timm is being imported, and no longer.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from bincompile.models.corpus import Call, Case

SIDE, PATCH = 16, 8
SMALL: dict[str, Any] = {"img_size": SIDE, "num_classes": 5}
PLAIN: dict[str, Any] = {**SMALL, "patch_size": PATCH, "embed_dim": 32, "depth": 2, "num_heads": 4}
WINDOWED: dict[str, Any] = {**SMALL, "patch_size": 2, "window_size": 4, "embed_dim": 16,
                            "depths": (2, 1), "num_heads": (2, 4)}
STAGED: dict[str, Any] = {"num_classes": 5, "embed_dims": (16, 32), "num_heads": (1, 2)}


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Modules for what timm imports and its models don't use, gone again at the end.

    timm's own data module is replaced by its constants; it is read again when someone asks for it.
    """
    found = importlib.util.find_spec("timm")
    if "timm" in sys.modules or found is None or importlib.util.find_spec("torchvision"):
        yield
        return
    constants = Path(next(iter(found.submodule_search_locations or ()))) / "data" / "constants.py"
    names = ("torchvision", "torchvision.ops", "torchvision.ops.misc", "timm.data")
    modules = {name: ModuleType(name) for name in names}
    unused = type("FrozenBatchNorm2d", (nn.Module,), {})
    modules["torchvision.ops.misc"].FrozenBatchNorm2d = unused  # type: ignore[attr-defined]
    exec(constants.read_text(encoding="utf-8"), vars(modules["timm.data"]))
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


@functools.cache
def _module(name: str) -> ModuleType:
    with _stand_ins():
        importlib.import_module("timm.models")
    return importlib.import_module(f"timm.models.{name}")


def _made(module: str, name: str, unfused: bool = False, **options: Any) -> nn.Module:
    """A model in eval mode; `unfused` writes attention out, as timm does where torch is old."""
    model = getattr(_module(module), name)(**options).eval()
    for part in model.modules():
        if unfused and hasattr(part, "fused_attn"):
            part.fused_attn = False
    for parameter in model.parameters():  # tables of biases start at zero
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def _image(batch: int, length: int) -> Call:
    return (torch.randn(batch, 3, SIDE, SIDE),), {}


def _case(name: str, module: str, kind: str, attention: int, look_ups: int = 0,
          unseen: str = "", declined: tuple[str, ...] = (), **options: Any) -> Case:
    return Case(f"timm/{name}", functools.partial(_made, module, kind, **options), _image,
                attention, look_ups, needs=("timm",),
                unseen={"attention": unseen} if unseen else {}, declined=declined)


CASES = (
    _case("vit/unfused", "vision_transformer", "VisionTransformer", 2, unfused=True, **PLAIN),
    _case("vit/fused", "vision_transformer", "VisionTransformer", 2, **PLAIN),
    _case("vit/norm-and-pool", "vision_transformer", "VisionTransformer", 3, qk_norm=True,
          global_pool="map", unfused=True, **PLAIN),
    _case("vit/relative-bias", "vision_transformer_relpos", "VisionTransformerRelPos", 2, 2,
          rel_pos_type="bias", unfused=True, **PLAIN),
    _case("vit/relative-network", "vision_transformer_relpos", "VisionTransformerRelPos", 2, 2,
          rel_pos_type="mlp", unfused=True, **PLAIN),
    _case("vit/sam", "vision_transformer_sam", "VisionTransformerSAM", 2, 4, use_rel_pos=True,
          unfused=True, window_size=2, global_attn_indexes=(1,), neck_chans=8,
          **{**PLAIN, "patch_size": 4}),
    _case("deit/distilled", "deit", "VisionTransformerDistilled", 2, unfused=True, **PLAIN),
    _case("beit/relative-bias", "beit", "Beit", 2, 2, use_rel_pos_bias=True, init_values=0.1,
          unfused=True, **PLAIN),
    _case("beit/fused", "beit", "Beit", 2, 2, use_rel_pos_bias=True, **PLAIN),
    _case("swin/v1", "swin_transformer", "SwinTransformer", 3, 3, unfused=True, **WINDOWED),
    _case("swin/v2", "swin_transformer_v2", "SwinTransformerV2", 3, 3, **WINDOWED),
    _case("swin/v1-fused", "swin_transformer", "SwinTransformer", 3, 3, **WINDOWED),
    _case("eva/rotary", "eva", "Eva", 2, use_rot_pos_emb=True, qkv_fused=False, unfused=True,
          **PLAIN),
    _case("cait/talking-heads", "cait", "Cait", 3, depth_token_only=1, unfused=True,
          unseen="linear layers mix the heads", **PLAIN),
    _case("xcit/channels", "xcit", "Xcit", 1, cls_attn_layers=1, unfused=True,
          unseen="two attentions over channels look alike", **PLAIN),
    _case("crossvit/two-scales", "crossvit", "CrossVit", 4, patch_size=(4, 8), num_heads=(2, 2),
          embed_dim=(16, 32), depth=((1, 1, 1),), mlp_ratio=(2.0, 2.0, 4.0), unfused=True, **SMALL),
    _case("pyramid/pvt", "pvt_v2", "PyramidVisionTransformerV2", 2, depths=(1, 1),
          sr_ratios=(2, 1), mlp_ratios=(2, 2), unfused=True, **STAGED),
    _case("pyramid/twins", "twins", "Twins", 3, img_size=SIDE, depths=(2, 1), wss=(2, 2),
          sr_ratios=(2, 1), mlp_ratios=(2, 2), unfused=True, **STAGED),
    _case("pyramid/nest", "nest", "Nest", 2, img_size=SIDE, patch_size=2, num_levels=2,
          depths=(1, 1), unfused=True, **STAGED),
    _case("pyramid/hiera", "hiera", "Hiera", 2, img_size=(SIDE, SIDE), embed_dim=16, stages=(1, 1),
          q_pool=1, mask_unit_size=(2, 2), mask_unit_attn=(True, False), num_classes=5,
          unfused=True),
    _case("pyramid/pit", "pit", "PoolingVisionTransformer", 2, img_size=SIDE, patch_size=8,
          stride=4, base_dims=(16, 16), depth=(1, 1), heads=(2, 2), mlp_ratio=2, num_classes=5,
          unfused=True),
    _case("tnt/inner-and-outer", "tnt", "TNT", 4, inner_dim=8, num_heads_inner=2,
          num_heads_outer=4, unfused=True,
          **{k: v for k, v in PLAIN.items() if k != "num_heads"}),
    _case("convit/gated", "convit", "ConVit", 2, local_up_to_layer=1, unfused=True,
          unseen="a gate mixes in weights of positions, and their sum is divided out",
          declined=("the weights of two softmaxes are mixed by a gate and renormalised",), **PLAIN),
)
