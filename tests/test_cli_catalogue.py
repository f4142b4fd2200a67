"""The data and model catalogues of the command line, and the digits job behind its defaults."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from cachefreeze.cli.data import load_data
from cachefreeze.cli.digits import PRETRAIN_CLASSES, TRANSFER_CLASSES, Digits, DigitsCNN, pretrain
from cachefreeze.cli.models import build_model, model_names
from cachefreeze.errors import UsageError

SHARED = Path(os.environ.get("CACHEFREEZE_DATA") or Path(__file__).parents[2] / "shared" / "data")
FAMILIES = ("squeezenet1_0", "googlenet", "vit_b_16", "densenet121", "convnext_tiny", "swin_t", "mnasnet0_5", "vgg11")


@pytest.fixture(autouse=True)
def one_thread():
    """Small kernels on a busy machine spend their time waiting for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is absent; CACHEFREEZE_DATA names the folder of real data")
    return path


def photo(path: Path, seed: int = 0, size: tuple[int, int] = (20, 14)) -> bytes:
    """Write a random image; return the bytes of its file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


@pytest.fixture
def folder(tmp_path):
    """Two classes; three training images and one validation image of each."""
    for split, count in (("train", 3), ("val", 1)):
        for label, name in enumerate(("ant", "bee")):
            for i in range(count):
                photo(tmp_path / "insects" / split / name / f"{i}.{('png', 'jpg')[label]}", seed=10 * label + i)
    return tmp_path / "insects"


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """A CIFAR-10 file of six training and two test images."""
    arrays = {"classes": np.array(["plane", "car"])}
    for split, count in (("train", 6), ("test", 2)):
        files = [photo(tmp_path / f"{i}.jpg", seed=i, size=(32, 32)) for i in range(count)]
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(files), dtype=np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{split}_labels"] = np.arange(count, dtype=np.uint8) % 2
    path = tmp_path / "data" / "cifar10" / "cifar10_jpeg_60k.npz"
    path.parent.mkdir(parents=True)
    np.savez(path, **arrays)
    monkeypatch.setenv("CACHEFREEZE_DATA", str(tmp_path / "data"))
    return path


def message(caught: pytest.ExceptionInfo[UsageError]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_digits_are_normalised_images_of_five_classes_split_once_for_all():
    data = load_data("digits", image_size=None)
    assert (data.image_size, data.classes) == (8, ("5", "6", "7", "8", "9"))
    torch.manual_seed(3)
    again = load_data("digits", image_size=None)
    for split, other in ((data.train, again.train), (data.val, again.val)):
        assert all(torch.equal(split[i][0], other[i][0]) for i in range(len(split)))
        assert split.targets == other.targets
    image, label = data.train[0]
    assert (image.shape, image.dtype, type(label)) == ((3, 8, 8), torch.float32, int)
    grey = image * torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1) + torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    torch.testing.assert_close(grey[0] * 16, (grey[0] * 16).round())
    torch.testing.assert_close(grey[0], grey[2])


def test_every_digit_is_in_one_split_and_a_fifth_of_each_class_is_held_out():
    counts = []
    for classes in (PRETRAIN_CLASSES, TRANSFER_CLASSES):
        train, val = Digits(classes, train=True), Digits(classes, train=False)
        counts.append(len(train) + len(val))
        for label in range(5):
            held_out, kept = val.targets.count(label), train.targets.count(label)
            assert abs(held_out / (held_out + kept) - 0.2) < 0.01
    assert sum(counts) == 1797


def test_digits_grow_but_do_not_shrink():
    assert load_data("digits", image_size=20).val[0][0].shape == (3, 20, 20)
    with pytest.raises(UsageError, match="image_size=7: the digits are 8 px"):
        load_data("digits", image_size=7)


def head_accuracy(model: DigitsCNN, epochs: int) -> float:
    """Train the classifier on the frozen features of the transfer classes."""
    batches = [next(iter(DataLoader(Digits(TRANSFER_CLASSES, train=split), 2000))) for split in (True, False)]
    model.eval()
    with torch.no_grad():
        (train, labels), (val, answers) = [(model.features(x), y) for x, y in batches]
    optimizer = torch.optim.AdamW(model.classifier.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model.classifier(train[batch]), labels[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        return float((model.classifier(val).argmax(1) == answers).float().mean())


def test_pretrained_digits_transfer_to_the_classes_never_seen():
    torch.manual_seed(0)
    model = build_model("digits_cnn", weights=None, classes=5)
    pretrain(model, seed=0)
    assert head_accuracy(model, epochs=10) > 0.96


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_pretrained_digits_transfer_whatever_the_seed(seed):
    torch.manual_seed(seed)
    model = build_model("digits_cnn", weights=None, classes=5)
    pretrain(model, seed=seed)
    assert head_accuracy(model, epochs=10) > 0.955


def test_pretraining_depends_on_its_seed_alone_and_leaves_no_trace_but_the_features():
    torch.manual_seed(1)
    model = DigitsCNN(5)
    other = pickle.loads(pickle.dumps(model))
    model.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - the state that must not move
    pretrain(model, seed=7, epochs=1)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    torch.rand(5)
    pretrain(other, seed=7, epochs=1)
    after = model.state_dict()
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in after.items())
    assert {key for key in after if torch.equal(after[key], before[key])} == {"classifier.weight", "classifier.bias"}
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_folder_gives_what_torchvision_gives(folder):
    data = load_data(str(folder), image_size=12)
    assert (data.name, data.classes, len(data.train), len(data.val)) == ("insects", ("ant", "bee"), 6, 2)
    path, label = data.train.samples[4]
    steps = torchvision.transforms
    with Image.open(path) as image:
        resized = steps.CenterCrop(12)(steps.Resize(12)(image.convert("RGB")))
    normalise = steps.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    sample, target = data.train[4]
    assert torch.equal(sample, normalise(steps.ToTensor()(resized)))
    assert target == label == 1
    assert load_data(str(folder), image_size=None).val[0][0].shape == (3, 224, 224)


def test_grey_and_transparent_images_become_rgb(folder):
    for mode in ("L", "RGBA", "LA", "1", "CMYK"):
        for file in (folder / "train" / "ant").iterdir():
            file.unlink()
        Image.new(mode, (9, 9)).save(folder / "train" / "ant" / ("x.jpg" if mode == "CMYK" else "x.png"))
        assert load_data(str(folder), image_size=8).train[0][0].shape == (3, 8, 8)


def remove(*parts):
    def spoil(folder):
        shutil.rmtree(folder.joinpath(*parts))

    return spoil


def empty(*parts):
    def spoil(folder):
        for entry in folder.joinpath(*parts).iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (remove(), ["no such folder", "digits, cifar10"]),
        (remove("train"), ["no folder train/", "train/<class>/"]),
        (remove("val"), ["no folder val/"]),
        (empty("train"), ["train/ holds no class"]),
        (empty("train", "bee"), ["no image in train/bee/", ".jpg"]),
        (empty("val", "ant"), ["no image in val/ant/"]),
        (remove("val", "bee"), ["same classes", "only in train/: bee"]),
        (lambda folder: (folder / "val" / "cat").mkdir(), ["same classes", "only in val/: cat"]),
    ],
)
def test_a_wrong_folder_is_explained_in_one_line(folder, spoil, words):
    spoil(folder)
    with pytest.raises(UsageError) as caught:
        load_data(str(folder), image_size=None)
    assert all(word in message(caught) for word in [*words, str(folder)])


@pytest.mark.parametrize("size", [0, -3])
@pytest.mark.parametrize("name", ["digits", "cifar10", "somewhere"])
def test_sizes_below_one_pixel_are_refused(name, size):
    with pytest.raises(UsageError, match=f"image_size={size}: expected 1 pixel or more"):
        load_data(name, image_size=size)


@pytest.mark.parametrize("name", ["ant/0.png", "bee/0.jpg"])
@pytest.mark.parametrize("damage", [lambda b: b"no image", lambda b: b"", lambda b: b[: len(b) // 2]])
def test_a_damaged_image_is_named_with_its_path(folder, name, damage):
    path = folder / "train" / name
    path.write_bytes(damage(path.read_bytes()))
    train = load_data(str(folder), image_size=8).train
    index = [file for file, _ in train.samples].index(str(path))
    with pytest.raises(UsageError) as caught:
        train[index]
    assert message(caught).startswith(f"{path} cannot be read as an image")
    assert train[1 if index == 0 else 0][0].shape == (3, 8, 8)


def test_packed_cifar10_is_decoded_sample_by_sample(packed):
    data = load_data("cifar10", image_size=None)
    assert (data.name, data.classes, data.image_size) == ("cifar10", ("plane", "car"), 32)
    assert (len(data.train), len(data.val), data.train.targets) == (6, 2, [0, 1, 0, 1, 0, 1])
    image, label = data.train[3]
    assert (image.shape, image.dtype, label) == ((3, 32, 32), torch.float32, 1)
    assert load_data("cifar10", image_size=16).val[1][0].shape == (3, 16, 16)
    data.train.encoded = np.zeros_like(data.train.encoded)
    with pytest.raises(UsageError, match=r"image 3 of cifar10_jpeg_60k\.npz cannot be read"):
        data.train[3]


def test_an_unreadable_cifar10_file_is_named(packed):
    with np.load(packed) as arrays:
        np.savez(packed, **{key: value for key, value in arrays.items() if key != "test_labels"})
    with pytest.raises(UsageError, match="test_labels"):
        load_data("cifar10", image_size=None)
    packed.write_bytes(packed.read_bytes()[:100])
    with pytest.raises(UsageError, match="cannot be read"):
        load_data("cifar10", image_size=None)


def test_cifar10_is_downloaded_where_there_is_no_file(tmp_path, monkeypatch, capsys):
    class Downloaded:
        classes = ("plane", "car")

        def __init__(self, root, *, train, transform, download):
            assert download
            sys.stdout.write("Files already downloaded and verified")
            self.root, self.train = root, train

    monkeypatch.setenv("CACHEFREEZE_DATA", str(tmp_path))
    monkeypatch.setenv("CACHEFREEZE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Downloaded)
    data = load_data("cifar10", image_size=None)
    assert (data.train.train, data.val.train, data.classes) == (True, False, ("plane", "car"))
    assert data.train.root == tmp_path / "home"
    assert not capsys.readouterr().out


@pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("File not found or corrupted.")])
def test_a_failed_download_names_both_ways(tmp_path, monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setenv("CACHEFREEZE_DATA", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
    with pytest.raises(UsageError) as caught:
        load_data("cifar10", image_size=None)
    assert all(word in message(caught) for word in ("download", "CACHEFREEZE_HOME", "CACHEFREEZE_DATA", str(tmp_path)))


@pytest.mark.parametrize("name", ["digits", "cifar10", "folder"])
def test_datasets_travel_to_workers(name, folder, packed):
    data = load_data(str(folder) if name == "folder" else name, image_size=8)
    copied = pickle.loads(pickle.dumps(data.val))
    assert torch.equal(copied[1][0], data.val[1][0])
    here, there = (torch.cat([x for x, _ in DataLoader(data.val, 16, num_workers=count)]) for count in (0, 2))
    assert torch.equal(here, there)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "cifar10", "folder"])
def test_datasets_travel_to_spawned_workers(name, folder, packed):
    data = load_data(str(folder) if name == "folder" else name, image_size=8)
    loader = DataLoader(data.val, 16, num_workers=1, multiprocessing_context="spawn")
    assert torch.equal(next(iter(loader))[0][1], data.val[1][0])


@pytest.mark.parametrize(
    ("module", "package", "call"),
    [
        ("sklearn.datasets", "sklearn", lambda: load_data("digits", image_size=9)),
        ("torchvision.transforms", "torchvision", lambda: load_data("cifar10", image_size=None)),
        ("torchvision.models", "torchvision", model_names),
    ],
)
def test_a_missing_package_is_answered_with_how_to_install_it(monkeypatch, packed, module, package, call):
    from cachefreeze.cli import digits

    digits._all_digits.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError) as caught:
        call()
    assert package in message(caught)
    assert 'pip install "cachefreeze[demo]"' in message(caught)


@pytest.mark.real_data
def test_real_cifar10_and_flowers_are_found(monkeypatch):
    shared("cifar10/cifar10_jpeg_60k.npz")
    monkeypatch.setenv("CACHEFREEZE_DATA", str(SHARED))
    cifar = load_data("cifar10", image_size=None)
    assert (len(cifar.train), len(cifar.val), len(cifar.classes)) == (50_000, 10_000, 10)
    assert cifar.train[49_999][0].shape == (3, 32, 32)
    flowers = load_data(str(shared("flowers")), image_size=None)
    assert (flowers.name, len(flowers.train), len(flowers.val), len(flowers.classes)) == ("flowers", 800, 250, 5)
    assert flowers.val[0][0].shape == (3, 224, 224)


@pytest.fixture
def on_meta(monkeypatch):
    """Modules without memory, however large. Not ``torch.device("meta")``: some builders compute with tensors."""
    register_parameter, register_buffer = nn.Module.register_parameter, nn.Module.register_buffer

    def parameter_on_meta(self, name, param):
        register_parameter(self, name, None if param is None else nn.Parameter(param.to("meta")))

    def buffer_on_meta(self, name, tensor, persistent=True):
        register_buffer(self, name, None if tensor is None else tensor.to("meta"), persistent)

    monkeypatch.setattr(nn.Module, "register_parameter", parameter_on_meta)
    monkeypatch.setattr(nn.Module, "register_buffer", buffer_on_meta)


def check_classifier(name: str) -> None:
    """Seven outputs, the names of everything as torchvision has them, no auxiliary head."""
    model = build_model(name, weights=None, classes=7)
    options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    reference = torchvision.models.get_model(name, weights=None, **options)
    size = 299 if name == "inception_v3" else 224
    assert model(torch.empty(2, 3, size, size, device="meta")).shape == (2, 7)
    own, expected = model.state_dict(), reference.state_dict()
    assert list(own) == list(expected)
    changed = [key for key in own if own[key].shape != expected[key].shape]
    layer = changed[0].rpartition(".")[0]
    # MaxViT's has no bias
    assert changed == [key for key in (f"{layer}.weight", f"{layer}.bias") if key in expected]
    assert getattr(model, "num_classes", 7) == 7


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_classifier_layer_alone_is_replaced(name):
    check_classifier(name)


@pytest.mark.slow
@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_the_classifier_layer_alone_is_replaced_in_every_model(name):
    check_classifier(name)


def test_the_catalogue_lists_classifiers_only():
    names = model_names()
    assert {"digits_cnn", "resnet18", "inception_v3", "vit_b_16", "maxvit_t"} <= set(names)
    assert not any(name.startswith(("quantized", "fasterrcnn", "deeplab", "raft", "r3d")) for name in names)
    assert len(names) == len(set(names))


def test_the_seed_alone_decides_random_weights():
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(build_model("squeezenet1_1", weights=None, classes=3).state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def saved(model: nn.Module, path: Path) -> str:
    save_file(model.state_dict(), path)
    return str(path)


@pytest.mark.parametrize(("name", "layer"), [("mnasnet0_5", "classifier.1"), ("digits_cnn", "classifier")])
def test_a_file_is_loaded_for_any_number_of_classes(tmp_path, name, layer):
    """As many classes: the file's classifier stays. Another number: it alone is replaced."""
    first = build_model(name, weights=None, classes=6)
    file = saved(first, tmp_path / "model.safetensors")
    same, other = (build_model(name, weights=file, classes=classes).state_dict() for classes in (6, 4))
    for key, value in first.state_dict().items():
        assert torch.equal(same[key], value)
        if key.startswith(layer + "."):
            assert len(other[key]) == 4
        else:
            assert torch.equal(other[key], value)


