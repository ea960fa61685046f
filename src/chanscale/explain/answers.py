"""What is told of one image: its answer, the channels that made it, and the map that is shown."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chanscale.classifier import Classifier
from chanscale.errors import ModelError
from chanscale.explain.chains import scale_behind
from chanscale.explain.circuits import Circuit
from chanscale.explain.evidence import (
    Evidence,
    Method,
    Subject,
    name_subject,
    show_class_map,
    show_grad_cam,
    show_gradients,
)
from chanscale.explain.overlays import Bar, Overlay, full_colour
from chanscale.explain.patches import read_grey
from chanscale.explain.places import shown_name
from chanscale.explain.survey import Survey
from chanscale.metrics import name_answer
from chanscale.predictions import Predictions
from chanscale.wording import NOTICE


@dataclass(frozen=True)
class ChannelPart:
    """A channel's part in an answer: what it adds to the logit, its trained scale, and what feeds it."""

    contribution: float
    scale: float | None
    circuit: Circuit

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: the channel's name, indices and figures, and its circuit as a tree and as text."""
        channel = self.circuit.channel
        return {
            "name": channel.text,
            "layer": channel.layer,
            "position": channel.position,
            "original_index": channel.original,
            "contribution": self.contribution,
            "scale": self.scale,
            "circuit": self.circuit.to_dict(),
            "circuit_text": self.circuit.to_text().split("\n"),
        }


@dataclass(frozen=True)
class Answer:
    """An image by `name`, the probability of each class, the logit explained, and the map that shows why.

    `logit` = `bias` + the contributions of the top `channels`, the largest first + `rest`, the sum of the `others`.
    Where the network does not end in maps, there is no bias, and there are no channels. `rules`: what `predict` says
    besides, of a model with an operating point or prediction sets: `called_positive`, `prediction_set`.
    """

    name: str
    index: int
    shares: Mapping[str, float]
    subject: Subject
    logit: float
    evidence: Evidence
    bias: float | None = None
    channels: tuple[ChannelPart, ...] = ()
    others: int = 0
    rest: float = 0.0
    usual_logit: float | None = None
    multilabel: bool = False
    rules: Mapping[str, Any] = field(default_factory=dict)

    @property
    def predicted(self) -> str:
        """The most probable class; of several labels those more probable than not, or "none"."""
        return name_answer(tuple(self.shares.values()), tuple(self.shares), multilabel=self.multilabel)

    def to_brief(self) -> dict[str, Any]:
        """Return what stands first: the image, its class, and the probabilities."""
        return {
            "image": shown_name(self.name),
            "predicted": self.predicted,
            "probabilities": dict(self.shares),
            **self.rules,
            "explained": self.subject.name,
            "logit": self.logit,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        values = self.evidence.values
        return {
            **self.to_brief(),
            "bias": self.bias,
            "channels": [channel.to_dict() for channel in self.channels],
            "rest": {"channels": self.others, "contribution": self.rest} if self.channels else None,
            "mean_training_logit": self.usual_logit,
            "map": {
                "relative": self.evidence.relative,
                "rows": values.shape[0],
                "columns": values.shape[1],
                "mean": float(values.mean()),
                "full_colour": full_colour(values.numpy()),
                "meaning": self.evidence.caption,
            },
            "notice": NOTICE,
        }


def answer_image(survey: Survey, index: int, *, top: int, method: Method) -> Answer:
    """Explain what the model says of one image. Raises ConfigError without captum, ModelError."""
    classes = survey.info.classes
    shares = dict(zip(classes, survey.shares[index].tolist(), strict=True))
    subject = name_subject(survey.info, int(survey.shares[index].argmax()))
    answer = Answer(
        name=survey.images.images.records[index].name,
        index=index,
        shares=shares,
        subject=subject,
        logit=float(survey.logits[index, subject.target]),
        evidence=_show(survey, index, subject, method),
        multilabel=survey.info.multilabel,
        rules=_apply_rules(survey, index),
    )
    return answer if survey.parts is None else _with_channels(answer, survey, top)


def _apply_rules(survey: Survey, index: int) -> dict[str, Any]:
    """Return what the rules of the model say of one image, by the names that `predict` has for them."""
    info, shares = survey.info, survey.shares[[index]].numpy()
    [said] = Predictions(
        ("",),
        info.classes,
        shares,
        operating_point=info.operating_point,
        prediction_sets=info.prediction_sets,
    ).to_dicts()
    return {name: said[name] for name in ("called_positive", "prediction_set") if name in said}


def _show(survey: Survey, index: int, subject: Subject, method: Method) -> Evidence:
    if method == "class-map" and survey.parts is not None:
        count = 0 if survey.training is None else len(survey.training.peaks)
        return show_class_map(survey.parts, subject, index, survey.usual, count)
    image = survey.images.batch([index])[0][0]
    if method == "integrated-gradients":
        return show_gradients(survey.model, image, subject)
    if not isinstance(survey.model, Classifier):
        raise ModelError("this needs the last map, which a program hides; use --method integrated-gradients")
    return show_grad_cam(survey.model, image, subject)


def _with_channels(answer: Answer, survey: Survey, top: int) -> Answer:
    parts, target = survey.parts, answer.subject.target
    assert parts is not None
    contributions = parts.contributions[answer.index, target]
    order = contributions.abs().argsort(descending=True, stable=True)
    return replace(
        answer,
        logit=float(parts.logits[answer.index, target]),
        bias=float(parts.bias[target]),
        channels=tuple(
            _part(survey, channel, float(contributions[channel])) for channel in order[:top].tolist()
        ),
        others=len(order[top:]),
        rest=float(contributions[order[top:]].sum()),
        usual_logit=None if survey.usual is None else float(survey.usual.logits[0, target]),
    )


def _part(survey: Survey, channel: int, contribution: float) -> ChannelPart:
    last = survey.chain.convolutions[-1:]
    scale = scale_behind(survey.chain.behind(last[0].name), channel) if last else None
    return ChannelPart(contribution, scale, survey.circuit(channel))


def picture_of(answer: Answer, survey: Survey) -> Overlay:
    """Return what is drawn of an answer. Raises UnreadableImageError."""
    return Overlay(
        title=shown_name(Path(answer.name).name),
        image=read_grey(survey.images.images.records[answer.index]),
        values=answer.evidence.values.numpy(),
        towards=answer.subject.towards,
        against=answer.subject.against,
        verdict=answer.predicted,
        shares=answer.shares,
        rules=_describe_rules(answer),
        bars=_bars(answer),
        sum_name=answer.subject.name,
        caption=answer.evidence.caption,
    )


def _describe_rules(answer: Answer) -> list[str]:
    lines = []
    if "called_positive" in answer.rules:
        called = answer.rules["called_positive"]
        lines.append(f"At the operating point: {'positive' if called else 'negative'}")
    if "prediction_set" in answer.rules:
        lines.append(f"Not ruled out: {', '.join(answer.rules['prediction_set'])}")
    return lines


def _bars(answer: Answer) -> list[Bar]:
    if answer.bias is None:
        return []
    bars = [Bar(part.circuit.channel.text, part.contribution) for part in answer.channels]
    if answer.others:
        bars.append(Bar(f"the other {answer.others} channels", answer.rest))
    return [*bars, Bar("bias", answer.bias)]
