"""A learned task, its probabilities, and its golden probe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from addenda.exceptions import IntegrityError
from addenda.registry.store.artifact import TENSORS, LowRank, adapters, pack, read
from addenda.registry.store.digests import digest
from addenda.registry.store.header import header_size
from addenda.registry.store.objectives import MEANINGS


@dataclass(frozen=True, eq=False)
class Task:
    """A learned task, immutable. Its logits depend only on its own tensors, its parents' and the backbone's.

    Attributes:
        name: the task's name; the registry numbers its versions.
        backbone: fingerprint of the backbone.
        labels: C class names, in the order of the head's rows.
        head_weight: head on the class token's final feature, or on the backbone's pooled feature in a head-only task.
        head_bias: the head's bias.
        class_token: the task's class token, without position embedding; None in a head-only task.
        memory: memory tokens E of each layer, before norm1 (paper, Fig. 2); m may be 0; None in a head-only task.
        pooled_weight: second head matrix, on the backbone's pooled feature. It is not in the paper; with it, training
            starts exactly at the linear probe on that feature.
        layer_weight: third head matrix, on the backbone's layer features, with their standardisation folded in, or on
            their projection by `layer_down`. None if the task reads only the last layer.
        layer_down: first factor of a low-rank `layer_weight`.
        adapters: low-rank updates of the blocks, one for each of ADAPTED, all of the same rank; usually None. They
            apply to the task's own class token only, and not to keys and values, which use the backbone's weights.
        parents: the tasks it extends, in order; it attends to their tokens and memory, and to their parents'.
        objective: `"single-label"` (softmax) or `"multi-label"` (a sigmoid per label).
        temperature: of temperature scaling, finite and above 0; applied to probabilities, not to logits.
        version: number under its name, from 1; None before registration.
        config: resolved training configuration.
        metrics: metrics measured during training.
        data: fingerprint, counts and labels of the training data.
    """

    name: str
    backbone: str
    labels: tuple[str, ...]
    head_weight: Float[Tensor, "C D"]
    head_bias: Float[Tensor, " C"]
    class_token: Float[Tensor, " D"] | None = None
    memory: Float[Tensor, "L m D"] | None = None
    pooled_weight: Float[Tensor, "C D"] | None = None
    layer_weight: Float[Tensor, "C _"] | None = None
    layer_down: Float[Tensor, "r n"] | None = None
    adapters: Mapping[str, LowRank] | None = None
    parents: tuple[Task, ...] = ()
    objective: str = "single-label"
    temperature: float = 1.0
    version: int | None = None
    config: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    metrics: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    data: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __getstate__(self) -> dict[str, Any]:
        """State for copy and pickle, which cannot handle a MappingProxyType."""
        return {k: dict(value) if isinstance(value, MappingProxyType) else value for k, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    @property
    def ref(self) -> str:
        """`name:version`, or the name before registration."""
        return self.name if self.version is None else f"{self.name}:{self.version}"

    @property
    def extends(self) -> tuple[str, ...]:
        """References of the parents."""
        return tuple(parent.ref for parent in self.parents)

    @property
    def num_memory_tokens(self) -> int:
        """m, the memory tokens per layer."""
        return 0 if self.memory is None else self.memory.shape[1]

    @property
    def adapter_rank(self) -> int:
        """r, the adapters' rank; 0 without adapters."""
        return 0 if not self.adapters else next(iter(self.adapters.values())).down.shape[1]

    @property
    def reads_pooled(self) -> bool:
        """Whether the head reads the backbone's pooled feature."""
        return self.class_token is None or self.pooled_weight is not None

    @property
    def num_layer_features(self) -> int:
        """n, the layer features that the head reads; 0 without a layer head."""
        weight = self.layer_weight if self.layer_down is None else self.layer_down
        return 0 if weight is None else weight.shape[1]

    @property
    def num_parameters(self) -> int:
        """The number of parameters that this task adds to the backbone."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The task's tensors by their names in the artifact."""
        tensors = {name: tensor for name in TENSORS if (tensor := getattr(self, name)) is not None}
        for site, update in (self.adapters or {}).items():
            tensors |= {f"adapters.{site}.{factor}": tensor for factor, tensor in update._asdict().items()}
        return tensors

    def probabilities(self, logits: Float[Tensor, "*B C"]) -> Float[Tensor, "*B C"]:
        """Turns logits of this task into probabilities."""
        return probabilities(logits, self.objective, self.temperature)

    @cached_property
    def artifact(self) -> bytes:
        """The task as safetensors bytes; equal content gives equal bytes."""
        return encode(self)

    @cached_property
    def sha256(self) -> str:
        """The artifact's sha256, which identifies the content independently of the name."""
        return digest(self.artifact)

    @cached_property
    def closure(self) -> tuple[Task, ...]:
        """All ancestors, each once, in an order determined by the parents alone."""
        seen: dict[str, Task] = {}
        for parent in self.parents:
            for task in (*parent.closure, parent):
                seen.setdefault(task.sha256, task)
        return tuple(seen.values())


