"""The run in plain words."""

import math
from collections.abc import Mapping
from typing import Any

from chanscale.artifact import ModelInfo
from chanscale.report_page.channel_map import is_left_out
from chanscale.report_page.material import Material
from chanscale.wording import percent

Figure = Mapping[str, float | None]


def summarise(material: Material) -> str:
    """Return a paragraph: what the model does, on how many images it was judged, how well, and what was removed."""
    sentences = [_describe_task(material), *_describe_figures(material.metrics), _describe_size(material)]
    return " ".join(sentences).replace(" %", "\N{NO-BREAK SPACE}%")


def _describe_task(material: Material) -> str:
    images = material.metrics["images"]
    return (
        f"This model {_describe_answer(material.info)}. It was trained on {images['train']:,} images; "
        f"{images['validation']:,} others chose when to stop."
    )


def _describe_answer(info: ModelInfo) -> str:
    if info.multilabel:
        return f"says of an image which of {len(info.classes)} labels hold: {', '.join(info.classes)}"
    if info.is_binary:
        return f"tells {info.classes[1]} from {info.classes[0]}"
    return f"tells {len(info.classes)} kinds of images apart"


def _describe_figures(metrics: Mapping[str, Any]) -> list[str]:
    if not metrics["n"]:
        return ["No images were set aside to test it, so how good it is has not been measured."]
    patients = f" of {metrics['patients']:,} patients" if "patients" in metrics else ""
    after, before = metrics["auc"], metrics["before"].get("auc")
    what = (
        "mean area under the ROC curves of its labels" if "labels" in metrics else "area under its ROC curve"
    )
    sentences = [
        f"On {metrics['n']:,} test images{patients}, of which it had seen none, the {what} (AUC) is "
        f"{with_interval(after)}; 0.5 is a guess, and 1 never wrong."
    ]
    if before and is_defined(after) and is_defined(before):
        sentences.append(
            f"The frozen network with a linear head comes to {with_interval(before)}: "
            f"this model is {_compare(after['value'], before['value'])}."
        )
    return sentences


def _compare(after: float, before: float) -> str:
    change = f"{after - before:+.3f}".replace("-", "−")
    if change[1:] == "0.000":
        return "as good"
    return f"{'better' if after > before else 'worse'} by {change[1:]}"


def _describe_size(material: Material) -> str:
    metrics = material.metrics
    parameters, macs = metrics["parameters"]["removed"], metrics["macs"]["removed"]
    text = f"{percent(parameters)} of the network's parameters and {percent(macs)} of its computation were removed"
    behind = sum(is_left_out(name, material.info) for name in material.widths)
    if behind:
        text += f", among them the last {behind} of {len(material.widths)} layers"
    return f"{text}."


def is_defined(figure: Figure) -> bool:
    """Tell whether a figure has a value: metrics.json has null where it is not defined, a run in memory nan."""
    value = figure["value"]
    return value is not None and math.isfinite(value)


def with_interval(figure: Figure) -> str:
    """Return a figure and its 95 % interval, as text."""
    if not is_defined(figure):
        return "not defined"
    low, high = figure["low"], figure["high"]
    if low is None or high is None or not math.isfinite(low):
        return f"{figure['value']:.3f}"
    return f"{figure['value']:.3f} (95 % interval {low:.2f} to {high:.2f})"
