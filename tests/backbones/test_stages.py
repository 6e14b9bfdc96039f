"""Models that cannot carry task tokens: their pooled feature, the statistics of their stages, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn

from addenda.backbones import FrozenBackbone
from addenda.backbones.scope import input_size, token_obstacle
from addenda.backbones.stages import StageFeatures, stage_obstacle, stage_structure
from addenda.combined import forward_pass
from addenda.exceptions import BackboneError, IntegrityError
from tests.support.models import backbone, images, lively_vit
from tests.support.tiny import STAGED, shaken, tiny_staged, tiny_vit

WIDTHS = {  # of the pooled feature, and of every stage but the last
    "convnext": (48, [16, 24, 32]),
    "swin": (48, [24]),
    "resnet": (48, [64, 16, 24, 32]),
    "efficientnet": (256, [16, 24, 32, 48]),
    "mobilenet": (1024, [16, 8, 16, 24]),
    "maxvit": (128, [32, 32, 64, 96]),
    "beit": (48, [48, 48]),
}


def statistics(stage: Tensor) -> Tensor:
    """Mean and deviation over positions of each position's channels, normalised, in other operations than ours."""
    centred = stage - stage.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return torch.cat([normed.mean((2, 3)), normed.var((2, 3), correction=0).sqrt()], dim=1)


@pytest.mark.parametrize("kind", STAGED)
def test_features_are_timms_pooled_feature_and_statistics_of_every_stage_but_the_last(kind: str) -> None:
    on, model, pictures = backbone(kind), lively_vit(kind), images(4)
    pooled, widths = WIDTHS[kind]
    assert (on.embed_dim, on.num_layer_features) == (pooled, 2 * sum(widths))
    result = forward_pass(on, pictures, pooled=True, layers=True)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(pictures), pre_logits=True)
        assert torch.equal(result.pooled, expected)
        assert torch.equal(on.backbone_logits(pictures), model(pictures))
        maps = model.double().forward_intermediates(pictures.double(), intermediates_only=True)
    torch.testing.assert_close(
        result.layers.double(), torch.cat([*map(statistics, maps[:-1])], 1), rtol=1e-3, atol=1e-3
    )
    assert torch.equal(forward_pass(on, pictures, pooled=True).pooled, result.pooled)
    assert on.backbone_logits(pictures).std() > 0


def test_a_model_without_blocks_for_tokens_has_none() -> None:
    on = backbone("resnet")
    assert (on.blocks, on.depth, on.num_heads, on.num_tokens, on.key_value_shape[0]) == ([], 0, 0, 0, 0)
    assert on.token_obstacle() == on.adapter_obstacle() == "it is a ResNet, not timm's VisionTransformer or Eva"
    with pytest.raises(
        BackboneError, match=r"^--memory requires task tokens, which backbone 'resnet' cannot carry: it is"
    ):
        on.check_tokens("--memory")


def test_a_vit_with_other_blocks_has_features() -> None:
    on = FrozenBackbone(tiny_vit(block_fn=ParallelScalingBlock), "parallel", "hub")
    assert on.token_obstacle() == "its blocks are ParallelScalingBlock, not timm's standard Block"
    assert on.num_layer_features == 2 * 2 * 48


def test_a_distilled_model_has_two_classifiers_to_train_and_to_leave_out() -> None:
    sizes = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32}
    on = FrozenBackbone(shaken(timm.create_model("deit_tiny_distilled_patch16_224", **sizes)), "distilled", "hub")
    trainable = on.trainable_copy(5)
    assert torch.equal(trainable(images(2)), torch.zeros(2, 5))
    assert not any(name.startswith("head") for name, _ in on.without_head().model.named_parameters())
    assert on.backbone_logits(images(2)).std() > 0


def test_a_copy_of_a_backbone_has_the_same_features() -> None:
    on = backbone("resnet")
    copied = copy.deepcopy(on)
    assert copied.model is not on.model
    assert torch.equal(copied.backbone_logits(images(2)), on.backbone_logits(images(2)))
    features = (forward_pass(each, images(2), pooled=True, layers=True).features for each in (on, copied))
    assert torch.equal(*features)


