"""ZooPFL: the network is a black box; clients learn to change what goes in and to read what comes out.

Source: Lu et al. 2023, arXiv:2310.05143, sections 3.2 to 3.5, as reconstructed in specs/federated.md section 8 (no code
was published).
An auto-encoder of the input (``wearfleet_models.surgery``) is trained on reconstruction for ``reconstruction_rounds``
rounds. Then its decoder stays as it is, and every round trains the encoder and the client's code by estimated gradients
(the network is only asked, never differentiated), and after that a linear layer behind the logits by true ones.
The estimate is of the derivative with respect to what the decoder takes, h + k numbers, and is carried on through the
encoder exactly.
Differs: the black box is the device's own frozen network, asked within the plan (no service on the internet is called,
so there is nothing to pay and no window leaves the device); the decoder travels in all rounds, though it changes only
in the first ones; a window's estimate uses the same directions as the others of its batch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Final, cast

import numpy as np
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.plan import Loop
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec

from wearfleet_cloud.federated.aggregate import Arrays, Averaged, Contribution
from wearfleet_cloud.federated.base import ADDITIONS, AveragingStrategy, StrategyInfo
from wearfleet_cloud.federated.server_optimiser import check_positive

if TYPE_CHECKING:
    from torch import Tensor
    from wearfleet_models.classifier import Classifier
    from wearfleet_models.surgery import InputSurgery

    from wearfleet_cloud.federated.client_program import ClientPhase, ClientProgram
    from wearfleet_cloud.federated.client_steps import Tensors

__all__ = ["ZooPFL"]

_OPERATING: Final = "operating"
"""1 when reconstruction is over: sent to all."""
_BUILDING: Final = "building"
_ROUNDS: Final = "rounds"
_ESTIMATORS: Final = ("coordinate", "random")
_CODE: Final = "surgery.code"


@dataclass(frozen=True, slots=True)
class ZooPFL(AveragingStrategy):
    """Zeroth-order personalisation of a black box.

    Args:
        width: h, numbers that the encoder leaves of a window.
        code_width: k, numbers of a client's own.
        reconstruction_rounds: rounds for the auto-encoder, at least 1.
        estimator: ``coordinate`` (central differences in each number: 2 (h + k) queries a window and step) or
            ``random`` (forward differences along random signs: directions + 1 queries).
        directions: of ``random``, at least 1.
        radius: of the differences, in standard deviations of the numbers; above 0.
        code_learning_rate: of the client's code.
        remap_learning_rate: of the layer behind the logits.

    Raises:
        ConfigError: a hyper-parameter is out of range.
    """

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="zoopfl",
        paper="Lu et al. 2023, arXiv:2310.05143",
        uploaded=(TensorRole.SHARED, TensorRole.AUX),
        kept_local=(TensorRole.HEAD, TensorRole.CLIENT_EMB),
        composes_with=tuple(a for a in ADDITIONS if a != "record_dp"),
        phases=("evaluate_before", "begin", "reconstruct", "operate", "remap", "evaluate_after"),
        hyper_parameters={
            "width": "numbers that the encoder leaves of a window",
            "code_width": "numbers of a client's own beside them",
            "reconstruction_rounds": "rounds for the auto-encoder before the network is asked, >= 1",
            "estimator": "coordinate (2 (width + code_width) queries a window and step) or random (directions + 1)",
            "directions": "of the random estimator, >= 1",
            "radius": "of the differences, in standard deviations of the numbers; above 0",
            "code_learning_rate": "of the client's own numbers, above 0",
            "remap_learning_rate": "of the layer behind the logits, above 0",
        },
        kept_beside=("its code", "the layer behind the logits"),
    )
    width: int = 32
    code_width: int = 8
    reconstruction_rounds: int = 10
    estimator: str = "coordinate"
    directions: int = 10
    radius: float = 5e-3
    code_learning_rate: float = 0.01
    remap_learning_rate: float = 0.01

    def __post_init__(self) -> None:
        check_positive(
            "ZooPFL",
            radius=self.radius,
            code_learning_rate=self.code_learning_rate,
            remap_learning_rate=self.remap_learning_rate,
        )
        for name in ("width", "code_width", "reconstruction_rounds", "directions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} of ZooPFL must be at least 1, got {getattr(self, name)}")
        if self.estimator not in _ESTIMATORS:
            raise ConfigError(
                f"estimator of ZooPFL must be {' or '.join(_ESTIMATORS)}, got {self.estimator!r}"
            )

    def network(self, model: "Classifier", seed: int) -> "Classifier":
        """The frozen model with an auto-encoder before it and a layer behind it."""
        from wearfleet_models.classifier import derived  # noqa: PLC0415  see AveragingStrategy

        return derived(
            model, seed, frozen="backbone-and-head", surgery=self.width, code_width=self.code_width
        )

    def client(self, model: "Classifier") -> "ClientProgram":
        """Reconstruct, or operate on the input and then read the output anew.

        Raises:
            ConfigError: the model has no auto-encoder of this width, or is not frozen.
        """
        from wearfleet_cloud.federated.client_program import (  # noqa: PLC0415  see AveragingStrategy
            measured,
            model_specs,
            training_phase,
        )

        spec = model.spec
        if (spec.surgery, spec.code_width, spec.frozen) != (self.width, self.code_width, "backbone-and-head"):
            raise ConfigError(
                "ZooPFL needs an auto-encoder of its width on a frozen model; derive one from a trained model "
                "(ZooPFL.network)"
            )
        build, build_slots = self._reconstruct(model)
        operate, operate_slots = self._operate(model)
        remap, remap_slots = training_phase(
            model,
            replace(self.local, learning_rate=self.remap_learning_rate),
            name="remap",
            roles=(TensorRole.HEAD,),
        )
        switch = TensorSpec(_OPERATING, "float32", (), TensorRole.AUX, TensorGroup.ANCHOR, "global")
        own = (switch, replace(switch, name=_BUILDING, origin="zeros", group=TensorGroup.OPTIMISER))
        specs = (*model_specs(model, self.info.kept_local), *build_slots, *operate_slots, *remap_slots, *own)
        phases = (
            self._begin(),
            replace(build, when=_BUILDING),
            replace(operate, when=_OPERATING),
            replace(remap, when=_OPERATING),
        )
        return measured(model, self.local, specs, phases)

    def server(
        self,
        specs: Sequence[TensorSpec],
        current: Arrays,
        state: Arrays,
        contributions: Iterable[Contribution],
    ) -> Averaged:
        """The mean of encoders and decoders; after the rounds of reconstruction, the word that they are over.

        Raises:
            AggregationError: as ``Averaging.combine``.
        """
        averaged = AveragingStrategy.server(self, specs, current, state, contributions)
        rounds = int(state.get(_ROUNDS, np.int64(0))) + 1
        over = np.asarray(rounds >= self.reconstruction_rounds, np.float32)
        return replace(
            averaged,
            tensors={**averaged.tensors, _OPERATING: over},
            state={_ROUNDS: np.asarray(rounds, np.int64)},
        )

    def _begin(self) -> "ClientPhase":
        """One step that says whether the auto-encoder is still to be built."""
        from wearfleet_cloud.federated.client_program import ClientPhase  # noqa: PLC0415  see AveragingStrategy

        once = Loop("train", self.local.batch_size, 1, 1, shuffle=False)
        return ClientPhase("begin", lambda given: {_BUILDING: 1.0 - given[_OPERATING]}, once, ())

    def _reconstruct(self, model: "Classifier") -> tuple["ClientPhase", tuple[TensorSpec, ...]]:
        """Gradient steps of encoder and decoder on the mean squared difference of windows, both standardised."""
        from torch.func import grad  # noqa: PLC0415  see AveragingStrategy

        from wearfleet_cloud.federated.client_program import optimised_phase  # noqa: PLC0415
        from wearfleet_cloud.federated.client_steps import weighted_mean  # noqa: PLC0415

        parts = _Parts(model)

        def direction(params: "Tensors", given: "Tensors") -> tuple["Tensors", "Tensors", "Tensors"]:
            window = parts.standardised(given, given["x"])

            def loss(params: "Tensors") -> "Tensor":
                now = {**given, **params}
                apart = (parts.decoded(now, parts.encoded(now, window)) - window) ** 2
                return weighted_mean(apart.flatten(1).mean(dim=1), given)

            return grad(loss)(params), {}, {}

        roles = (TensorRole.SHARED, TensorRole.AUX)
        return optimised_phase(model, self.local, direction, name="reconstruct", roles=roles)

    def _operate(self, model: "Classifier") -> tuple["ClientPhase", tuple[TensorSpec, ...]]:
        """Steps of the encoder, and of the client's code, along an estimated gradient."""
        from torch.func import grad  # noqa: PLC0415  see AveragingStrategy

        from wearfleet_cloud.federated.client_program import optimised_phase  # noqa: PLC0415
        from wearfleet_cloud.federated.client_steps import weighted_mean  # noqa: PLC0415

        parts = _Parts(model)

        def direction(params: "Tensors", given: "Tensors") -> tuple["Tensors", "Tensors", "Tensors"]:
            window = parts.standardised(given, given["x"])
            numbers = parts.encoded(given, window)
            slopes = self._slopes(parts, numbers, given)

            def along(moving: "Tensors") -> "Tensor":
                reached = parts.encoded({**given, **moving}, window)
                return weighted_mean((slopes * reached).sum(dim=1), given)

            moving = {**params, _CODE: given[_CODE]}
            grads = grad(along)(moving)
            code = given[_CODE] - given["code_learning_rate"] * grads.pop(_CODE)
            return grads, {_CODE: code}, {}

        return optimised_phase(
            model,
            self.local,
            direction,
            name="operate",
            roles=(TensorRole.SHARED,),
            scalars=(("code_learning_rate", self.code_learning_rate),),
        )

    def _slopes(self, parts: "_Parts", numbers: "Tensor", given: "Tensors") -> "Tensor":
        """(B, h + k) estimated derivative of each window's loss with respect to its numbers."""
        import torch  # noqa: PLC0415  see AveragingStrategy
        from wearfleet_models.randomness import uniform  # noqa: PLC0415

        size = numbers.shape[1]
        spread = ((numbers - numbers.mean()) ** 2).mean().sqrt().detach()
        radius = self.radius * torch.clamp(spread, min=1e-6)
        if self.estimator == "coordinate":
            places = torch.arange(size, device=numbers.device)
            steps = (places[:, None] == places[None, :]).to(numbers.dtype)
            above = parts.losses(given, numbers[None] + radius * steps[:, None])
            below = parts.losses(given, numbers[None] - radius * steps[:, None])
            return ((above - below) / (2.0 * radius)).T
        signs = torch.where(uniform(given["rng"], 0, (self.directions, size)) < 0.5, -1.0, 1.0)
        steps = signs.to(numbers.dtype)
        above = parts.losses(given, numbers[None] + radius * steps[:, None])
        here = parts.losses(given, numbers[None])
        return ((above - here) / radius).T @ steps / self.directions


