"""A frozen backbone: timm's own forward pass, with each layer's keys and values on offer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy, deepcopy
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.layers import Mlp
from torch import Tensor, nn
from torchvision.transforms.functional import normalize

from addenda.backbones.arithmetic import building, layer_statistics, plain
from addenda.backbones.family import Family, KeyValue, Reading
from addenda.backbones.fingerprint import Wiring, fingerprint, hash_state
from addenda.backbones.images import prepared
from addenda.backbones.scope import FAMILIES, obstacle
from addenda.backbones.vit import VisionTransformerFamily
from addenda.exceptions import BackboneError, IntegrityError


class FrozenBackbone:
    """A timm VisionTransformer or Eva whose outputs never change.

    Args:
        model: one of them with a class token and pre-norm blocks of plain attention.
        name: its timm name.
        source: where the weights came from: `"hub"`, `"embedded"`, or a file's path.
        mean: normalisation, None for the model's own.
        std: normalisation, None for the model's own.
        precision: dtype in which everything computes.
        device: where it lives.

    Attributes:
        fingerprint: sha256 over architecture, input size, weights (as loaded, before any cast) and preprocessing.
        precision_name: `"float32"` or `"bfloat16"`.
        preprocessing: timm's data configuration: input_size, interpolation, mean, std, crop_pct, crop_mode.
        num_tokens: P, the frozen tokens: class token, registers, patches.
        grid_size: rows and columns of patches, which are the last of the frozen tokens.
        patch_size: pixels of a patch's height.
        patch_operations: multiply-adds that make the patches of one image.
        pools_class_token: whether the pooled feature is the class token, and no patch of the last block is read.
        family: how models of its class compute.
        blocks: for the task stream to pass its own tokens through: timm's, or stand-ins of theirs.
        memo: what others have found out about it, kept as long as it lives.

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
        why = obstacle(model)
        if why is not None:
            raise BackboneError(f"Backbone {name!r} cannot carry task tokens: {why}.")
        config = resolve_model_data_config(model)
        self.preprocessing: dict[str, Any] = {
            "input_size": [3, *model.patch_embed.img_size],
            "interpolation": config["interpolation"],
            "mean": [float(v) for v in (mean or config["mean"])],
            "std": [float(v) for v in (std or config["std"])],
            "crop_pct": float(config["crop_pct"]),
            "crop_mode": config["crop_mode"],
        }
        for what, weight in model.named_parameters():
            if not weight.detach().isfinite().all():
                raise BackboneError(f"Weight {what!r} of backbone {name!r} ({source}) holds NaN or infinity.")
        self.name, self.source = name, source
        self.precision, self.device = precision, torch.device(device)
        self.precision_name = str(precision).removeprefix("torch.")
        family = FAMILIES[type(model)]
        self.fingerprint = fingerprint(model, family, self.preprocessing)
        with building():
            # timm's module attributes have no static types; the scope check has made sure of what they are.
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
        # Without its last step, which would make tensors of torch's default dtype.
        settings: Any = {key: tuple(v) if isinstance(v, list) else v for key, v in self.preprocessing.items()}
        self._resize_and_crop: Any = create_transform(**settings, is_training=False, normalize=False)
        self._contents = hash_state(self.model)
        self._wiring = Wiring(self.model)
        self.memo: dict[Any, Any] = {}

    def transform(self, image: Image.Image) -> Float[Tensor, "3 H W"]:
        """An image of any mode and size as the model takes it: as `prepared`, then resized and cropped by timm.

        Raises:
            DataError: pixel values of no known scale.
        """
        with plain(torch.device("cpu")):
            pixels = self._resize_and_crop(prepared(image)).float() / 255
            found: Tensor = normalize(pixels, self.preprocessing["mean"], self.preprocessing["std"])
        return found

    def check_images(self, images: Tensor) -> None:
        """Raises BackboneError unless images are Float[B, 3, H, W] of the model's own size."""
        expected = tuple(self.preprocessing["input_size"])
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise BackboneError(
                f"Images must have the shape [B, {', '.join(map(str, expected))}] of backbone {self.name!r}; "
                f"got {list(images.shape)}. `backbone.transform` makes them."
            )
        if not images.is_floating_point():
            raise BackboneError(f"Images must be floating point and normalised; got {images.dtype}.")

    def check_unchanged(self) -> None:
        """Raises IntegrityError if a module or a weight in memory is no longer what was loaded; hashes all weights."""
        if self._wiring.changed:
            raise IntegrityError(
                f"Module {self._wiring.where()!r} of backbone {self.name!r} is no longer as it was loaded: it was "
                "replaced, set otherwise, hooked, compiled, moved or cast. Undo that, or load the backbone again."
            )
        if hash_state(self.model) != self._contents:
            raise IntegrityError(
                f"The weights of backbone {self.name!r} in memory have changed since they were loaded."
            )

    def check_as_loaded(self) -> None:
        """The same in some microseconds: weights are hashed only where something has written to one.

        A write through `.data` is seen by `check_unchanged` alone.
        """
        if self._wiring.changed or self._wiring.written:
            self.check_unchanged()
            self._wiring.note()

    @property
    def fused_attention(self) -> bool | str:
        """Whether attention runs as torch's one fused operation; where blocks differ, 1 or 0 for each."""
        fused = [bool(block.attn.fused_attn) for block in self.blocks]
        return fused[0] if len(set(fused)) == 1 else "".join(str(int(one)) for one in fused)

    def check_vision_transformer(self, what: str) -> None:
        """Raises BackboneError, naming what was written for it alone, unless it is timm's VisionTransformer."""
        if not isinstance(self.family, VisionTransformerFamily):
            found = self.family.TIMM_CLASS.__name__
            raise BackboneError(f"{what} is for timm's VisionTransformer; backbone {self.name!r} is timm's {found}.")

    def first_blocks(self, depth: int) -> FrozenBackbone:
        """This backbone cut off after some blocks, sharing its weights: for computations where the depth is nothing."""
        return self._with(blocks=self.blocks[:depth], depth=len(self.blocks[:depth]), memo={})

    def stream(self, images: Tensor, reading: Reading = "tokens", layers: bool = False) -> FrozenStream:
        """The frozen pass, layer by layer: iterate for each layer's keys and values.

        Args:
            images: Float[B, 3, H, W], normalised, of the model's own input size.
            reading: what is wanted of the last block. `"tokens"` runs it as timm does, bit for bit; `"pooled"`
                computes only what the pooled feature needs (where that is the class token), `"nothing"` only keys and
                values.
            layers: whether the layer features are wanted too.

        Raises:
            BackboneError: images of another shape.
        """
        self.check_images(images)
        return FrozenStream(self, images, reading, layers)

    def backbone_logits(self, images: Tensor) -> Float[Tensor, "B C"]:
        """Stock timm's own forward pass over images Float[B, 3, H, W], head included."""
        self.check_images(images)
        with plain(self.device):
            logits: Tensor = self.model(images.to(self.device, self.precision))
        return logits

    def first_tokens(self, class_tokens: Float[Tensor, "S D"]) -> Float[Tensor, "S D"]:
        """Tasks' tokens as the first block meets them.

        A new class token gets the position of the backbone's own (DeiT-III gives it none), and norm_pre where the
        model has one (CLIP).
        """
        position = self.model.pos_embed
        if position is not None and not self.model.no_embed_class:
            class_tokens = class_tokens + position[0, 0]
        tokens: Tensor = self.model.norm_pre(class_tokens)
        return tokens

    @property
    def num_layer_features(self) -> int:
        """n, the numbers that layer heads read: three vectors of each block's output but the last."""
        return 3 * self.embed_dim * (self.depth - 1)

    @property
    def class_token(self) -> Float[Tensor, " D"]:
        """The backbone's own class token, without position."""
        token: Tensor = self.model.cls_token[0, 0]
        return token

    def pool(self, tokens: Float[Tensor, "B P D"]) -> Float[Tensor, "B D"]:
        """The pooled feature, which its own head reads, of the last block's frozen tokens."""
        feature: Tensor = self.model.forward_head(self.model.norm(tokens), pre_logits=True)
        return feature

    def final_norm(self, tokens: Tensor) -> Tensor:
        """Both final norms, of which one is an identity."""
        normed: Tensor = self.model.fc_norm(self.model.norm(tokens))
        return normed

    def embed(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B P D"]:
        """What the first block meets, as timm's forward_features makes it."""
        return self.family.embed(images.detach().to(self.device, self.precision))

    def adapter_obstacle(self) -> str | None:
        """Says which property keeps this backbone's blocks from carrying adapters; None if nothing does."""
        for block in self.model.blocks:
            if type(block.mlp) is not Mlp:
                return f"its MLPs are {type(block.mlp).__name__}, not timm's plain Mlp of fc1 and fc2"
        return None

    def adapter_shapes(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear layer of a block that adapters update, by its name in BlockAdapters.

        Raises:
            BackboneError: its blocks cannot carry adapters.
        """
        why = self.adapter_obstacle()
        if why is not None:
            raise BackboneError(f"Backbone {self.name!r} cannot carry adapters: {why}.")
        attn, mlp = self.blocks[0].attn, self.blocks[0].mlp
        layers = {"proj": attn.proj, "fc1": mlp.fc1, "fc2": mlp.fc2}
        queries = (self.embed_dim, attn.proj.in_features)
        return {"q": queries} | {site: (layer.in_features, layer.out_features) for site, layer in layers.items()}

    @property
    def weights(self) -> nn.Module:
        """The timm model, as a module that another can hold."""
        held: nn.Module = self.model
        return held

    def without_head(self) -> FrozenBackbone:
        """This backbone without its own classifier, which no task reads; it shares everything else."""
        bare = copy(self.model)
        bare._modules = {**self.model._modules, "head": nn.Identity()}
        return self._with(model=bare)

    def _with(self, **changed: Any) -> FrozenBackbone:
        """Another backbone that shares all with this one but what is given."""
        other = object.__new__(type(self))
        vars(other).update(vars(self) | changed)
        return other

    def trainable_copy(self, num_classes: int) -> nn.Module:
        """A copy of the timm model whose weights can be trained, in float32, with a head of its own that is zeros."""
        model = self._unhooked()
        model.reset_classifier(num_classes)
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
        trainable: nn.Module = model.float().to(self.device).requires_grad_(True)
        return trainable

    def _unhooked(self) -> Any:
        model: Any = deepcopy(self.model, {id(self.family): self.family})  # a family's hooks are bound to it
        for module in model.modules():
            module._forward_hooks.clear()
        return model

    def __getstate__(self) -> dict[str, Any]:
        """What a deep copy or a pickle is made of: all but what is bound to this very model."""
        bound = ("model", "family", "blocks", "memo", "_wiring")
        return {"model": self._unhooked()} | {name: held for name, held in vars(self).items() if name not in bound}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Binds a copy to its own model."""
        vars(self).update(state)
        with building():
            self.family = FAMILIES[type(self.model)](self.model)
        self.blocks = self.family.blocks[: self.depth]
        self._wiring, self.memo = Wiring(self.model), {}

    def record(self) -> dict[str, Any]:
        """What a registry keeps of this backbone, enough to load it again."""
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
    """One frozen pass over one batch. Iterate once; then `pooled` and `layers` are what heads read of it."""

    def __init__(self, backbone: FrozenBackbone, images: Tensor, reading: Reading, layers: bool) -> None:
        self._backbone = backbone
        self._images = images
        self._reading = reading
        self._tokens: Tensor | None = None
        self._layers: list[Tensor] | None = [] if layers else None

    def __iter__(self) -> Iterator[KeyValue]:
        """Yields each layer's keys and values, Float[B, H, P, d]."""
        family, (*blocks, last) = self._backbone.family, self._backbone.blocks
        tokens = self._backbone.embed(self._images)
        for number, block in enumerate(blocks):
            tokens, offered, normed = family.run(block, tokens)
            if number:
                self._read(normed)
            yield offered
        tokens, offered, normed = family.last(last, tokens, self._reading)
        self._tokens = None if self._reading == "nothing" else tokens
        if blocks:
            self._read(normed)
        yield offered

    def _read(self, normed: Float[Tensor, "B P D"]) -> None:
        """Takes the statistics of a block's output where it is still in the processor's caches: in the next block."""
        if self._layers is not None:
            rows, columns = self._backbone.grid_size
            self._layers.append(layer_statistics(normed, rows * columns))

    @property
    def layers(self) -> Float[Tensor, "B n"]:
        """The layer features: statistics of every block but the last, in float32 at least; of one block none."""
        assert self._layers is not None, "not wanted"
        assert len(self._layers) == self._backbone.depth - 1, "asked for before the stream was read to its end"
        count = self._images.shape[0]  # not len(), which would fix the size of a traced batch
        none = torch.zeros(count, 0, dtype=torch.float32, device=self._backbone.device)
        return torch.cat(self._layers or [none], dim=1)

    @property
    def tokens(self) -> Float[Tensor, "B P D"]:
        """The last block's output through the final norm, as timm's forward_features gives it."""
        assert self._tokens is not None, "asked for before the stream was read to its end, or reading nothing"
        normed: Tensor = self._backbone.model.norm(self._tokens)
        return normed

    @property
    def pooled(self) -> Float[Tensor, "B D"]:
        """The backbone's own pooled feature, which its head reads."""
        assert self._tokens is not None, "asked for before the stream was read to its end, or reading nothing"
        return self._backbone.pool(self._tokens)
