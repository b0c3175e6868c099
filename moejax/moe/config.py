"""What kind of mixture of experts a layer is."""

import dataclasses

from moejax.core.errors import InputError

GATES = ("mlp", "linear")
WEIGHTINGS = ("normalized", "unnormalized", "selected")
LOAD_ESTIMATORS = ("noisy_logits", "noise_term")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """An MoE layer of XFT's kind (arXiv 2404.15247): `num_experts` in all, of which `top_k` act.

    num_experts, top_k: both count the shared expert, as the paper does; "8 experts, top 6" is
        one shared expert and 5 chosen among 7 routed ones.
    num_shared: 1, or 0 for plain sparse upcycling (arXiv 2212.05055). Expert 0 is the shared one.
    gate: "mlp" (two matrices with a tanh between) or "linear".
    weighting: how router probabilities become weights; see `moejax.moe.routing`.
    noise: whether the router has learned noise; it acts only in training (when a key is given).
    balance_weight: factor of the two balance losses, which are summed over layers.
    count_padding: whether padding tokens enter the balance losses and counts (the reference's way).
    load_estimator: "noisy_logits" (Shazeer et al. 2017, eq. 8 to 10) or "noise_term", the XFT
        code's slip (it compares the noise alone with the threshold), kept for parity.
    """

    num_experts: int
    top_k: int
    num_shared: int = 1
    gate: str = "mlp"
    weighting: str = "normalized"
    noise: bool = True
    balance_weight: float = 0.01
    count_padding: bool = False
    load_estimator: str = "noisy_logits"

    def __post_init__(self) -> None:
        _require_name("gate", self.gate, GATES)
        _require_name("weighting", self.weighting, WEIGHTINGS)
        _require_name("load_estimator", self.load_estimator, LOAD_ESTIMATORS)
        if self.num_experts < 2:
            raise InputError(f"num_experts={self.num_experts}: an MoE needs at least 2 experts.")
        if self.top_k > self.num_experts:
            raise InputError(
                f"top_k={self.top_k} is more than num_experts={self.num_experts}: choose "
                f"top_k <= {self.num_experts} or more experts."
            )
        if self.num_shared not in (0, 1):
            raise InputError(f"num_shared={self.num_shared}: there is one shared expert or none.")
        if self.top_k <= self.num_shared:
            raise InputError(
                f"top_k={self.top_k} counts the {self.num_shared} shared expert(s) and leaves none "
                f"to route: choose top_k >= {self.num_shared + 1}."
            )
        needed = 0 if self.weighting == "selected" else 1
        if self.num_shared != needed:
            raise InputError(
                f"weighting={self.weighting!r} needs num_shared={needed}, "
                f"not num_shared={self.num_shared}."
            )
        if not self.balance_weight >= 0:
            raise InputError(f"balance_weight={self.balance_weight} must be 0 or more.")

    @property
    def num_routed(self) -> int:
        """How many experts the router chooses from."""
        return self.num_experts - self.num_shared

    @property
    def routed_per_token(self) -> int:
        """How many of them each token gets."""
        return self.top_k - self.num_shared

    @property
    def has_unit_weights(self) -> bool:
        """Whether a token's weights sum to one, so that upcycling changes nothing at step 0."""
        return self.weighting != "unnormalized"


def _require_name(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{field}={value!r} is unknown: choose one of {', '.join(known)}.")
