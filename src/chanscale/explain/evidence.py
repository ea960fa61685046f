"""The map that is shown of an image, and the sentences that say what its numbers mean."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from chanscale.artifact import ModelInfo
from chanscale.classifier import Classifier
from chanscale.explain.decomposition import Decomposition
from chanscale.explain.saliency import grad_cam, integrated_gradients

Method = Literal["class-map", "grad-cam", "integrated-gradients"]

_FRAME = "A frame along the border comes from the padding of the convolutions, and is alike in each image"
_NO_CAUSE = "What is marked moved the model's answer; it need not be what a reader would call the finding."


@dataclass(frozen=True)
class Subject:
    """What is explained: the logit at `target`, which speaks for the class `towards`, and against `against`."""

    target: int
    towards: str
    against: str
    name: str


@dataclass(frozen=True)
class Evidence:
    """A map (h, w) over an image, positive where it speaks for the class; `caption`: what its numbers mean.

    `relative`: whether the mean map of the training images was taken off.
    """

    values: Tensor
    caption: str
    relative: bool = False


def name_subject(info: ModelInfo, winner: int) -> Subject:
    """Return what is explained: of two classes always the log-odds of the second, else the logit of the winner."""
    classes = info.classes
    if info.is_binary:
        return Subject(0, classes[1], classes[0], f"the log-odds of {classes[1]}")
    name = classes[winner]
    what = "log-odds" if info.multilabel else "logit"
    return Subject(winner, name, f"not {name}", f"the {what} of {name}")


def show_class_map(
    parts: Decomposition, subject: Subject, index: int, usual: Decomposition | None, count: int = 0
) -> Evidence:
    """Return the class map of one image; with the parts of the mean training logit, `usual`, what differs from it.

    The mean of the relative map is the logit less the mean logit of the `count` training images.
    """
    values, logit = parts.class_maps[index, subject.target], float(parts.logits[index, subject.target])
    if usual is None:
        told = (
            f"Where the evidence lies: the mean of the map is {subject.name}, {signed(logit)}. "
            f"{_FRAME}; --images takes it off. {_NO_CAUSE}"
        )
        return Evidence(values, told)
    mean = float(usual.logits[0, subject.target])
    told = (
        f"Where this image differs from the mean of {count:,} training images: the mean of the map, "
        f"{signed(logit - mean)}, is {subject.name}, {signed(logit)}, less their mean, {signed(mean)}. {_NO_CAUSE}"
    )
    return Evidence(values - usual.class_maps[0, subject.target], told, relative=True)


def show_grad_cam(model: Classifier, image: Tensor, subject: Subject) -> Evidence:
    """Return Grad-CAM of one image (C, H, W), before its ReLU, less its mean. Raises ConfigError without captum."""
    values = grad_cam(model, image[None], subject.target)[0].double()
    told = (
        f"Grad-CAM of {subject.name}, before its ReLU, less its mean: where there is more and less evidence than "
        f"elsewhere. Its size has no meaning. {_FRAME}. {_NO_CAUSE}"
    )
    return Evidence(values - values.mean(), told)


def show_gradients(model: nn.Module, image: Tensor, subject: Subject) -> Evidence:
    """Return integrated gradients of one image (C, H, W). Raises ConfigError without captum, ModelError."""
    values, missed = integrated_gradients(model, image[None], subject.target)
    told = (
        f"Integrated gradients from a black image: the pixels sum to {signed(float(values.sum()))}, the change of "
        f"{subject.name} from it, but for {abs(float(missed[0])):.2g}. Black pixels get nothing. {_NO_CAUSE}"
    )
    return Evidence(values[0].double(), told)


def signed(value: float) -> str:
    """Return a number with its sign: `+0.42`, `−1.30`."""
    return ("−" if value < 0 else "+") + f"{abs(value):.2f}"
