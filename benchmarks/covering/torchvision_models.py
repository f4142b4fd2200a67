"""Every classification, segmentation and video builder of torchvision that trains at a small input."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Generator, nn

from covering.case import Case

# builders whose weights fix the input, or that pool below one pixel at the size of the others, 64
_SIZES = {
    "inception_v3": 96, "googlenet": 64, "alexnet": 80, "squeezenet1_0": 64, "squeezenet1_1": 64, "vit_h_14": 56,
    "efficientnet_v2_l": 128,  # with batch statistics of fewer pixels it makes noise of a last bit
}  # fmt: skip
_LONG, _FRAMES, _SIDE = ("mvit", "s3d", "swin"), 16, 64  # what pools more than the other video builders do
_MAXVIT: dict[str, Any] = {
    "input_size": (64, 64), "stem_channels": 16, "partition_size": 2, "block_channels": [16, 32],
    "block_layers": [1, 2], "head_dim": 8, "stochastic_depth_prob": 0.1,
}  # fmt: skip
_NARROW = 128
# Of stacks of more than 300 million weights, so many blocks: as wide as they are, and as deep as it takes to be cut.
_SHALLOW = {"vit_h_14": 8, "vit_l_16": 8, "vit_l_32": 8, "regnet_y_128gf": 2}


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
        settings["image_size"] = _SIZES.get(name, 64)
    if name in ("googlenet", "inception_v3"):
        settings |= {"aux_logits": False, "init_weights": False}
    made = models.get_model(name, weights=None, **settings)
    if name.startswith(("alexnet", "vgg")):
        _narrow(made.classifier)
    for stack in (made.encoder.layers,) if name.startswith("vit_") else getattr(made, "trunk_output", ()):
        del stack[_SHALLOW.get(name, len(stack)) :]
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

    module = models.video.mvit
    make = module._mvit

    def small(*args: Any, **settings: Any) -> nn.Module:  # the builders insist on the size of their weights
        return make(*args, **{**settings, "spatial_size": (_SIDE, _SIDE)})

    with patch.object(module, "_mvit", small):
        made = models.get_model(name, weights=None, num_classes=10)
    if name == "s3d":
        made.avgpool.kernel_size = (2, _SIDE // 32, _SIDE // 32)  # all that is left, as of an image of 224
    return made


def cases() -> Iterator[Case]:
    """All of them, by torchvision's own lists."""
    from torchvision import models

    for name in models.list_models(module=models):
        make = partial(_images, _SIZES.get(name, 64))
        note = f"{_SHALLOW[name]} blocks in a stack" if name in _SHALLOW else ""
        yield Case("torchvision", name, partial(_classifier, name), make, note)
    for name in models.list_models(module=models.segmentation):
        yield Case("torchvision", f"segmentation.{name}", partial(_segmenter, name), partial(_images, 64))
    for name in models.list_models(module=models.video):
        frames, size = (_FRAMES, _SIDE) if name.startswith(_LONG) else (4, 32)
        yield Case("torchvision", f"video.{name}", partial(_video, name), partial(_clips, frames, size))