def test_half_precision_files_become_float32(tmp_path):
    model = build_model("squeezenet1_1", weights=None, classes=6)
    file = saved(model.half(), tmp_path / "half.safetensors")
    loaded = build_model("squeezenet1_1", weights=file, classes=6)
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.classifier[1].weight, model.classifier[1].weight.float())


def test_auxiliary_heads_in_a_file_are_left_out(tmp_path):
    state = build_model("googlenet", weights=None, classes=4).state_dict()
    state |= {"aux1.fc2.weight": torch.zeros(1000, 1024), "aux2.conv.bn.bias": torch.zeros(128)}
    save_file(state, tmp_path / "g.safetensors")
    model = build_model("googlenet", weights=str(tmp_path / "g.safetensors"), classes=4)
    assert model.aux1 is None
    assert model.transform_input
    assert torch.equal(model.fc.weight, state["fc.weight"])


def test_counters_missing_in_old_files_start_at_zero(tmp_path):
    state = build_model("mnasnet0_5", weights=None, classes=4).state_dict()
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    save_file(old, tmp_path / "old.safetensors", metadata={"format": "pt"})
    build_model("mnasnet0_5", weights=str(tmp_path / "old.safetensors"), classes=4)


def test_weights_that_do_not_fit_name_the_first_keys_and_count_them(tmp_path):
    state = DigitsCNN(5).state_dict()
    del state["features.1.1.weight"], state["classifier.bias"]
    state |= {"head.weight": torch.zeros(2), "features.0.0.weight": torch.zeros(2, 3)}
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(UsageError) as caught:
        build_model("digits_cnn", weights=str(tmp_path / "odd.safetensors"), classes=5)
    text = message(caught)
    assert "odd.safetensors does not fit DigitsCNN" in text
    assert "2 missing (features.1.1.weight, classifier.bias)" in text
    assert "1 unexpected (head.weight)" in text
    assert "1 of another shape (features.0.0.weight (2, 3) instead of (32, 3, 3, 3))" in text
    with pytest.raises(UsageError, match=r"missing \(.*, …\)"):
        build_model("mnasnet0_5", weights=str(tmp_path / "odd.safetensors"), classes=5)


