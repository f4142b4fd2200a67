"""A detector with a fixed input size trains from cached rows; one that pads a batch to its largest image is refused."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader

import cachefreeze as cf
from cachefreeze.errors import BatchDependentError, FieldError, LoaderError, SplitError, UsageError
from cachefreeze.samples import View

detection = pytest.importorskip("torchvision.models.detection")

# what every image is resized to: 320 in the builder, whose feature maps cost ten times as much
SIDE = 96
SIZES = [(40, 50), (64, 32), (48, 48), (30, 60), (52, 44)]


class Photos(torch.utils.data.Dataset):
    """Images of different sizes with none to two boxes, from a seed; counts what is read of it."""

    def __init__(self):
        self.reads = 0

    def __len__(self):
        return len(SIZES)

    def __getitem__(self, index):
        self.reads += 1
        generator = torch.Generator().manual_seed(index)
        height, width = SIZES[index]
        corner = torch.rand(index % 3, 2, generator=generator) * 10
        sides = torch.rand(index % 3, 2, generator=generator) * 15 + 3
        labels = torch.randint(1, 4, (index % 3,), generator=generator)
        target = {"boxes": torch.cat([corner, corner + sides], dim=1), "labels": labels, "image_id": index}
        return torch.rand(3, height, width, generator=generator), target


def listed(batch):
    return tuple(zip(*batch, strict=True))


def ssdlite(train_from=None, seed=0):
    torch.manual_seed(seed)
    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    model.transform.fixed_size = (SIDE, SIDE)
    if train_from is not None:
        cf.freeze(model, train_from, example_inputs=inputs())
    return model


def inputs(indices=(0, 1, 2)):
    return listed([Photos()[i] for i in indices])


def train(model, store, epochs=3):
    """Losses of every step, what each pass read of the dataset, and the engine."""
    dataset = Photos()
    engine = cf.Engine(model, store=store)
    loader = engine.loader(
        DataLoader(
            dataset, 2, shuffle=True, generator=torch.Generator().manual_seed(0), collate_fn=listed, drop_last=True
        ),
        inputs=(0, 1),
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    model.train()
    losses, reads, sources = [], [], []
    for _ in engine.epochs(epochs):
        before = dataset.reads
        for images, targets in loader:
            found = engine(images, targets)
            optimizer.zero_grad()
            sum(found.values()).backward()
            optimizer.step()
            losses.append({name: value.item() for name, value in found.items()})
        reads.append(dataset.reads - before)
        sources.append(loader.source)
    return losses, reads, sources, engine


@pytest.fixture(scope="module")
def trained():
    """A model trained from cached rows, and what its training reported."""
    model = ssdlite("head")
    return (model, *train(model, "host"))


def close(got, wanted, rtol=1e-4):
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=1e-5)


def test_cached_training_equals_uncached(trained):
    """Losses of every step, the whole model afterwards; a pass over rows reads the two samples that it watches."""
    model, losses, reads, sources, _ = trained
    other = ssdlite("head")
    wanted, *_ = train(other, "off")
    assert sources[-1] == "cached"
    assert reads[-1] == 2
    for got, expected in zip(losses, wanted, strict=True):
        assert got == pytest.approx(expected, rel=1e-5)
    assert losses[0] != losses[-1]
    close(model.state_dict(), other.state_dict())


def test_detections_are_the_models_own(trained):
    """In eval mode rows give the detections of the model itself, in the coordinates of the images' own sizes."""
    model, *_, engine = trained
    loader = DataLoader(Photos(), 3, collate_fn=listed)
    cached = engine.loader(loader, inputs=(0, 1))
    modes = [m.training for m in model.modules()]
    model.eval()
    with torch.no_grad():
        for _ in range(2):
            for (images, targets), (rows, other) in zip(loader, cached, strict=True):
                close(engine(rows, other), model(images, targets))
                assert [list(image.shape) for image in images] == rows.raw
                close(other.raw[0]["boxes"], targets[0]["boxes"])
                assert [t["image_id"] for t in other.raw] == [t["image_id"] for t in targets]
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    assert cached.source == "cached"


def test_rows_on_disk_hold_no_pixels(trained, tmp_path):
    """A file holds activations and targets; worker processes fill it; a second run finds it and computes nothing."""
    *_, engine = trained
    outputs = []
    for workers, computed in ((2, len(SIZES)), (0, 0)):
        manager = cf.CacheManager(engine.parts, f"hdf5:{tmp_path}")
        loader = manager.loader(DataLoader(Photos(), 3, collate_fn=listed, num_workers=workers), inputs=(0, 1))
        with torch.no_grad():
            outputs.append([engine.parts.suffix(*rows.tensors, *rows.lists) for rows, _ in loader])
        assert loader.counts.computed == computed
        beside = loader.rows.spec.nbytes - len(SIZES) * engine.parts.boundary.bytes_per_sample
        manager.close()
    close(*outputs, rtol=0)
    pixels = sum(3 * height * width * 4 for height, width in SIZES)
    assert 0 < beside < pixels / 50