def probabilities(
    logits: Float[Tensor, "*B C"], objective: str, temperature: float | Tensor = 1.0
) -> Float[Tensor, "*B C"]:
    """Turns logits into probabilities.

    Args:
        logits: a task's logits, or those of several tasks with equally many labels.
        objective: one of MEANINGS.
        temperature: divides the logits; above 1 it lowers the confidence. A tensor is broadcast to the logits.

    Returns:
        The softmax for an exclusive objective, or else the sigmoid of each logit.
    """
    scaled = logits / temperature
    if MEANINGS[objective].exclusive:
        return scaled.softmax(-1)
    # torch.sigmoid gives other bits for a tensor's last elements than elsewhere, which would break batch invariance.
    return torch.stack([scaled, torch.zeros_like(scaled)], -1).softmax(-1)[..., 0].contiguous()


def is_finite(logits: Float[Tensor, "*B C"], objective: str, temperature: float) -> bool:
    """Whether all logits and their probabilities are finite."""
    return bool(logits.isfinite().all() and probabilities(logits, objective, temperature).isfinite().all())


@dataclass(frozen=True, eq=False)
class Golden:
    """A golden probe: a task's logits on the fixed probe images, recorded at registration.

    Attributes:
        numerics: what the bits depend on besides the content: versions, device, precision, shapes, a probe's digest.
        numerics_fingerprint: sha256 of `numerics`.
        logits: logits of the probe images.
        digest: sha256 of the logits' bytes.
    """

    numerics: Mapping[str, Any]
    numerics_fingerprint: str
    logits: Float[Tensor, "N C"]
    digest: str


def encode(task: Task) -> bytes:
    """Encodes a task as its artifact."""
    manifest: dict[str, Any] = {
        "backbone": task.backbone,
        "labels": list(task.labels),
        "objective": task.objective,
        "extends": [parent.sha256 for parent in task.parents],
    }
    if task.temperature != 1.0:  # omitted, so that the bytes of tasks from before temperature scaling do not change
        manifest["temperature"] = float(task.temperature)
    tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in task.tensors.items()}
    return pack(manifest, tensors, vars(task).get("header"))


def decode(data: bytes, sha256: str, parent: Callable[[str], Task], record: Mapping[str, Any]) -> Task:
    """Decodes an artifact. `parent` returns a task by its sha256; `record` has the fields that artifacts lack."""
    manifest, tensors = read(data, sha256)
    task = Task(
        backbone=manifest["backbone"],
        labels=tuple(manifest["labels"]),
        objective=manifest["objective"],
        temperature=manifest.get("temperature", 1.0),
        parents=tuple(parent(p) for p in manifest["extends"]),
        **{name: tensor for name, tensor in tensors.items() if name in TENSORS},
        adapters=MappingProxyType(adapters(tensors)) if "adapters.q.down" in tensors else None,
        **record,
    )
    vars(task).update(sha256=sha256, header=data[: header_size(data)])
    return task


def check_unwritten(task: Task) -> None:
    """Raises IntegrityError if a task's tensors in memory no longer match its sha256."""
    actual = digest(encode(task))
    if actual != task.sha256:
        raise IntegrityError(
            f"The tensors of task {task.ref!r} were modified in memory: expected sha256 {task.sha256[:12]}…, found "
            f"{actual[:12]}…. Load the task again, or create a new one from them (dataclasses.replace)."
        )
