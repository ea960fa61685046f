"""Networks by name: each is loaded with its own preprocessing, or an error says how to get it."""

import json
import os
import sys
import urllib.error
from types import ModuleType, SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn

import tiny_backbone
from chanscale.backbones import BACKBONES, Preprocessing
from chanscale.catalogue import build_network, is_elsewhere, load_network, load_weights
from chanscale.errors import ChanscaleError, ConfigError, WeightsError
from chanscale.headless import remove_head
from chanscale.libraries import LIBRARIES, Library
from networks import randomise, same_tensors
from tiny_weights import one_line_of

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


class Net(nn.Module):
    """What the fake libraries build."""

    def __init__(self, classes=5, channels=3):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)

    def forward(self, x):
        return self.fc(self.bn1(self.conv1(x)).relu().mean((2, 3)))


@pytest.fixture
def trained():
    with torch.random.fork_rng():
        torch.manual_seed(9)
        return randomise(Net()).eval()


@pytest.fixture
def timm(monkeypatch, trained):
    """A library with timm's functions, and one pretrained network."""

    def create_model(name, *, pretrained, num_classes=None, in_chans=3):
        if name not in ("net", "local-dir:net"):
            raise RuntimeError(f"Unknown model ({name})")
        model = Net(num_classes or 5, in_chans)
        if pretrained:
            sys.stdout.write("Downloading")
            model.load_state_dict(trained.state_dict())
        model.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
        return model

    return fake(monkeypatch, "timm", create_model=create_model)


@pytest.fixture
def torchvision(monkeypatch, trained):
    """A library with torchvision's functions, and one pretrained network."""

    def get_model(name, *, weights, num_classes=5):
        if name.lower() != "net":
            raise ValueError(f"Unknown model {name}")
        model = Net(num_classes)
        if weights == "DEFAULT":
            model.load_state_dict(trained.state_dict())
        return model

    preset = SimpleNamespace(transforms=lambda: SimpleNamespace(mean=MEAN, std=STD))
    defaults = SimpleNamespace(DEFAULT=preset)
    models = SimpleNamespace(
        get_model=get_model, get_model_weights={"net": defaults, "Net": defaults}.__getitem__
    )
    return fake(monkeypatch, "torchvision", models=models)


def fake(monkeypatch, name, **contents):
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def transformers(monkeypatch):
    """The real library, kept off the network."""
    library = pytest.importorskip("transformers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return library


@pytest.fixture
def folder(transformers, tmp_path):
    """A small ResNet as transformers saves it, with what an image processor says."""
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5
    )
    model = randomise(transformers.ResNetForImageClassification(config)).eval()
    model.save_pretrained(tmp_path / "net")
    describe(tmp_path / "net", HALF)
    return tmp_path / "net"


def describe(folder, settings):
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")


def same_but_for_the_classes(got, wanted):
    shapes = [
        {name: tensor.shape[1:] for name, tensor in model.state_dict().items()} for model in (got, wanted)
    ]
    return shapes[0] == shapes[1] and list(shapes[0]) == list(shapes[1])


# --- what is loaded


