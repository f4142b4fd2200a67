"""Training under a schedule with a cache equals training under it without one, bit for bit, through every move."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import cachefreeze as cf
from cachefreeze.schedules import Ladder

torchvision = pytest.importorskip("torchvision")


class GPTBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x):
        b, t, w = x.shape
        q, k, v = self.attend(self.ln_1(x)).view(b, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, w)
        x = x + self.project(mixed)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, vocabulary=11, width=16, length=8, depth=4):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.h = nn.ModuleList([GPTBlock(width, 2) for _ in range(depth)])
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x)).transpose(1, 2)


def vit():
    return torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=4, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5, dropout=0.1
    )


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(*(torchvision.models.resnet.BasicBlock(8, 8) for _ in range(4)))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.blocks(self.bn1(self.conv1(x)).relu()).mean((2, 3)))


MODELS = {"resnet": ResNet, "vit": vit, "gpt": GPT}


def build(name):
    torch.manual_seed(0)
    return MODELS[name]()


def samples(name, count=18):
    generator = torch.Generator().manual_seed(5)
    if name == "gpt":
        ids = torch.randint(0, 11, (count, 9), generator=generator)
        return TensorDataset(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    side = 16 if name == "vit" else 32
    return TensorDataset(torch.randn(count, 3, side, side, generator=generator), torch.arange(count) % 5)


SCHEDULES = {
    "freezeout": lambda ladder: cf.FreezeOut(0.6),
    "stages": lambda ladder: cf.Stages(
        [
            {"epochs": 1},
            {"train_from": ladder.names[2], "epochs": 2},
            {"train_from": ladder.names[4], "epochs": 1.5, "lr_factor": 0.5},
            {"train_last": 1, "epochs": 1.5},
            {"train_from": ladder.names[1]},  # thaws again
        ]
    ),
    "unfreezing": lambda ladder: cf.GradualUnfreezing(every=1.5, decay=2.6),
}


def train(model, name, schedule, store, *, epochs=8, shuffle=True):
    """Losses of every step, the final state, random numbers drawn next, and each epoch's source and boundary."""
    torch.manual_seed(2)
    ladder = Ladder.of(model, samples(name).tensors[0][:2])
    engine = cf.Engine(model, store, schedule=SCHEDULES[schedule](ladder), moves="always")
    order = torch.Generator().manual_seed(3)
    batches = engine.loader(DataLoader(samples(name), 6, shuffle=shuffle, generator=order))
    checks = engine.loader(DataLoader(samples(name, 6), 6, generator=torch.Generator()))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0}], 3e-3
    )
    engine.attach(optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    losses, sources = [], []
    for _ in engine.epochs(epochs):
        model.train()
        for x, y in batches:
            optimizer.zero_grad()
            loss = functional.cross_entropy(engine(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        scheduler.step()
        model.eval()
        with torch.no_grad():
            losses += [functional.cross_entropy(engine(x), y) for x, y in checks]
        sources.append((batches.source, engine.boundary))
    engine.close()
    return torch.stack(losses), {k: v.clone() for k, v in model.state_dict().items()}, torch.rand(3), sources


def assert_equal(got, expected):
    assert torch.equal(got[0], expected[0])
    assert all(torch.equal(got[1][name], value) for name, value in expected[1].items())
    assert torch.equal(got[2], expected[2]), "another random state than without a cache"
    assert [boundary for _, boundary in got[3]] == [boundary for _, boundary in expected[3]]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", MODELS)
def test_a_staged_run_with_a_cache_is_the_run_without(name, schedule, tmp_path):
    """A ResNet's rows do not depend on their batch; those of matrix products do, so there every epoch has the same."""
    base, shuffle = build(name), name == "resnet"
    expected = train(copy.deepcopy(base), name, schedule, "off", shuffle=shuffle)
    assert len({boundary for _, boundary in expected[3]}) >= 4, "at least three moves"
    # files that follow the boundary: of the model that is fastest to train, under every schedule
    for store in ("host", f"hdf5:{tmp_path}") if name == "resnet" else ("host",):
        got = train(copy.deepcopy(base), name, schedule, store, shuffle=shuffle)
        assert_equal(got, expected)
        assert {source for source, boundary in got[3] if boundary is None} <= {"live"}
        assert "live" not in {source for source, boundary in got[3] if boundary is not None}
    assert len(list(tmp_path.glob("*.h5"))) <= 2, "stores of boundaries that were left are gone"


@pytest.mark.parametrize("name", ["vit", "gpt"])
def test_each_step_of_a_shuffled_transformer_agrees_from_equal_weights(name):
    """Trajectories part by one ulp, so each step is compared from the same weights, through three moves."""
    model, data = build(name), samples(name)
    ladder = Ladder.of(model, data.tensors[0][:2])
    engine = cf.Engine(model, "host", schedule=SCHEDULES["stages"](ladder), moves="always")
    indexed = TensorDataset(*data.tensors, torch.arange(len(data)))
    batches = engine.loader(DataLoader(indexed, 5, shuffle=True, generator=torch.Generator().manual_seed(3)))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    engine.attach(optimizer)
    sources = []
    for _ in engine.epochs(8):
        model.train()
        for rows, y, index in batches:
            trained = [p for p in model.parameters() if p.requires_grad]
            found = []
            for x in (rows, data.tensors[0][index]):
                torch.manual_seed(int(index[0]))
                loss = functional.cross_entropy(engine(x), y)
                found.append((loss.detach(), torch.autograd.grad(loss, trained)))
            (loss, grads), (expected, expected_grads) = found
            if engine.boundary is not None:  # live batches are raw: one and the same
                assert isinstance(rows, cf.Rows)
                assert torch.allclose(loss, expected, rtol=1e-5)
            scale = max(float(g.abs().max()) for g in expected_grads)
            assert all(float((a - b).abs().max()) <= 1e-5 * scale for a, b in zip(grads, expected_grads, strict=True))
            for p, grad in zip(trained, expected_grads, strict=True):
                p.grad = grad
            optimizer.step()
        sources.append(batches.source)
    assert {"live", "fill", "cached"} == set(sources)
