"""ZooPFL: estimated gradients against true ones, what each stage changes, and what stays with a client."""

import numpy as np
import pytest
import torch
from oracles.edge_rounds import Federation
from oracles.small_federation import model, splits
from torch import Tensor
from torch.func import grad
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.client_steps import cross_entropy
from wearfleet_cloud.federated.zoopfl import ZooPFL, _Parts
from wearfleet_models import Classifier, tensor_roles
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import TensorRole

SPLITS = {"anna": splits(1, 45, 21), "ben": splits(2, 40, 30)}
OPTIONS = {"width": 6, "code_width": 2, "batch_size": 16, "learning_rate": 0.05, "reconstruction_rounds": 1}


def strategy(**options: object) -> ZooPFL:
    made = create_strategy("zoopfl", {**OPTIONS, **options})
    assert isinstance(made, ZooPFL)
    return made


def network(of: ZooPFL) -> Classifier:
    return of.network(model("cnn"), seed=3)


def given_of(built: Classifier) -> dict[str, Tensor]:
    data = SPLITS["anna"]["train"]
    state = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in built.state_dict().items()
    }
    return {
        **state,
        "x": torch.from_numpy(data.x[:16]).double(),
        "y": torch.from_numpy(data.y[:16]),
        "weight": torch.ones(16, dtype=torch.float64),
        "rng": torch.tensor(11),
    }


def true_slopes(parts: _Parts, numbers: Tensor, given: dict[str, Tensor]) -> Tensor:
    """By automatic differentiation of what the estimator may only ask."""

    def loss(numbers: Tensor) -> Tensor:
        return cross_entropy(parts._answer(given, numbers), given["y"]).sum()

    return grad(loss)(numbers)


def test_central_differences_are_the_true_gradient_up_to_the_square_of_the_radius() -> None:
    errors = []
    for radius in (1e-2, 1e-4):
        made = strategy(radius=radius)
        built = network(made).double()
        parts, given = _Parts(built), given_of(built)
        numbers = parts.encoded(given, parts.standardised(given, given["x"]))
        slopes = made._slopes(parts, numbers, given)
        errors.append(float((slopes - true_slopes(parts, numbers, given)).norm()))
        assert slopes.shape == (16, 8)
        size = float(true_slopes(parts, numbers, given).norm())
    # a smooth function's would be 1e-4 of the first; a kink of ReLU or of the pool within the radius spoils a window
    assert errors[1] < errors[0] / 3
    assert errors[1] < 5e-3 * size


@pytest.mark.slow
def test_random_directions_estimate_the_gradient_without_bias() -> None:
    made = strategy(estimator="random", directions=4000, radius=1e-5)
    built = network(made).double()
    parts, given = _Parts(built), given_of(built)
    numbers = parts.encoded(given, parts.standardised(given, given["x"]))
    truth = true_slopes(parts, numbers, given)
    estimate = made._slopes(parts, numbers, given)
    # each number's estimate has variance at most ||g||^2 / directions for signs
    bound = 5.0 * truth.norm(dim=1, keepdim=True) / np.sqrt(4000)
    assert bool(((estimate - truth).abs() <= bound + 1e-3).all())


@pytest.mark.slow
def test_the_first_rounds_build_the_auto_encoder_and_later_ones_leave_its_decoder() -> None:
    made = strategy()
    federation = Federation(made, network(made), SPLITS)
    roles = tensor_roles(federation.network)
    decoder = [name for name, role in roles.items() if role == TensorRole.AUX]
    encoder = [name for name, role in roles.items() if role == TensorRole.SHARED]
    frozen = [name for name, role in roles.items() if role == TensorRole.FROZEN]
    start = dict(federation.tensors)
    assert len(decoder) == len(encoder) == 4

    def changed(names: list[str], before: dict[str, np.ndarray]) -> set[str]:
        return {name for name in names if not np.array_equal(federation.tensors[name], before[name])}

    federation.round()
    assert changed(decoder, start) == set(decoder)
    assert changed(encoder, start) == set(encoder)
    assert all(not federation.local[c]["surgery.code"].any() for c in SPLITS)
    middle = dict(federation.tensors)
    federation.round()
    assert changed(decoder, middle) == set()
    assert changed(encoder, middle) == set(encoder)
    assert changed(frozen, start) == set()
    codes = [federation.local[client]["surgery.code"] for client in SPLITS]
    layers = [federation.local[client]["remap.weight"] for client in SPLITS]
    assert codes[0].any()
    assert not np.array_equal(codes[0], codes[1])
    assert not np.array_equal(layers[0], layers[1])
    assert {s.name for s in federation.plan.upload_specs()} == {*decoder, *encoder}


def test_reconstruction_gets_better_with_every_round() -> None:
    made = strategy(reconstruction_rounds=5, learning_rate=0.2, epochs=4)
    built = network(made)
    federation, parts = Federation(made, built, SPLITS), _Parts(built)

    def error() -> float:
        tensors = {n: torch.from_numpy(np.array(federation.tensors[n])) for n in built.state_dict()}
        x = parts.standardised(tensors, torch.from_numpy(SPLITS["anna"]["holdout"].x))
        return float(((parts.decoded(tensors, parts.encoded(tensors, x)) - x) ** 2).mean())

    errors = [error()]
    for _ in range(3):
        federation.round()
        errors.append(error())
    assert errors == sorted(errors, reverse=True)


def test_at_first_the_layer_behind_the_network_changes_nothing() -> None:
    plain, built = model("cnn").eval(), network(strategy()).eval()
    x = torch.from_numpy(SPLITS["anna"]["holdout"].x)
    embedding = plain.features(x)
    torch.testing.assert_close(built.classify(embedding), plain(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [{"width": 0}, {"radius": 0.0}, {"estimator": "guess"}, {"directions": 0}, {"code_learning_rate": -1}],
)
def test_what_is_out_of_range_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        strategy(**options)


def test_another_model_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match="derive one"):
        strategy().client(model("cnn"))
