"""How the baselines are trained: one set of settings for all of them."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Rates = Annotated[tuple[Positive, ...], Field(min_length=1)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class BaselineSettings:
    """Settings of the baselines.

    Attributes:
        epochs: passes over an experience's images.
        batch_size: new images in an optimiser step; replay adds as many old ones.
        warmup_steps: steps of linear warm-up before the cosine, in each experience.
        clip_norm: largest norm of the gradient.
        weight_decay: AdamW's.
        autocast: whether passes run in bfloat16 where torch's autocast thinks it safe.
        augment: whether fine-tuning draws a fresh view of an image each time, and per-task models keep `views` of it.
        views: random views that per-task models learn from, held in memory.
        finetuning_rate: learning rate of fine-tuning in sequence, EWC, LwF, replay and joint training.
        full_rates: learning rates of one full model for each task; validation picks one.
        lora_rates: of one LoRA for each task, likewise.
        ewc_lambda: weight of EWC's penalty. Of 10^3 and 10^6 (three pairs of CIFAR-10 classes, 48 images each, ViT-Ti)
            the first held nothing back.
        lwf_alpha: weight of LwF's distillation.
        lwf_temperature: of its softmax.
        replay_images: images in memory, of all experiences together.
        ranpac_width: M, random features. The paper has 10,000; solving takes M^3 operations for each experience.
    """

    epochs: Count = 4
    batch_size: Count = 16
    warmup_steps: Annotated[int, Field(ge=0)] = 5
    clip_norm: Positive = 1.0
    weight_decay: NotNegative = 0.05
    autocast: bool = False
    augment: bool = True
    views: Annotated[int, Field(ge=0)] = 3
    finetuning_rate: Positive = 5e-5
    full_rates: Rates = (5e-5,)
    lora_rates: Rates = (5e-4,)
    ewc_lambda: NotNegative = 1e6
    lwf_alpha: NotNegative = 1.0
    lwf_temperature: Positive = 2.0
    replay_images: Count = 200
    ranpac_width: Count = 2000