@pytest.mark.parametrize("name", ["timm:net", "torchvision:Net"])
@pytest.mark.usefixtures("timm", "torchvision")
def test_a_librarys_network_comes_with_its_weights_and_its_normalisation(name, trained):
    network = load_network(name)
    assert same_tensors(network.model, trained)
    assert not any(module.training for module in network.model.modules())
    mean, std = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)) if name == "timm:net" else (MEAN, STD)
    wanted = (IMAGES - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(network.preprocessing(IMAGES), wanted)
    assert network.random_layer is None
    assert network.origin == f"{name.lower()}, weights from {name.partition(':')[0]}"


def test_a_folder_of_transformers_comes_with_its_weights_and_its_normalisation(transformers, folder):
    network = load_network(f"transformers:{folder}")
    original = transformers.ResNetForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(network.model(IMAGES), original(IMAGES).logits)
    assert torch.allclose(network.preprocessing(IMAGES), IMAGES * 2 - 1, atol=1e-6)
    assert not network.model.training
    assert network.random_layer is None


def test_half_precision_weights_are_computed_with_in_float32(transformers, folder):
    transformers.ResNetForImageClassification.from_pretrained(folder).half().save_pretrained(folder)
    model = load_network(f"transformers:{folder}").model
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert all(torch.equal(tensor.half().float(), tensor) for tensor in model.parameters())


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (HALF, lambda x: (x - 0.5) / 0.5),
        (
            {"image_mean": 0.5, "image_std": 0.25, "do_rescale": True, "rescale_factor": 1 / 255},
            lambda x: (x - 0.5) * 4,
        ),
        ({"do_normalize": False}, lambda x: x),
        (HALF | {"rescale_factor": 1 / 127.5, "rescale_offset": True}, lambda x: (2 * x - 1 - 0.5) / 0.5),
        (HALF | {"include_top": True}, lambda x: (x - 0.5) / 0.25),
        (HALF | {"do_rescale": False}, lambda x: (255 * x - 0.5) / 0.5),
        ({"do_normalize": False, "do_flip_channel_order": True}, lambda x: x.flip(1)),
    ],
)
def test_the_settings_of_an_image_processor_are_followed(settings, wanted, folder):
    describe(folder, settings)
    assert torch.allclose(
        load_network(f"transformers:{folder}").preprocessing(IMAGES), wanted(IMAGES), atol=1e-5
    )


@pytest.mark.parametrize(
    "flags", [{}, {"include_top": True, "rescale_offset": True, "rescale_factor": 1 / 127.5}]
)
def test_preprocessing_is_that_of_the_image_processor_itself(flags, transformers, folder):
    name = "EfficientNetImageProcessorPil"
    if not hasattr(transformers, name):
        pytest.skip("this version of transformers has no image processors without torchvision")
    flags = {"include_top": False} | flags
    processor = getattr(transformers, name)(do_resize=False, image_mean=MEAN, image_std=STD, **flags)
    processor.save_pretrained(folder)
    pixels = (IMAGES * 255).to(torch.uint8)
    wanted = torch.stack([torch.as_tensor(x) for x in processor([p.numpy() for p in pixels])["pixel_values"]])
    got = load_network(f"transformers:{folder}").preprocessing(pixels / 255)
    assert torch.allclose(got, wanted.float(), atol=1e-4)


@pytest.fixture
def densenet(monkeypatch):
    """MONAI's DenseNet121, and what stands in for the file that it would download: the tensors, by its own names."""
    from monai.networks.nets import DenseNet121, densenet

    torch.manual_seed(7)
    model = DenseNet121(spatial_dims=2, in_channels=3, out_channels=1000)
    published = {name: tensor for name, tensor in model.state_dict().items() if "class_layers" not in name}

    def download(url, **options):
        return dict(published)

    monkeypatch.setattr(densenet, "load_state_dict_from_url", download)
    return published


def test_a_network_of_monai_comes_with_imagenets_weights_and_normalisation(densenet):
    network = load_network("monai:Densenet121")
    assert network.name == "monai:DenseNet121"
    assert all(torch.equal(network.model.state_dict()[name], tensor) for name, tensor in densenet.items())
    assert network.preprocessing.to_dict()["mean"] == MEAN
    assert network.preprocessing.to_dict()["std"] == STD
    # The published classifier has another name there: the head of MONAI's is random, and is taken off.
    assert network.random_layer == "class_layers.out"
    assert network.random_layer == remove_head(network.model, IMAGES).head


def test_weights_that_monai_passed_over_are_found_out(densenet):
    del densenet["features.denseblock2.denselayer3.layers.conv1.weight"]
    with pytest.raises(
        WeightsError, match=r"monai:DenseNet121 are incomplete: none for 'features\.denseblock2\.dense"
    ):
        load_network("monai:DenseNet121")


def test_a_backbone_of_ours_is_a_trunk_with_its_published_weights(monkeypatch):
    tiny_backbone.register(monkeypatch.setitem, monkeypatch.setattr)
    network = load_network("tiny")
    wanted = tiny_backbone.fixed_weights("tiny")
    assert all(torch.equal(network.model.state_dict()[name], tensor) for name, tensor in wanted.items())
    assert (network.name, network.origin, network.can_be_rebuilt) == ("tiny", "here", True)
    assert same_but_for_the_classes(build_network("tiny", bare=True), network.model)
    assert isinstance(build_network("tiny")[-1], nn.Linear)


