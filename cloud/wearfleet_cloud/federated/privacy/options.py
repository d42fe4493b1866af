"""What an operator asks of differential privacy: where noise is added, how much, and what a wearer may spend."""

import math
from dataclasses import dataclass
from typing import Final

from wearfleet_protos.errors import ConfigError

__all__ = ["RECORD_CLIP", "RECORD_SIGMA", "PrivacyOptions", "RecordPrivacy"]

RECORD_CLIP: Final = "record_clip"
RECORD_SIGMA: Final = "record_sigma"
"""Names of the scalars of a plan that say C and z C."""

_PLACES: Final = ("off", "central", "local", "record")


@dataclass(frozen=True, slots=True)
class RecordPrivacy:
    """DP-SGD on the device.

    Args:
        clip: C, largest norm of the gradient of one window.
        sigma: z C, standard deviation of the noise in the sum of a step's gradients.
        sampling_rate: q, probability of a window to be in a step's batch.
        steps: of a round.
    """

    clip: float
    sigma: float
    sampling_rate: float
    steps: int


@dataclass(frozen=True, slots=True)
class PrivacyOptions:
    """Differential privacy of a run; ``dp=off`` leaves everything as it is.

    Args:
        dp: ``off``; ``central`` (the server clips every client's difference and adds noise to their sum); ``local``
            (every device clips and noises its own difference before it sends it); or ``record`` (every device clips
            the gradient of every window and noises every step: protects a window, not a client).
        noise_multiplier: z, standard deviation of the noise over what one client (under ``record``: one window) can
            change: the clip in a sum, twice the clip where a device's own update is replaced by another; 0 for none.
        clip: C, largest norm of a client's difference (under ``record``: of a window's gradient) over all parameters
            together; above 0, may be inf.
        adaptive_clip: ``on`` moves C towards the median norm of the differences, beginning with ``clip``.
        expected_cohort: the fixed denominator: how many updates a round is expected to have.
        count_noise: standard deviation of the noise in the count of updates that adaptive clipping uses; 0 for a
            twentieth of ``expected_cohort``.
        sampling_rate: q, probability of a window to be in the batch of a step, under ``record``.
        record_steps: noised steps of a round, under ``record``; 0 for 1 / q, so that every window is expected once.
        dp_delta: probability that the stated epsilon does not hold; less than one over the number of wearers.
        max_epsilon: a wearer whose budget another round would exceed is not asked; inf for no limit.

    Raises:
        ConfigError: a value is out of range, or values contradict each other.
    """

    dp: str = "off"
    noise_multiplier: float = 1.0
    clip: float = 1.0
    adaptive_clip: str = "off"
    expected_cohort: int = 0
    count_noise: float = 0.0
    sampling_rate: float = 0.1
    record_steps: int = 0
    dp_delta: float = 1e-5
    max_epsilon: float = math.inf

    def __post_init__(self) -> None:
        if self.dp not in _PLACES:
            raise ConfigError(f"dp must be {', '.join(_PLACES)}, got {self.dp!r}")
        if self.adaptive_clip not in ("on", "off"):
            raise ConfigError(f"adaptive_clip must be on or off, got {self.adaptive_clip!r}")
        if not 0.0 <= self.noise_multiplier < math.inf:
            raise ConfigError(f"noise_multiplier must be at least 0, got {self.noise_multiplier}")
        if not self.clip > 0.0 or not 0.0 < self.dp_delta < 1.0 or not self.max_epsilon > 0.0:
            raise ConfigError(
                "clip and max_epsilon must be above 0 and dp_delta between 0 and 1, "
                f"got {self.clip}, {self.max_epsilon} and {self.dp_delta}"
            )
        if self.dp == "central":
            self._check_central()
        if self.dp in ("local", "record") and (math.isinf(self.clip) or self.adaptive_clip == "on"):
            raise ConfigError(
                f"dp={self.dp} needs a fixed, finite clip; set clip and leave adaptive_clip off"
            )
        if not 0.0 < self.sampling_rate <= 1.0 or self.record_steps < 0:
            raise ConfigError(
                "sampling_rate must be above 0 and at most 1 and record_steps at least 0, "
                f"got {self.sampling_rate}, {self.record_steps}"
            )

    @property
    def addition(self) -> str:
        """Its name in ``StrategyInfo.composes_with``; empty when it is off."""
        return {"central": "central_dp", "local": "local_dp", "record": "record_dp"}.get(self.dp, "")

    @property
    def record(self) -> RecordPrivacy | None:
        """What a device does in every step; None where single windows are not protected."""
        if self.dp != "record":
            return None
        steps = self.record_steps or math.ceil(1.0 / self.sampling_rate - 1e-9)
        return RecordPrivacy(self.clip, self.clip * self.noise_multiplier, self.sampling_rate, steps)

    @property
    def device_clip(self) -> float:
        """To what norm devices clip; 0 where they do not."""
        return self.clip if self.dp == "local" else 0.0

    @property
    def device_noise(self) -> float:
        """Standard deviation of a device's own noise."""
        return 2.0 * self.clip * self.noise_multiplier if self.dp == "local" else 0.0

    @property
    def bit_noise(self) -> float:
        """sigma_b, standard deviation of the noise in the count of unclipped updates."""
        return (self.count_noise or self.expected_cohort / 20.0) if self.noise_multiplier else 0.0

    @property
    def sum_noise(self) -> float:
        """Noise in the sum, in units of the clip: z, or z_delta = (z^-2 - (2 sigma_b)^-2)^-1/2 beside a noised count.

        Source: Andrew et al. 2021, arXiv:1905.03871, theorem 1: both releases are together one Gaussian of z.
        """
        if self.adaptive_clip == "off" or not self.noise_multiplier:
            return self.noise_multiplier
        return float((self.noise_multiplier**-2 - (2.0 * self.bit_noise) ** -2) ** -0.5)

    def _check_central(self) -> None:
        if self.expected_cohort < 1:
            raise ConfigError(
                "dp=central divides by a fixed number of updates; set expected_cohort to how many a round should have"
            )
        if self.noise_multiplier and math.isinf(self.clip):
            raise ConfigError("noise needs a finite clip: its size is noise_multiplier times clip")
        if self.adaptive_clip == "on":
            if math.isinf(self.clip):
                raise ConfigError("adaptive_clip begins with clip, which must be finite")
            if self.noise_multiplier and not self.noise_multiplier < 2.0 * self.bit_noise:
                raise ConfigError(
                    f"adaptive_clip needs noise_multiplier below {2.0 * self.bit_noise:g}, twice the noise of the "
                    f"count, got {self.noise_multiplier:g}; raise expected_cohort or count_noise"
                )