class _Parts:
    """The parts of a model as functions of named tensors; the network is only asked."""

    def __init__(self, model: "Classifier") -> None:
        import copy  # noqa: PLC0415

        from wearfleet_cloud.federated.client_steps import called  # noqa: PLC0415  see AveragingStrategy

        network = copy.deepcopy(model).eval()
        surgery = cast("InputSurgery", network.surgery)
        self.standardised = called(network, network.standardise)
        self.encoded = called(network, surgery.encode)
        self.decoded = called(network, surgery.decode)
        self._answer = called(network, lambda numbers: _answer(network, surgery.decode(numbers)))

    def losses(self, given: "Tensors", numbers: "Tensor") -> "Tensor":
        """(Q, B, h + k) -> (Q, B) cross-entropies of the batch's windows, asked with these numbers."""
        from wearfleet_cloud.federated.client_steps import cross_entropy  # noqa: PLC0415  see AveragingStrategy

        logits = self._answer(given, numbers.flatten(0, 1))
        labels = (given["y"][None] + given["y"].new_zeros(numbers.shape[0], 1)).flatten()
        return cross_entropy(logits, labels).reshape(numbers.shape[:2]).detach()


def _answer(network: "Classifier", window: "Tensor") -> "Tensor":
    """(N, C, T) standardised -> logits (N, K): the black box and the layer behind it."""
    return network.classify(network.neck(network.backbone(window, None, None), None))
