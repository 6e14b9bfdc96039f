"""The regimes that the paper compares: settings of `LearnConfig`, and rivals that move the frozen tokens.

A rival starts from the same regression on the same split as a task, under the same penalty on its head. Validation
chooses its optimiser, learning rate and epoch too: by accuracy, and by loss among equals, since full fine-tuning soon
grows too sure of itself and its loss rises while its accuracy still does. How it stands after its last epoch is noted
as well: few images choose an epoch badly. None can be registered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
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
"""What a user gets, by the settings that are asked for."""

REGISTRABLE = ("head", "head+class", "memory-M", "adapters-R", *AS_SHIPPED)

BASELINES = {
    "full": "it changes the backbone's own weights",
    "lora": "its updates change what the backbone's own tokens become",
    "unmasked": "without the mask the frozen tokens see the task's",
    "attentive": "a task has no such head",
}
"""Why each cannot be registered."""

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW, "sgd": partial(torch.optim.SGD, momentum=0.9),
}  # fmt: skip


class Rate(NamedTuple):
    """An optimiser, of OPTIMIZERS, and its learning rate at its highest."""

    optimizer: str
    learning_rate: float

    def __str__(self) -> str:
        return f"{self.optimizer} {self.learning_rate:g}"


RATES: Mapping[str, tuple[Rate, ...]] = {
    "full": (*(Rate("adamw", rate) for rate in (1e-5, 3e-5, 1e-4)), *(Rate("sgd", rate) for rate in (0.003, 0.01))),
    "lora": (Rate("adamw", 3e-4), Rate("adamw", 1e-3)),
    "unmasked": (Rate("adamw", 1e-3), Rate("adamw", 3e-3)),
    "attentive": (Rate("adamw", 3e-4), Rate("adamw", 1e-3)),
}
"""What a rival is tried with, unless told."""

LORA_LAYERS = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"
EVALUATION_BATCH = 32

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BaselineConfig:
    """How a rival is trained; what is measured depends on every field."""

    epochs: int = 30  # passes over the training part, at most; validation picks the best
    batch_size: int = 16
    rates: tuple[Rate, ...] = ()  # validation picks one. Empty takes the regime's own
    weight_decay: float = 0.05  # of all but the head, which has the regression's own penalty instead
    warmup_steps: int = 5  # of linear warm-up before the cosine
    clip_norm: float = 1.0  # largest norm of the gradient
    augmentation: Augmentation = field(default_factory=Augmentation)  # views are drawn once and kept in memory
    validation_fraction: float = 0.2
    autocast: bool = False  # whether passes run in bfloat16 where torch's autocast thinks it safe
    seed: int = 0  # of the split, of the first values and of the order of images


@dataclass(frozen=True)
class TrainedBaseline:
    """A rival at its best epoch, and how accurate it was after its last."""

    method: str
    labels: tuple[str, ...]
    num_images: int  # that training passed
    rate: Rate
    epoch: int = 0  # from 1; 0 where it diverged before the end of the first
    validation_loss: float = math.inf
    validation_accuracy: float = 0.0
    last_validation_accuracy: float = 0.0
    # Whether each test image is answered rightly, at its best epoch and after its last; None without a test set.
    right: Bool[Tensor, " N"] | None = None
    last_right: Bool[Tensor, " N"] | None = None
    tensors: Tensors = field(default_factory=dict)  # what was learned, by name

    @property
    def rank(self) -> tuple[float, float]:
        """The less the better, by validation."""
        return -self.validation_accuracy, self.validation_loss


def is_baseline(method: str) -> bool:
    """Whether a regime is for comparison only; raises TrainingError where there is no such regime."""
    return _parse(method)[0] in BASELINES


def method_config(method: str, config: LearnConfig) -> LearnConfig:
    """The settings under which `Learner` learns and registers a regime; those as shipped take the seed alone."""
    kind, size = _parse(method)
    if kind in BASELINES:
        raise TrainingError(
            f"Regime {method!r} cannot be registered: {BASELINES[kind]}, so tasks learned before would not keep their "
            f"bits. It is trained for comparison only (addenda bench paper). Registrable: {', '.join(REGISTRABLE)}."
        )
    if kind in AS_SHIPPED:
        return LearnConfig.parse({**AS_SHIPPED[kind], "seed": config.seed})
    if kind == "head":
        return replace(config, head_only=True)
    if kind == "adapters":
        return replace(config, adapter_rank=size)
    return replace(config, num_memory_tokens=size)


def rates_of(method: str, config: BaselineConfig) -> tuple[Rate, ...]:
    """What a rival is tried with."""
    return config.rates or RATES[_parse(method)[0]]


def train_baseline(
    method: str,
    backbone: FrozenBackbone,
    images: LabelledImages,
    test: LabelledImages | None = None,
    config: BaselineConfig | None = None,
    cache: ActivationCache | None = None,
    report: Report = silent,
) -> TrainedBaseline:
    """The best of `train_rivals`, by validation; TrainingError where all diverged."""
    config = config or BaselineConfig()
    best = min(
        train_baselines(method, backbone, images, test, config, cache, report), key=lambda baseline: baseline.rank
    )
    if best.epoch == 0:
        tried = ", ".join(map(str, rates_of(method, config)))
        raise TrainingError(f"{method!r} diverged with each of {tried}. Try smaller learning rates.")
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
    """Trains a rival with each rate in turn; the test images choose nothing."""
    config = config or BaselineConfig()
    kind, _ = _parse(method)
    if kind not in BASELINES:
        raise TrainingError(f"Regime {method!r} is no rival: `Learner` learns it. Rivals: full, lora-R, unmasked-M.")
    if kind == "lora":
        backbone.check_vision_transformer(f"The regime {method!r}")
    if config.augmentation.fresh:
        raise TrainingError("Rivals learn from views that are kept in memory; fresh ones are not for them.")
    activations = Activations(
        backbone, images, replace(config.augmentation, views=0), cache or ActivationCache(), tokens=False
    )
    targets, objective = activations.targets, images.objective
    train, validation = objective.split(targets, len(images.labels), config.validation_fraction, config.seed)
    strength = objective.choose_strength(activations.pooled, targets, config.seed)
    linear_probe = objective.fit_linear_probe(activations.pooled[train], targets[train], strength)
    pixels = _read_views(images, backbone, config.augmentation)
    scored_on = None if test is None else test.read_all(backbone)

    rates, steps = rates_of(method, config), math.ceil(len(train) / config.batch_size)
    for place, rate in enumerate(rates):
        module, answer = _build(method, backbone, linear_probe, images.labels, config.seed)
        learned = {name: p for name, p in module.named_parameters() if p.requires_grad}
        head = {name: p for name, p in learned.items() if name.startswith(("head", "pooled"))}
        head_weights = [p for p in head.values() if p.ndim == 2]
        # The regression's own, once for each feature that the head reads (Trainer.run says why).
        penalty = len(head_weights) / (2 * strength * len(train))
        groups: list[dict[str, Any]] = [
            {"params": [p for name, p in learned.items() if name not in head]},
            {"params": list(head.values()), "weight_decay": 0.0},
        ]
        optimizer = OPTIMIZERS[rate.optimizer](groups, lr=rate.learning_rate, weight_decay=config.weight_decay)
        rise = partial(schedule, warmup_steps=config.warmup_steps, steps=steps * config.epochs)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rise)
        random = torch.Generator().manual_seed(config.seed)
        best = TrainedBaseline(method, images.labels, config.epochs * len(train), rate)
        for epoch in range(1, config.epochs + 1):
            order = train[torch.randperm(len(train), generator=random, dtype=torch.int64, device="cpu")]
            drawn = torch.randint(len(pixels), (len(order),), generator=random, dtype=torch.int64, device="cpu")
            batches = zip(order.split(config.batch_size), drawn.split(config.batch_size), strict=True)
            for step, (rows, views) in enumerate(batches, 1):
                with torch.autocast(backbone.device.type, torch.bfloat16, enabled=config.autocast):
                    logits = answer(pixels[views, rows].to(backbone.device))
                mean = objective.loss(logits.float(), targets[rows].to(backbone.device))
                (mean + penalty * torch.stack([w.square().sum() for w in head_weights]).sum()).backward()
                nn.utils.clip_grad_norm_(learned.values(), config.clip_norm)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                done = (place * config.epochs + epoch - 1) * steps + step
                standing = f"validation {100 * best.validation_accuracy:.1f} %" if best.epoch else ""
                report(f"training {method} by {rate}, {standing}", done, len(rates) * config.epochs * steps)
            logits = _logits(answer, pixels[0, validation], backbone, config.autocast)
            reached = objective.loss(logits, targets[validation]).item()
            best = replace(best, last_validation_accuracy=accuracy(logits, targets[validation]))
            now = replace(
                best, epoch=epoch, validation_loss=reached, validation_accuracy=best.last_validation_accuracy
            )  # fmt: skip
            if math.isfinite(reached) and now.rank < best.rank:
                kept = {
                    name: p.detach().clone(memory_format=torch.contiguous_format).cpu() for name, p in learned.items()
                }
                best = replace(now, tensors=kept)
        if test is not None and scored_on is not None and best.epoch:
            last = _logits(answer, scored_on, backbone, config.autocast)
            chosen = baseline_logits(backbone, best, scored_on, config.autocast)
            right, last_right = (logits.argmax(1) == test.targets for logits in (chosen, last))
            best = replace(best, right=right, last_right=last_right)
        yield best


def baseline_logits(
    backbone: FrozenBackbone, baseline: TrainedBaseline, pixels: Float[Tensor, "N 3 H W"], autocast: bool = False
) -> Float[Tensor, "N C"]:
    """What a trained rival answers for images, as the backbone that it was trained on takes them."""
    weight = torch.zeros(len(baseline.labels), backbone.embed_dim, dtype=torch.float32, device="cpu")
    module, answer = _build(baseline.method, backbone, LinearProbe(weight, weight[:, 0], 1.0), baseline.labels, 0)
    module.load_state_dict(baseline.tensors, strict=False)
    return _logits(answer, pixels, backbone, autocast)


def joined_accuracies(
    backbone: FrozenBackbone,
    baselines: Mapping[str, Tensors],
    tests: Mapping[str, LabelledImages],
    autocast: bool = False,
) -> dict[str, float]:
    """Scores unmasked rivals that were trained apart, joined in one sequence, every token seeing every other."""
    tasks = [
        _unmasked_task(name, backbone, tests[name].labels, {key: tensors[own] for key, own in DENSE_NAMES.items()})
        for name, tensors in baselines.items()
    ]
    joined = DenseMask(backbone, tasks, masked=False)

    def scored(name: str, test: LabelledImages) -> float:
        pixels = test.read_all(backbone)
        return accuracy(_logits(lambda part: joined(part)[name], pixels, backbone, autocast), test.targets)

    return {name: scored(name, test) for name, test in tests.items()}


def _parse(method: str) -> tuple[str, int]:
    """The kind of a regime, and its number of memory tokens or its rank."""
    if method in ("full", "head", "attentive", *AS_SHIPPED):
        return method, 0
    if method == "head+class":
        return "memory", 0
    kind, _, size = method.partition("-")
    if kind not in ("memory", "adapters", "unmasked", "lora") or not size.isdecimal() or int(size) < 1:
        raise TrainingError(
            f"Regime {method!r} is not known. Known: {', '.join(REGISTRABLE)}, full, lora-R, unmasked-M, attentive; M "
            "memory tokens in each layer, R the rank, 1 or more."
        )
    return kind, int(size)


def _read_views(images: LabelledImages, backbone: FrozenBackbone, how: Augmentation) -> Float[Tensor, "V N 3 H W"]:
    """Every image as it is, then the very views of it that a task learns from."""
    make, found = partial(augment, how=how, preprocessing=backbone.preprocessing), []
    for index in range(len(images)):
        seeds = [view_seed(images.digest(index), number) for number in range(1, 1 + how.num_views)]
        views = images.item(index).views(backbone, [None, *(partial(make, seed=seed) for seed in seeds)])
        found.append(torch.stack(views))
    return torch.stack(found, dim=1)


def _build(
    method: str, backbone: FrozenBackbone, linear_probe: LinearProbe, labels: tuple[str, ...], seed: int
) -> tuple[nn.Module, Model]:
    """Where a rival starts, and its answer; the parameters that want gradients are what it learns."""
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
    with torch.no_grad():
        model.head.weight.copy_(linear_probe.weight)
        model.head.bias.copy_(linear_probe.bias)
    if kind == "lora":
        with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator
            torch.manual_seed(seed)
            model = _low_rank(model, size)
        model.head.requires_grad_(True)
    return model, model


class AttentiveProbe(nn.Module):
    """A learned query attends to the class token and the mean patch of every block; a linear head reads what it takes.

    Source: Ciernik, Morik et al., "Beyond the Final Layer", arXiv 2601.09322. Ours reads the layer features' own
    normalisation, one query and as many heads as the backbone has, and of the last block the pooled feature.
    """

    def __init__(self, backbone: FrozenBackbone, num_classes: int) -> None:
        super().__init__()
        width = backbone.embed_dim
        self._backbone = [backbone]  # no part of what is learned
        self.query = nn.Parameter(torch.randn(1, 1, width, dtype=torch.float32, device="cpu") * width**-0.5)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, backbone.num_heads, batch_first=True)
        self.head = nn.Linear(width, num_classes)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C"]:
        """Logits; the backbone is run without gradients."""
        (backbone,) = self._backbone
        with torch.no_grad():
            _, pooled, layers = forward_pass(
                backbone, pixels, sizes=(micro_batch(backbone.device),), pooled=True, layers=True
            )  # fmt: skip
        assert pooled is not None
        assert layers is not None
        means = layers.view(len(pixels), -1, 3, backbone.embed_dim)[:, :, :2].flatten(1, 2)  # not the deviations
        seen = self.norm(torch.cat([means, pooled.unsqueeze(1).to(means.dtype)], dim=1))
        taken, _ = self.attention(self.query.expand(len(pixels), -1, -1), seen, seen, need_weights=False)
        logits: Tensor = self.head(taken[:, 0])
        return logits


def _low_rank(model: nn.Module, rank: int) -> nn.Module:
    """A frozen model with PEFT's updates, which start as nothing, in every linear layer of its blocks."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise TrainingError(f"Regime 'lora-{rank}' needs PEFT ({error}): pip install 'addenda[bench]'") from error
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_LAYERS)
    injected: nn.Module = inject_adapter_in_model(config, model.requires_grad_(False))
    return injected


def _unmasked_task(name: str, backbone: FrozenBackbone, labels: tuple[str, ...], tensors: Tensors) -> Task:
    """What DenseMask is made of; its tensors mean nothing under the mask, so no one else gets it."""
    return Task(name=name, backbone=backbone.fingerprint, labels=labels, **as_fields(tensors))


def batches(images: LabelledImages, backbone: FrozenBackbone, size: int) -> Iterator[Float[Tensor, "B 3 H W"]]:
    """Images as the backbone takes them, so many at a time."""
    for rows in torch.arange(len(images), dtype=torch.int64, device="cpu").split(size):
        yield images.select(rows.tolist()).read_all(backbone)


@torch.no_grad()
def _logits(answer: Model, pixels: Tensor, backbone: FrozenBackbone, autocast: bool) -> Float[Tensor, "N C"]:
    with torch.autocast(backbone.device.type, torch.bfloat16, enabled=autocast):
        return torch.cat([answer(part.to(backbone.device)).float().cpu() for part in pixels.split(EVALUATION_BATCH)])
