"""The model catalogue: every torchvision classifier by name, and the small network for the digits."""

from __future__ import annotations

import difflib
import http.client
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cachefreeze.cli.digits import DigitsCNN
from cachefreeze.cli.optional import demo_package
from cachefreeze.errors import UsageError

DIGITS_MODEL = "digits_cnn"
_DEFAULT = "DEFAULT"
# The models with auxiliary heads, and the names of these heads, which are off here.
_AUXILIARY_HEADS = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}
_SHOWN_KEYS = 3


def model_names() -> list[str]:
    """Every name that :func:`build_model` takes."""
    models = demo_package("torchvision.models")
    return [DIGITS_MODEL, *models.list_models(module=models)]


def build_model(name: str, *, weights: str | None, classes: int) -> nn.Module:
    """Build a classifier for ``classes`` classes; random numbers come from torch's global state.

    Args:
        name: One of :func:`model_names`.
        weights: None for random ones, ``DEFAULT`` for torchvision's, or a ``.safetensors`` file with a classifier
            for any number of classes: it is kept where the number is right, else replaced after loading.
        classes: Outputs of the new classifier.

    Raises:
        UsageError: Unknown name; weights that cannot be had, read or fitted.
    """
    if classes < 1:
        raise UsageError(f"classes={classes}: expected 1 or more")
    _check_name(name)
    if weights in (None, _DEFAULT):
        model = _new(name) if weights is None else _with_default_weights(name)
    else:
        found = _read(str(weights))
        model = _new(name)
        _set_outputs(model, _outputs_in(found, model))
        _load(model, found, str(weights), ignored=_AUXILIARY_HEADS.get(name, ()))
    _set_outputs(model, classes)
    return model


def _check_name(name: str) -> None:
    known = model_names()
    if name not in known:
        # most names differ in their last characters only, so some come near almost every typing error
        near = difflib.get_close_matches(name.lower(), known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "for example digits_cnn, resnet18, mobilenet_v2"
        raise UsageError(f"--model {name}: no such model among torchvision's {len(known) - 1} classifiers; {hint}")


def _new(name: str) -> nn.Module:
    """A model with random weights and as many classes as its builder gives it."""
    if name == DIGITS_MODEL:
        return DigitsCNN(classes=10)
    model: nn.Module = demo_package("torchvision.models").get_model(name, weights=None, **_options(name))
    return model


def _options(name: str) -> dict[str, Any]:
    if name not in _AUXILIARY_HEADS:
        return {}
    # transform_input as torchvision's weights want it: always on, so that a file means the same wherever it came from;
    # init_weights because leaving it out warns
    return {"aux_logits": False, "init_weights": True, "transform_input": True}


def _with_default_weights(name: str) -> nn.Module:
    if name == DIGITS_MODEL:
        raise UsageError(f"--weights {_DEFAULT}: {name} has none to download; leave --weights out or pass a file")
    # no auxiliary options: torchvision insists on heads while it loads, and drops them afterwards if at all
    model: nn.Module
    try:
        model = demo_package("torchvision.models").get_model(name, weights=_DEFAULT, progress=sys.stderr.isatty())
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"--weights {_DEFAULT}: torchvision's weights for {name} cannot be had ({reason}); allow the download, or "
            "pass a .safetensors file"
        ) from error
    if name in _AUXILIARY_HEADS:
        model.aux_logits = False  # type: ignore[assignment]
        for head in _AUXILIARY_HEADS[name]:
            setattr(model, head, None)
    return model


def _classifier(model: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    """Name and layer whose outputs are the classes: the last linear one, in SqueezeNet the last convolution."""
    linear: dict[str, nn.Linear | nn.Conv2d] = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    return list((linear or convolutions).items())[-1]


def _outputs_in(found: Mapping[str, Tensor], model: nn.Module) -> int:
    """Classes that a file was made for; the model's own where the file has no classifier of that name."""
    name, layer = _classifier(model)
    weight = found.get(f"{name}.weight")
    # one of a wholly different shape, or with no output at all, is reported by _load
    if weight is None or weight.shape[1:] != layer.weight.shape[1:] or weight.numel() == 0:
        return len(layer.weight)
    return len(weight)


def _set_outputs(model: nn.Module, classes: int) -> None:
    """Put a new classifier layer, freshly initialised, under the name of the old one unless the size is right."""
    name, old = _classifier(model)
    if len(old.weight) == classes:
        return
    new: nn.Linear | nn.Conv2d
    if isinstance(old, nn.Conv2d):
        new = nn.Conv2d(old.in_channels, classes, kernel_size=1)
        nn.init.normal_(new.weight, mean=0.0, std=0.01)  # as torchvision's SqueezeNet starts this layer
        if new.bias is not None:
            nn.init.zeros_(new.bias)
    else:
        new = nn.Linear(old.in_features, classes, bias=old.bias is not None)
    model.set_submodule(name, new)
    if hasattr(model, "num_classes"):
        model.num_classes = classes  # type: ignore[assignment]


def _read(path: str) -> dict[str, Tensor]:
    file = Path(path).expanduser()
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "no such file"
        raise UsageError(f"--weights {path}: {what}; expected a .safetensors file or {_DEFAULT}")
    try:
        found = load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"--weights {path} is not a readable safetensors file ({error}); save weights with "
            "safetensors.torch.save_file(model.state_dict(), FILE)"
        ) from error
    # files may keep float16 where that lost nothing that matters
    return {key: value.float() if value.is_floating_point() else value for key, value in found.items()}


def _load(model: nn.Module, found: Mapping[str, Tensor], path: str, *, ignored: tuple[str, ...]) -> None:
    """Load every tensor of a file into the model; nothing may be left over on either side but ``ignored`` modules."""
    own = model.state_dict()
    found = {key: value for key, value in found.items() if key.partition(".")[0] not in ignored}
    # files from before PyTorch 0.4.1 have no such counter; it then starts at 0
    missing = [key for key in own if key not in found and not key.endswith(".num_batches_tracked")]
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
        raise UsageError(
            f"--weights {path} does not fit {type(model).__name__}: of its {len(own)} tensors, {'; '.join(problems)}; "
            "pass the --model that the file was made from"
        )
    # into the model's own dictionary, which carries the versions that some modules (MNASNet) insist on
    own.update(found)
    model.load_state_dict(own)
