"""What the runs of a cross-validation say: of the images that each left out, and of those that are in no fold."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chanscale.artifact import load_model
from chanscale.comparison.differences import Scores
from chanscale.crossval.folder import CrossFolder
from chanscale.crossval.plan import CrossPlan, Member
from chanscale.data.loading import DecodedImages
from chanscale.data.sources import ImageSet
from chanscale.data.splits import read_splits
from chanscale.errors import ArtifactError
from chanscale.evaluation import predict
from chanscale.metrics import Ints
from chanscale.progress import Watcher
from chanscale.run_images import load_images

Shares = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """Probabilities (M, N, K) of `members` for `images`; nan where an image was not asked for.

    Every member is asked for images in no fold; for those of the folds, only the member that left the image out.
    """

    images: ImageSet
    members: tuple[Member, ...]
    probabilities: Shares

    @property
    def labels(self) -> Ints:
        """Class indices, (N,)."""
        return self.images.labels

    @property
    def groups(self) -> NDArray[Any]:
        """What tells the patients apart, (N,)."""
        return self.images.group_keys

    def count_patients(self) -> dict[str, int]:
        """Return `patients`, how many there are, where any is known."""
        count = self.images.count_patients()
        return {} if count is None else {"patients": count}

    @property
    def out_of_fold(self) -> Shares:
        """The probabilities of whichever member left the image out, for each repeat, (R, N, K).

        Raises ArtifactError unless, in each repeat, one member did.
        """
        repeats = np.array([member.repeat for member in self.members])
        asked = ~np.isnan(self.probabilities[:, :, 0])
        for repeat in np.unique(repeats):
            counts = asked[repeats == repeat].sum(0)
            if np.any(counts != 1):
                name = self.images.records[int(np.flatnonzero(counts != 1)[0])].name
                raise ArtifactError(
                    f"repeat {repeat} left {name} out {counts[counts != 1][0]} times, not once: its runs are of "
                    "different splits; remove them, and run the command again"
                )
        answered = [np.nansum(self.probabilities[repeats == repeat], axis=0) for repeat in np.unique(repeats)]
        return np.stack(answered)

    def scores(self) -> list[Scores]:
        """Return for each member what it said of the images that it was asked for."""
        return [self._score(shares) for shares in self.probabilities]

    def score_mean(self) -> Scores:
        """Return the mean of what all members say."""
        return self._score(self.probabilities.mean(0))

    def to_csv(self) -> str:
        """Return a table with a row for each image and each member that was asked for it."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        classes = self.images.classes
        writer.writerow(
            ("image", "patient", "repeat", "fold", "label", *(f"probability_{name}" for name in classes))
        )
        writer.writerows(self._rows())
        return text.getvalue()

    def _score(self, shares: Shares) -> Scores:
        asked = np.flatnonzero(~np.isnan(shares[:, 0]))
        names = tuple(self.images.records[i].name for i in asked)
        groups = tuple(map(str, self.groups[asked].tolist()))
        return Scores(names, groups, self.labels[asked], shares[asked])

    def _rows(self) -> Iterator[Sequence[Any]]:
        for member, shares in zip(self.members, self.probabilities, strict=True):
            for record, row in zip(self.images.records, shares.tolist(), strict=True):
                if row[0] == row[0]:
                    label = self.images.classes[record.label]
                    told = (f"{share:.8g}" for share in row)
                    yield record.name, record.group, member.repeat, member.fold, label, *told


def ask_members(
    folder: CrossFolder, plan: CrossPlan, learning: ImageSet, outer: ImageSet | None, watcher: Watcher
) -> tuple[Answers, Answers | None]:
    """Return what all finished runs say of the images that they left out, and of those in no fold, if there are any.

    Which images a run left out, its own `splits.csv` says. Raises ArtifactError, DataError.
    """
    config = plan.config.already_opened()
    seen = load_images(learning, config, watcher)
    unseen = load_images(outer, config, watcher) if outer else None
    left_out, kept_out = [], []
    for done, member in enumerate(plan.members, 1):
        run = folder.run_of(member)
        model, _ = load_model(run)
        ask = partial(_ask, model, classes=len(learning.classes))
        left_out.append(ask(seen, read_splits(run / "splits.csv", learning).test))
        if unseen:
            kept_out.append(ask(unseen, range(len(unseen))))
        watcher.on_step("asking the models", done, len(plan.members))
    first = Answers(learning, plan.members, np.stack(left_out))
    return first, replace(first, images=outer, probabilities=np.stack(kept_out)) if outer else None


def _ask(model: Any, images: DecodedImages, indices: Sequence[int], *, classes: int) -> Shares:
    shares = np.full((len(images), classes), np.nan)
    shares[list(indices)] = predict(model, images, indices)[0]
    return shares