def test_running_statistics_and_settings_of_layers_are_part_of_the_fingerprint() -> None:
    def resnet(**changes: Any) -> str:
        model = tiny_staged("resnet")
        for path, value in changes.items():
            owner, _, name = path.replace("__", ".").rpartition(".")
            setattr(model.get_submodule(owner), name, value)
        return FrozenBackbone(model, "resnet", "hub").fingerprint

    found = [
        resnet(),
        resnet(bn1__running_var=torch.full((64,), 2.0)),
        resnet(bn1__eps=1e-3),
        resnet(maxpool__stride=1),
        resnet(act1=nn.SiLU()),
        FrozenBackbone(tiny_staged("resnet"), "resnet", "hub", mean=(0.1,) * 3).fingerprint,
    ]
    assert len(set(found)) == 6
    assert resnet() == found[0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cait_xxs24_224", {"global_pool": "avg"}),
        ("vit_relpos_base_patch16_clsgap_224", {"global_pool": "token"}),
        ("convnext_atto", {"act_layer": "quick_gelu"}),
    ],
)
def test_a_choice_unlike_the_architectures_is_part_of_the_fingerprint(name: str, options: dict[str, Any]) -> None:
    stock, other = (stage_structure(timm.create_model(name, device="meta", **given)) for given in ({}, options))
    assert "unlike timm's" not in stock  # older registries hold the fingerprint without it
    assert stock != other


def test_a_running_statistic_that_is_written_to_is_detected() -> None:
    on = FrozenBackbone(tiny_staged("resnet"), "resnet", "hub")
    on.check_as_loaded()
    on.model.bn1.running_mean.add_(1)
    with pytest.raises(IntegrityError, match="weights of backbone 'resnet' in memory have changed"):
        on.check_as_loaded()


# --- what is refused --------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A model whose map is changed by `spoil`."""

    def __init__(self, spoil: Any = None, channels: int = 3) -> None:
        super().__init__()
        self.in_chans = channels
        self.conv = nn.Conv2d(channels, 8, 3)
        self.pretrained_cfg: dict[str, object] = {"input_size": (channels, 8, 8)}
        self.spoil = spoil or (lambda maps: maps)

    def forward_intermediates(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        maps = self.spoil(self.conv(images))
        return maps, [maps, maps]

    def forward_head(self, maps: Tensor, pre_logits: bool = False) -> Tensor:
        return maps.mean((2, 3))


def needs_gradients(maps: Tensor) -> Tensor:
    loss = maps.sum()
    return maps - torch.autograd.grad(loss, [loss])[0]


def needs_training_mode(maps: Tensor) -> Tensor:
    raise RuntimeError("call train() first\nand more")


REFUSED = [
    (needs_gradients, "its features cannot be computed without gradients in eval mode: RuntimeError, element 0"),
    (needs_training_mode, "its features cannot be computed .*: RuntimeError, call train\\(\\) first\\. See"),
    (lambda maps: F.dropout(maps, 0.5), "its features are random: two runs of the same images differ"),
    (lambda maps: maps - maps.mean(0, keepdim=True) * torch.arange(len(maps)).view(-1, 1, 1, 1),
     "its features of an image depend on the other images in the batch"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "reason"), REFUSED, ids=["gradients", "training", "random", "batch"])
def test_a_model_whose_features_are_not_its_images_alone_is_refused_by_name(spoil: Any, reason: str) -> None:
    with pytest.raises(BackboneError, match=f"^Backbone 'odd' cannot be used: {reason}"):
        FrozenBackbone(Odd(spoil), "odd", "hub")


def test_an_odd_model_that_is_not_spoilt_is_a_backbone() -> None:
    assert FrozenBackbone(Odd(), "even", "hub").num_layer_features == 16


def test_other_channels_a_missing_method_several_features_and_batch_statistics_are_named() -> None:
    assert stage_obstacle(Odd(channels=4), input_size(Odd(channels=4))) == "it takes 4 input channels, not 3"
    assert stage_obstacle(nn.Linear(2, 2), [3, 8, 8]) == "timm's Linear has no forward_intermediates"
    unpooled: Any = Odd()
    unpooled.forward_head = lambda maps, pre_logits: maps
    assert stage_obstacle(unpooled, [3, 8, 8]) == "it does not pool an image into one feature"
    batch = tiny_staged("resnet")
    batch.bn1 = nn.BatchNorm2d(64, track_running_stats=False)
    assert "batch norm has no running statistics" in str(stage_obstacle(batch, [3, 32, 32]))


def test_a_model_is_checked_on_the_meta_device_without_memory() -> None:
    model = tiny_staged("resnet").to("meta")
    assert stage_obstacle(model, [3, 32, 32]) is None
    assert token_obstacle(model) is not None
    assert StageFeatures(model, [3, 32, 32]).operations() == backbone("resnet").patch_operations() > 10**6


def test_the_statistics_of_a_constant_map_are_zeros() -> None:
    on = FrozenBackbone(Odd(lambda maps: maps * 0), "flat", "hub")
    assert forward_pass(on, torch.ones(2, 3, 8, 8), layers=True).layers.count_nonzero() == 0