@pytest.mark.parametrize("shape", [(), (5,), (0, 2048), (5, 7), (5, 2048, 1)])
def test_a_classifier_of_an_odd_shape_is_reported(tmp_path, shape):
    state = DigitsCNN(5).state_dict()
    state["classifier.weight"] = torch.zeros(shape)
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(UsageError, match=r"of another shape \(classifier"):
        build_model("digits_cnn", weights=str(tmp_path / "odd.safetensors"), classes=5)


def test_weights_that_are_no_file_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "w.pt")
    (tmp_path / "empty.safetensors").touch()
    for name, words in (("none.safetensors", "no such file"), ("", "is a folder")):
        with pytest.raises(UsageError, match=f"{words}; expected a .safetensors file or DEFAULT"):
            build_model("squeezenet1_1", weights=str(tmp_path / name), classes=2)
    for name in ("w.pt", "empty.safetensors"):
        with pytest.raises(UsageError, match="is not a readable safetensors file") as caught:
            build_model("squeezenet1_1", weights=str(tmp_path / name), classes=2)
        assert "save_file" in message(caught)


@pytest.mark.parametrize(
    ("name", "near"),
    [("resnet81", "resnet18"), ("MobileNet_V2", "mobilenet_v2"), ("???", "digits_cnn"), ("", "resnet18")],
)
def test_an_unknown_model_is_answered_with_near_names(name, near):
    with pytest.raises(UsageError, match="no such model") as caught:
        build_model(name, weights=None, classes=2)
    assert near in message(caught)


