"""Avalanche's own strategies on a trainable copy of the backbone: they change the weights that all tasks share.

Loop and losses are Avalanche's. The recipe is that of the per-task models beside them: AdamW, in each experience a
warm-up and a cosine, clipped gradients, light random views.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sized
from typing import Any

import torch
from avalanche.models import IncrementalClassifier
from avalanche.training.plugins import EWCPlugin, LwFPlugin, ReplayPlugin, SupervisedPlugin
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
    """Fine-tuning in sequence: naive, or held back by EWC, LwF or replayed images.

    EWC is the online form of Schwarz et al. 2018 without decay: one sum of importances, whatever the number of tasks.
    """

    def __post_init__(self) -> None:
        how = self.settings
        made: dict[str, tuple[Any, dict[str, Any]]] = {
            "naive": (Naive, {}),
            "joint": (JointTraining, {}),
            "ewc": (EWC, {"ewc_lambda": how.ewc_lambda, "mode": "online", "decay_factor": 1.0}),
            "lwf": (LwF, {"alpha": how.lwf_alpha, "temperature": how.lwf_temperature}),
            "replay": (Replay, {"mem_size": how.replay_images}),
        }
        strategy, options = made[self.name]
        self._model = Classifier(self.backbone, len(self.stream.labels), how.autocast)
        weights = self._model.parameters()
        self._strategy = strategy(
            model=self._model, criterion=nn.CrossEntropyLoss(), device=self.backbone.device,
            optimizer=torch.optim.AdamW(weights, how.finetuning_rate, weight_decay=how.weight_decay),
            train_mb_size=how.batch_size, train_epochs=how.epochs, plugins=[SchedulePlugin(how)],
            evaluator=quiet_evaluator(), **options,
        )  # fmt: skip
        # LwF alone asks for task labels; elsewhere they would split each batch evenly among tasks.
        benchmark = self.stream.benchmark(self._view, self.backbone.transform, task_labels=self.name == "lwf")
        self._experiences = benchmark.train_stream

    def _view(self, image: Any) -> Tensor:
        """An image to learn from; its view is drawn from torch's generator, which `_train` has seeded."""
        if isinstance(image, Tensor):
            return image
        seed = int(torch.randint(2**31, (), dtype=torch.int64, device="cpu"))
        if self.settings.augment:
            return augment(image.convert("RGB"), Augmentation(), seed, self.backbone.preprocessing)
        return self.backbone.transform(image)

    def _learn(self, number: int) -> None:
        self._train(number, self._experiences[number])
        if (lwf := self._plugin(LwFPlugin)) is not None:
            # Of a single head Avalanche distils the classes of task 0 only, unless all classes are filed there.
            known = lwf.lwf.prev_classes_by_task
            known[0] = set().union(*known.values())

    def _train(self, number: int, experiences: Any) -> None:
        # Avalanche's replay calls what Avalanche deprecates, and turns on the warning that says so.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(record=True) as heard:
            torch.manual_seed(1_000_003 * self.seed + number)
            self._strategy.train(experiences, eval_streams=[], reset_optimizer_state=True)
        for one in heard:
            if not issubclass(one.category, DeprecationWarning):
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)

    @torch.no_grad()
    def _logits(self, images: LabelledImages) -> Float[Tensor, "N C"]:
        self._model.eval()
        pixels = batches(images, self.backbone, EVALUATION_BATCH)
        return torch.cat([self._model(part.to(self.backbone.device)).cpu() for part in pixels])

    def _plugin(self, kind: type) -> Any:
        return next((plugin for plugin in self._strategy.plugins if isinstance(plugin, kind)), None)

    def _stored_bytes(self) -> float:
        """The changed weights, and EWC's importances or the replayed images.

        Between two experiences EWC's anchor and LwF's teacher are the changed weights themselves, and count once.
        """
        weights = 4 * sum(parameter.numel() for parameter in self._model.parameters())
        if self._plugin(EWCPlugin) is not None:
            return 2 * weights
        replay = self._plugin(ReplayPlugin)
        return weights + (0 if replay is None else self._images_bytes(replay.storage_policy.buffer))

    def _images_bytes(self, images: Sized) -> int:
        """Of images at the model's input size, one byte a value."""
        return len(images) * int(math.prod(self.backbone.preprocessing["input_size"]))


class Joint(FineTuning):
    """All experiences at once, once the last has come: an upper bound, which answers nothing before.

    Until then every score is NEVER, told and untold: only the last row of a matrix of accuracies means anything.
    """

    def _learn(self, number: int) -> None:
        if number == len(self.stream.experiences) - 1:
            self._train(number, self._experiences)

    def _logits(self, images: LabelledImages) -> Float[Tensor, "N C"]:
        finished = self.num_learned == len(self.stream.experiences)
        return super()._logits(images) if finished else self.nothing(images)

    def _stored_bytes(self) -> float:
        """The weights, and every image: without them it could not learn the next task."""
        met = self.stream.experiences[: self.num_learned]
        return super()._stored_bytes() + sum(self._images_bytes(one.train) for one in met)


class Classifier(nn.Module):
    """A trainable copy of a backbone under one head, in which classes not met yet are at NEVER.

    The head is Avalanche's, and has all classes from the start: an optimiser is first made before a head grows.
    """

    def __init__(self, backbone: FrozenBackbone, num_classes: int, autocast: bool) -> None:
        super().__init__()
        self.body = backbone.trainable_copy(num_classes)
        self.body.head = nn.Identity()
        head: Any = IncrementalClassifier(backbone.embed_dim, num_classes, mask_value=NEVER).to(backbone.device)
        nn.init.zeros_(head.classifier.weight)
        nn.init.zeros_(head.classifier.bias)
        self.head = head
        self._autocast = autocast

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C"]:
        """Logits in float32, whatever the passes below run in."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self._autocast):
            features = self.body(images)
        logits: Tensor = self.head(features.float())
        return logits


class SchedulePlugin(SupervisedPlugin):  # type: ignore[misc]
    """Warm-up and cosine over the steps of one experience, and clipped gradients."""

    def __init__(self, settings: BaselineSettings) -> None:
        super().__init__()
        self._settings, self._step = settings, 0

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """A new experience starts the schedule anew."""
        self._step = 0

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        """Clips the gradient, and sets the step's learning rate."""
        how = self._settings
        nn.utils.clip_grad_norm_(strategy.model.parameters(), how.clip_norm)
        steps = how.epochs * math.ceil(len(strategy.adapted_dataset) / how.batch_size)
        for group in strategy.optimizer.param_groups:
            group["lr"] = how.finetuning_rate * schedule(self._step, how.warmup_steps, steps)
        self._step += 1
