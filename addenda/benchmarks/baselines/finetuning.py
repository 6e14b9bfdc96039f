"""Avalanche's strategies on a trainable copy of the backbone, whose weights all tasks share.

Training loop and losses are Avalanche's. The recipe is that of the per-task models: AdamW, warm-up and cosine schedule
in each experience, gradient clipping, light random augmentation.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sized
from typing import Any

import torch
from avalanche.models import IncrementalClassifier
from avalanche.training.plugins import LwFPlugin, ReplayPlugin, SupervisedPlugin
from avalanche.training.supervised import EWC, JointTraining, LwF, Naive, Replay
from jaxtyping import Float
from torch import Tensor, nn

from addenda.backbones import FrozenBackbone
from addenda.benchmarks.baselines.method import BaselineSettings, OneHead, quiet_evaluator
from addenda.benchmarks.baselines.paper_methods import EVALUATION_BATCH, batches
from addenda.benchmarks.strategy import NEVER
from addenda.learner.augmentation import Augmentation, augment
from addenda.learner.candidates import schedule
from addenda.learner.data.labelled import LabelledImages


class FineTuning(OneHead):
    """Sequential fine-tuning, alone or with EWC, LwF or replay.

    EWC is the online form of Schwarz et al. 2018 without decay: one sum of importances for any number of tasks.
    """

    def __post_init__(self) -> None:
        settings = self.settings
        strategies: dict[str, tuple[Any, dict[str, Any]]] = {
            "naive": (Naive, {}),
            "joint": (JointTraining, {}),
            "ewc": (EWC, {"ewc_lambda": settings.ewc_lambda, "mode": "online", "decay_factor": 1.0}),
            "lwf": (LwF, {"alpha": settings.lwf_alpha, "temperature": settings.lwf_temperature}),
            "replay": (Replay, {"mem_size": settings.replay_images}),
        }
        strategy, options = strategies[self.name]
        self._model = Classifier(self.backbone, len(self.stream.labels), settings.autocast)
        weights = self._model.parameters()
        self._strategy = strategy(
            model=self._model, criterion=nn.CrossEntropyLoss(), device=self.backbone.device,
            optimizer=torch.optim.AdamW(weights, settings.finetuning_rate, weight_decay=settings.weight_decay),
            train_mb_size=settings.batch_size, train_epochs=settings.epochs, plugins=[SchedulePlugin(settings)],
            evaluator=quiet_evaluator(), **options,
        )  # fmt: skip
        # Only LwF needs task labels; with the others Avalanche would balance each batch over tasks.
        benchmark = self.stream.benchmark(self._view, self.backbone.transform, task_labels=self.name == "lwf")
        self._experiences = benchmark.train_stream

    def _view(self, image: Any) -> Tensor:
        """A training view of an image, drawn from torch's generator, which `_train` seeds."""
        if isinstance(image, Tensor):
            return image
        seed = int(torch.randint(2**31, (), dtype=torch.int64, device="cpu"))
        if self.settings.augment:
            return augment(image.convert("RGB"), Augmentation(), seed, self.backbone.preprocessing)
        return self.backbone.transform(image)

    def _learn(self, number: int) -> None:
        self._train(number, self._experiences[number])
        if self.name == "lwf":
            # With a single head, Avalanche distils only the classes recorded for task 0.
            classes_by_task = self._plugin(LwFPlugin).lwf.prev_classes_by_task
            classes_by_task[0] = set().union(*classes_by_task.values())

    def _train(self, number: int, experiences: Any) -> None:
        # Avalanche's replay uses its own deprecated functions and enables their warnings.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(record=True) as caught:
            torch.manual_seed(1_000_003 * self.seed + number)
            self._strategy.train(experiences, eval_streams=[], reset_optimizer_state=True)
        for warning in caught:
            if not issubclass(warning.category, DeprecationWarning):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

    @torch.no_grad()
    def _logits(self, images: LabelledImages) -> Float[Tensor, "N C"]:
        self._model.eval()
        pixels = batches(images, self.backbone, EVALUATION_BATCH)
        return torch.cat([self._model(batch.to(self.backbone.device)).cpu() for batch in pixels])

    def _plugin(self, kind: type) -> Any:
        return next(plugin for plugin in self._strategy.plugins if isinstance(plugin, kind))

    def _stored_bytes(self) -> float:
        """The fine-tuned weights, plus EWC's importances or the replay buffer.

        Between experiences, EWC's anchor and LwF's teacher are the fine-tuned weights themselves and count once.
        """
        weights = 4 * sum(parameter.numel() for parameter in self._model.parameters())
        if self.name == "replay":
            return weights + self._images_bytes(self._plugin(ReplayPlugin).storage_policy.buffer)
        return 2 * weights if self.name == "ewc" else weights

    def _images_bytes(self, images: Sized) -> int:
        """Bytes of images at the model's input size, one byte per value."""
        return len(images) * int(math.prod(self.backbone.preprocessing["input_size"]))


class Joint(FineTuning):
    """Upper bound: trains on all experiences at once when the last one arrives.

    All scores are NEVER until then, so only the last row of an accuracy matrix is meaningful.
    """

    def _learn(self, number: int) -> None:
        if number == len(self.stream.experiences) - 1:
            self._train(number, self._experiences)

    def _logits(self, images: LabelledImages) -> Float[Tensor, "N C"]:
        finished = self.num_learned == len(self.stream.experiences)
        return super()._logits(images) if finished else self.no_scores(images)

    def _stored_bytes(self) -> float:
        """The weights and all training images, which the next task would need."""
        learned = self.stream.experiences[: self.num_learned]
        return super()._stored_bytes() + sum(self._images_bytes(experience.train) for experience in learned)


class Classifier(nn.Module):
    """A trainable copy of a backbone with a single head; the logits of classes not seen yet are NEVER.

    The head is Avalanche's. It has all classes from the start, since the optimizer is created before a head grows.
    """

    def __init__(self, backbone: FrozenBackbone, num_classes: int, autocast: bool) -> None:
        super().__init__()
        body: Any = backbone.trainable_copy(num_classes)
        body.reset_classifier(0)  # pools, without a head
        self.body = body
        self.head = IncrementalClassifier(backbone.embed_dim, num_classes, mask_value=NEVER).to(backbone.device)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)
        self._autocast = autocast

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C"]:
        """Logits in float32, with or without autocast."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self._autocast):
            features = self.body(images)
        logits: Tensor = self.head(features.float())
        return logits


class SchedulePlugin(SupervisedPlugin):  # type: ignore[misc]
    """Warm-up and cosine schedule over the steps of each experience, and gradient clipping."""

    def __init__(self, settings: BaselineSettings) -> None:
        super().__init__()
        self._settings, self._step = settings, 0

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Restart the schedule for a new experience."""
        self._step = 0

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        """Clip the gradient and set the learning rate of this step."""
        settings = self._settings
        nn.utils.clip_grad_norm_(strategy.model.parameters(), settings.clip_norm)
        steps = settings.epochs * math.ceil(len(strategy.adapted_dataset) / settings.batch_size)
        for group in strategy.optimizer.param_groups:
            group["lr"] = settings.finetuning_rate * schedule(self._step, settings.warmup_steps, steps)
        self._step += 1