def test_no_classes_are_refused():
    with pytest.raises(UsageError, match="classes=0: expected 1 or more"):
        build_model("digits_cnn", weights=None, classes=0)


@pytest.mark.parametrize("name", ["squeezenet1_1", "googlenet", pytest.param("inception_v3", marks=pytest.mark.slow)])
def test_default_weights_are_loaded_and_auxiliary_heads_dropped(monkeypatch, name):
    """Everything but the download itself is torchvision's own code."""
    options = {"init_weights": False} if name != "squeezenet1_1" else {}
    stored = torchvision.models.get_model(name, weights=None, **options).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **options: stored)
    model = build_model(name, weights="DEFAULT", classes=3)
    own = model.state_dict()
    assert not any(key.startswith(("aux", "Aux")) for key in own)
    assert sum(torch.equal(value, stored[key]) for key, value in own.items()) == len(own) - 2
    random = build_model(name, weights=None, classes=3)
    assert list(own) == list(random.state_dict())
    assert getattr(model, "transform_input", None) == getattr(random, "transform_input", None)
    assert not getattr(model, "aux_logits", False)


@pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("invalid hash value"), ConnectionError()])
def test_default_weights_that_cannot_be_had_are_explained(monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(UsageError, match="torchvision's weights for squeezenet1_1 cannot be had") as caught:
        build_model("squeezenet1_1", weights="DEFAULT", classes=3)
    assert "pass a .safetensors file" in message(caught)


def test_the_digits_model_has_no_default_weights():
    with pytest.raises(UsageError, match="leave --weights out"):
        build_model("digits_cnn", weights="DEFAULT", classes=5)


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["mobilenet_v2", "squeezenet1_1"])
def test_real_weights_load_and_know_a_photo(name):
    file = shared(f"weights/{name}_imagenet.safetensors")
    model = build_model(name, weights=str(file), classes=1000).eval()
    daisies = [image for image, label in list_of(shared("flowers"), "daisy", 8)]
    with torch.no_grad():
        guesses = model(torch.stack(daisies)).argmax(1)
    assert int((guesses == 985).sum()) >= 5  # ImageNet's class "daisy"
    replaced = build_model(name, weights=str(file), classes=5)
    stored = load_file(file)
    changed = [key for key, value in replaced.state_dict().items() if value.shape != stored[key].shape]
    assert changed == ["classifier.1.weight", "classifier.1.bias"]


def list_of(folder: Path, name: str, count: int) -> list[tuple[torch.Tensor, int]]:
    data = load_data(str(folder), image_size=None)
    label = data.classes.index(name)
    return [data.val[i] for i in [i for i, target in enumerate(data.val.targets) if target == label][:count]]


def test_the_digits_features_are_the_same_in_any_batch():
    """Rows computed in one batch and used in another must not differ, or cached and uncached training would."""
    model = DigitsCNN(5).eval()
    x = next(iter(DataLoader(Digits(TRANSFER_CLASSES, train=False), 200)))[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([model.features(part) for part in x.split(7)]), model.features(x))
