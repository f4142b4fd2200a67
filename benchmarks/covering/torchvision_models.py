"""Every classification, segmentation and video builder of torchvision that trains at a small input."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Generator, nn

from covering.case import Case

# builders whose weights fix the input, or that pool below one pixel at the size of the others
_SIZES = {"inception_v3": 96, "googlenet": 64, "alexnet": 80, "squeezenet1_0": 64, "squeezenet1_1": 64}
_CLIPS = {"mvit": (16, 224), "s3d": (16, 224), "swin": (16, 64)}  # frames and sides; what they insist on
_MAXVIT: dict[str, Any] = {
    "input_size": (64, 64), "stem_channels": 16, "partition_size": 2, "block_channels": [16, 32],
    "block_layers": [1, 2], "head_dim": 8, "stochastic_depth_prob": 0.1,
}  # fmt: skip
_NARROW = 128
# Billions of parameters in one layer stack; the same code as their smaller siblings, which are here.
_HUGE = frozenset({"vit_h_14", "regnet_y_128gf", "vit_l_16", "vit_l_32", "regnet_y_32gf", "regnet_x_32gf"})


def _images(size: int, batch: int, generator: Generator) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=generator)


def _clips(frames: int, size: int, batch: int, generator: Generator) -> torch.Tensor:
    return torch.randn(batch, 3, frames, size, size, generator=generator)


def _classifier(name: str) -> nn.Module:
    from torchvision import models

    settings: dict[str, Any] = {"num_classes": 10}
    if name == "maxvit_t":
        from torchvision.models.maxvit import MaxVit

        return MaxVit(**settings, **_MAXVIT)
    if name.startswith("vit_"):
        settings["image_size"] = 56 if name == "vit_h_14" else 64
    if name in ("googlenet", "inception_v3"):
        settings |= {"aux_logits": False, "init_weights": False}
    made = models.get_model(name, weights=None, **settings)
    if name.startswith(("alexnet", "vgg")):
        _narrow(made.classifier)
    return made


def _narrow(classifier: nn.Sequential) -> None:
    """Two layers of 4096 features become 128 wide: the structure is theirs, the hundred million weights are not."""
    first, second, last = (i for i, layer in enumerate(classifier) if isinstance(layer, nn.Linear))
    classifier[first] = nn.Linear(classifier[first].in_features, _NARROW)
    classifier[second] = nn.Linear(_NARROW, _NARROW)
    classifier[last] = nn.Linear(_NARROW, classifier[last].out_features)


def _segmenter(name: str) -> nn.Module:
    from torchvision import models

    auxiliary = {} if name.startswith("lraspp") else {"aux_loss": True}
    return models.get_model(name, weights=None, weights_backbone=None, num_classes=5, **auxiliary)


def _video(name: str) -> nn.Module:
    from torchvision import models

    return models.get_model(name, weights=None, num_classes=10)


def cases() -> Iterator[Case]:
    """All of them, by torchvision's own lists."""
    from torchvision import models

    for name in models.list_models(module=models):
        if name not in _HUGE:
            make = partial(_images, _SIZES.get(name, 64))
            yield Case("torchvision", name, partial(_classifier, name), make)
    for name in models.list_models(module=models.segmentation):
        yield Case("torchvision", f"segmentation.{name}", partial(_segmenter, name), partial(_images, 64))
    for name in models.list_models(module=models.video):
        frames, size = next((clip for start, clip in _CLIPS.items() if name.startswith(start)), (4, 32))
        yield Case("torchvision", f"video.{name}", partial(_video, name), partial(_clips, frames, size))
