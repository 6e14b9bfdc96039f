"""What is learned: a task's tensors and what they mean, and the golden probe that pins its outputs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from addenda.exceptions import RegistryError
from addenda.registry.objectives import probabilities

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=:/-]{0,99}")

RESERVED = {
    "auto": "`--task auto` and `--extends auto` let Addenda choose among all tasks",
    "combined": "the server answers for all tasks together under it",
    "none": "it is what a router answers where no task fits",
}
"""Words that stand where a task's name could stand, and what they mean there."""

ADAPTED = ("q", "proj", "fc1", "fc2")
"""The linear layers of a block that a task's adapters update, by timm's names; `q` is a third of its `qkv`."""


class LowRank(NamedTuple):
    """Low-rank updates of one linear layer in each of L blocks: its f(x) becomes f(x) + (x @ down.T) @ up.T.

    Attributes:
        down: Float[L, r, in].
        up: Float[L, out, r].
    """

    down: Float[Tensor, "L r in"]
    up: Float[Tensor, "L out r"]


def check_name(name: str) -> str:
    """Returns a valid task or alias name; raises RegistryError for any other."""
    if not NAME.fullmatch(name):
        raise RegistryError(
            f"{name!r} is not a valid name: use lower-case letters, digits, '-' and '_', first a letter or digit, "
            "63 characters at most."
        )
    return name


def check_new_name(name: str) -> str:
    """Returns a name that a task may be given; raises RegistryError for one that means something else in its place.

    Tasks that have one from before are reached as `name:version`.
    """
    if name in RESERVED:
        raise RegistryError(f"No task can be called {name!r}: {RESERVED[name]}. Choose another name.")
    return check_name(name)


def check_tag(tag: str) -> str:
    """Returns a valid tag; raises RegistryError for any other."""
    if not TAG.fullmatch(tag):
        raise RegistryError(
            f"{tag!r} is not a valid tag: use letters, digits and '.', '_', '=', ':', '/', '-', first a letter or "
            "digit, 100 characters at most."
        )
    return tag


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
    def num_parameters(self) -> int:
        """Numbers that this task adds to the backbone."""
        tensors = [self.head_weight, self.head_bias, self.class_token, self.memory, self.pooled_weight]
        tensors += [part for update in (self.adapters or {}).values() for part in update]
        return sum(t.numel() for t in tensors if t is not None)

    def probabilities(self, logits: Float[Tensor, "*B C"]) -> Float[Tensor, "*B C"]:
        """Its logits as probabilities, by its objective and temperature."""
        return probabilities(logits, self.objective, self.temperature)

    @cached_property
    def artifact(self) -> bytes:
        """The task as safetensors; equal content gives equal bytes."""
        from addenda.registry.artifact import encode

        return encode(self)

    @cached_property
    def sha256(self) -> str:
        """The artifact's sha256: the identity of the content, whatever its name."""
        from addenda.registry.artifact import digest

        return digest(self.artifact)

    @cached_property
    def closure(self) -> tuple[Task, ...]:
        """Every task that this one sees, each once, in an order that its own history fixes."""
        seen: dict[str, Task] = {}
        for parent in self.parents:
            for task in (*parent.closure, parent):
                seen.setdefault(task.sha256, task)
        return tuple(seen.values())


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