# --- laws of names


@pytest.mark.usefixtures("timm", "torchvision")
def test_a_stored_name_builds_the_same_network_again(folder):
    for name in ("timm:net", "torchvision:Net", f"transformers:{folder}"):
        network = load_network(name)
        again = build_network(network.name, bare=True)
        assert same_but_for_the_classes(again, network.model)
        assert load_network(network.name).name == network.name
        assert network.can_be_rebuilt == (not name.startswith("transformers"))
    assert load_network("torchvision:Net").name == "torchvision:net"
    assert not load_network("timm:local-dir:net").can_be_rebuilt


@pytest.mark.parametrize(
    "network", ["hf-hub:any/body", "hf_hub:any/body", "HF-HUB:any/body", "local-dir:net"]
)
def test_what_a_hub_or_a_folder_describes_for_timm_is_not_rebuilt_by_name(network):
    assert is_elsewhere(f"timm:{network}")
    assert not is_elsewhere("timm:resnet18.a1_in1k")
    assert not is_elsewhere("timm:timm:resnet18")


def test_the_name_of_a_folder_is_its_whole_path(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert load_network("transformers:net").name == f"transformers:{folder.resolve()}"


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("monai:DenseNet121", "class_layers.out"),
        ("monai:resnet10", "fc"),
        ("monai:SEResNet50", "last_linear"),
        ("monai:efficientnet-b0", "_fc"),
        ("transformers:ResNet", "net.classifier.1"),
        ("transformers:RegNet", "net.classifier.1"),
    ],
)
def test_networks_are_built_without_memory_under_the_names_that_the_head_has(name, head):
    pytest.importorskip(name.partition(":")[0])
    with torch.device("meta"):
        model = build_network(name)
    assert all(tensor.is_meta for tensor in model.parameters())
    assert isinstance(model.get_submodule(head), nn.Linear)


def test_dimensions_and_channels_are_followed_where_a_network_leaves_them_open(timm):
    with torch.device("meta"):
        volume = build_network("monai:resnet10", dimensions=3, channels=1)
        grey = build_network("monai:DenseNet121", channels=1)
    assert volume.conv1.weight.shape[1:] == (1, 7, 7, 7)
    assert grey.features.conv0.weight.shape[1:] == (1, 7, 7)
    assert build_network("timm:net", channels=1).conv1.in_channels == 1


@pytest.mark.usefixtures("timm")
def test_loading_draws_no_random_numbers_and_prints_nothing(capsys):
    steps = []
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    load_network("timm:net", progress=lambda *step: steps.append(step))
    assert torch.equal(torch.rand(4), wanted)
    assert capsys.readouterr().out == ""
    assert steps == [("loading timm:net", 0, 1), ("loading timm:net", 1, 1)]


# --- weights from a file


@pytest.fixture
def file(trained, tmp_path):
    """A function that saves the trained network with some tensors changed (None: left out)."""

    def save(**changes):
        tensors = trained.state_dict() | {name.replace("__", "."): tensor for name, tensor in changes.items()}
        path = tmp_path / "w.safetensors"
        safetensors.torch.save_file({k: v for k, v in tensors.items() if v is not None}, path)
        return path

    return save


@pytest.mark.usefixtures("timm")
def test_weights_of_a_file_are_loaded_by_name(file, trained):
    network = load_network("timm:net", weights=file())
    assert torch.equal(network.model.conv1.weight, trained.conv1.weight)
    assert torch.equal(network.model.bn1.running_var, trained.bn1.running_var)
    assert network.preprocessing.to_dict()["mean"] == [0.1, 0.2, 0.3]
    assert network.origin == "timm:net, weights from w.safetensors"
    # Five classes in the file, two in the network: the head is not there yet.
    assert network.random_layer == "fc"


