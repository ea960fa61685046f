"""Fine-tuning of the last block: what lies before it is frozen."""

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from chanscale.baselines.fine_tuning import FineTuner, Part, Trained, all_epochs, find_norms, middle
from chanscale.classifier import Classifier
from chanscale.config import FitConfig
from chanscale.costs import count_positions
from chanscale.data.loading import DecodedImages
from chanscale.data.splits import Splits
from chanscale.modes import hooked, in_eval
from chanscale.progress import Watcher

LEARNING_RATES = (3e-5, 1e-4, 3e-4)


def train_last_block(
    model: Classifier, data: DecodedImages, splits: Splits, config: FitConfig, watcher: Watcher,
    *, lr: float | None = None,
) -> Trained:  # fmt: skip
    """Return a copy of `model` with its last block and head trained, at its best epoch, and a row for each epoch.

    All that lies before the block stays as it is, bit for bit, the statistics of norms included.
    """
    block = find_last_block(model, data.batch(splits.train[:1])[0])
    tuner = FineTuner(model, data, splits, config, watcher)
    tuned = tuner.copy(model)
    layers = [tuned.get_submodule(name) for name in block]
    parameters = [parameter for layer in layers for parameter in layer.parameters(recurse=False)]
    still = [norm for name, norm in find_norms(tuned).items() if name not in block]
    part = Part(parameters, lr or middle(LEARNING_RATES))
    return tuner.tune(tuned, all_epochs(config), [part], still=still)


def find_last_block(model: Classifier, example: Tensor) -> list[str]:
    """Return the layers with weights of the last block of the trunk, in the order in which `example` calls them.

    That is the stage of deepest resolution, as papers cut networks: it begins at the first convolution behind which
    no map is larger than that of the last convolution (block 5 of VGG16, layer 4 of a ResNet less the convolution
    in front of its stride). Where the resolution never falls, it is the last third of the convolutions. Smaller maps
    on the way do not end it: the gates of a squeeze-excite have one position.
    """
    layers = order_of_calls(model.trunk, model.preprocessing(example))
    convolutions = {name: layer for name, layer in layers.items() if isinstance(layer, _ConvNd)}
    places = count_positions(model.trunk, convolutions, model.preprocessing(example))
    order = [name for name in layers if name in convolutions]
    larger = [index for index, name in enumerate(order) if places[name] > places[order[-1]]]
    first = order[larger[-1] + 1 if larger else len(order) * 2 // 3]
    names = list(layers)
    return [f"trunk.{name}" for name in names[names.index(first) :]]


@torch.no_grad()
def order_of_calls(model: nn.Module, example: Tensor) -> dict[str, nn.Module]:
    """Return the modules of `model` that hold weights themselves, in the order in which `example` first calls them."""
    names = {m: name for name, m in model.named_modules() if list(m.parameters(recurse=False))}
    called: dict[str, nn.Module] = {}

    def note(module: nn.Module, _: object) -> None:
        called.setdefault(names[module], module)

    handles = [module.register_forward_pre_hook(note) for module in names]
    with hooked(handles), in_eval(model):
        model(example)
    return called
