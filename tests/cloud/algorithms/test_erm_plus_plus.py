"""ERM++: which mean of the weights predicts, and what the warm-up of strict mode leaves still."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from algorithm_cases import batch, build, model, step
from torch import Tensor
from wearfleet_cloud.algorithms import Algorithm, State
from wearfleet_cloud.training.optimisers import Adam, Sgd


def _network(state: State) -> dict[str, Tensor]:
    return {n: t for n, t in (*state.params.items(), *state.buffers.items()) if t.is_floating_point()}


def _run(algorithm: Algorithm, steps: int, **values: float) -> list[State]:
    """The states after every step."""
    states, given = [algorithm.init()], batch(algorithm)
    for number in range(steps):
        states.append(step(algorithm, states[-1], given, number, **values)[0])
    return states


def test_the_network_itself_is_that_of_erm() -> None:
    ours, erm = _run(build("erm-plus-plus", Sgd()), 3)[-1], _run(build("erm", Sgd()), 3)[-1]
    torch.testing.assert_close(_network(ours), _network(erm), rtol=0.0, atol=0.0)


def test_the_strict_average_is_the_plain_mean_that_begins_with_the_step_before() -> None:
    """T10: with averaging from update 6 on, the mean of the networks after updates 5, 6, ..., each counted once."""
    algorithm = build("erm-plus-plus", Sgd(momentum=0.9), {"mode": "strict"})
    states = _run(algorithm, 9, linear_steps=-1.0, average_from=6.0)
    for made in range(1, 10):
        kept = algorithm.inference(states[made])
        counted = [_network(state) for state in states[min(made, 5) : made + 1]]
        mean = {n: torch.stack([one[n].double() for one in counted]).mean(0) for n in counted[0]}
        # five updates of the mean in float32 round by 6e-8 each
        torch.testing.assert_close({n: kept[n].double() for n in mean}, mean, rtol=1e-6, atol=1e-6)
    assert "backbone.norm1.running_mean" in mean


def test_the_corrected_average_forgets_polynomially() -> None:
    """theta_k counts with c_k prod_(j > k) (1 - c_j), which for whole ``tail`` is a ratio of binomial coefficients."""
    algorithm = build("erm-plus-plus", Sgd(momentum=0.9))
    steps, tail = 7, 3
    states = _run(algorithm, steps, tail=float(tail))
    rising = [_product(k, k + tail) for k in range(1, steps + 1)]  # k (k + 1) ... (k + tail - 1)
    shares = [value / sum(rising) for value in rising]
    kept, networks = algorithm.inference(states[-1]), [_network(state) for state in states[1:]]
    mean = {n: sum(s * one[n].double() for s, one in zip(shares, networks, strict=True)) for n in networks[0]}
    torch.testing.assert_close({n: kept[n].double() for n in mean}, mean, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(kept["head.weight"], states[-1].params["head.weight"], rtol=1e-3)


def test_the_strict_warm_up_moves_the_head_alone_and_then_starts_the_optimiser_anew() -> None:
    algorithm = build("erm-plus-plus", Adam(), {"mode": "strict"})
    states = _run(algorithm, 4, linear_steps=1.0)
    for made in (1, 2):
        before, after = states[made - 1], states[made]
        moved = {n for n, p in after.params.items() if not torch.equal(p, before.params[n])}
        assert moved == {"head.weight", "head.bias"}
        assert not torch.equal(
            after.buffers["backbone.norm1.running_mean"], before.buffers["backbone.norm1.running_mean"]
        )
    assert [float(state.slots["adam_step"]) for state in states] == [0.0, 1.0, 2.0, 1.0, 2.0]
    fresh = states[2]._replace(slots=Adam().init(states[2].params))
    erm, _ = step(build("erm", Adam()), fresh, batch(algorithm), 2)
    torch.testing.assert_close(states[3].params, erm.params, rtol=0.0, atol=0.0)


def test_the_warm_up_is_that_of_an_optimiser_of_the_head() -> None:
    algorithm = build("erm-plus-plus", Adam(weight_decay=0.01), {"mode": "strict"})
    states, reference = _run(algorithm, 3, linear_steps=2.0), model().train()
    optimiser = torch.optim.Adam(reference.head.parameters(), 0.05, weight_decay=0.01)
    given = batch(algorithm)
    for _ in range(3):
        optimiser.zero_grad()
        F.cross_entropy(reference(given.x.flatten(0, 1)), given.y.flatten()).backward()
        optimiser.step()
    kept = {n: states[3].params[n] for n, _ in reference.named_parameters()}
    torch.testing.assert_close(kept, dict(reference.named_parameters()), rtol=1e-5, atol=1e-6)


def _product(first: int, last: int) -> int:
    value = 1
    for factor in range(first, last):
        value *= factor
    return value
