"""SOT: carry the labels of clusters of source windows to clusters of one target's windows, by optimal transport.

Transductive: it needs all windows of the target, unlabelled, and predicts these windows only.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the usual name

from wearfleet_cloud.algorithms.base import CORRECTED, MODES, AlgorithmInfo, Tensors, TrainingWindows
from wearfleet_cloud.algorithms.erm import Erm
from wearfleet_cloud.algorithms.passes import embed
from wearfleet_cloud.kernels.sinkhorn import group_lasso_plan

__all__ = ["Sot", "carry_labels", "label_centres", "statistics", "substructures", "transport"]

_MOST_COMPONENTS: Final = 20
"""Of one class: the published search for the number of components has no end of its own (pitfall P30)."""
_CHUNK: Final = 1024
_BANDS: Final = 4


class _Mixture(Protocol):
    """What is used of ``sklearn.mixture.GaussianMixture``: (k, p) means, (k,) weights, classes, criterion."""

    means_: NDArray[np.float64]
    weights_: NDArray[np.float64]

    def predict(self, x: NDArray[np.float64]) -> NDArray[np.int64]: ...

    def bic(self, x: NDArray[np.float64]) -> float: ...


@dataclass(frozen=True, slots=True)
class Sot(Erm):
    """Classes of the target's windows by substructural optimal transport; the network is trained by ERM beside it.

    1. Source substructures: per class a mixture of Gaussians with diagonal covariance, with 1, 2, ... components until
       BIC rises; target substructures: one mixture of ``clusters`` components.
    2. M_ij = |A_i - B_j|^2 over its median, between the means. b_j: weights of the target's components. Source
       weights a_i = sum_j b_j softmax_i(-M_ij / relaxation), the closed form of a transport that fixes b alone.
    3. Group-sparse entropic transport of a to b with regularisation ``epsilon`` and ``eta`` (``kernels/sinkhorn``).
    4. A_i moves to the mean of the B_j that it is sent to; B_j takes the class of the nearest moved A_i, a window that
       of its most probable component.

    Features "statistics": fixed statistics of a window's channels. Features "network": embeddings of the trained
    network. **Needs the target's windows, unlabelled**: scores on the target are those of a person whose recording was
    at hand, which no other algorithm here sees. What is exported is the network, which had no part of it.

    Source: Lu et al. 2021, arXiv:2102.03353, algorithm 1; specs/ood.md 3.7.
    Differs: mode "strict" divides every column of source and target by its maximum, whatever its sign, and gives all
    target clusters the same weight, as the published code does (pitfall P30); "corrected" standardises columns, source
    and target by themselves, and uses the components' weights. Both are seeded and stop at 20 components a class.
    Transport in the log domain cannot break down, so there is no fallback.
    """

    features: str = "statistics"
    mode: str = CORRECTED
    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        name="sot",
        title="SOT (transductive)",
        paper="Lu et al. 2021, arXiv:2102.03353",
        family="domain adaptation",
        needs=("unlabelled target data",),
        forward="joint",
        inference="backbone + head, trained by ERM; the transductive predictions are not part of it",
        hyper={"clusters": 200.0, "epsilon": 0.1, "eta": 0.1, "relaxation": 0.1},
        options={"features": ("statistics", "network"), "mode": MODES},
        alone="it looks at all windows of one target after training",
    )

    def transduce(
        self, tensors: Tensors, data: TrainingWindows, target: Tensor, hyper: Mapping[str, Tensor]
    ) -> Tensor:
        """As ``Algorithm.transduce``: classes of all windows of the target."""
        source = self._features(tensors, data.windows, data.y.shape[0])
        unlabelled = self._features(tensors, lambda part: target[part], target.shape[0])
        given = {name: float(value) for name, value in hyper.items()}
        found = carry_labels(source, data.y.cpu().numpy(), unlabelled, given, strict=self.mode != CORRECTED)
        return torch.from_numpy(found).to(target.device)

    def _features(
        self, tensors: Tensors, windows: Callable[[slice], Tensor], count: int
    ) -> NDArray[np.float64]:
        """(N, p) of N windows, chunk by chunk, in evaluation mode."""
        parts = [slice(first, first + _CHUNK) for first in range(0, count, _CHUNK)]
        if self.features == "statistics":
            return torch.cat([statistics(windows(part)) for part in parts]).double().cpu().numpy()
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                found = [embed(self.model, tensors, {}, windows(part), None, None)[0] for part in parts]
        finally:
            self.model.train(training)
        return torch.cat(found).double().cpu().numpy()


def statistics(x: Tensor) -> Tensor:
    """Mean, standard deviation, least, largest, mean square, and share of the power in four bands, of every channel.

    Args:
        x: (N, C, T) windows, T >= 8.

    Returns:
        (N, 9 C); the bands are quarters of the frequencies above 0, their shares are 0 where there is no power.
    """
    power = torch.fft.rfft(x, dim=-1)[..., 1:].abs().square()
    bands = torch.stack([band.sum(dim=-1) for band in power.tensor_split(_BANDS, dim=-1)], dim=-1)
    shares = bands / bands.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    moments = (x.mean(-1), x.std(-1, correction=0), x.amin(-1), x.amax(-1), x.square().mean(-1))
    return torch.cat([torch.stack(moments, dim=-1), shares], dim=-1).flatten(1)


def carry_labels(
    source: NDArray[np.float64],
    y: NDArray[np.int64],
    target: NDArray[np.float64],
    hyper: Mapping[str, float],
    *,
    strict: bool,
) -> NDArray[np.int64]:
    """Classes of the target's windows.

    Args:
        source: (n, p) features.
        y: (n,) classes.
        target: (m, p) features.
        hyper: "clusters" (at most m), "epsilon", "eta", "relaxation".
        strict: with the defects of the published code.

    Returns:
        (m,).
    """
    source, target = _scaled(source, strict=strict), _scaled(target, strict=strict)
    known, classes = substructures(source, y)
    mixture = _mixture(target, min(int(hyper["clusters"]), len(target)))
    share = np.full(len(mixture.weights_), 1.0 / len(mixture.weights_)) if strict else mixture.weights_
    return label_centres(known, classes, mixture.means_, share, hyper)[mixture.predict(target)]


def substructures(
    x: NDArray[np.float64], y: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Centres (m, p) of the mixture of every class of windows (n, p), and their classes (m,)."""
    means, classes = [], []
    for label in np.unique(y):
        own = x[y == label]
        best = _mixture(own, 1)
        for components in range(2, min(_MOST_COMPONENTS, len(own)) + 1):
            more = _mixture(own, components)
            if more.bic(own) >= best.bic(own):
                break
            best = more
        means.append(best.means_)
        classes.append(np.full(len(best.means_), label))
    return np.concatenate(means), np.concatenate(classes)