def test_a_boundary_within_the_backbone():
    """Losses and gradients from rows are the model's own; of the images the suffix reads nothing but their sizes."""
    model = ssdlite("backbone.extra.0")
    images, targets = inputs((1, 2, 3))
    parts = cf.split(model, (images, targets))
    assert parts.boundary.name == "backbone.extra.0"
    assert parts.cached_fraction > 0.5
    rows = parts.prefix(images, targets)
    blank = [torch.full_like(image, float("nan")) for image in images]
    other = copy.deepcopy(model)
    model.train(), other.train()
    got, wanted = parts.suffix(*rows, (blank, targets)), other(images, targets)
    close(got, wanted)
    sum(got.values()).backward()
    sum(wanted.values()).backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == (not p.requires_grad), name
        if p.grad is not None:
            close(p.grad, q.grad, rtol=1e-3)
    with pytest.raises(TypeError, match=r"suffix\(\*rows, \(images, targets\)\)"):
        parts.suffix(*rows)


def test_blocks_of_a_detector():
    """A row at the backbone is the resized image, at the head every feature map."""
    backbone, head = cf.blocks(ssdlite(), inputs())
    assert (backbone.name, backbone.bytes_per_sample) == ("backbone", 3 * SIDE * SIDE * 4)
    assert head.name == "head"
    assert head.forward_before > 0.8


def test_a_detector_that_pads_to_the_largest_image_is_refused_by_name():
    """Its rows would depend on the other images of the batch."""
    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=4)
    for p in model.backbone.parameters():
        p.requires_grad_(False)
    with pytest.raises(UsageError, match=r"'transform' .* of FasterRCNN pads a batch to its largest image"):
        cf.split(model, inputs(), train_from="roi_heads")
    with pytest.raises(UsageError, match="FasterRCNN pads a batch"):
        cf.Engine(model).loader(DataLoader(Photos(), 2, collate_fn=listed), inputs=(0, 1))


@pytest.mark.parametrize(
    "given", [torch.rand(2, 3, 40, 40), ([torch.rand(3, 8, 8)] * 2, [None]), ([torch.rand(3, 8, 8)] * 2, 3)]
)
def test_inputs_that_are_no_lists_of_samples_are_refused(given):
    """A batch of images, lists of different lengths, and what is no list."""
    with pytest.raises(UsageError, match="expected lists of equal length with one entry a sample"):
        cf.split(ssdlite(), given, train_from="head")


def test_a_model_that_is_no_detector_takes_no_lists():
    """Nothing is known to make one batch of them, so nothing is known to have a row a sample."""
    view = View.of(DataLoader(Photos(), 2, collate_fn=listed), ["x"])
    with pytest.raises(UsageError, match="nothing in it is known to make one batch"):
        cf.split(Summing(), view.example(), train_from="layer")


class Looking(torch.nn.Module):
    """A detector that looks at the images themselves besides what is frozen."""

    def __init__(self):
        super().__init__()
        self.transform = detection.transform.GeneralizedRCNNTransform(
            16, 16, [0.5] * 3, [0.5] * 3, size_divisible=1, fixed_size=(16, 16)
        )
        self.frozen = torch.nn.Conv2d(3, 4, 1)
        self.layer = torch.nn.Conv2d(4, 2, 1)
        self.looks = True
        self.mixes = False

    def forward(self, images, targets):
        images, targets = self.transform(images, targets)
        pixels = images.tensors
        features = self.frozen(pixels + pixels.mean() if self.mixes else pixels)
        return self.layer(features) + (pixels.mean(dim=1, keepdim=True) if self.looks else 0)


def test_images_that_are_used_after_the_boundary_are_refused():
    """The rows hold what frozen layers make of the pixels, and the lists none of them."""
    with pytest.raises(SplitError, match="images that 'transform' puts into one batch are used after 'layer'"):
        cf.split(Looking(), inputs(), train_from="layer")


