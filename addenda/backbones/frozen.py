"""The frozen backbone: timm's forward pass, which also yields the keys and values of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from addenda.backbones.arithmetic import float32_on_cpu, plain, uncompiled
from addenda.backbones.copies import headless, hooked, replace_inference_tensors, with_new_head, without_hooks
from addenda.backbones.family import Family, Reading
from addenda.backbones.fingerprint import ModuleState, fingerprint, hash_contents
from addenda.backbones.frozen_stream import FrozenStream
from addenda.backbones.image_input import ImageInput
from addenda.backbones.pooling import pool_by_latent_query, pool_operations, pools_by_latent_query
from addenda.backbones.scope import FAMILIES, input_size, obstacle, token_obstacle
from addenda.backbones.stages import StageFeatures, counted_operations
from addenda.exceptions import BackboneError, IntegrityError


class FrozenBackbone(ImageInput):
    """A timm model whose outputs never change.

    A VisionTransformer or Eva of plain pre-norm blocks carries task tokens. Any other model carries head-only tasks,
    which read its pooled feature and the statistics of its stages.

    Args:
        model: a model in eval or training mode; it is put into eval mode.
        name: its timm name.
        source: origin of the weights: `"hub"`, `"embedded"`, or a file's path.
        mean: normalisation mean per channel; None takes the model's.
        std: normalisation standard deviation per channel; None takes the model's.
        precision: dtype of the weights and of all computation.
        device: device of the weights.
        conversion: how the weights file's tensors were converted, in one line; empty if they were not.
        crop_pct: share of an image that the centre crop keeps; None takes the model's.

    Attributes:
        fingerprint: sha256 over architecture, input size, weights (as loaded, before any cast) and preprocessing.
        precision_name: `"float32"` or `"bfloat16"`.
        embed_dim: D, the width of the pooled feature and of tokens.
        depth: L, the number of blocks; like the following numbers 0 if the model cannot carry task tokens.
        num_tokens: P, the number of frozen tokens: class token, registers and patches.
        grid_size: rows and columns of patches, which are the last of the frozen tokens.
        patch_size: height of a patch in pixels.
        has_class_token: whether the model has a class token of its own.
        pools_class_token: whether the pooled feature is the class token, so that no patch of the last block is read.
        blocks: the blocks that the task stream runs through: timm's, or views of them.
        stages: the features of a model that cannot carry task tokens; None for one that can.
        memo: cache of values derived from this backbone.

    Raises:
        BackboneError: the model is out of scope.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        source: str,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        precision: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        conversion: str = "",
        crop_pct: float | None = None,
    ) -> None:
        replace_inference_tensors(model)
        reason = obstacle(model) or hooked(model)
        if reason is not None:
            raise BackboneError(f"Backbone {name!r} cannot be used: {reason}. See: addenda backbones list")
        config = resolve_model_data_config(model)
        super().__init__(
            name,
            {
                "input_size": input_size(model),
                "interpolation": config["interpolation"],
                "mean": [float(v) for v in (mean or config["mean"])],
                "std": [float(v) for v in (std or config["std"])],
                "crop_pct": float(crop_pct or config["crop_pct"]),
                "crop_mode": config["crop_mode"],
            },
        )
        for parameter, weight in model.state_dict().items():
            if not weight.isfinite().all():
                raise BackboneError(
                    f"Weight {parameter!r} of backbone {name!r} ({source}) holds NaN or infinity; use other weights."
                )
        self.source, self.conversion = source, conversion
        self.precision, self.device = precision, torch.device(device)
        self.precision_name = str(precision).removeprefix("torch.")
        self._token_obstacle = token_obstacle(model)
        family = FAMILIES[type(model)] if self._token_obstacle is None else None
        self.fingerprint = fingerprint(model, family, self.preprocessing)
        with float32_on_cpu():
            # timm's module attributes have no static types; `obstacle` has checked them.
            self.model: Any = model.to(self.device, precision).eval().requires_grad_(False)
        self.num_parameters: int = sum(p.numel() for p in model.parameters())
        if family is not None:
            self._read_blocks(family)
        elif (reason := self._read_stages().instability()) is not None:
            raise BackboneError(f"Backbone {name!r} cannot be used: {reason}. See: addenda backbones list")
        self._contents = hash_contents(self.model)
        self._module_state = ModuleState(self.model.named_modules())
        self.memo: dict[Any, Any] = {}

    # Of a model that cannot carry task tokens, which has no blocks, tokens or patches.
    stages: StageFeatures | None = None
    depth = num_heads = num_tokens = patch_size = 0
    grid_size: tuple[int, int] = (0, 0)
    has_class_token = pools_class_token = False

    def _read_stages(self) -> StageFeatures:
        with float32_on_cpu():
            self.stages = stages = StageFeatures(self.model, self.preprocessing["input_size"])
        self.blocks: list[Any] = []
        self.embed_dim: int = stages.pooled_width
        return stages

    def _read_blocks(self, family: type[Family]) -> None:
        """Sets the attributes of a model that can carry task tokens."""
        model, patches = self.model, self.model.patch_embed
        with float32_on_cpu():
            self._family = family(model)
        self.blocks = self._family.blocks
        self.embed_dim = model.embed_dim
        self.depth = len(model.blocks)
        self.num_heads = model.blocks[0].attn.num_heads
        self.num_tokens = model.num_prefix_tokens + patches.num_patches
        self.patch_size = patches.patch_size[0]
        self.grid_size = tuple(patches.grid_size)
        self.has_class_token = model.cls_token is not None
        self.pools_class_token = model.global_pool == "token"

    @property
    def family(self) -> Family:
        """The computation of blocks for the model's class; only for a model that can carry task tokens."""
        return self._family

    @property
    def num_layer_features(self) -> int:
        """n, the number of layer features: three vectors per block, two without a class token, but the last."""
        if self.stages is not None:
            return self.stages.num_layer_features
        return (3 if self.has_class_token else 2) * self.embed_dim * (self.depth - 1)

    @property
    def key_value_shape(self) -> tuple[int, int, int, int, int]:
        """Layers, two, heads, frozen tokens and dimensions per head: the keys and values of one image."""
        return self.depth, 2, self.num_heads, self.num_tokens, self.embed_dim // max(self.num_heads, 1)

    def patch_operations(self) -> int:
        """Multiply-adds of one image before the blocks: the patch embedding, or a whole model without blocks."""
        if self.stages is not None:
            return self.stages.operations()
        return counted_operations(self.model.patch_embed, self._zeros())

    def pool_operations(self, num_queries: int = 1) -> int:
        """Multiply-adds of pooling one image by attention; 0 for other pooling."""
        return pool_operations(self.model, num_queries) if self.blocks else 0

    def _zeros(self) -> Tensor:
        """An image of zeros, in a batch of its own."""
        shape = (1, *self.preprocessing["input_size"])
        return torch.zeros(shape, dtype=self.precision, device=self.device)

    def token_obstacle(self) -> str | None:
        """Returns why this backbone cannot carry task tokens, or None if it can."""
        return self._token_obstacle

    def check_tokens(self, asked: str) -> None:
        """Raises BackboneError, naming what was asked for, if this backbone cannot carry task tokens."""
        if self._token_obstacle is not None:
            raise BackboneError(
                f"{asked} requires task tokens, which backbone {self.name!r} cannot carry: {self._token_obstacle}. "
                "Learn with its layer head alone, or choose a backbone: addenda backbones list"
            )

    def check_unchanged(self) -> None:
        """Raises IntegrityError if a module or weight has changed since loading; hashes all weights."""
        if self._module_state.changed:
            raise IntegrityError(
                f"Module {self._module_state.where()!r} of backbone {self.name!r} has changed since it was loaded "
                "(replaced, reconfigured, hooked, compiled, moved or cast). Undo the change, or reload the backbone."
            )
        if hash_contents(self.model) != self._contents:
            raise IntegrityError(
                f"The weights of backbone {self.name!r} in memory have changed since they were loaded. "
                "Reload the backbone."
            )

    def check_as_loaded(self) -> None:
        """Like `check_unchanged`, in microseconds: misses a write through `.data`, which torch does not count."""
        if self._module_state.changed or self._module_state.written:
            self.check_unchanged()
            self._module_state.record()

    @property
    def fused_attention(self) -> bool | str:
        """Whether attention uses torch's fused operation; a string of 1 or 0 per block and pool where they differ.

        It is empty for a model without attention.
        """
        by_blocks = [*(block.attn for block in self.blocks), self.model.attn_pool] if self.stages is None else None
        modules = by_blocks or self.model.modules()
        fused = [bool(module.fused_attn) for module in modules if hasattr(module, "fused_attn")]
        return fused[0] if len(set(fused)) == 1 else "".join(str(int(flag)) for flag in fused)

    def check_vision_transformer(self, method: str) -> None:
        """Raises BackboneError, naming the method, unless the model is timm's VisionTransformer."""
        if self.stages is not None or type(self.model) is not VisionTransformer:
            timm_class = type(self.model).__name__
            raise BackboneError(
                f"{method} requires timm's VisionTransformer; backbone {self.name!r} is timm's {timm_class}. Leave the "
                "method out, or choose another backbone."
            )

    def first_blocks(self, depth: int) -> FrozenBackbone:
        """This backbone truncated to `depth` blocks, with shared weights."""
        return self._shallow_copy(blocks=self.blocks[:depth], depth=len(self.blocks[:depth]), memo={})

    def stream(self, images: Tensor, reading: Reading = "tokens", layers: bool = False) -> FrozenStream:
        """The frozen forward pass; iterate over it for each layer's keys and values.

        Args:
            images: Float[B, 3, H, W], normalised, of the model's input size.
            reading: what to compute of the last block. `"tokens"` runs it as timm does, bit for bit; `"pooled"`
                computes only what the pooled feature needs, if that is the class token; `"nothing"` computes only keys
                and values.
            layers: whether to compute the layer features too.

        Raises:
            BackboneError: the images have another shape.
        """
        self.check_images(images)
        return FrozenStream(self, images, reading, layers)

    @uncompiled
    def backbone_logits(self, images: Tensor) -> Float[Tensor, "B C"]:
        """Runs timm's own forward pass, including its head, on images Float[B, 3, H, W]."""
        self.check_images(images)
        with plain(self.device):
            logits: Tensor = self.model(images.to(self.device, self.precision))
        return logits

    def first_tokens(self, class_tokens: Float[Tensor, "S D"]) -> Float[Tensor, "S D"]:
        """The first block's input for tasks' class tokens."""
        return self.family.first_tokens(class_tokens)

    @property
    @uncompiled
    def class_token(self) -> Float[Tensor, " D"]:
        """Where tasks' class tokens start."""
        with plain(self.device):
            return self.family.class_token(self._zeros())

    def pool(self, tokens: Float[Tensor, "B P D"], reading: Reading = "pooled") -> Float[Tensor, "B D"]:
        """Pools the last block's frozen tokens into the feature that the backbone's head reads.

        Only with reading "tokens" it has timm's bits where the model pools by attention.
        """
        normed = self.model.norm(tokens)
        if reading != "tokens" and pools_by_latent_query(self.model):
            return pool_by_latent_query(self.model, normed)
        feature: Tensor = self.model.forward_head(normed, pre_logits=True)
        return feature

    def final_norm(self, tokens: Tensor) -> Tensor:
        """Applies both final norms, one of which is an identity."""
        normed: Tensor = self.model.fc_norm(self.model.norm(tokens))
        return normed

    def embed(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B P D"]:
        """The first block's input, computed as in timm's forward_features."""
        return self.family.embed(self.on_device(images))

    def on_device(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Images in the backbone's precision, without gradients."""
        return images.detach().to(self.device, self.precision)

    def adapter_obstacle(self) -> str | None:
        """Returns why this backbone's blocks cannot carry adapters, or None if they can."""
        return self._token_obstacle or self.family.adapter_obstacle()

    def adapter_shapes(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each linear layer that adapters update; BackboneError if they cannot be carried."""
        reason = self.adapter_obstacle()
        if reason is not None:
            raise BackboneError(
                f"Backbone {self.name!r} cannot carry adapters: {reason}. Learn without adapters, or choose another "
                "backbone."
            )
        return self.family.adapter_shapes()

    @property
    def weights(self) -> nn.Module:
        """The timm model, typed as a module, to be registered as a submodule."""
        module: nn.Module = self.model
        return module

    def without_head(self) -> FrozenBackbone:
        """This backbone without its classifier, which no task reads; everything else is shared."""
        return self._shallow_copy(model=headless(self.model))

    def _shallow_copy(self, **changed: Any) -> FrozenBackbone:
        """A copy with some attributes changed and all others shared."""
        other = object.__new__(type(self))
        vars(other).update(vars(self) | changed)
        return other

    def trainable_copy(self, num_classes: int) -> nn.Module:
        """A trainable float32 copy of the timm model with a new head, initialised to zeros."""
        return with_new_head(self._model_copy(), num_classes).to(self.device)

    def _model_copy(self) -> Any:
        return without_hooks(self.model, vars(self).get("_family"))

    def __getstate__(self) -> dict[str, Any]:
        """State for deep copies and pickles: everything that is not bound to this model, which must be unchanged."""
        self.check_unchanged()
        bound = ("model", "_family", "stages", "blocks", "memo", "_module_state")
        state = {name: value for name, value in vars(self).items() if name not in bound}
        return {"model": self._model_copy()} | state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuilds what is bound to the model."""
        vars(self).update(state)
        depth = self.depth
        if self._token_obstacle is None:
            self._read_blocks(FAMILIES[type(self.model)])
            self.blocks, self.depth = self.blocks[:depth], depth
        else:
            self._read_stages()
        self._module_state, self.memo = ModuleState(self.model.named_modules()), {}

    def record(self) -> dict[str, Any]:
        """The registry's record of this backbone, sufficient to load it again."""
        return {
            "fingerprint": self.fingerprint,
            "name": self.name,
            "source": self.source,
            "precision": self.precision_name,
            "preprocessing": self.preprocessing,
            "embed_dim": self.embed_dim,
            "depth": self.depth,
            "num_heads": self.num_heads,
            "num_tokens": self.num_tokens,
            "num_parameters": self.num_parameters,
        }
