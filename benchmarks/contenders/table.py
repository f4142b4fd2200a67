"""Who takes part: the module, its options, the packages it needs, and whether each epoch runs what is frozen."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import cachefreeze as cf


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Attributes:
        module: Of this folder.
        packages: Beyond those of the package, by their names for pip.
        every_epoch: Whether the frozen half runs in every epoch, so that a few epochs tell the time of all.
        cuts: Those that it can train.
        compiles: Whether it needs a C++ compiler.
    """

    module: str
    options: Mapping[str, Any] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    every_epoch: bool = False
    cuts: tuple[str, ...] = ("head", "middle")
    compiles: bool = False

    @property
    def run(self) -> Callable[..., Any]:
        return importlib.import_module(f"contenders.{self.module}").run

    def lacks(self) -> str | None:
        """Why it cannot take part here, and how it could."""
        missing = [name for name in self.packages if importlib.util.find_spec(_MODULES.get(name, name)) is None]
        if missing:
            return f"not installed: pip install {' '.join(missing)}"
        if self.compiles and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            return "no C++ compiler: install g++"
        unknown = [] if self.module != "engine" else [o for o in self.options if o not in (*_ENGINE, "store")]
        return f"this version's Engine has no {unknown[0]}=" if unknown else None


_MODULES = {"scikit-learn": "sklearn"}
_ENGINE = inspect.signature(cf.Engine.__init__).parameters
_TWO = {"workers": 2}

CONTENDERS: dict[str, Contender] = {
    "frozen, no cache": Contender("frozen", every_epoch=True),
    "frozen, no cache, 2 workers": Contender("frozen", _TWO, every_epoch=True),
    "Lightning BackboneFinetuning": Contender("lightning_frozen", packages=("lightning",), every_epoch=True),
    "decoded images, bf16": Contender("decoded_images", every_epoch=True),
    "decoded images, bf16, compiled": Contender("decoded_images", {"compiled": True}, every_epoch=True, compiles=True),
    "hand-written": Contender("handwritten"),
    "hand-written, 2 workers": Contender("handwritten", _TWO),
    "h5py": Contender("hdf5_rows"),
    "h5py, 2 workers": Contender("hdf5_rows", _TWO),
    "a .pt file per sample": Contender("sample_files"),
    "a .pt file per sample, 2 workers": Contender("sample_files", _TWO),
    "datasets.map": Contender("arrow_map", packages=("datasets",)),
    "Keras features": Contender("keras_features", packages=("keras",)),
    "scikit-learn": Contender("logistic_regression", packages=("scikit-learn",), cuts=("head",)),
    "cachefreeze host": Contender("engine"),
    "cachefreeze hdf5": Contender("engine", {"store": "hdf5"}),
    "cachefreeze host, optimized": Contender("engine", {"prefix": "optimized"}),
    "cachefreeze hdf5, optimized": Contender("engine", {"prefix": "optimized", "store": "hdf5"}),
}
