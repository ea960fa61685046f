"""The page from its parts: everything is one file, which asks for nothing and can send nothing."""

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from chanscale.calibration import judge_calibration
from chanscale.classifier import Classifier
from chanscale.decision_rules import judge_rules, temper
from chanscale.evaluation import Evaluation
from chanscale.files import write_atomically
from chanscale.metrics import tell_apart
from chanscale.report_page import card, curves, plots
from chanscale.report_page.channel_map import COLUMNS, MOST_CELLS, map_channels
from chanscale.report_page.contributions import find_channels
from chanscale.report_page.material import Material
from chanscale.report_page.mistakes import count_mistakes, find_mistakes
from chanscale.report_page.summary import is_defined, summarise, with_interval
from chanscale.wording import NOTICE, percent, shorten, size_on_disk

REPORT = "report.html"
"""What the page is called in a run folder."""
MOST_CURVES = 6
"""ROC curves that can be told apart in one plot."""
MOST_CLASSES = 12
"""Of which a whole confusion matrix can be read; of more, the commonest confusions are listed."""


def write_report(material: Material, path: Path, *, names: bool = False) -> Path:
    """Write the page of a run to one HTML file, whole or not at all, and return its path.

    `names`: call test images by their names, which may tell who the patient is; else they have numbers.
    """
    write_atomically(path, build_report(material, names=names))
    return path


def build_report(material: Material, *, names: bool = False) -> str:
    """Return the page as HTML."""
    style, script = _read("report.css"), _read("report.js")
    page = _environment().get_template("report.html")
    return page.render(
        notice=NOTICE,
        style=Markup(style),  # both are ours, and their hashes are what the page's policy lets run
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        summary=summarise(material),
        metrics=material.metrics,
        info=material.info,
        binary=material.is_binary,
        figures=card.figure_rows(material.metrics),
        has_maps=isinstance(material.model, Classifier),
        volumes=material.info.space is not None,
        quality=_describe_quality(material) if material.judged else None,
        mistakes=find_mistakes(material, names=names),
        layers=map_channels(material.model, material.info, material.widths),
        in_cells=sum(material.widths.values()) <= MOST_CELLS,
        columns=COLUMNS,
        path_plot=plots.draw_path(material.history, material.metrics) if _has_path(material) else None,
        channels=find_channels(material),
        stability=material.stability,
        card=_describe_card(material),
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_read), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    filters = {
        "percent": percent, "shorten": shorten, "size_on_disk": size_on_disk, "defined_figure": is_defined,
        "with_interval": with_interval, "embedded": embed,
    }  # fmt: skip
    environment.filters.update(filters)
    return environment


