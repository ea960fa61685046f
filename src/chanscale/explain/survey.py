"""What a model says of all images that are to be explained, taken apart, and what is usual on its training images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from chanscale.artifact import ModelInfo, load_model, model_path
from chanscale.classifier import Classifier, probabilities
from chanscale.config import Frames
from chanscale.data.loading import BatchLoader, DecodedImages, decode_images
from chanscale.errors import ConfigError
from chanscale.explain.chains import Chain, find_chain
from chanscale.explain.circuits import Circuit, Means, averaging_inputs, trace_back
from chanscale.explain.decomposition import Decomposition, decompose
from chanscale.explain.naming import ChannelNames, name_channels
from chanscale.explain.training_maps import TrainingMaps, decompose_mean, survey_training
from chanscale.own_images import open_own_images
from chanscale.predictions import open_unlabelled
from chanscale.programs import Program

Progress = Callable[[str, int, int], None]

TRUNK = "trunk."
"""Goes before the names of a trunk's layers in the whole model."""


@dataclass(frozen=True)
class Survey:
    """A model, its `images`, and of each of them the logits (N, M).

    `parts`: of those logits; None for a program, and for a network that ends in features. `means`: of what each
    convolution of the `chain` takes in, over these images. `training`, `usual`: the last maps on the training images,
    and the parts of their mean logit, where they were given. `circuits`: those traced so far, by channel.
    """

    model: Classifier | Program
    info: ModelInfo
    images: DecodedImages
    logits: Tensor
    chain: Chain
    means: Means
    names: ChannelNames
    parts: Decomposition | None = None
    training: TrainingMaps | None = None
    usual: Decomposition | None = None
    circuits: dict[int, Circuit] = field(default_factory=dict)

    @property
    def shares(self) -> Tensor:
        """Probabilities (N, K)."""
        return probabilities(self.logits, multilabel=self.model.multilabel)

    def circuit(self, channel: int) -> Circuit:
        """Return what feeds a channel of the last map."""
        if channel not in self.circuits:
            self.circuits[channel] = trace_back(self.chain, self.means, self.names, channel)
        return self.circuits[channel]


def survey_images(
    run: Path,
    paths: Sequence[Path],
    data: Path | None,
    *,
    needs_maps: bool,
    frames: Frames | None = None,
    progress: Progress | None = None,
) -> Survey:
    """Run a model over images, and over its training images in the set at `data`, if that is given.

    `needs_maps`: whether it is an error when the network does not end in maps. `frames`: of a DICOM file; default: as
    in training. Raises ConfigError, ArtifactError, DataError, ModelError.
    """
    model, info = load_model(run)
    info.require_pictures("explain")
    if isinstance(model, Program) and (needs_maps or data is not None):
        raise ConfigError(
            f"{run} holds a network of your own as a program, which hides its last map; "
            "use --method integrated-gradients, without --images"
        )
    own = None if data is None else open_own_images(data, model_path(run), info)
    images = decode_images(
        open_unlabelled(paths, info, frames=frames), image_size=info.image_size, most_channels=info.most_channels,
        progress=_step(progress, "decoding images"),
    )  # fmt: skip
    batches = _batches(images, _step(progress, "running the model"))
    if isinstance(model, Program):
        return _survey_program(model, info, images, batches)
    training = None if own is None else survey_training(
        model, *own, image_size=info.image_size, progress=_step(progress, "training images")
    )  # fmt: skip
    usual = None if training is None else decompose_mean(model, training)
    return _survey_classifier(model, info, images, batches, training, usual, needs_maps=needs_maps)


@torch.no_grad()
def _survey_program(
    model: Program, info: ModelInfo, images: DecodedImages, batches: Iterator[Tensor]
) -> Survey:
    chain = Chain((), "a program hides its layers")
    logits = torch.cat([model(batch) for batch in batches])
    return Survey(model, info, images, logits, chain, {}, name_channels(info, ()))


@torch.no_grad()
def _survey_classifier(
    model: Classifier, info: ModelInfo, images: DecodedImages, batches: Iterator[Tensor],
    training: TrainingMaps | None, usual: Decomposition | None, *, needs_maps: bool,
) -> Survey:  # fmt: skip
    first, _ = images.batch([0])
    chain = find_chain(model.trunk, model.preprocessing(first), prefix=TRUNK)
    sums: dict[str, Tensor] = {}
    logits, parts = [], []
    with averaging_inputs(chain, sums):
        for batch in batches:
            maps = model.feature_map(batch)
            logits.append(model.head(maps))
            if needs_maps or maps.dim() == 4:
                parts.append(decompose(model.head, maps))
    means = {name: total / len(images) for name, total in sums.items()}
    names = name_channels(info, chain.convolutions)
    joined = _join(parts) if parts else None
    return Survey(model, info, images, torch.cat(logits), chain, means, names, joined, training, usual)


def _join(parts: Sequence[Decomposition]) -> Decomposition:
    return Decomposition(
        logits=torch.cat([part.logits for part in parts]),
        bias=parts[0].bias,
        contributions=torch.cat([part.contributions for part in parts]),
        class_maps=torch.cat([part.class_maps for part in parts]),
    )


def _batches(images: DecodedImages, progress: Callable[[int, int], None] | None) -> Iterator[Tensor]:
    done = 0
    for batch in BatchLoader(images, range(len(images)), batch_size=16).epoch():
        yield batch.images
        done += len(batch.images)
        if progress:
            progress(done, len(images))


def _step(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(what, done, total)
