"""The frozen backbone: timm's forward pass, which also yields the keys and values of each layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy, deepcopy
from typing import Any

import torch
from jaxtyping import Float
from timm.data import resolve_model_data_config
from timm.layers import Mlp
from torch import Tensor, nn

from addenda.backbones.arithmetic import float32_on_cpu, layer_statistics, plain
from addenda.backbones.family import Family, KeyValue, Reading
from addenda.backbones.fingerprint import ModuleState, fingerprint, hash_state
from addenda.backbones.image_input import ImageInput
from addenda.backbones.scope import FAMILIES, obstacle
from addenda.backbones.vit import VisionTransformerFamily
from addenda.exceptions import BackboneError, IntegrityError


class FrozenBackbone(ImageInput):
    """A timm VisionTransformer or Eva whose outputs never change.

    Args:
        model: a model with a class token and pre-norm blocks of plain attention.
        name: its timm name.
        source: origin of the weights: `"hub"`, `"embedded"`, or a file's path.
        mean: normalisation mean per channel; None takes the model's.
        std: normalisation standard deviation per channel; None takes the model's.
        precision: dtype of the weights and of all computation.
        device: device of the weights.

    Attributes:
        fingerprint: sha256 over architecture, input size, weights (as loaded, before any cast) and preprocessing.
        precision_name: `"float32"` or `"bfloat16"`.
        num_tokens: P, the number of frozen tokens: class token, registers and patches.
        grid_size: rows and columns of patches, which are the last of the frozen tokens.
        patch_size: height of a patch in pixels.
        patch_operations: multiply-adds of the patch embedding of one image.
        pools_class_token: whether the pooled feature is the class token, so that no patch of the last block is read.
        family: the computation for its class of models.
        blocks: the blocks that the task stream runs through: timm's, or views of them.
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
    ) -> None:
        reason = obstacle(model)
        if reason is not None:
            raise BackboneError(f"Backbone {name!r} cannot carry task tokens: {reason}. See: addenda backbones list")
        config = resolve_model_data_config(model)
        super().__init__(
            name,
            {
                "input_size": [3, *model.patch_embed.img_size],
                "interpolation": config["interpolation"],
                "mean": [float(v) for v in (mean or config["mean"])],
                "std": [float(v) for v in (std or config["std"])],
                "crop_pct": float(config["crop_pct"]),
                "crop_mode": config["crop_mode"],
            },
        )
        for parameter, weight in model.named_parameters():
            if not weight.detach().isfinite().all():
                raise BackboneError(
                    f"Weight {parameter!r} of backbone {name!r} ({source}) holds NaN or infinity; use other weights."
                )
        self.source = source
        self.precision, self.device = precision, torch.device(device)
        self.precision_name = str(precision).removeprefix("torch.")
        family = FAMILIES[type(model)]
        self.fingerprint = fingerprint(model, family, self.preprocessing)
        with float32_on_cpu():
            # timm's module attributes have no static types; `obstacle` has checked them.
            self.model: Any = model.to(self.device, precision).eval().requires_grad_(False)
            self.family: Family = family(self.model)
        self.blocks: list[Any] = self.family.blocks
        self.embed_dim: int = model.embed_dim
        self.depth: int = len(model.blocks)
        self.num_heads: int = model.blocks[0].attn.num_heads
        patches = model.patch_embed
        self.num_tokens: int = model.num_prefix_tokens + patches.num_patches
        self.num_parameters: int = sum(p.numel() for p in model.parameters())
        self.grid_size: tuple[int, int] = tuple(patches.grid_size)
        self.patch_size: int = patches.patch_size[0]
        self.patch_operations: int = patches.num_patches * patches.proj.weight.numel()
        self.pools_class_token: bool = model.global_pool == "token"
        self._contents = hash_state(self.model)
        self._module_state = ModuleState(self.model.named_modules())
        self.memo: dict[Any, Any] = {}

    def check_unchanged(self) -> None:
        """Raises IntegrityError if a module or weight has changed since loading; hashes all weights."""
        if self._module_state.changed:
            raise IntegrityError(
                f"Module {self._module_state.where()!r} of backbone {self.name!r} has changed since it was loaded "
                "(replaced, reconfigured, hooked, compiled, moved or cast). Undo the change, or reload the backbone."
            )
        if hash_state(self.model) != self._contents:
            raise IntegrityError(
                f"The weights of backbone {self.name!r} in memory have changed since they were loaded. "
                "Reload the backbone."
            )

    def check_as_loaded(self) -> None:
        """Like `check_unchanged`, in microseconds: hashes the weights only after a write to one of them.

        Only `check_unchanged` detects a write through `.data`.
        """
        if self._module_state.changed or self._module_state.written:
            self.check_unchanged()
            self._module_state.record()

    @property
    def fused_attention(self) -> bool | str:
        """Whether attention uses torch's fused operation; a string of 1 or 0 per block where blocks differ."""
        fused = [bool(block.attn.fused_attn) for block in self.blocks]
        return fused[0] if len(set(fused)) == 1 else "".join(str(int(flag)) for flag in fused)

    def check_vision_transformer(self, method: str) -> None:
        """Raises BackboneError, naming the method, unless the model is timm's VisionTransformer."""
        if not isinstance(self.family, VisionTransformerFamily):
            timm_class = self.family.TIMM_CLASS.__name__
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

    def backbone_logits(self, images: Tensor) -> Float[Tensor, "B C"]:
        """Runs timm's own forward pass, including its head, on images Float[B, 3, H, W]."""
        self.check_images(images)
        with plain(self.device):
            logits: Tensor = self.model(images.to(self.device, self.precision))
        return logits

    def first_tokens(self, class_tokens: Float[Tensor, "S D"]) -> Float[Tensor, "S D"]:
        """The first block's input for tasks' class tokens.

        Each gets the position embedding of the backbone's class token (none in DeiT-III), and norm_pre where the model
        has one (CLIP).
        """
        position = self.model.pos_embed
        if position is not None and not self.model.no_embed_class:
            class_tokens = class_tokens + position[0, 0]
        tokens: Tensor = self.model.norm_pre(class_tokens)
        return tokens

    @property
    def num_layer_features(self) -> int:
        """n, the number of layer features: three vectors per block, except the last."""
        return 3 * self.embed_dim * (self.depth - 1)

    @property
    def class_token(self) -> Float[Tensor, " D"]:
        """The backbone's class token, without position embedding."""
        token: Tensor = self.model.cls_token[0, 0]
        return token

    def pool(self, tokens: Float[Tensor, "B P D"]) -> Float[Tensor, "B D"]:
        """Pools the last block's frozen tokens into the feature that the backbone's head reads."""
        feature: Tensor = self.model.forward_head(self.model.norm(tokens), pre_logits=True)
        return feature

    def final_norm(self, tokens: Tensor) -> Tensor:
        """Applies both final norms, one of which is an identity."""
        normed: Tensor = self.model.fc_norm(self.model.norm(tokens))
        return normed

    def embed(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B P D"]:
        """The first block's input, computed as in timm's forward_features."""
        return self.family.embed(images.detach().to(self.device, self.precision))

    def adapter_obstacle(self) -> str | None:
        """Returns why this backbone's blocks cannot carry adapters, or None if they can."""
        for block in self.model.blocks:
            if type(block.mlp) is not Mlp:
                return f"its MLPs are {type(block.mlp).__name__}, not timm's plain Mlp of fc1 and fc2"
        return None

    def adapter_shapes(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each linear layer that adapters update, by its name in BlockAdapters.

        Raises:
            BackboneError: the blocks cannot carry adapters.
        """
        reason = self.adapter_obstacle()
        if reason is not None:
            raise BackboneError(
                f"Backbone {self.name!r} cannot carry adapters: {reason}. Learn without adapters, or choose another "
                "backbone."
            )
        attn, mlp = self.blocks[0].attn, self.blocks[0].mlp
        layers = {"proj": attn.proj, "fc1": mlp.fc1, "fc2": mlp.fc2}
        queries = (self.embed_dim, attn.proj.in_features)
        return {"q": queries} | {site: (layer.in_features, layer.out_features) for site, layer in layers.items()}

    @property
    def weights(self) -> nn.Module:
        """The timm model, typed as a module, to be registered as a submodule."""
        module: nn.Module = self.model
        return module

    def without_head(self) -> FrozenBackbone:
        """This backbone without its classifier, which no task reads; everything else is shared."""
        headless = copy(self.model)
        headless._modules = {**self.model._modules, "head": nn.Identity()}
        return self._shallow_copy(model=headless)

    def _shallow_copy(self, **changed: Any) -> FrozenBackbone:
        """A copy with some attributes changed and all others shared."""
        other = object.__new__(type(self))
        vars(other).update(vars(self) | changed)
        return other

    def trainable_copy(self, num_classes: int) -> nn.Module:
        """A trainable float32 copy of the timm model with a new head, initialised to zeros."""
        model = self._copy_without_hooks()
        model.reset_classifier(num_classes)
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
        trainable: nn.Module = model.float().to(self.device).requires_grad_(True)
        return trainable

    def _copy_without_hooks(self) -> Any:
        model: Any = deepcopy(self.model, {id(self.family): self.family})  # hooks are bound to the family
        for module in model.modules():
            module._forward_hooks.clear()
        return model

    def __getstate__(self) -> dict[str, Any]:
        """State for deep copies and pickles: everything that is not bound to this model."""
        bound = ("model", "family", "blocks", "memo", "_module_state")
        state = {name: value for name, value in vars(self).items() if name not in bound}
        return {"model": self._copy_without_hooks()} | state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuilds what is bound to the model."""
        vars(self).update(state)
        with float32_on_cpu():
            self.family = FAMILIES[type(self.model)](self.model)
        self.blocks = self.family.blocks[: self.depth]
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


class FrozenStream:
    """One frozen forward pass over one batch. Iterate once, then read `pooled` and `layers`."""

    def __init__(self, backbone: FrozenBackbone, images: Tensor, reading: Reading, layers: bool) -> None:
        self._backbone = backbone
        self._images = images
        self._reading = reading
        self._tokens: Tensor | None = None
        self._layers: list[Tensor] | None = [] if layers else None

    def __iter__(self) -> Iterator[KeyValue]:
        """Yields each layer's keys and values, Float[B, H, P, d]."""
        backbone, family = self._backbone, self._backbone.family
        tokens = backbone.embed(self._images)
        for number, block in enumerate(backbone.blocks, 1):
            is_last = number == backbone.depth
            outputs = family.last(block, tokens, self._reading) if is_last else family.run(block, tokens)
            tokens, key_values, normed = outputs
            if number > 1 and self._layers is not None:  # of the block before, while its output is in the CPU's caches
                self._layers.append(layer_statistics(normed, backbone.model.patch_embed.num_patches))
            if is_last and self._reading != "nothing":
                self._tokens = tokens
            yield key_values

    @property
    def layers(self) -> Float[Tensor, "B n"]:
        """The layer features of every block except the last, in float32 or higher."""
        assert self._layers is not None, "layer features were not requested"
        assert len(self._layers) == self._backbone.depth - 1, "the stream was not read to its end"
        count = self._images.shape[0]  # not len(), which would fix the batch size of a traced model
        empty = torch.zeros(count, 0, dtype=torch.float32, device=self._backbone.device)
        return torch.cat(self._layers or [empty], dim=1)

    @property
    def tokens(self) -> Float[Tensor, "B P D"]:
        """The last block's output after the final norm, as returned by timm's forward_features."""
        assert self._tokens is not None, "the stream was not read to its end, or was made with reading='nothing'"
        normed: Tensor = self._backbone.model.norm(self._tokens)
        return normed

    @property
    def pooled(self) -> Float[Tensor, "B D"]:
        """The pooled feature, which the backbone's head reads."""
        assert self._tokens is not None, "the stream was not read to its end, or was made with reading='nothing'"
        return self._backbone.pool(self._tokens)