def _read(name: str) -> str:
    return resources.files("chanscale.report_page").joinpath("page", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def embed(value: Any) -> Markup:
    """Return JSON that no browser takes for markup, wherever in a script it stands."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e"))


def _has_path(material: Material) -> bool:
    aucs = [row.get("validation_auc") for row in material.history]
    return any(isinstance(auc, float) and math.isfinite(auc) for auc in aucs)


def _describe_quality(material: Material) -> dict[str, Any]:
    """Return what is known of the probabilities of the test images."""
    judged = material.judged
    assert judged is not None
    rocs = _find_rocs(material, judged)
    thresholds = curves.find_thresholds(judged.probabilities, judged.labels) if material.is_binary else None
    start = _find_start(material, judged) if material.is_binary else None
    several = material.info.multilabel
    matrix = None if several else curves.confusion(judged.probabilities, judged.labels)
    said, right = _name_axes(material)
    return {
        "rocs": rocs,
        "areas": sorted(rocs.items(), key=lambda item: item[1].area),
        "roc_plot": plots.draw_roc(dict(list(rocs.items())[:MOST_CURVES]), _point_of(start))
        if rocs
        else None,
        "calibration": _describe_calibration(material, judged),
        "calibration_plot": plots.draw_calibration(
            curves.find_bins(judged.probabilities, judged.labels),
            said,
            right,
            before=_find_bins_before(material, judged),
        ),
        **judge_rules(judged, material.info.operating_point, material.info.prediction_sets),
        "matrix": matrix.tolist() if matrix is not None and len(matrix) <= MOST_CLASSES else None,
        "confusions": [] if matrix is None else _list_confusions(matrix, material.info.classes),
        "labels": _describe_labels(material, judged) if several else None,
        "mistakes": count_mistakes(judged, material.info.operating_point),
        "operating": _describe_start(start) if start else None,
        "data": {**asdict(thresholds), "frame": _frame(), "start": asdict(start)}
        if thresholds and start
        else None,
    }


def _describe_calibration(material: Material, judged: Evaluation) -> dict[str, Any]:
    """Return what metrics.json says of the temperature, if anything, and the figures `after` it as they are here."""
    after = judge_calibration(judged.probabilities, judged.labels, judged.groups)
    told = material.metrics.get("calibration", {"temperature": 1, "reason": None, "images": 0})
    return {"before": None, **told, "after": {name: figure.to_dict() for name, figure in after.items()}}


def _find_bins_before(material: Material, judged: Evaluation) -> list[curves.Bin]:
    """Return the bins of the probabilities before calibration; none where there was none."""
    temperature = material.metrics.get("calibration", {}).get("temperature", 1)
    if temperature == 1:
        return []
    before = temper(judged.logits, 1 / temperature, multilabel=material.info.multilabel)
    return curves.find_bins(before, judged.labels)


def _describe_labels(material: Material, judged: Evaluation) -> list[dict[str, Any]]:
    """Return of each of several labels its AUC, and how it was called at a probability of 0.5."""
    called = curves.count_labels(judged.probabilities, judged.labels, material.info.classes)
    return [asdict(one) | {"auc": judged.by_label[one.name].to_dict()} for one in called]


def _find_start(material: Material, judged: Evaluation) -> curves.Start:
    """Return what the threshold in use comes to: that of the operating point, or 0.5."""
    point = material.info.operating_point
    called = point.call(judged.probabilities) if point else judged.probabilities.argmax(1) == 1
    return curves.count_called(called, judged.labels, point.threshold if point else 0.5)


def _find_rocs(material: Material, judged: Evaluation) -> dict[str, curves.Roc]:
    """Return the ROC curve of the positive class, or of each class against the rest, where both are there."""
    classes, labels = material.info.classes, judged.labels
    chosen = [1] if material.is_binary else [*range(len(classes))][:MOST_CURVES]
    found = {}
    for k in chosen:
        known, positive = tell_apart(labels, k)
        if 0 < positive.sum() < len(positive):
            found[classes[k]] = curves.find_roc(
                judged.probabilities[known, k], positive, material.groups[known]
            )
    return found


def _name_axes(material: Material) -> tuple[str, str]:
    if material.is_binary:
        return "probability that the model says", "share that was positive"
    if material.info.multilabel:
        return "probability that the model says", "share that had the label"
    return "probability of the most probable class", "share that was right"


def _point_of(start: curves.Start | None) -> tuple[float, float] | None:
    """Return where the threshold in use lies on the ROC curve, if there is one."""
    if not start or not start.positives or not start.negatives:
        return None
    return start.false_positives / start.negatives, start.true_positives / start.positives


def _describe_start(start: curves.Start) -> dict[str, Any]:
    """Return the confusion and the shares at the threshold in use; a share of nothing is None."""
    hits, alarms = start.true_positives, start.false_positives
    missed, passed = start.positives - hits, start.negatives - alarms
    return {
        "threshold": start.threshold, "tp": hits, "fp": alarms, "fn": missed, "tn": passed,
        "sensitivity": _share(hits, hits + missed), "specificity": _share(passed, passed + alarms),
        "ppv": _share(hits, hits + alarms), "npv": _share(passed, passed + missed),
        "prevalence": _share(start.positives, start.positives + start.negatives),
    }  # fmt: skip


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _frame() -> Mapping[str, float]:
    frame = plots.UNIT
    return {"left": frame.left, "top": frame.top, "width": frame.width, "height": frame.height}


def _list_confusions(matrix: Any, classes: tuple[str, ...]) -> list[tuple[str, str, int]]:
    """Return what was most often called what else: true class, called class, how often."""
    wrong = matrix * (1 - np.eye(len(matrix), dtype=matrix.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_CLASSES].tolist()
    pairs = [divmod(place, len(matrix)) for place in order]
    return [
        (classes[true], classes[said], int(wrong[true, said])) for true, said in pairs if wrong[true, said]
    ]


def _describe_card(material: Material) -> dict[str, Any]:
    config, plan = card.without_folders(material.config), material.plan
    again = card.without_folders(plan.config) if plan else config
    objects = card.name_objects(material)
    return {
        "model": card.describe_model(material),
        "sides": card.count_sides(material),
        "skipped": material.metrics["images"]["skipped"],
        "seed": material.config.seed,
        "training": card.describe_training(material),
        "options": card.list_options(config),
        "objects": objects,
        "command": None if objects else card.write_command(again, material.info.network, plan=plan),
        "fold": plan is not None,
        "config": again.to_yaml(),
    }
