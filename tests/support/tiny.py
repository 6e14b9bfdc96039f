"""Tiny random backbones; importing this module loads neither pytest nor the shape checker, for use in subprocesses."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

SETTINGS = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}


def tiny_vit(seed: int = 0, **options: object) -> VisionTransformer:
    """A random ViT for 32 px images: 17 tokens, 48 dimensions, 3 blocks, 3 heads."""
    torch.manual_seed(seed)
    return VisionTransformer(**{**SETTINGS, **options}).eval()


EVA: dict[str, dict[str, object]] = {
    "dinov3": {
        "qkv_bias": False, "init_values": 0.3, "num_reg_tokens": 4, "use_abs_pos_emb": False, "use_rot_pos_emb": True,
        "rope_type": "dinov3", "rope_temperature": 100.0, "rope_rotate_half": True, "dynamic_img_size": True,
        "use_fc_norm": False,
    },
    "eva02": {
        "qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True, "use_rot_pos_emb": True,
        "ref_feat_shape": (16, 16), "mlp_ratio": 8 / 3, "global_pool": "token",
    },
    "eva02-small": {
        "swiglu_mlp": True, "use_rot_pos_emb": True, "ref_feat_shape": (16, 16), "mlp_ratio": 8 / 3,
    },
    "rope-mixed": {
        "attn_type": "rope", "qk_norm": True, "init_values": 0.3, "use_abs_pos_emb": False, "use_rot_pos_emb": True,
        "rope_type": "mixed", "rope_temperature": 10.0, "rope_grid_indexing": "xy", "global_pool": "token",
    },
    "pe-core": {
        "attn_type": "rope", "use_rot_pos_emb": True, "ref_feat_shape": (16, 16), "rope_grid_indexing": "xy",
        "use_pre_transformer_norm": True, "global_pool": "map", "attn_pool_num_heads": 4, "use_fc_norm": False,
    },
    "rope-gap": {
        "attn_type": "rope", "qkv_bias": False, "init_values": 0.3, "class_token": False, "num_reg_tokens": 1,
        "use_abs_pos_emb": False, "use_rot_pos_emb": True, "use_fc_norm": False,
    },
    "eva": {"init_values": 0.3, "global_pool": "token", "use_pre_transformer_norm": True},
}  # fmt: skip
"""Settings of timm's Eva models: DINOv3; EVA-02 of CLIP and small; learned rotations; Perception Encoder's core;
rotations without a class token; no rotations."""


def tiny_eva(kind: str, seed: int = 0, **options: object) -> Eva:
    """A random Eva of one kind, with the size of `tiny_vit`."""
    torch.manual_seed(seed)
    return Eva(**{**SETTINGS, **EVA[kind], **options}).eval()


STAGED: dict[str, tuple[str, dict[str, object]]] = {
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)}),
    "swin": ("swin_tiny_patch4_window7_224", {
        "img_size": 32, "embed_dim": 24, "depths": (1, 2), "num_heads": (1, 2), "window_size": 4,
    }),
    "resnet": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (16, 24, 32, 48)}),
    "efficientnet": ("test_efficientnet", {}),
    "mobilenet": ("mobilenetv3_small_050", {}),
    "maxvit": ("test_maxvit", {"img_size": 32}),
    "beit": ("beit_base_patch16_224", {"img_size": 32, "embed_dim": 48, "depth": 3, "num_heads": 3}),
}  # fmt: skip
"""timm names of models that cannot carry task tokens, and settings that make them small."""


def tiny_staged(kind: str, seed: int = 0, **options: object) -> Any:
    """A random model that cannot carry task tokens, for 32 px images; its batch norms have uneven statistics."""
    name, settings = STAGED[kind]
    torch.manual_seed(seed)
    model: Any = timm.create_model(name, num_classes=7, **{**settings, **options}).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32)}
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
            elif name.endswith("running_mean"):
                buffer.normal_()
    return model


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """Perturbs every parameter, so that no zero head, unit norm or vanishing LayerScale hides a difference."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    return model.eval()


def some_images(model: nn.Module, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))