def test_rows_that_depend_on_the_other_images_of_a_batch_are_refused():
    """Rows are compared with those of the same image among others."""
    model = Looking()
    model.looks = False
    assert cf.split(model, inputs(), train_from="layer").boundary.bytes_per_sample == 4 * 16 * 16 * 4
    model.mixes = True
    images, targets = inputs()
    equal = [images[0]] * 3
    before = images[0].clone()
    for given in (images, equal):
        with pytest.raises((BatchDependentError, SplitError), match="depends on the other samples of its batch"):
            cf.split(model, (given, targets), train_from="layer")
    assert torch.equal(images[0], before)


class Summing(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, images):
        return self.layer(torch.stack([image.mean() for image in images])[:, None])


def doubled(batch):
    images, targets = listed(batch)
    return [image * 2 for image in images], targets


def largest_first(batch):
    return listed(sorted(batch, key=lambda item: -item[0].numel()))


@pytest.mark.parametrize(
    ("collate", "why"),
    [(doubled, "listed by the collate function as it is"), (largest_first, "does not keep their order")],
)
def test_a_collate_function_that_does_more_than_listing_is_refused(collate, why):
    """Images that are not the items' own, and another order than the items'."""
    with pytest.raises((BatchDependentError, FieldError), match=why):
        View.of(DataLoader(Photos(), 2, collate_fn=collate), ["images", "targets"], inputs=(0, 1))


def doubled_beside_others(batch):
    return doubled(batch) if len(batch) > 1 else listed(batch)


def test_images_are_the_items_own_in_every_batch():
    """What a collate function does to an image beside others shows itself, also where nothing is probed."""
    loader = DataLoader(Photos(), 2, collate_fn=doubled_beside_others)
    with pytest.raises(BatchDependentError, match="does not hand on the images of 5 items"):
        View.of(loader, ["images", "targets"], inputs=(0, 1), assume_deterministic=True)


def test_a_changed_pixel_or_box_is_another_fingerprint():
    """Every byte of every item counts, and random states are as before."""

    def identity(change):
        items = [Photos()[i] for i in range(len(SIZES))]
        change(items)
        return View.of(DataLoader(items, 2, collate_fn=listed), ["images", "targets"], inputs=(0, 1)).identity()

    before = torch.get_rng_state()
    same = identity(lambda items: None)
    assert torch.equal(before, torch.get_rng_state())
    assert identity(lambda items: None) == same
    assert identity(lambda items: items[3][0][0, 0, 0].add_(1)) != same
    assert identity(lambda items: items[4][1]["boxes"][0, 3].add_(1)) != same


def test_one_engine_takes_lists_or_tensors(trained):
    """What the model was split with is what its loaders give."""
    *_, engine = trained
    images = torch.utils.data.TensorDataset(torch.rand(4, 3, 16, 16), torch.zeros(4))
    with pytest.raises(LoaderError, match="give the model tensors, but it was split with lists"):
        engine.loader(DataLoader(images, 2))


class Scored(Looking):
    """Two layers that a schedule freezes one after the other, and an output that the targets are part of."""

    def __init__(self):
        super().__init__()
        self.middle = torch.nn.Conv2d(4, 4, 1)

    def forward(self, images, targets):
        images, targets = self.transform(images, targets)
        scores = torch.stack([1 + target["boxes"].sum() / 100 for target in targets])
        return self.layer(self.middle(self.frozen(images.tensors)).relu()) * scores[:, None, None, None]


@pytest.mark.parametrize("make", [Scored, pytest.param(ssdlite, marks=pytest.mark.slow)])
def test_lists_under_a_schedule(make):
    """The cache follows the boundary; its rows are promoted, and losses are those of the run without it."""
    stages = [{"epochs": 1}, {"train_from": "middle", "epochs": 2}, {"train_from": "layer"}]
    stages = stages if make is Scored else [{"epochs": 1}, {"train_from": "head"}]

    def run(store):
        torch.manual_seed(0)
        model = make()
        engine = cf.Engine(model, store, schedule=cf.Stages(stages), moves="always")
        loader = DataLoader(Photos(), 3, shuffle=True, generator=torch.Generator().manual_seed(0), collate_fn=listed)
        loader = engine.loader(loader, inputs=(0, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        losses, seen = [], []
        model.train()
        for _ in engine.epochs(2 * len(stages) - 1):
            for images, targets in loader:
                found = engine(images, targets)
                loss = sum(found.values()) if isinstance(found, dict) else found.square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            seen.append((loader.source, loader.counts.promoted))
        return losses, seen

    (got, seen), (expected, _) = run("host"), run("off")
    assert got == pytest.approx(expected, rel=1e-4)
    assert seen == [("live", 0), ("fill", 0), ("cached", 0), ("fill", len(SIZES)), ("cached", 0)][: len(seen)]
