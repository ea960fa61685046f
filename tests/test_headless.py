"""The head is found by running: what is left returns the features that the logits were made of."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from chanscale.errors import ModelError
from chanscale.headless import Logits, remove_head, without_layer
from networks import FlattenNet, plain_trunk, randomise, same_tensors
from tiny_weights import one_line_of

IMAGES = (2, 3, 32, 32)
VOLUMES = (2, 1, 32, 32, 32)


class Residual(nn.Module):
    """As torchvision's ResNet: a functional flatten, and `fc`."""

    def __init__(self, *, fc=None):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        )
        self.block = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = fc or nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(x + self.block(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Dense(nn.Module):
    """As torchvision's DenseNet: everything behind the features is a function but `classifier`."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.classifier = nn.Linear(8, 5)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(F.relu(self.features(x), inplace=True), (1, 1))
        return self.classifier(torch.flatten(x, 1))


class Function(nn.Module):
    """`net`, and a function of what it returns."""

    def __init__(self, net, function):
        super().__init__()
        self.net, self.function = net, function

    def forward(self, x):
        return self.function(self.net(x))


def monai(name, **options):
    from monai.networks import nets

    return getattr(nets, name)(**options)


def hugging(name, **options):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(num_labels=5, **options)
    return getattr(transformers, f"{name}ForImageClassification")(config)


RESNET = {"block": "basic", "layers": (1, 1, 1, 1), "block_inplanes": (4, 8, 8, 16), "num_classes": 5}
DENSE = {
    "block_config": (1, 1, 1, 1),
    "growth_rate": 8,
    "in_channels": 3,
    "out_channels": 5,
    "spatial_dims": 2,
}
SMALL = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
EFFICIENT = {"width_coefficient": 0.25, "depth_coefficient": 0.1, "image_size": 32, "hidden_dim": 320}

CLASSIFIERS = {
    "residual": (Residual, IMAGES, "fc"),
    "dense": (Dense, IMAGES, "classifier"),
    "several linear layers": (FlattenNet, (2, 3, 16, 16), "output"),
    "dropout before it": (
        lambda: nn.Sequential(plain_trunk(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(12, 5)),
        IMAGES, "4",
    ),
    "MONAI ResNet 3-D": (
        partial(monai, "ResNet", spatial_dims=3, n_input_channels=1, **RESNET), VOLUMES, "fc",
    ),
    "MONAI ResNet 2-D": (
        partial(monai, "ResNet", spatial_dims=2, n_input_channels=3, **RESNET), IMAGES, "fc",
    ),
    "MONAI DenseNet121": (partial(monai, "DenseNet121", **DENSE), IMAGES, "class_layers.out"),
    "MONAI EfficientNet": (
        partial(monai, "EfficientNetBN", model_name="efficientnet-b0", pretrained=False, num_classes=5), IMAGES, "_fc",
    ),
    "MONAI SE-ResNet": (
        partial(monai, "SEResNet50", spatial_dims=2, in_channels=3, layers=(1, 1, 1, 1), num_classes=5),
        (2, 3, 64, 64), "last_linear",
    ),
    "HF ResNet": (partial(hugging, "ResNet", layer_type="basic", **SMALL), IMAGES, "net.classifier.1"),
    "HF RegNet": (partial(hugging, "RegNet", groups_width=8, **SMALL), IMAGES, "net.classifier.1"),
    "HF MobileNetV2": (partial(hugging, "MobileNetV2", depth_multiplier=0.25), IMAGES, "net.classifier"),
    "HF EfficientNet": (partial(hugging, "EfficientNet", **EFFICIENT), IMAGES, "net.classifier"),
}  # fmt: skip
"""Build, the shape of an example, and the name of the head."""


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_head_on_the_features_gives_the_logits_exactly(name):
    build, shape, head = CLASSIFIERS[name]
    model, example = randomise(build()).eval(), torch.randn(shape)
    headless = remove_head(model, example)
    linear = {f"net.{key}": module for key, module in model.named_modules()} | dict(model.named_modules())
    with torch.no_grad():
        features, logits = headless.trunk(example), model(example)
    logits = getattr(logits, "logits", logits)
    assert headless.head == head
    assert features.shape == (2, linear[head].in_features)
    assert features.std() > 0
    assert logits.shape[1] in (3, 5)
    assert torch.equal(linear[head](features), logits)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_all_other_tensors_keep_their_names_and_values(name):
    build, shape, head = CLASSIFIERS[name]
    model = randomise(build())
    left = remove_head(model, torch.randn(shape)).trunk.state_dict()
    prefix = "net." if head.startswith("net.") else ""
    wanted = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    assert list(left) == [key for key in wanted if not key.startswith(f"{head}.")]
    assert all(torch.equal(value, wanted[key]) for key, value in left.items())


@pytest.mark.parametrize("name", ["residual", "MONAI DenseNet121", "HF ResNet"])
def test_the_given_network_stays_as_it_was(name):
    build, shape, _ = CLASSIFIERS[name]
    model = build().train()
    before = copy.deepcopy(model)
    headless = remove_head(model, torch.randn(shape))
    assert same_tensors(model, before)
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert not any(module.training or module._forward_hooks for module in headless.trunk.modules())
    assert str(model) == str(before)


@pytest.mark.parametrize("name", ["residual", "HF ResNet"])
def test_the_name_of_the_head_makes_the_trunk_again(name):
    build, shape, head = CLASSIFIERS[name]
    model = build()
    trunk = remove_head(model, torch.randn(shape)).trunk
    named = Logits(model) if head.startswith("net.") else model
    again = without_layer(named, head)
    assert str(again) == str(trunk)
    assert same_tensors(again, trunk)
    bare = without_layer(named.to("meta"), head)
    assert list(bare.state_dict()) == list(trunk.state_dict())
    assert not any(module.training for module in bare.modules())


def test_a_trunk_of_transformers_is_stable_when_its_head_is_looked_for_again():
    model, example = CLASSIFIERS["HF ResNet"][0](), torch.randn(IMAGES)
    once = remove_head(model, example)
    twice = remove_head(once.trunk, example)
    assert twice.head is None
    assert list(twice.trunk.state_dict()) == list(once.trunk.state_dict())


def test_a_head_with_two_names_goes_from_both():
    model = Residual()
    model.add_module("classifier", model.fc)
    trunk = remove_head(model, torch.randn(IMAGES)).trunk
    assert isinstance(trunk.fc, nn.Identity)
    assert isinstance(trunk.classifier, nn.Identity)


@pytest.mark.parametrize("function", ["module", "functional"])
@pytest.mark.parametrize("pooling", [F.adaptive_avg_pool2d, F.adaptive_max_pool2d])
def test_a_last_1x1_convolution_is_the_head(function, pooling):
    """As SqueezeNet: dropout, convolution to the classes, ReLU, pooling."""
    body, last = nn.Sequential(plain_trunk(), nn.Dropout()), nn.Conv2d(12, 5, 1)
    if function == "module":
        pool = nn.AdaptiveAvgPool2d(1) if pooling is F.adaptive_avg_pool2d else nn.AdaptiveMaxPool2d(1)
        model = nn.Sequential(body, last, nn.ReLU(inplace=True), pool, nn.Flatten())
    else:
        model = Function(nn.Sequential(body, last), lambda x: pooling(F.relu(x), 1).flatten(1))
    headless, example = remove_head(model, torch.randn(IMAGES)), torch.randn(IMAGES)
    assert headless.head == ("1" if function == "module" else "net.1")
    with torch.no_grad():
        features, maps = headless.trunk(example), body.eval()(example)
    assert torch.allclose(features, pooling(maps.relu(), 1).flatten(1))


def test_a_convolution_to_the_classes_on_pooled_features_is_the_head():
    model = nn.Sequential(plain_trunk(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 5, 1), nn.Flatten())
    assert remove_head(model, torch.randn(IMAGES)).head == "2"


def norm_behind():
    # Statistics of a new norm leave almost everything as it is: rounding must not be all that tells.
    layers = nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *layers)


def fully_connected():
    return nn.Sequential(plain_trunk(), nn.Flatten(), nn.Linear(12 * 16, 10), nn.ReLU(), nn.Dropout())


HEADLESS = {
    "feature map": (plain_trunk, (2, 12, 4, 4)),
    "1x1 map": (lambda: nn.Sequential(plain_trunk(), nn.AdaptiveAvgPool2d(1)), (2, 12, 1, 1)),
    "last layer a 1x1 convolution": (lambda: nn.Sequential(plain_trunk(), nn.Conv2d(12, 6, 1)), (2, 6, 4, 4)),
    "pooled": (partial(Residual, fc=nn.Identity()), (2, 8)),
    "a norm behind a 1x1 convolution": (norm_behind, (2, 12)),
    "a last layer that is followed by ReLU": (fully_connected, (2, 10)),
    "an inplace ReLU": (
        lambda: nn.Sequential(plain_trunk(), nn.Flatten(), nn.Linear(12 * 16, 10), nn.ReLU(inplace=True)), (2, 10),
    ),
    "a norm of the features": (
        lambda: nn.Sequential(plain_trunk(), nn.Flatten(), nn.Linear(12 * 16, 10), nn.BatchNorm1d(10)), (2, 10),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADLESS)
def test_features_are_left_as_they_are(name):
    build, shape = HEADLESS[name]
    model, example = build().train(), torch.randn(IMAGES)
    headless = remove_head(model, example)
    assert headless.head is None
    assert headless.trunk is not model
    assert not headless.trunk.training
    assert same_tensors(headless.trunk, model)
    with torch.no_grad():
        features = headless.trunk(example)
        assert features.shape == shape
        assert torch.equal(features, model.eval()(example))


def test_a_feature_map_of_a_volume_or_a_signal_is_one():
    for layer, shape in ((nn.Conv3d, (2, 1, 8, 8, 8)), (nn.Conv1d, (2, 1, 8))):
        assert remove_head(layer(1, 4, 3), torch.randn(shape)).head is None


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("softmax", nn.Softmax(1)),
        ("softmax", lambda x: x.softmax(-1)),
        ("log_softmax", nn.LogSoftmax(1)),
        ("sigmoid", nn.Sigmoid()),
        ("sigmoid", torch.sigmoid_),
        ("logsigmoid", nn.LogSigmoid()),
    ],
)
def test_probabilities_are_refused(name, last):
    with pytest.raises(ModelError, match=f"Function ends in a {name}: pass it without"):
        remove_head(Function(Residual(), last), torch.randn(IMAGES))
    squeeze = nn.Sequential(plain_trunk(), nn.Conv2d(12, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ModelError, match=f"ends in a {name}"):
        remove_head(Function(squeeze, last), torch.randn(IMAGES))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(self.fc(x.mean((2, 3))))


class Clever(Residual):
    """Looks at its head before it uses it."""

    def forward(self, x):
        return super().forward(x.to(self.fc.weight.dtype))


class Moody(Residual):
    """Computes otherwise when its head is not there."""

    def forward(self, x):
        return super().forward(x if isinstance(self.fc, nn.Linear) else x + 1)


class Uncopied(nn.Conv2d):
    def __deepcopy__(self, memo):
        raise RuntimeError("no copies\nof this")


ERRORS = {
    "dictionary": (Function(Residual(), lambda x: {"logits": x}), "Function returns a dict: wrap it in a module"),
    "tuple": (Function(Residual(), lambda x: (x, x)), "Function returns a tuple: wrap it"),
    "logits that are none": (
        Function(Residual(), lambda x: SimpleNamespace(logits=[x])), "returns a SimpleNamespace",
    ),
    "one number each": (Function(Residual(), lambda x: x[:, 0]), r"must return features .* Got \(2,\) for images"),
    "one number": (Function(Residual(), lambda x: x.mean()), r"must return features .* Got \(\)"),
    "tokens": (Function(plain_trunk(), lambda x: x.flatten(2)), r"Got \(2, 12, 16\)"),
    "another batch": (Function(Residual(), lambda x: x[:1]), r"Got \(1, 5\)"),
    "does not run": (plain_trunk().append(nn.Linear(7, 2)), r"does not run on images of \(3, 32, 32\): mat1"),
    "called twice": (Twice(), "the head 'fc' of Twice is called 2 times"),
    "needs its head": (Clever(), "Clever does not run .* no attribute 'weight'"),
    "computes otherwise": (Moody(), "Moody computes otherwise without its head"),
    "no copy": (nn.Sequential(Uncopied(3, 4, 3)), "Sequential cannot be copied: no copies of this"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_taken_apart_is_an_error_of_one_line(name):
    model, said = ERRORS[name]
    with pytest.raises(ModelError, match=said) as caught:
        remove_head(model, torch.randn(IMAGES))
    one_line_of(caught)


def test_a_head_alone_is_an_error():
    with pytest.raises(ModelError, match="Linear is a head without a trunk"):
        remove_head(nn.Linear(3, 2), torch.randn(2, 3))


def test_a_layer_that_is_not_there_cannot_be_taken_off():
    with pytest.raises(ModelError, match="Residual has no layer 'classifier' that could be taken off"):
        without_layer(Residual(), "classifier")


def test_a_weight_norm_of_the_old_kind_is_told_with_what_to_do():
    with pytest.warns(FutureWarning):
        network = nn.Sequential(torch.nn.utils.weight_norm(nn.Conv2d(3, 8, 3)))
    network(torch.rand(1, 3, 8, 8))  # its weight is now made of others, and such a tensor cannot be copied
    with pytest.raises(ModelError, match=r"cannot be copied: .*; call torch\.nn\.utils\.remove_weight_norm"):
        remove_head(network, torch.rand(1, 3, 8, 8))
