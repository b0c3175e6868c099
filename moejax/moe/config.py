"""What kind of mixture of experts a layer is."""

import dataclasses
import math
from typing import Any

from moejax.core.errors import InputError

GATES = ("mlp", "linear")
SCORES = ("softmax", "sigmoid")
SELECTIONS = ("top_k", "expert_choice")
XFT_WEIGHTINGS = ("normalized", "unnormalized")
WEIGHTINGS = (*XFT_WEIGHTINGS, "selected", "scores", "renormalized")
GROUP_SCORES = ("max", "top2_sum")
BALANCES = ("cv_squared", "switch", "sequence", "pooled", "none")
BALANCE_SCOPES = ("local", "global")
LOAD_ESTIMATORS = ("noisy_logits", "noise_term")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """An MoE layer: how tokens find experts, how wide those are, and what keeps them evenly used.

    The defaults are XFT's (arXiv 2404.15247); `CONVENTIONS` has the fields of other families.

    num_experts, top_k: all experts of the stack and how many of them a token uses. With
        num_shared=1 both count the shared expert, as the XFT paper does: "8 experts, top 6" is one
        shared expert and 5 chosen among 7 routed ones. Otherwise both count routed experts only.
    num_shared: 1 for XFT's weightings, where expert 0 of the stack is shared, else 0.
    gate: "mlp" (two matrices with a tanh between) or "linear".
    score: what becomes of a logit, "softmax" over the routed experts or "sigmoid" of each.
    weighting: how scores become weights; see `moejax.moe.routing.route`.
    selection: "top_k" (each token its best experts) or "expert_choice" (each expert its best
        tokens; not causal, see `moejax.moe.selection.choose_tokens`).
    capacity_factor: of expert choice: an expert takes capacity_factor * top_k * T / num_experts of
        a row's T tokens.
    num_groups, top_groups, group_score: group-limited top-k; experts lie in num_groups equal groups
        and a token chooses within its top_groups best ones, scored by their best expert ("max",
        DeepSeek-V2) or the sum of their two best ("top2_sum", DeepSeek-V3).
    selection_bias, bias_rate: whether a bias per expert, moved against the load by bias_rate each
        step and not by gradients, enters the choice but no weight (arXiv 2408.15664).
    scale: factor of the routed weights.  soft_cap: logits become soft_cap * tanh(z / soft_cap).
    noise: whether the router has learned noise.  jitter: the router sees x * U(1 - jitter,
        1 + jitter). Both act only in training (when a key is given).
    jitter_experts: whether the experts see that too, as in transformers' Mixtral.
    balance: which loss asks for an even load; see `moejax.moe.losses`.
    balance_weight: its factor; the losses are summed over layers (one for all of them if "pooled").
    balance_scope: on a mesh, "local" is the mean over devices of the loss of each one's tokens,
        "global" the loss of all tokens. They are one thing on one device, and for "sequence".
    z_weight: factor of the router z-loss.
    count_padding: whether padding tokens enter the losses and counts (XFT's reference does so).
    load_estimator: "noisy_logits" (Shazeer et al. 2017, eq. 8 to 10) or "noise_term", the XFT
        code's slip (it compares the noise alone with the threshold), kept for parity.
    expert_ffn: width of one expert; None is the model's d_ff.
    shared_ffn, shared_gate: width of a feed-forward network that every token passes besides (0:
        none), and whether its output is times sigmoid(x w) (Qwen2-MoE).
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
    score: str = "softmax"
    selection: str = "top_k"
    capacity_factor: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    selection_bias: bool = False
    bias_rate: float = 1e-3
    scale: float = 1.0
    soft_cap: float | None = None
    jitter: float = 0.0
    jitter_experts: bool = False
    balance: str = "cv_squared"
    balance_scope: str = "local"
    z_weight: float = 0.0
    expert_ffn: int | None = None
    shared_ffn: int = 0
    shared_gate: bool = False

    def __post_init__(self) -> None:
        _check_names(self)
        _check_numbers(self)
        _check_experts(self)
        _check_groups(self)
        _check_together(self)

    @property
    def num_routed(self) -> int:
        """How many experts the router chooses from."""
        return self.num_experts - self.num_shared

    @property
    def routed_per_token(self) -> int:
        """How many of them each token gets (under expert choice about so many, on average)."""
        return self.top_k - self.num_shared

    @property
    def has_unit_weights(self) -> bool:
        """Whether a token's weights sum to one, so that upcycling changes nothing at step 0."""
        sums_to_one = self.weighting in ("normalized", "selected", "renormalized")
        return sums_to_one and self.scale == 1 and self.shared_ffn == 0


