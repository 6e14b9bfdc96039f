"""What is learned: a task's tensors, what its logits mean, and the golden probe that pins them."""

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
from addenda.registry.store.header import end
from addenda.registry.store.objectives import OBJECTIVES


@dataclass(frozen=True, eq=False)
class Task:
    """One learned task, immutable. Its logits are a function of its tensors, its parents' and the backbone alone.

    Attributes:
        name: what it is called; the registry numbers its versions.
        backbone: fingerprint of the backbone that it was learned on.
        labels: C class names, in the order of the head's rows.
        head_weight: reads the task token's final feature; reads the backbone's pooled feature in a head-only task.
        head_bias: added to the logits.
        class_token: the task's token, without position embedding; None in a head-only task.
        memory: memory tokens E of each layer, before norm1 (paper, Fig. 2); m may be 0; None in a head-only task.
        pooled_weight: a second head matrix, which reads the backbone's own pooled feature beside the token's. The
            paper has none; with it, training starts exactly at the logistic regression on that feature.
        layer_weight: a third head matrix, which reads the backbone's layer features, their standardisation folded in;
            or, where there is a `layer_down`, what this makes of them. None in a task that reads the last layer alone.
        layer_down: the first factor of a `layer_weight` of low rank.
        adapters: low-rank updates of its own token's way through the blocks, one for each of ADAPTED, of one rank; most
            tasks have None. Keys and values, its own token's too, come from the backbone's own weights.
        parents: the tasks it extends, in order: it sees their tokens and memory, and what they extend.
        objective: how the logits are read: `"single-label"` is a softmax, `"multi-label"` a sigmoid of each.
        temperature: what its logits are divided by to become probabilities: finite, above 0. Logits stay.
        version: its number under its name, from 1; None before registration.
        config: the resolved configuration that made it.
        metrics: what was measured when it was learned.
        data: fingerprint, counts and labels of what it was learned from.
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
        """What a deep copy or a pickle is made of."""
        return {k: dict(held) if isinstance(held, MappingProxyType) else held for k, held in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    @property
    def ref(self) -> str:
        """`name:version`, or the bare name before registration."""
        return self.name if self.version is None else f"{self.name}:{self.version}"

    @property
    def extends(self) -> tuple[str, ...]:
        """References of its parents."""
        return tuple(parent.ref for parent in self.parents)

    @property
    def num_memory_tokens(self) -> int:
        """m, the memory tokens of each layer."""
        return 0 if self.memory is None else self.memory.shape[1]

    @property
    def adapter_rank(self) -> int:
        """r, the rank of its adapters; 0 without."""
        return 0 if not self.adapters else next(iter(self.adapters.values())).down.shape[1]

    @property
    def reads_pooled(self) -> bool:
        """Whether its head reads the backbone's own pooled feature."""
        return self.class_token is None or self.pooled_weight is not None

    @property
    def num_layer_features(self) -> int:
        """n, the layer features that its head reads; 0 where it reads none."""
        read = self.layer_weight if self.layer_down is None else self.layer_down
        return 0 if read is None else read.shape[1]

    @property
    def num_parameters(self) -> int:
        """Numbers that this task adds to the backbone."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by their names in the artifact."""
        held = {name: tensor for name in TENSORS if (tensor := getattr(self, name)) is not None}
        for site, update in (self.adapters or {}).items():
            held |= {f"adapters.{site}.{part}": tensor for part, tensor in update._asdict().items()}
        return held

    def probabilities(self, logits: Float[Tensor, "*B C"]) -> Float[Tensor, "*B C"]:
        """Its logits as probabilities, by its objective and temperature."""
        return probabilities(logits, self.objective, self.temperature)

    @cached_property
    def artifact(self) -> bytes:
        """The task as safetensors; equal content gives equal bytes."""
        return encode(self)

    @cached_property
    def sha256(self) -> str:
        """The artifact's sha256: the identity of the content, whatever its name."""
        return digest(self.artifact)

    @cached_property
    def closure(self) -> tuple[Task, ...]:
        """Every task that this one sees, each once, in an order that its own history fixes."""
        seen: dict[str, Task] = {}
        for parent in self.parents:
            for task in (*parent.closure, parent):
                seen.setdefault(task.sha256, task)
        return tuple(seen.values())


def probabilities(logits: Float[Tensor, "*B C"], objective: str, temperature: float = 1.0) -> Float[Tensor, "*B C"]:
    """Turns logits into probabilities, for every part of the package.

    Args:
        logits: as a task gives them.
        objective: one of OBJECTIVES.
        temperature: what logits are divided by first; above 1 it makes a task less sure of itself.

    Returns:
        Of an exclusive objective's logits a softmax, which sums to 1; of another's a sigmoid of each.
    """
    scaled = logits / temperature
    if OBJECTIVES[objective].exclusive:
        return scaled.softmax(-1)
    # torch's sigmoid has other bits at a tensor's end than elsewhere: they would depend on an image's place in a batch.
    return torch.stack([scaled, torch.zeros_like(scaled)], -1).softmax(-1)[..., 0].contiguous()


def is_finite(logits: Float[Tensor, "*B C"], objective: str, temperature: float) -> bool:
    """Whether logits are numbers, and the probabilities that they stand for too."""
    return bool(logits.isfinite().all() and probabilities(logits, objective, temperature).isfinite().all())


@dataclass(frozen=True, eq=False)
class Golden:
    """A task's logits on the fixed probe images, made when it was registered.

    Attributes:
        numerics: what the bits depend on beside the content: versions, device, precision, shapes, a probe's digest.
        numerics_fingerprint: sha256 over it.
        logits: the logits of the probe images.
        digest: sha256 over their bytes.
    """

    numerics: Mapping[str, Any]
    numerics_fingerprint: str
    logits: Float[Tensor, "N C"]
    digest: str


def encode(task: Task) -> bytes:
    """Turns a task into its artifact."""
    manifest: dict[str, Any] = {
        "backbone": task.backbone,
        "labels": list(task.labels),
        "objective": task.objective,
        "extends": [parent.sha256 for parent in task.parents],
    }
    if task.temperature != 1.0:  # a task without one keeps the bytes that it had before there were temperatures
        manifest["temperature"] = float(task.temperature)
    tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in task.tensors.items()}
    return pack(manifest, tensors, vars(task).get("header"))


def decode(data: bytes, sha256: str, parent: Callable[[str], Task], record: Mapping[str, Any]) -> Task:
    """Turns an artifact back into a task, with parents by sha256 and a record of the fields that it does not hold."""
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
    vars(task).update(sha256=sha256, header=data[: end(data)])
    return task


def check_unwritten(task: Task) -> None:
    """Raises IntegrityError where a task's tensors in memory no longer hash to its sha256: somebody wrote to them."""
    found = digest(encode(task))
    if found != task.sha256:
        raise IntegrityError(
            f"The tensors of task {task.ref!r} in memory have been written to: they hash to {found[:12]}…, and its "
            f"sha256 is {task.sha256[:12]}…. Load it again, or make another task of them (dataclasses.replace)."
        )