@pytest.mark.parametrize("name", ["monai", "transformers"])
def test_a_network_without_weights_of_its_own_takes_a_file_and_imagenets_normalisation(name, tmp_path):
    library = pytest.importorskip(name)
    name = {"monai": "monai:resnet10", "transformers": "transformers:ResNet"}[library.__name__]
    wanted = randomise(build_network(name))
    inner = wanted.net if name.startswith("transformers") else wanted
    safetensors.torch.save_file(inner.state_dict(), tmp_path / "w.safetensors")
    network = load_network(name, weights=tmp_path / "w.safetensors")
    assert same_tensors(network.model, wanted)
    assert network.random_layer is None
    assert network.preprocessing.to_dict()["mean"] == MEAN


def test_a_head_for_other_classes_or_none_is_not_needed(file):
    for changes in (
        {"fc__weight": torch.zeros(9, 4), "fc__bias": torch.zeros(9)},
        {"fc__weight": None, "fc__bias": None},
    ):
        model = Net(5)
        head = model.fc.weight.clone()
        assert load_weights(model, file(**changes)) == {"fc.weight", "fc.bias"}
        assert torch.equal(model.fc.weight, head)
    assert load_weights(Net(5), file()) == set()


@pytest.mark.usefixtures("timm")
def test_a_layer_that_stays_must_not_be_random(file):
    network = load_network("timm:net", weights=file())
    network.check_head(remove_head(network.model, IMAGES).head)
    with pytest.raises(
        WeightsError, match="no pretrained weights for the layer 'fc' of timm:net, which is not its"
    ):
        network.check_head("other")
    load_network("timm:net").check_head(None)


def test_counters_of_batches_may_be_missing(file, trained):
    model = Net(5)
    assert load_weights(model, file(bn1__num_batches_tracked=None)) == set()
    assert same_tensors(model, trained)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"conv1__weight": None}, r"it lacks 'conv1\.weight'\. It must hold the state dict"),
        ({"bn1__weight": None, "bn1__bias": None}, r"it lacks 'bn1\.weight' and 1 more"),
        ({"conv2__weight": torch.zeros(1)}, r"it has, unknown to the network, 'conv2\.weight'"),
        (
            {"conv1__weight": torch.zeros(5, 3, 3, 3)},
            r"it has 'conv1\.weight' of shape \(5, 3, 3, 3\), not \(4, 3, 3",
        ),
        ({"fc__weight": torch.zeros(5, 7)}, r"it has 'fc\.weight' of shape \(5, 7\), not \(5, 4\)"),
        (
            {"conv1__weight": None, "x": torch.zeros(1)},
            r"it lacks 'conv1\.weight' and has, unknown to the network, 'x'",
        ),
    ],
)
def test_weights_of_another_network_are_refused_by_the_first_that_differs(changes, said, file):
    model = Net(5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError, match=rf"w\.safetensors does not fit Net: {said}") as caught:
        load_weights(model, file(**changes))
    one_line_of(caught)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    for name, content, said in (
        ("w.pth", b"", "must be a .safetensors file; make one with"),
        ("no.safetensors", None, "no file at"),
        ("bad.safetensors", b"not at all", "is not a whole safetensors file"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=said) as caught:
            load_weights(Net(), tmp_path / name)
        one_line_of(caught)


# --- errors


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "vgg17",
            r"`backbone` must be one of efficientnet_lite0, vgg16, monai:<network>, .* Got 'vgg17' instead",
        ),
        (
            "keras:VGG16",
            "'keras' is no source of networks; have efficientnet_lite0, vgg16, monai:<network>, timm:<network>",
        ),
        ("monai:", "'monai:' names no network; write monai:<network>"),
        ("monai:VGG99", "monai does not build 'VGG99': .* no attribute 'VGG99'"),
        ("monai:UNet", "monai does not build 'UNet': .*missing"),
        ("monai:get_efficientnet_image_size", "is no network|does not build"),
        ("timm:other", r"timm does not build 'other': Unknown model \(other\)"),
        ("torchvision:other", "torchvision does not build 'other'"),
    ],
)
@pytest.mark.usefixtures("timm", "torchvision")
def test_a_name_of_nothing_says_what_there_is(name, said):
    with pytest.raises(ConfigError, match=said) as caught:
        build_network(name)
    one_line_of(caught)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_that_is_not_there_is_named_with_its_command(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    for make in (build_network, load_network):
        with pytest.raises(
            ConfigError, match=f"needs {library}, which cannot be imported here: pip install {library}"
        ):
            make(f"{library}:net")


def test_no_library_is_imported_before_it_is_asked_for(monkeypatch):
    for library in LIBRARIES:
        monkeypatch.setitem(sys.modules, library, None)
    build_network("vgg16", bare=True)


@pytest.mark.parametrize("name", ["monai:DenseNet264", "monai:resnet18", "monai:UNet"])
def test_a_network_of_monai_without_weights_says_so(name):
    with pytest.raises(
        ConfigError, match=r"no pretrained weights of .* for images: .* --weights FILE"
    ) as caught:
        load_network(name)
    one_line_of(caught)


@pytest.mark.usefixtures("transformers")
def test_a_configuration_of_transformers_has_no_weights():
    with pytest.raises(
        ConfigError, match="'transformers:ResNet' has no weights: name a model of the hub or a folder"
    ):
        load_network("transformers:ResNet")
    with pytest.raises(ConfigError, match=r"transformers does not build 'Nothing': .*NothingConfig"):
        build_network("transformers:Nothing")


@pytest.mark.usefixtures("transformers")
def test_without_a_network_the_hub_is_an_error_that_says_what_to_get():
    for make in (build_network, load_network):
        with pytest.raises(
            WeightsError, match=r"cannot get transformers:nobody/net .* put config.json, prep"
        ) as caught:
            make("transformers:nobody/net")
        one_line_of(caught)


def test_without_a_network_the_weights_of_monai_are_an_error_that_says_what_to_do(monkeypatch):
    def refuse(url, **options):
        raise urllib.error.URLError("no route\nto host")

    from monai.networks.nets import densenet

    monkeypatch.setattr(densenet, "load_state_dict_from_url", refuse)
    with pytest.raises(
        WeightsError, match=r"cannot get monai:DenseNet121 \(.*no route to host.*\)\. .*--weights FILE"
    ):
        load_network("monai:DenseNet121")


def test_a_folder_without_safetensors_or_processor_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ChanscaleError, match=r"cannot get transformers:.*model.safetensors into a folder"):
        load_network(f"transformers:{folder}")
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    describe(folder, {"do_normalize": True})
    with pytest.raises(ConfigError, match="must say `image_mean`"):
        load_network(f"transformers:{folder}")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(WeightsError, match=r"cannot get transformers:.*preprocessor_config.json"):
        load_network(f"transformers:{folder}")


