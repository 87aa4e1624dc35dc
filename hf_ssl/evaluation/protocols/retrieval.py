# SPDX-License-Identifier: Apache-2.0
"""Image retrieval: each test image queries a gallery, in which the images of its class are relevant.

The gallery consists of the training images, as for hashing and for k-NN classification, because the classes
of both splits are the same. With `gallery: test`, each test image queries all other test images. Metric
learning does this, because the classes of its splits differ (Oh Song et al. 2016, 1511.06452).
`retrieval_scores` defines average precision, recall at k and ties.
"""

from dataclasses import asdict, dataclass, field

from hf_ssl.errors import UserError, check_name, check_values
from hf_ssl.evaluation.inputs import Inputs
from hf_ssl.evaluation.results import ProtocolResult, mean_error, result_id
from hf_ssl.evaluation.retrieval_scores import retrieval_scores, usable_ranks

VERSION = 1
GALLERIES = ("train", "test")


@dataclass
class Config:
    """Settings.

    Attributes:
        gallery: "train": the training images; "test": all other test images (leave-one-out).
        recall: values of k for recall at k. Values that are not smaller than the gallery are left out.
    """

    gallery: str = "train"
    recall: list[int] = field(default_factory=lambda: [1, 5, 10, 100])

    def check(self, where: str) -> None:
        """Raise UserError for a value outside of its range."""
        check_name(f"{where}.gallery", self.gallery, GALLERIES, "train or test")
        ranks = list(self.recall)
        check_values(where, ("recall", ranks, ranks and min(ranks) > 0, "one or more positive numbers"))


def run(inputs: Inputs, config: Config) -> list[ProtocolResult]:
    """Return the mean average precision, with recall at k as further metrics. Nothing is selected.

    Raises:
        UserError: no test image has a relevant gallery image.
    """
    train, test = inputs.train, inputs.test
    with inputs.progress("retrieval", len(test)) as bar:
        if config.gallery == "test":
            found = retrieval_scores(test.features, test.labels, device=inputs.device, advance=bar.update)
        else:
            data = (train.features, train.labels, test.features, test.labels)
            found = retrieval_scores(*data, device=inputs.device, advance=bar.update)
    precisions = found.average_precision[found.first_rank > 0]
    if len(precisions) < 2:
        raise UserError(
            f"retrieval: expected at least 2 test images with relevant images, got {len(precisions)}; use "
            "another test split"
        )
    other = len(test) - len(precisions)
    without = f". Test images without a relevant image are left out ({other:,})" if other else ""
    gallery = f"the {train}" if config.gallery == "train" else "all other test images"
    ranks = usable_ranks(config.recall, len(train) if config.gallery == "train" else len(test) - 1)
    return [
        ProtocolResult(
            protocol="retrieval",
            id=result_id("retrieval", VERSION, asdict(config)),
            key="retrieval_map" if config.gallery == "train" else "retrieval_map_leave_one_out",
            metric="mean_average_precision",
            title="Mean average precision of retrieval",
            column="retrieval mAP" if config.gallery == "train" else "retrieval mAP, leave-one-out",
            text=f"each of {test} is a query, for which {gallery} are ranked by cosine similarity. Images of "
            "the class of the query are relevant. Average precision is the mean of the precisions at the "
            "ranks of all relevant images, without a limit on the rank. Images with equal similarity share "
            "one rank. Recall at k is the share of the queries with a relevant image among the k most "
            f"similar images{without}",
            value=found.mean_average_precision(),
            standard_error=mean_error(precisions.tolist()),
            metrics={f"recall_{k}": found.recall(k) for k in ranks},
            selection={},
            selected_on=None,
            details={"queries": len(precisions)},
        )
    ]
