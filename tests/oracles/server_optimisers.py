"""Server optimisers one number at a time, in Python floats, straight from the paper's lines."""

import math

Numbers = list[float]


class Oracle:
    """The server of one algorithm over a vector; ``aggregate`` is one round."""

    def __init__(self, name: str, x: Numbers, options: dict[str, float]) -> None:
        self.name, self.x, self.options = name, list(x), options
        self.m = [0.0] * len(x)
        self.v = [options.get("tau", 0.0) ** 2] * len(x)
        self.count = 0

    def aggregate(self, updates: list[tuple[int, Numbers]]) -> Numbers:
        """Updates are (number of windows, difference)."""
        total = sum(n for n, _ in updates)
        self.count += 1
        for i in range(len(self.x)):
            delta = sum(n / total * update[i] for n, update in updates)
            self.x[i] += self._fedavgm(i, delta) if self.name == "fedavgm" else self._adaptive(i, delta)
        return self.x

    def _fedavgm(self, i: int, delta: float) -> float:
        self.m[i] = self.options["server_momentum"] * self.m[i] + delta
        return self.options["server_learning_rate"] * self.m[i]

    def _adaptive(self, i: int, delta: float) -> float:
        beta1, beta2 = self.options["beta1"], self.options.get("beta2", 0.0)
        self.m[i] = beta1 * self.m[i] + (1 - beta1) * delta
        square = delta**2
        if self.name == "fedadagrad":
            self.v[i] += square
        elif self.name == "fedadam":
            self.v[i] = beta2 * self.v[i] + (1 - beta2) * square
        else:
            sign = (self.v[i] > square) - (self.v[i] < square)
            self.v[i] -= (1 - beta2) * square * sign
        rate = self.options["server_learning_rate"]
        if self.options.get("bias_correction"):
            rate *= math.sqrt(1 - beta2**self.count) / (1 - beta1**self.count)
        return rate * self.m[i] / (math.sqrt(self.v[i]) + self.options["tau"])
