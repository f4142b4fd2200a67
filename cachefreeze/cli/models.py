"""The model catalogue: every torchvision classifier by name, and the small network for the digits."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cachefreeze.cli.digits import DigitsCNN
from cachefreeze.cli.optional import demo_package
from cachefreeze.errors import UsageError

DIGITS_MODEL = "digits_cnn"
# Models with auxiliary heads, which are off here, and whose constructor asks how to initialise.
_AUXILIARY = ("googlenet", "inception_v3")
_SHOWN_KEYS = 3


def model_names() -> list[str]:
    """Every name that :func:`build_model` takes."""
    models = demo_package("torchvision.models")
    return [DIGITS_MODEL, *models.list_models(module=models)]


def build_model(name: str, *, weights: str | None, classes: int) -> nn.Module:
    """Build a classifier for ``classes`` classes.

    Args:
        name: One of :func:`model_names`.
        weights: None for random ones, ``DEFAULT`` for torchvision's, or a ``.safetensors`` file. A file for other
            classes is loaded before the classifier is replaced, one for as many after.
        classes: Outputs of the new classifier.

    Raises:
        UsageError: Unknown name; weights that cannot be had, read or fitted.
    """
    known = model_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or ["resnet18", "mobilenet_v2", "vit_b_16"]
        raise UsageError(f"--model {name}: no such torchvision classifier; did you mean {', '.join(near)}?")
    if name == DIGITS_MODEL:
        if weights == "DEFAULT":
            raise UsageError(f"--model {name} has no default weights; leave --weights out, it is pretrained on the fly")
        model: nn.Module = DigitsCNN(classes)
        if weights is not None:
            _load(model, _read(weights), weights)
        return model
    found = None if weights in (None, "DEFAULT") else _read(str(weights))
    model = _torchvision(name, default=weights == "DEFAULT")
    if found is not None and _outputs(model, found) != classes:
        _load(model, found, str(weights))
        found = None
    _replace_classifier(model, classes)
    if found is not None:
        _load(model, found, str(weights))
    return model


def _torchvision(name: str, *, default: bool) -> nn.Module:
    models = demo_package("torchvision.models")
    options: dict[str, Any] = {}
    if name in _AUXILIARY:
        options["aux_logits"] = False
        if not default:
            options["init_weights"] = True
    try:
        model: nn.Module = models.get_model(name, weights="DEFAULT" if default else None, **options)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"--weights DEFAULT: torchvision's weights for {name} cannot be had ({error}); pass a .safetensors file"
        ) from error
    return model


def _classifier(model: nn.Module) -> str:
    """Name of the layer whose outputs are the classes."""
    if type(model).__name__ == "SqueezeNet":
        return "classifier.1"
    linear: list[str] = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return linear[-1]


def _outputs(model: nn.Module, found: dict[str, Tensor]) -> int | None:
    """Classes of the classifier in a file; None where it has none under the expected name."""
    weight = found.get(f"{_classifier(model)}.weight")
    return None if weight is None or weight.dim() == 0 else len(weight)


def _replace_classifier(model: nn.Module, classes: int) -> None:
    name = _classifier(model)
    parent, _, attribute = name.rpartition(".")
    owner, old = model.get_submodule(parent), model.get_submodule(name)
    new: nn.Module
    if isinstance(old, nn.Conv2d):
        new = nn.Conv2d(old.in_channels, classes, kernel_size=1)
        nn.init.normal_(new.weight, mean=0.0, std=0.01)  # as torchvision's SqueezeNet starts its final convolution
        nn.init.zeros_(new.bias) if new.bias is not None else None
        model.num_classes = classes  # type: ignore[assignment]
    else:
        assert isinstance(old, nn.Linear)
        new = nn.Linear(old.in_features, classes, bias=old.bias is not None)
    setattr(owner, attribute, new)


def _read(path: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise UsageError(f"--weights {path}: no such file; expected a .safetensors file or DEFAULT")
    try:
        found = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"--weights {path} is not a readable safetensors file ({error})") from error
    # files may keep float16 where that lost nothing that matters
    return {key: value.float() if value.is_floating_point() else value for key, value in found.items()}


def _load(model: nn.Module, found: dict[str, Tensor], path: str) -> None:
    own = model.state_dict()
    if type(model).__name__ in ("GoogLeNet", "Inception3"):
        found = {key: value for key, value in found.items() if not key.startswith(("aux1.", "aux2.", "AuxLogits."))}
    missing = [key for key in own if key not in found]
    unexpected = [key for key in found if key not in own]
    misshapen = [
        f"{key} {tuple(found[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in found and found[key].shape != own[key].shape
    ]
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:_SHOWN_KEYS])}{', …' if len(keys) > _SHOWN_KEYS else ''})"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if keys
    ]
    if problems:
        raise UsageError(f"--weights {path} does not fit {type(model).__name__}: keys {'; '.join(problems)}")
    with torch.no_grad():
        model.load_state_dict(found)
