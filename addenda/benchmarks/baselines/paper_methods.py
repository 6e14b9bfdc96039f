"""Methods of `addenda bench paper`: registrable ones, as `LearnConfig` settings, and baselines, which are trained here.

A baseline starts from the same linear probe on the same split as a task, with the same penalty on its head. Validation
selects its optimizer, learning rate and epoch by accuracy, and by loss among equals: full fine-tuning soon becomes
overconfident, so that its loss rises while its accuracy still improves. The state after the last epoch is recorded as
well, since a small validation split selects epochs unreliably. Baselines cannot be registered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from addenda.backbones import FrozenBackbone
from addenda.benchmarks.baselines.dense_mask import DENSE_NAMES, DenseMask
from addenda.combined import forward_pass, micro_batch
from addenda.exceptions import TrainingError
from addenda.learner.activation_cache import ActivationCache
from addenda.learner.activations import Activations
from addenda.learner.augmentation import Augmentation, augment, view_seed
from addenda.learner.candidates import Tensors, as_fields, first_tensors, schedule
from addenda.learner.context import Report, silent
from addenda.learner.data import LabelledImages
from addenda.learner.learn_config import LearnConfig
from addenda.learner.objectives import LinearProbe, accuracy
from addenda.registry import Task

AS_SHIPPED: Mapping[str, Mapping[str, Any]] = {
    "linear-probe": {"head_only": True, "layer_head": False}, "layer-probe": {"head_only": True},
    "default": {}, "default+adapters": {"adapter_rank": "auto"},
}  # fmt: skip
"""`addenda learn` as shipped: the settings that differ from its defaults."""

REGISTRABLE = ("head", "head+class", "memory-M", "adapters-R", *AS_SHIPPED)

BASELINES = {
    "full": "it changes the backbone's own weights",
    "lora": "its updates change the backbone's own tokens",
    "unmasked": "without the mask, the frozen tokens attend to the task's",
    "attentive": "tasks have no attentive head",
}
"""Why each baseline cannot be registered."""

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW, "sgd": partial(torch.optim.SGD, momentum=0.9),
}  # fmt: skip


class Rate(NamedTuple):
    """An optimizer of OPTIMIZERS and its peak learning rate."""

    optimizer: str
    learning_rate: float

    def __str__(self) -> str:
        return f"{self.optimizer} {self.learning_rate:g}"


RATES: Mapping[str, tuple[Rate, ...]] = {
    "full": (*(Rate("adamw", rate) for rate in (1e-5, 3e-5, 1e-4)), *(Rate("sgd", rate) for rate in (0.003, 0.01))),
    "lora": (Rate("adamw", 3e-4), Rate("adamw", 1e-3)),
    "unmasked": (Rate("adamw", 1e-3), Rate("adamw", 3e-3)),
    "attentive": (Rate("adamw", 3e-4), Rate("adamw", 1e-3), Rate("adamw", 3e-3)),
}
"""Default optimizers and learning rates of each baseline; validation selects one."""

LORA_LAYERS = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"
EVALUATION_BATCH = 32

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BaselineConfig:
    """Training settings of a baseline; results depend on every field."""

    epochs: int = 30  # maximum; validation selects the best
    batch_size: int = 16
    rates: tuple[Rate, ...] = ()  # validation selects one; empty: the baseline's RATES
    weight_decay: float = 0.05  # on all parameters but the head, which has the linear probe's penalty instead
    warmup_steps: int = 5  # linear warm-up before the cosine schedule
    clip_norm: float = 1.0  # maximum gradient norm
    augmentation: Augmentation = field(default_factory=Augmentation)  # views are drawn once and held in memory
    validation_fraction: float = 0.2
    autocast: bool = False  # run the forward pass under bfloat16 autocast
    seed: int = 0  # for the split, the initial values and the order of images


@dataclass(frozen=True)
class TrainedBaseline:
    """A baseline at its best epoch, with its accuracy after the last epoch."""

    method: str
    labels: tuple[str, ...]
    num_images: int  # processed in training, counting each epoch
    rate: Rate
    epoch: int = 0  # from 1; 0 if it diverged within the first
    validation_loss: float = math.inf
    validation_accuracy: float = 0.0
    last_validation_accuracy: float = 0.0
    # Whether each test image is predicted correctly, at the best epoch and after the last; None without test images.
    right: Bool[Tensor, " N"] | None = None
    last_right: Bool[Tensor, " N"] | None = None
    tensors: Tensors = field(default_factory=dict)  # trained parameters and buffers by name

    @property
    def rank(self) -> tuple[float, float]:
        """Sort key by validation; lower is better."""
        return -self.validation_accuracy, self.validation_loss


def is_baseline(method: str) -> bool:
    """Whether a method is for comparison only; raises TrainingError for unknown methods."""
    return _parse(method)[0] in BASELINES


def method_config(method: str, config: LearnConfig) -> LearnConfig:
    """The settings with which `Learner` learns a registrable method; methods as shipped take only the seed."""
    kind, size = _parse(method)
    if kind in BASELINES:
        raise TrainingError(
            f"Method {method!r} cannot be registered: {BASELINES[kind]}, so the logits of earlier tasks would change. "
            f"It is only for comparison (addenda bench paper). Registrable: {', '.join(REGISTRABLE)}."
        )
    if kind in AS_SHIPPED:
        return LearnConfig.parse({**AS_SHIPPED[kind], "seed": config.seed})
    if kind == "head":
        return replace(config, head_only=True, fall_back=True)
    return replace(config, adapter_rank=size) if kind == "adapters" else replace(config, num_memory_tokens=size)


def rates_of(method: str, config: BaselineConfig) -> tuple[Rate, ...]:
    """The optimizers and learning rates to try for a baseline."""
    return config.rates or RATES[_parse(method)[0]]


def best_baseline(trained: Iterable[TrainedBaseline]) -> TrainedBaseline:
    """The best by validation of what `train_baselines` yields; TrainingError if training diverged with every rate."""
    trained = list(trained)
    best = min(trained, key=lambda baseline: baseline.rank)
    if best.epoch == 0:
        rates = ", ".join(str(baseline.rate) for baseline in trained)
        raise TrainingError(f"Training {best.method!r} diverged with each of {rates}. Try lower learning rates.")
    return best


def train_baselines(
    method: str,
    backbone: FrozenBackbone,
    images: LabelledImages,
    test: LabelledImages | None = None,
    config: BaselineConfig | None = None,
    cache: ActivationCache | None = None,
    report: Report = silent,
) -> Iterator[TrainedBaseline]:
    """Train a baseline with each rate in turn; test images are only scored, never used for selection."""
    config = config or BaselineConfig()
    kind, _ = _parse(method)
    if kind not in BASELINES:
        raise TrainingError(
            f"Method {method!r} is not a baseline; `Learner` learns it. Baselines: full, lora-R, unmasked-M, attentive."
        )
    if kind == "lora":
        backbone.check_vision_transformer(f"The method {method!r}")
    if config.augmentation.fresh:
        raise TrainingError("Baselines do not support `fresh` augmentation; set Augmentation(fresh=False).")
    activations = Activations(
        backbone, images, replace(config.augmentation, views=0), cache or ActivationCache(), tokens=False
    )
    targets, objective = activations.targets, images.objective
    train, validation = objective.split(targets, len(images.labels), config.validation_fraction, config.seed)
    strength = objective.choose_strength(activations.pooled, targets, config.seed)
    linear_probe = objective.fit_linear_probe(activations.pooled[train], targets[train], strength)
    inputs = _inputs(method, backbone, _read_views(images, backbone, config.augmentation))
    test_inputs = None if test is None else _inputs(method, backbone, test.read_all(backbone))

    rates, steps = rates_of(method, config), math.ceil(len(train) / config.batch_size)
    for rate_index, rate in enumerate(rates):
        module, predict = _build(method, backbone, linear_probe, images.labels, config.seed)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        own_head: Any = getattr(module, "get_classifier", nn.Identity)()  # timm's name for it is not always `head`
        classifier = {id(p) for p in own_head.parameters()}
        head = {name: p for name, p in trained.items() if name.startswith(("head", "pooled")) or id(p) in classifier}
        head_weights = [p for p in head.values() if p.ndim == 2]
        # The linear probe's penalty, once for each feature that the head reads (see Trainer.run).
        penalty = len(head_weights) / (2 * strength * len(train))
        groups: list[dict[str, Any]] = [
            {"params": [p for name, p in trained.items() if name not in head]},
            {"params": list(head.values()), "weight_decay": 0.0},
        ]
        optimizer = OPTIMIZERS[rate.optimizer](groups, lr=rate.learning_rate, weight_decay=config.weight_decay)
        factor = partial(schedule, warmup_steps=config.warmup_steps, steps=steps * config.epochs)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        random = torch.Generator().manual_seed(config.seed)
        best = TrainedBaseline(method, images.labels, config.epochs * len(train), rate)
        for epoch in range(1, config.epochs + 1):
            module.train(kind == "attentive")
            order = train[torch.randperm(len(train), generator=random, dtype=torch.int64, device="cpu")]
            drawn = torch.randint(len(inputs), (len(order),), generator=random, dtype=torch.int64, device="cpu")
            batches = zip(order.split(config.batch_size), drawn.split(config.batch_size), strict=True)
            for step, (rows, views) in enumerate(batches, 1):
                with torch.autocast(backbone.device.type, torch.bfloat16, enabled=config.autocast):
                    logits = predict(inputs[views, rows].to(backbone.device))
                loss = objective.loss(logits.float(), targets[rows].to(backbone.device))
                (loss + penalty * torch.stack([w.square().sum() for w in head_weights]).sum()).backward()
                nn.utils.clip_grad_norm_(trained.values(), config.clip_norm)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                done = (rate_index * config.epochs + epoch - 1) * steps + step
                best_so_far = f", validation {100 * best.validation_accuracy:.1f} %" if best.epoch else ""
                report(f"training {method} with {rate}{best_so_far}", done, len(rates) * config.epochs * steps)
            module.eval()
            logits = _logits(predict, inputs[0, validation], backbone, config.autocast)
            validation_loss = objective.loss(logits, targets[validation]).item()
            best = replace(best, last_validation_accuracy=accuracy(logits, targets[validation]))
            score = best.last_validation_accuracy
            current = replace(best, epoch=epoch, validation_loss=validation_loss, validation_accuracy=score)
            if math.isfinite(validation_loss) and current.rank < best.rank:
                layout = torch.contiguous_format
                state = trained | dict(module.named_buffers())
                tensors = {name: t.detach().clone(memory_format=layout).cpu() for name, t in state.items()}
                best = replace(current, tensors=tensors)
        if test is not None and test_inputs is not None and best.epoch:
            last_logits = _logits(predict, test_inputs, backbone, config.autocast)
            best_logits = _logits(_rebuilt(backbone, best)[1], test_inputs, backbone, config.autocast)
            right, last_right = (logits.argmax(1) == test.targets for logits in (best_logits, last_logits))
            best = replace(best, right=right, last_right=last_right)
        yield best


def baseline_logits(
    backbone: FrozenBackbone, baseline: TrainedBaseline, pixels: Float[Tensor, "N 3 H W"], autocast: bool = False
) -> Float[Tensor, "N C"]:
    """Logits of a trained baseline on images prepared for its backbone."""
    return _logits(_rebuilt(backbone, baseline)[1], _inputs(baseline.method, backbone, pixels), backbone, autocast)


def merged(backbone: FrozenBackbone, lora: TrainedBaseline) -> FrozenBackbone:
    """A copy of the backbone with a trained LoRA merged into its weights."""
    model, _ = _rebuilt(backbone, lora)
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer"):  # a layer of PEFT's
            module.merge()
            model.set_submodule(name, module.base_layer)
    settings = {name: backbone.preprocessing[name] for name in ("mean", "std", "crop_pct")}
    return FrozenBackbone(
        model, backbone.name, "adapted", precision=backbone.precision, device=backbone.device, **settings
    )


def _rebuilt(backbone: FrozenBackbone, baseline: TrainedBaseline) -> tuple[nn.Module, Model]:
    """A trained baseline as a module, and its forward function."""
    weight = torch.zeros(len(baseline.labels), backbone.embed_dim, dtype=torch.float32, device="cpu")
    module, predict = _build(baseline.method, backbone, LinearProbe(weight, weight[:, 0], 1.0), baseline.labels, 0)
    module.load_state_dict(baseline.tensors, strict=False)
    module.eval()
    return module, predict


def joined_accuracies(
    backbone: FrozenBackbone,
    baselines: Mapping[str, Tensors],
    tests: Mapping[str, LabelledImages],
    autocast: bool = False,
) -> dict[str, float]:
    """Test accuracy of unmasked baselines trained separately, joined in one sequence without a mask."""
    tasks = [
        _unmasked_task(name, backbone, tests[name].labels, {key: tensors[dense] for key, dense in DENSE_NAMES.items()})
        for name, tensors in baselines.items()
    ]
    joined = DenseMask(backbone, tasks, masked=False)

    def test_accuracy(name: str, test: LabelledImages) -> float:
        pixels = test.read_all(backbone)
        return accuracy(_logits(lambda batch: joined(batch)[name], pixels, backbone, autocast), test.targets)

    return {name: test_accuracy(name, test) for name, test in tests.items()}


def _parse(method: str) -> tuple[str, int]:
    """The kind of a method, and its number of memory tokens or its rank."""
    if method in ("full", "head", "attentive", *AS_SHIPPED):
        return method, 0
    if method == "head+class":
        return "memory", 0
    kind, _, size = method.partition("-")
    if kind not in ("memory", "adapters", "unmasked", "lora") or not size.isdecimal() or int(size) < 1:
        raise TrainingError(
            f"Unknown method {method!r}. Known: {', '.join(REGISTRABLE)}, full, lora-R, unmasked-M, attentive, with M "
            "memory tokens per layer and rank R, both at least 1."
        )
    return kind, int(size)


def _read_views(
    images: LabelledImages, backbone: FrozenBackbone, augmentation: Augmentation
) -> Float[Tensor, "V N 3 H W"]:
    """Each image without augmentation, then the same views of it that a task is trained on."""
    view = partial(augment, how=augmentation, preprocessing=backbone.preprocessing)
    stacks = []
    for index in range(len(images)):
        seeds = [view_seed(images.digest(index), number) for number in range(1, 1 + augmentation.num_views)]
        views = images.item(index).views(backbone, [None, *(partial(view, seed=seed) for seed in seeds)])
        stacks.append(torch.stack(views))
    return torch.stack(stacks, dim=1)


def _build(
    method: str, backbone: FrozenBackbone, linear_probe: LinearProbe, labels: tuple[str, ...], seed: int
) -> tuple[nn.Module, Model]:
    """A baseline before training and its forward function; parameters that require gradients are trained."""
    kind, size = _parse(method)
    if kind == "unmasked":
        config = LearnConfig(num_memory_tokens=size, seed=seed)
        start = first_tensors(backbone, linear_probe, config.candidates[0], config.memory_std)
        dense = DenseMask(backbone, [_unmasked_task("baseline", backbone, labels, start)], masked=False)
        return dense, lambda pixels: dense(pixels)["baseline"]
    if kind == "attentive":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            probe = AttentiveProbe(backbone, len(labels)).to(backbone.device)
        return probe, probe
    model: Any = backbone.trainable_copy(len(labels))
    head = model.get_classifier()  # of a ViT its `head`, of other models another module
    with torch.no_grad():
        head.weight.copy_(linear_probe.weight)
        head.bias.copy_(linear_probe.bias)
    if kind == "lora":
        with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator
            torch.manual_seed(seed)
            model = _low_rank(model, size)
        head.requires_grad_(True)
    return model, model


class AttentiveProbe(nn.Module):
    """A linear head on a learned query that attends to the class token and mean patch token of every block.

    Source: Ciernik, Morik et al., "Beyond the Final Layer", arXiv 2601.09322, with the authors' initial query, three
    layer norms, and batch normalisation before the head. Here, inputs are the normalised layer features and, for
    the last block, the pooled feature; there is one query, with as many heads as the backbone.
    """

    def __init__(self, backbone: FrozenBackbone, num_classes: int) -> None:
        super().__init__()
        width = backbone.embed_dim
        self.query = nn.Parameter(torch.randn(1, 1, width, dtype=torch.float32, device="cpu") * 0.02)
        self.query_norm, self.key_norm, self.value_norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, backbone.num_heads, batch_first=True)
        self.batch_norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "B C"]:
        """Computes logits from `layer_tokens`."""
        query = self.query_norm(self.query).expand(len(tokens), -1, -1)
        attended, _ = self.attention(query, self.key_norm(tokens), self.value_norm(tokens), need_weights=False)
        self.batch_norm.train(self.training and len(tokens) > 1)  # one image has no variance
        logits: Tensor = self.head(self.batch_norm(attended[:, 0]))
        return logits


@torch.no_grad()
def layer_tokens(backbone: FrozenBackbone, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B T D"]:
    """Computes the class token and mean patch token of every block but the last, and the pooled feature."""
    _, pooled, layers = forward_pass(backbone, pixels, sizes=(micro_batch(backbone.device),), pooled=True, layers=True)
    assert pooled is not None
    assert layers is not None
    means = layers.view(len(pixels), -1, 3, backbone.embed_dim)[:, :, :2].flatten(1, 2)  # without the deviations
    return torch.cat([means, pooled.unsqueeze(1).to(means.dtype)], dim=1)


def _inputs(method: str, backbone: FrozenBackbone, pixels: Float[Tensor, "... 3 H W"]) -> Tensor:
    """Returns what a baseline's forward function reads: pixels, or the attentive probe's tokens, computed once."""
    if method != "attentive":
        return pixels
    batches = pixels.flatten(0, -4).split(EVALUATION_BATCH)
    tokens = torch.cat([layer_tokens(backbone, batch.to(backbone.device)).cpu() for batch in batches])
    return tokens.view(*pixels.shape[:-3], *tokens.shape[1:])


def _low_rank(model: nn.Module, rank: int) -> nn.Module:
    """Freeze a model and inject PEFT's LoRA, initially zero, into every linear layer of its blocks."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise TrainingError(f"Method 'lora-{rank}' requires PEFT ({error}): pip install 'addenda[bench]'") from error
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_LAYERS)
    injected: nn.Module = inject_adapter_in_model(config, model.requires_grad_(False))
    return injected


def _unmasked_task(name: str, backbone: FrozenBackbone, labels: tuple[str, ...], tensors: Tensors) -> Task:
    """A task for DenseMask only; its tensors are not valid under the mask."""
    return Task(name=name, backbone=backbone.fingerprint, labels=labels, **as_fields(tensors))


def batches(images: LabelledImages, backbone: FrozenBackbone, size: int) -> Iterator[Float[Tensor, "B 3 H W"]]:
    """Images prepared for the backbone, in batches of `size`."""
    for rows in torch.arange(len(images), dtype=torch.int64, device="cpu").split(size):
        yield images.select(rows.tolist()).read_all(backbone)


@torch.no_grad()
def _logits(predict: Model, inputs: Tensor, backbone: FrozenBackbone, autocast: bool) -> Float[Tensor, "N C"]:
    with torch.autocast(backbone.device.type, torch.bfloat16, enabled=autocast):
        return torch.cat([predict(batch.to(backbone.device)).float().cpu() for batch in inputs.split(EVALUATION_BATCH)])
