"""Training task tokens on cached activations, several candidates side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Parameter

from addenda.backbones import FrozenBackbone, KeyValue
from addenda.combined.attention import attend, memory_key_values
from addenda.learner.cache import Activations
from addenda.learner.config import LearnConfig
from addenda.learner.regression import Regression

EVALUATION_BATCH = 64


@dataclass
class Candidate:
    """One set of a task's tensors on its way from the regression to the best that was found.

    Its head reads the token's feature and the backbone's pooled one. It starts as the regression, shared in halves
    between the two: under an L2 penalty that is the cheaper way to write the same function of two like features.
    """

    learning_rate: float
    class_token: Tensor
    memory: Tensor
    head_weight: Tensor
    pooled_weight: Tensor
    head_bias: Tensor

    @classmethod
    def start(
        cls, backbone: FrozenBackbone, regression: Regression, config: LearnConfig, learning_rate: float
    ) -> Candidate:
        """The first values (design, section 1): the backbone's class token, memory from N(0, memory_std)."""
        random = torch.Generator().manual_seed(config.seed)
        shape = (backbone.depth, config.num_memory_tokens, backbone.embed_dim)
        tensors = (
            backbone.class_token.float(),
            torch.randn(shape, generator=random) * config.memory_std,
            regression.weight / 2,
            regression.weight / 2,
            regression.bias,
        )
        return cls(learning_rate, *(Parameter(t.detach().clone().to(backbone.device)) for t in tensors))

    @classmethod
    def regression(cls, backbone: FrozenBackbone, regression: Regression, config: LearnConfig) -> Candidate:
        """A token that adds nothing: exactly the regression, for where validation prefers that."""
        start = cls.start(backbone, regression, config, 0.0).snapshot()
        start.head_weight.zero_()
        start.pooled_weight.copy_(regression.weight)
        return start

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Class token, memory, both head matrices, bias."""
        return self.class_token, self.memory, self.head_weight, self.pooled_weight, self.head_bias

    def snapshot(self) -> Candidate:
        """A copy that further training does not touch."""
        return Candidate(self.learning_rate, *(t.detach().clone().cpu() for t in self.tensors))


@dataclass(frozen=True)
class Epoch:
    """What is known after an epoch; `on_epoch` gets it.

    Attributes:
        phase: `"sweep"` or `"refit"`.
        epoch: from 1.
        epochs: how many there will be.
        train_loss: mean cross-entropy of each candidate on the training part.
        validation_loss: of each candidate on the validation part; empty in the refit.
        validation_accuracy: likewise, 0..1.
        learning_rates: of the candidates.
    """

    phase: str
    epoch: int
    epochs: int
    train_loss: tuple[float, ...]
    validation_loss: tuple[float, ...]
    validation_accuracy: tuple[float, ...]
    learning_rates: tuple[float, ...]


OnEpoch = Callable[[Epoch], None]


def stream_features(
    backbone: FrozenBackbone,
    key_values: Float[Tensor, "B L 2 H P d"],
    class_tokens: Float[Tensor, "S D"],
    memory: Float[Tensor, "S L m D"],
    parent_memory: Sequence[KeyValue],
) -> Float[Tensor, "S B D"]:
    """The task streams of S candidates over cached activations, with gradients.

    Args:
        backbone: the frozen backbone.
        key_values: cached keys and values; tokens of the tasks to extend are among them.
        class_tokens: one for each candidate.
        memory: each candidate's memory tokens.
        parent_memory: for each layer the memory of the tasks to extend, [1, H, m', d]; empty if there is none.

    Returns:
        Each candidate's final feature, in float32.
    """
    precision = backbone.precision
    tokens = backbone.first_tokens(class_tokens.to(precision)).unsqueeze(1).expand(-1, len(key_values), -1)
    for layer, block in enumerate(backbone.blocks):
        # Converted one by one: a slice of both together is no plain matrix batch, and every product would copy it.
        frozen = KeyValue(key_values[:, layer, 0].to(precision), key_values[:, layer, 1].to(precision))
        queries, keys, values = backbone.project(block, tokens)
        own = memory_key_values(backbone, block, memory[:, layer].to(precision))
        if parent_memory:
            inherited = (t.expand(len(memory), -1, -1, -1) for t in parent_memory[layer])
            own = KeyValue(*(torch.cat(pair, dim=2) for pair in zip(own, inherited, strict=True)))
        private = KeyValue(keys.unsqueeze(3), values.unsqueeze(3))
        tokens = backbone.finish(block, tokens, attend(block.attn.scale, queries, frozen, private, own))
    return backbone.final_norm(tokens).float()


class Trainer:
    """Trains candidates on the same cached activations in the same order.

    Args:
        backbone: the frozen backbone.
        activations: of all the images.
        parent_memory: for each layer the memory of the tasks to extend.
        config: the settings.
        regression: where candidates start; its penalty goes on as theirs.
        report: called after each step with steps done, all steps, and how it stands.
    """

    def __init__(
        self,
        backbone: FrozenBackbone,
        activations: Activations,
        parent_memory: Sequence[KeyValue],
        config: LearnConfig,
        report: Callable[[int, int, str], None] | None = None,
    ) -> None:
        self._backbone = backbone
        self._activations = activations
        self._parent_memory = parent_memory
        self._config = config
        self._report = report

    def run(
        self,
        regression: Regression,
        learning_rates: Sequence[float],
        train: Int[Tensor, " N"],
        validation: Int[Tensor, " M"],
        stop_after: int,
        on_epoch: OnEpoch | None,
        phase: str,
    ) -> tuple[list[list[Candidate]], list[Epoch]]:
        """Trains for some epochs of the schedule.

        Returns:
            For each epoch, 0 (the start) included, the candidates as they were, and what was measured.
        """
        config = self._config
        candidates = [Candidate.start(self._backbone, regression, config, rate) for rate in learning_rates]
        optimizer = self._optimizer(candidates)
        steps_per_epoch = math.ceil(len(train) / config.batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._schedule(steps_per_epoch * config.epochs))
        # The regression's own penalty, twice: a function shared in halves by two like features weighs half as much.
        penalty = 1 / (regression.strength * len(train))
        order = torch.Generator().manual_seed(config.seed)
        snapshots = [[candidate.snapshot() for candidate in candidates]]
        history = [self._epoch(phase, 0, stop_after, [math.nan] * len(candidates), candidates, validation)]
        for epoch in range(1, stop_after + 1):
            total = torch.zeros(len(candidates))
            for step, rows in enumerate(train[torch.randperm(len(train), generator=order)].split(config.batch_size)):
                logits, targets = self._logits(candidates, rows)
                losses = torch.stack([F.cross_entropy(logits[:, i], targets) for i in range(len(candidates))])
                weights = [c.head_weight.square().sum() + c.pooled_weight.square().sum() for c in candidates]
                optimizer.zero_grad()
                (losses + penalty * torch.stack(weights)).sum().backward()
                for candidate in candidates:
                    torch.nn.utils.clip_grad_norm_(candidate.tensors, config.clip_norm)
                optimizer.step()
                schedule.step()
                total += losses.detach().cpu() * len(rows)
                if self._report is not None:
                    done = (epoch - 1) * steps_per_epoch + step + 1
                    reached = max(history[-1].validation_accuracy, default=None)
                    standing = "" if reached is None else f", validation {100 * reached:.1f} %"
                    self._report(done, stop_after * steps_per_epoch, f"loss {losses.min().item():.3f}{standing}")
            snapshots.append([candidate.snapshot() for candidate in candidates])
            history.append(self._epoch(phase, epoch, stop_after, (total / len(train)).tolist(), candidates, validation))
            if on_epoch is not None:
                on_epoch(history[-1])
        return snapshots, history

    @torch.no_grad()
    def validation_logits(self, candidates: Sequence[Candidate], rows: Tensor) -> Float[Tensor, "N S C"]:
        """Logits of some images under each candidate."""
        parts = [self._logits(candidates, part)[0].cpu() for part in rows.split(EVALUATION_BATCH)]
        return torch.cat(parts)

    def _logits(self, candidates: Sequence[Candidate], rows: Tensor) -> tuple[Tensor, Tensor]:
        device = self._backbone.device
        features = stream_features(
            self._backbone,
            self._activations.key_values[rows].to(device),
            torch.stack([c.class_token for c in candidates]),
            torch.stack([c.memory for c in candidates]),
            self._parent_memory,
        )
        pooled = self._activations.pooled[rows].to(device)
        heads = torch.stack([torch.cat([c.head_weight, c.pooled_weight], dim=1) for c in candidates])
        inputs = torch.cat([features, pooled.expand_as(features)], dim=2)
        logits = torch.einsum("sbd,scd->bsc", inputs, heads) + torch.stack([c.head_bias for c in candidates])
        return logits, self._activations.targets[rows].to(device)

    def _optimizer(self, candidates: Sequence[Candidate]) -> torch.optim.Optimizer:
        config = self._config
        groups = []
        for candidate in candidates:
            groups.append({"params": [candidate.class_token, candidate.memory], "lr": candidate.learning_rate})
            groups.append(
                {
                    "params": [candidate.head_weight, candidate.pooled_weight, candidate.head_bias],
                    "lr": config.head_learning_rate,
                }
            )
        if config.optimizer == "sgd":
            return torch.optim.SGD(groups, momentum=config.momentum)
        return torch.optim.AdamW(groups, weight_decay=0.0)

    def _schedule(self, steps: int) -> Callable[[int], float]:
        """Linear warm-up, then a cosine to zero, as a factor of the learning rate."""
        warmup = self._config.warmup_steps

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

        return factor

    def _epoch(
        self,
        phase: str,
        epoch: int,
        epochs: int,
        train_loss: Sequence[float],
        candidates: Sequence[Candidate],
        validation: Tensor,
    ) -> Epoch:
        losses: list[float] = []
        accuracies: list[float] = []
        if len(validation):
            logits, targets = self.validation_logits(candidates, validation), self._activations.targets[validation]
            losses = [F.cross_entropy(logits[:, i], targets).item() for i in range(len(candidates))]
            accuracies = (logits.argmax(-1) == targets[:, None]).float().mean(0).tolist()
        rates = tuple(c.learning_rate for c in candidates)
        return Epoch(phase, epoch, epochs, tuple(train_loss), tuple(losses), tuple(accuracies), rates)