def test_tensors_that_a_folder_lacks_are_found_out(folder):
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    headless = {name: tensor for name, tensor in tensors.items() if "classifier" not in name}
    safetensors.torch.save_file(headless, path, metadata={"format": "pt"})
    assert load_network(f"transformers:{folder}").random_layer == "net.classifier.1"
    first = next(iter(headless))
    safetensors.torch.save_file(
        {k: v for k, v in headless.items() if k != first}, path, metadata={"format": "pt"}
    )
    with pytest.raises(
        WeightsError, match=f"are incomplete: none for 'net.{first}', so it would stay random"
    ):
        load_network(f"transformers:{folder}")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_no_pickle_of_a_library_is_run(torchvision, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": Evil()}, "evil.pth")

    def get_model(name, *, weights):
        return torch.load("evil.pth", weights_only=False)

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ConfigError, match="Weights only load failed"):
        load_network("torchvision:net")
    assert not (tmp_path / "ran").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_new_library_is_one_entry(monkeypatch, trained):
    def build(zoo, network, dimensions, channels):
        return Net(2, channels)

    def load(zoo, network):
        return trained, set()

    def preprocess(zoo, network, model):
        return Preprocessing(scale=3)

    fake(monkeypatch, "zoo")
    entry = Library(build=build, load=load, preprocess=preprocess, by_hand="ask")
    monkeypatch.setitem(LIBRARIES, "zoo", entry)
    assert build_network("zoo:any", channels=1).conv1.in_channels == 1
    assert load_network("zoo:any").preprocessing.scale == 3


def test_our_own_backbones_are_in_the_catalogue():
    with torch.device("meta"):
        for name in BACKBONES:
            assert (
                sum(p.numel() for p in build_network(name, bare=True).parameters())
                == BACKBONES[name].trunk_parameters
            )
