"""The network that a model was made of, whole, to time the model against."""

import torch

from chanscale.artifact import ModelInfo
from chanscale.backbones import BACKBONES, Preprocessing, load_backbone
from chanscale.classifier import assemble, to_channels_last
from chanscale.errors import ArtifactError
from chanscale.export.deployed import DeployedClassifier, flush_denormals
from chanscale.originals import rebuild_trunk
from chanscale.weight_sources import Progress


def deploy_original(
    info: ModelInfo, *, image_size: int, progress: Progress | None = None
) -> DeployedClassifier:
    """Return the whole network called `info.backbone` with a head for its classes, as `deploy` does a model.

    A backbone of ours has its public weights; another's are random, which changes no time. Raises ArtifactError for a
    network that no name rebuilds, WeightsError.
    """
    if info.rebuilt_by != "name":
        raise ArtifactError(
            f"{info.backbone} cannot be built by name: there is nothing to compare the run with"
        )
    named = info.backbone in BACKBONES
    trunk = (
        load_backbone(info.backbone, progress=progress) if named else rebuild_trunk(info.backbone, info.head)
    )
    preprocessing = Preprocessing.from_dict({**info.preprocessing, "folded": False})
    example = torch.zeros(2, info.channels, info.image_size, info.image_size)
    whole = assemble(preprocessing, trunk, example, classes=info.classes, multilabel=info.multilabel)
    whole = to_channels_last(whole).requires_grad_(False)
    flush_denormals(whole)
    return DeployedClassifier(whole, image_size=image_size, grey_only=False).eval()
