"""FedNova as its paper writes it: directions, normalisers found by running the solver, one number at a time."""


def solver_length(steps: int, rate: float, momentum: float, mu: float) -> float:
    """How far the solver gets on a gradient that is always 1, in units of the rate: the sum of its coefficients."""
    y = velocity = 0.0
    for _ in range(steps):
        velocity = momentum * velocity + (1.0 + mu * y)
        y -= rate * velocity
    return -y / rate


def aggregate(
    x: list[float], clients: list[tuple[int, int, list[float]]], rate: float, momentum: float, mu: float
) -> list[float]:
    """Clients are (windows, steps, local model)."""
    clients = [client for client in clients if client[1] > 0]
    total = sum(windows for windows, _, _ in clients)
    lengths = [solver_length(steps, rate, momentum, mu) for _, steps, _ in clients]
    effective = sum(n / total * a for (n, _, _), a in zip(clients, lengths, strict=True))
    return [
        x[i]
        - effective
        * sum(n / total * (x[i] - y[i]) / a for (n, _, y), a in zip(clients, lengths, strict=True))
        for i in range(len(x))
    ]
