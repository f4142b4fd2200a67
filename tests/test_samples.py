"""Random datasets and collate functions are refused with a line to paste; views are deterministic."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, default_collate

import cachefreeze as cf
from cachefreeze.errors import RandomSampleError, UsageError
from cachefreeze.isolation import RandomState
from cachefreeze.probing import check_deterministic, copies_of, view_line
from cachefreeze.sample_keys import _file_facts


def make_model():
    with torch.random.fork_rng():
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4), nn.ReLU(), nn.Linear(4, 3))
    cf.freeze(model, "3")
    return model


class Images(Dataset):
    """Eight fixed images with a transform."""

    def __init__(self, transform=None):
        self.data = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        self.transform = transform

    def __len__(self):
        return 8

    def __getitem__(self, index):
        image = self.data[index]
        return (self.transform(image) if self.transform else image), index


def rare_noise(image):
    return image + 1 if torch.rand(1).item() < 0.001 else image


def numpy_noise(image):
    return image * (1 + 0 * np.random.rand())  # noqa: NPY002


def python_noise(image):
    return image.flip(2) if random.random() < 0.5 else image


class OwnGenerator:
    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, image):
        return image + torch.rand(1, generator=self.generator)


RANDOM = {"torch": rare_noise, "numpy": numpy_noise, "random": python_noise, "own generator": OwnGenerator()}


@pytest.mark.parametrize("name", RANDOM)
def test_random_datasets_are_refused(name):
    """Also a draw that changed nothing: a transform that acts once in a thousand is random all the same."""
    with pytest.raises(RandomSampleError, match=r"view="):
        cf.Engine(make_model(), "host").loader(DataLoader(Images(RANDOM[name]), 4))


def test_probing_leaves_the_random_states_alone():
    state = RandomState.capture()
    for transform in RANDOM.values():
        with pytest.raises(RandomSampleError):
            cf.Engine(make_model(), "host").loader(DataLoader(Images(transform), 4))
    cf.Engine(make_model(), "host").loader(DataLoader(Images(), 4))
    assert state.moved() == []


def mixup(samples):
    x = torch.stack([s[0] for s in samples])
    share = torch.rand(1)
    return x * share + x.flip(0) * (1 - share), torch.tensor([s[1] for s in samples])


def test_random_collate_functions_are_refused():
    with pytest.raises(RandomSampleError, match="collate"):
        cf.Engine(make_model(), "host").loader(DataLoader(Images(), 4, collate_fn=mixup))


def test_opt_out():
    cached = cf.Engine(make_model(), "host").loader(DataLoader(Images(rare_noise), 4), assume_deterministic=True)
    assert sum(len(labels) for _, labels in cached) == 8


def centre(image):
    return image * 2


@pytest.mark.parametrize("wrap", ["plain", "subset", "concat", "dataset"])
def test_view_caches_the_deterministic_samples(wrap):
    """view= is a transform put in place of the random one, or a dataset of the same samples."""
    augmented, view = Images(python_noise), centre
    expected = torch.stack([Images(centre)[i][0] for i in range(8)])
    dataset = augmented
    if wrap == "subset":
        dataset, expected = Subset(augmented, [5, 1, 7]), expected[[5, 1, 7]]
    if wrap == "concat":
        dataset, expected = ConcatDataset([augmented, Images(python_noise)]), expected.repeat(2, 1, 1, 1)
    if wrap == "dataset":
        view = Images(centre)
    model = make_model()
    cached = cf.Engine(model, "host").loader(DataLoader(dataset, len(expected)), view=view)
    rows, _ = next(iter(cached))
    assert torch.equal(rows.tensors[0], model[:3](expected))
    assert augmented.transform is python_noise, "the user's own dataset is not touched"


def test_bad_views():
    with pytest.raises(UsageError, match="samples"):
        cf.Engine(make_model(), "host").loader(DataLoader(Images(), 4), view=Subset(Images(), [1]))
    with pytest.raises(UsageError, match="expected a deterministic transform"):
        cf.Engine(make_model(), "host").loader(DataLoader(Images(), 4), view=3)
    data = torch.utils.data.TensorDataset(torch.zeros(8, 3, 8, 8), torch.zeros(8))
    with pytest.raises(UsageError, match="no attribute 'transform'"):
        cf.Engine(make_model(), "host").loader(DataLoader(data, 4), view=centre)


def test_the_line_to_paste_comes_from_the_users_pipeline():
    transforms = pytest.importorskip("torchvision.transforms")
    pipeline = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.1),
            transforms.ToTensor(),
            transforms.Normalize((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)),
            transforms.RandomErasing(0.1),
        ]
    )
    line = view_line(Images(pipeline))
    assert line == (
        "view=Compose([Resize(256), CenterCrop(224), ToTensor(), Normalize((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))])"
    )
    names = {name: getattr(transforms, name) for name in ("Compose", "Resize", "CenterCrop", "ToTensor", "Normalize")}
    assert len(eval(line.removeprefix("view="), names).transforms) == 4  # what is pasted must run


@pytest.mark.parametrize("root", ["", "a", "a/", "./a", ".", "/", None])
@pytest.mark.parametrize(
    "name", ["b.jpg", "a/b.jpg", "./a/b.jpg", "a//b.jpg", "a/.hidden.jpg", "../{here}/a/b.jpg", "a/gone.jpg"]
)
def test_a_file_is_told_as_pathlib_tells_it(root, name, tmp_path, monkeypatch):
    """Its path from the folder that it is in, whichever way both are written: a cache outlives a release."""
    (tmp_path / "a").mkdir()
    for file in ("a/b.jpg", "a/.hidden.jpg"):
        (tmp_path / file).write_text("x")
    monkeypatch.chdir(tmp_path)
    name = name.format(here=tmp_path.name)
    for folder in [tmp_path] if root is None else [Path(root), tmp_path / root]:
        for part in (name, str(tmp_path / name), Path(name)):
            path = folder / part
            shown = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
            status = [path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else []
            assert _file_facts([part], {0: folder}, [folder, Path()]) == [(shown, *status)]


def test_a_probe_copies_samples_and_not_the_memory_that_they_lie_in(monkeypatch):
    """A sample of a TensorDataset is a view: with all others it may be gigabytes, fifty times over."""
    data, copied = TensorDataset(torch.rand(64, 3), torch.arange(64)), []
    original = torch.UntypedStorage.__deepcopy__
    monkeypatch.setattr(torch.UntypedStorage, "__deepcopy__", lambda s, memo: copied.append(s) or original(s, memo))
    check_deterministic(data, default_collate)
    assert not copied
    sparse = torch.eye(2).to_sparse()
    item = {"a": data[3][0], "b": [data[3][1], torch.zeros(2)], "same": data[3][0], "sparse": sparse}
    item["again"] = item["a"]
    one, other = copies_of([item, item])
    assert one["again"] is one["a"]
    assert one["a"].data_ptr() not in (other["a"].data_ptr(), item["a"].data_ptr())
    assert torch.equal(one["a"], item["a"])
    assert torch.equal(one["sparse"].to_dense(), torch.eye(2))
    assert one["a"].untyped_storage().nbytes() == 12