def label_centres(
    known: NDArray[np.float64],
    classes: NDArray[np.int64],
    target: NDArray[np.float64],
    share: NDArray[np.float64],
    hyper: Mapping[str, float],
) -> NDArray[np.int64]:
    """Classes (d,) of the target's centres; arguments as for :func:`transport`."""
    plan = transport(known, classes, target, share, hyper)
    moved = plan @ target / np.maximum(plan.sum(axis=1, keepdims=True), 1e-30)
    found: NDArray[np.int64] = classes[_squares(moved, target).argmin(axis=0)]
    return found


def transport(
    known: NDArray[np.float64],
    classes: NDArray[np.int64],
    target: NDArray[np.float64],
    share: NDArray[np.float64],
    hyper: Mapping[str, float],
) -> NDArray[np.float64]:
    """Plan (m, d) from the source's centres (m, p) with classes (m,) to the target's (d, p) with shares (d,)."""
    cost = _squares(known, target)
    cost /= max(float(np.median(cost)), 1e-30)
    a = F.softmax(torch.from_numpy(-cost / hyper["relaxation"]), dim=0).numpy() @ share
    plan = group_lasso_plan(
        torch.from_numpy(cost)[None],
        torch.from_numpy(classes)[None],
        epsilon=torch.tensor([hyper["epsilon"]], dtype=torch.float64),
        eta=torch.tensor([hyper["eta"]], dtype=torch.float64),
        a=torch.from_numpy(a)[None],
        b=torch.from_numpy(share)[None],
    )
    return plan[0].numpy()


def _scaled(x: NDArray[np.float64], *, strict: bool) -> NDArray[np.float64]:
    """Columns with mean 0 and deviation 1; strict: over their largest value. Constant ones (strict: 0) stay finite."""
    centre, size = (0.0, x.max(axis=0)) if strict else (x.mean(axis=0), x.std(axis=0))
    return (x - centre) / np.where(size == 0.0, 1.0, size)


def _squares(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """|first_i - second_j|^2, (m, p), (d, p) -> (m, d)."""
    squares: NDArray[np.float64] = ((first[:, None] - second[None]) ** 2).sum(axis=2)
    return squares


def _mixture(x: NDArray[np.float64], components: int) -> _Mixture:
    """Mixture of Gaussians with diagonal covariances, seeded; one that has not converged is taken as it is."""
    # A second of start-up that nobody else waits for; without types.
    from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]  # noqa: PLC0415
    from sklearn.mixture import GaussianMixture  # type: ignore[import-untyped]  # noqa: PLC0415

    x = np.repeat(x, 2, axis=0) if len(x) == 1 else x  # it refuses a single window
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found: _Mixture = GaussianMixture(components, covariance_type="diag", random_state=0).fit(x)
    return found