_LINEAR: dict[str, Any] = {"num_shared": 0, "gate": "linear", "noise": False, "balance": "switch"}
# Fields by which `MoEConfig(num_experts, top_k, **fields)` routes as these families do; what varies
# within a family (groups, scale, widths, renormalisation where its config has a switch) comes on
# top.
CONVENTIONS: dict[str, dict[str, Any]] = {
    "mixtral": {**_LINEAR, "weighting": "renormalized", "jitter_experts": True},
    "olmoe": {**_LINEAR, "weighting": "scores"},
    "qwen2_moe": {**_LINEAR, "weighting": "scores", "shared_gate": True},
    "qwen3_moe": {**_LINEAR, "weighting": "renormalized"},
    "deepseek_v2": {**_LINEAR, "weighting": "scores", "balance": "sequence"},
    "deepseek_v3": {
        **_LINEAR,
        "score": "sigmoid",
        "weighting": "renormalized",
        "group_score": "top2_sum",
        "selection_bias": True,
        "balance": "sequence",
        "balance_weight": 1e-4,
    },
    "expert_choice": {
        **_LINEAR,
        "weighting": "scores",
        "selection": "expert_choice",
        "balance": "none",
    },
}


def _check_names(config: MoEConfig) -> None:
    names = {
        "gate": GATES,
        "score": SCORES,
        "selection": SELECTIONS,
        "weighting": WEIGHTINGS,
        "group_score": GROUP_SCORES,
        "balance": BALANCES,
        "balance_scope": BALANCE_SCOPES,
        "load_estimator": LOAD_ESTIMATORS,
    }
    for field, known in names.items():
        value = getattr(config, field)
        if value not in known:
            raise InputError(f"{field}={value!r} is unknown: choose one of {', '.join(known)}.")


def _check_numbers(config: MoEConfig) -> None:
    for field in ("balance_weight", "z_weight", "shared_ffn"):
        value = getattr(config, field)
        if not (value >= 0 and math.isfinite(value)):
            raise InputError(f"{field}={value} must be 0 or more.")
    for field in ("capacity_factor", "bias_rate", "scale", "soft_cap", "expert_ffn"):
        value = getattr(config, field)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InputError(f"{field}={value} must be more than 0.")
    if not 0 <= config.jitter < 1:
        raise InputError(f"jitter={config.jitter} must be at least 0 and less than 1.")


def _check_experts(config: MoEConfig) -> None:
    if config.num_experts < 2:
        raise InputError(f"num_experts={config.num_experts}: an MoE needs at least 2 experts.")
    if config.top_k > config.num_experts:
        raise InputError(
            f"top_k={config.top_k} is more than num_experts={config.num_experts}: choose "
            f"top_k <= {config.num_experts} or more experts."
        )
    if config.num_shared not in (0, 1):
        raise InputError(
            f"num_shared={config.num_shared}: there is one shared expert in the stack or none; "
            "shared_ffn is the width of shared experts beside it."
        )
    if config.top_k <= config.num_shared:
        raise InputError(
            f"top_k={config.top_k} counts the {config.num_shared} shared expert(s) and leaves none "
            f"to route: choose top_k >= {config.num_shared + 1}."
        )
    needed = 1 if config.weighting in XFT_WEIGHTINGS else 0
    if config.num_shared != needed:
        raise InputError(
            f"weighting={config.weighting!r} needs num_shared={needed}, "
            f"not num_shared={config.num_shared}."
        )
    if config.shared_gate and not config.shared_ffn:
        raise InputError("shared_gate=True with shared_ffn=0: give the shared network a width.")


def _check_groups(config: MoEConfig) -> None:
    experts, groups, top = config.num_routed, config.num_groups, config.top_groups
    if groups < 1 or experts % groups:
        divisors = ", ".join(str(n) for n in range(1, experts + 1) if experts % n == 0)
        raise InputError(
            f"num_groups={groups} does not divide the {experts} routed experts: "
            f"choose one of {divisors}."
        )
    if not 1 <= top <= groups:
        raise InputError(f"top_groups={top} must lie between 1 and num_groups={groups}.")
    size = experts // groups
    if top * size < config.routed_per_token:
        raise InputError(
            f"top_groups={top} of {size} experts each hold {top * size}, fewer than the "
            f"{config.routed_per_token} a token gets: choose "
            f"top_groups >= {-(-config.routed_per_token // size)}."
        )
    if groups > 1 and config.group_score == "top2_sum" and size < 2:
        raise InputError(
            f"group_score='top2_sum' needs 2 experts in a group, and num_groups={groups} leaves "
            f"{size}: choose num_groups <= {experts // 2} or group_score='max'."
        )


def _check_together(config: MoEConfig) -> None:
    """Fields that mean nothing, or something else, beside each other."""
    needs: dict[str, Any] = {}
    cause = ""
    if config.weighting in XFT_WEIGHTINGS:
        cause = f"weighting={config.weighting!r}"
        needs = {"score": "softmax", "num_groups": 1, "selection_bias": False, "scale": 1.0}
        needs |= {"selection": "top_k"}
    elif config.selection == "expert_choice":
        cause = "selection='expert_choice'"
        needs = {"weighting": "scores", "num_groups": 1, "selection_bias": False}
        needs |= {"balance": "none"}  # the load is even by construction
    elif config.noise and config.balance == "cv_squared":
        cause = "noise=True with balance='cv_squared', whose load is that of a plain top-k,"
        needs = {"num_groups": 1, "selection_bias": False}
    for field, needed in needs.items():
        value = getattr(config, field)
        if value != needed:
            raise InputError(f"{cause} needs {field}={needed!r}, not {field}={value!r}.")
