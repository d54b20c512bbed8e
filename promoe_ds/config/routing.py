"""The routing section: which method serves the mixture of experts, and its settings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from promoe_ds.config.section import NameIn, Section, name_and_message, require


class RouterSize(NamedTuple):
    """Parameters of one layer's router, and its multiply-adds per token and per image."""

    parameters: int
    per_token: int
    per_image: int = 0


def linear_gate(width: int, experts: int, target_values: int) -> RouterSize:
    """Return the size of a matrix (E, D) without bias.

    Args:
        target_values: P, which a router predicts for every token (Expert Race).
    """
    return RouterSize(width * experts, width * experts)


def _pool_gate(width: int, experts: int, target_values: int) -> RouterSize:
    products = width * (experts + width + experts)
    return RouterSize(products + width + experts, products)


def _race_gate(width: int, experts: int, target_values: int) -> RouterSize:
    products = width * (width + experts + target_values)
    return RouterSize(products + width + target_values, products)


@dataclass(frozen=True, kw_only=True)
class Method:
    """What the rest of a run must know of a routing method before any router is built.

    size: from D, E and P (0 without regularisation by the target) to the router's size.
    options: the section that `routing.options` is read by; None: there are none.
    reads: fields of RoutingConfig that not every method reads; elsewhere a value other than the
    default is refused.
    tokens_choose: every token asks for top_k experts; otherwise the experts choose among tokens.
    single_choice: every token has one expert, so top_k is 1.
    mixes_samples: outputs depend on the other samples of a pass in evaluation, too.
    unit_gates: every token's gates add up to 1.
    """

    reads: tuple[str, ...] = ()
    tokens_choose: bool = True
    single_choice: bool = False
    mixes_samples: bool = False
    unit_gates: bool = False
    size: Callable[[int, int, int], RouterSize] = linear_gate
    options: type[Section] | None = None


_Step = Annotated[int, Field(ge=0)]

_PROMOE = ("activation", "score_scale", "rcl_weight", "rcl_temperature", "rcl_scope")
_BALANCE = ("balance_weight", "balance_level")
#: Every routing method; its router is the class registered for it in promoe_ds.routing. A file that
# --import names adds its own (examples/custom_router.py).
METHODS: dict[str, Method] = {
    "dense": Method(),
    "token_choice": Method(reads=(*_PROMOE, "rcl_assignments", *_BALANCE)),
    "expert_choice": Method(reads=_PROMOE, tokens_choose=False),
    "dit_moe": Method(reads=_BALANCE),
    "ec_dit": Method(reads=("capacity_schedule",), tokens_choose=False),
    "diff_moe": Method(
        reads=("capacity_schedule", "capacity_weight", "threshold_decay"),
        tokens_choose=False,
        mixes_samples=True,
        size=_pool_gate,
    ),
    "expert_race": Method(
        reads=("activation", "threshold_decay", "similarity_weight", "per_layer_weight"),
        tokens_choose=False,
        size=_race_gate,
    ),
    "classification": Method(
        reads=("classification_weight", "superclass_map", "superclasses"),
        single_choice=True,
        size=lambda width, experts, _: RouterSize((width + 1) * experts, 0, width * experts),
    ),
    "kmeans": Method(
        single_choice=True, size=lambda width, experts, _: RouterSize(0, width * experts)
    ),
    "hash": Method(unit_gates=True, size=lambda *_: RouterSize(0, 0)),
}


class RoutingConfig(Section):
    """The feed-forward: dense, or a mixture of experts and the router that serves it.

    Every method takes unconditional experts (step 1 of ProMoE's router) and shared experts. Where
    experts choose, top_k is the number of experts that a token has on average.
    """

    method: Annotated[str, NameIn(METHODS)] = Field(
        "token_choice", description="token_choice and expert_choice are ProMoE's"
    )
    options: dict[str, Any] = Field(
        {},
        validate_default=True,
        description="of a method of your own (--import), which declares them",
    )
    moe_blocks: Literal["interleave", "all"] = Field(
        "interleave", description="odd blocks, or every block"
    )
    num_experts: int = Field(
        12, gt=0, description="E: routed experts on all ranks, unconditional ones excluded"
    )
    top_k: int = Field(
        1, gt=0, description="K: routed experts per conditional token, or their average"
    )
    num_shared_experts: int = Field(1, ge=0, description="N_s of Eq. 5")
    num_unconditional_experts: int = Field(
        1, ge=0, description="N_u of Eq. 5; 0 routes null samples too"
    )
    expert_width: int | None = Field(
        None,
        gt=0,
        description=(
            "F; mlp_ratio * D / (1 + N_s) if left out, of SwiGLU under model.block=modern 2/3 of"
            " it as model.mlp_ratio says"
        ),
    )
    shared_expert_width: int | None = Field(None, gt=0, description="as expert_width if left out")
    expert_type: Literal["gelu", "swiglu"] = Field(
        "gelu", description="GELU-tanh with biases, or SwiGLU without"
    )
    expert_init_std: float | None = Field(
        None, gt=0, description="of experts' normal initial weights; Xavier-uniform if left out"
    )
    shared_expert_type: Literal["gelu", "swiglu"] | None = Field(
        None, description="as expert_type if left out"
    )
    activation: Literal["identity", "sigmoid", "softmax"] = Field(
        "identity", description="A of Eq. 2"
    )
    score_scale: float = Field(1.0, gt=0, description="alpha of Eq. 4")
    rcl_weight: float = Field(1.0, ge=0, description="lambda_RCL; 0 switches the loss off")
    rcl_temperature: float = Field(0.07, gt=0, description="tau of Eq. 6")
    rcl_scope: Literal["rank", "global"] = Field(
        "global", description="centroids of this rank, or of all ranks"
    )
    rcl_assignments: Literal["all", "first"] = Field(
        "all", description="all K choices form the centroids, or the best"
    )
    balance_weight: float = Field(0.0, ge=0, description="coefficient of the load-balancing loss")
    balance_level: Literal["batch", "sample"] = Field(
        "batch", description="what the loss asks to be even: a pass, or each image"
    )
    capacity_schedule: tuple[_Step, _Step] | None = Field(
        None,
        description=(
            "in training every expert takes all tokens up to the first of two steps, then linearly"
            " fewer until top_k at the second"
        ),
    )
    capacity_weight: float = Field(0.01, gt=0, description="of DiffMoE's capacity predictor's loss")
    threshold_decay: float = Field(0.95, ge=0, lt=1, description="of running thresholds, per step")
    similarity_weight: float = Field(
        1e-4, ge=0, description="of Expert Race's router similarity loss"
    )
    per_layer_weight: float = Field(
        1e-2, ge=0, description="of Expert Race's per-layer regularisation"
    )
    classification_weight: float = Field(
        1.0, ge=0, description="of the routing classification loss (Sec. 4.2)"
    )
    superclass_map: str | None = Field(
        None, description="name or path of a map from superclasses to classes"
    )
    superclasses: tuple[int, ...] | None = Field(
        None,
        description=(
            "of every class: what superclass_map said when the recipe was "
            "loaded; not to be set, kept with the run"
        ),
    )

    @field_validator("options")
    @classmethod
    def _read_options(cls, values: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Read the options by the method's own section, and fill in those left out."""
        if (method := info.data.get("method")) is None:
            return values
        section = METHODS[method].options
        if section is None:
            require(not values, f"has no use for method={method}: leave it out")
            return {}
        try:
            return section.model_validate(values).model_dump(mode="json")
        except ValidationError as error:
            problem = error.errors()[0]
            name, message = name_and_message(problem)
            if problem["type"] == "extra_forbidden":
                message = f"no such option; there are {', '.join(section.model_fields)}"
            raise ValueError(f"{name}={problem['input']}: {message}") from None

    @property
    def traits(self) -> Method:
        """What METHODS says of this method."""
        return METHODS[self.method]

    def check(self) -> None:
        """Refuse fields that contradict each other."""
        require(
            self.method == "dense" or self.top_k <= self.num_experts,
            f"top_k={self.top_k} exceeds num_experts={self.num_experts}: lower it",
        )
        require(
            not self.traits.single_choice or self.top_k == 1,
            f"top_k={self.top_k}: method={self.method} gives every token one expert (Sec. 4.3): set"
            " top_k=1",
        )
        if self.capacity_schedule is not None:
            first, last = self.capacity_schedule
            require(
                first <= last,
                f"capacity_schedule={[first, last]}: its second step comes before its first: swap"
                " them",
            )
        for field in type(self).model_fields:
            readers = [name for name, method in METHODS.items() if field in method.reads]
            if readers and self.method not in readers:
                self.refuse_set(
                    field, use=f"method={self.method} (it is read by {', '.join(readers)})"
                )
        if self.num_shared_experts == 0:
            self.refuse_set("shared_expert_width", "shared_expert_type", use="num_shared_experts=0")
        require(
            self.method != "classification" or self.superclass_map is not None,
            "method=classification needs superclass_map: a packaged map's name or the path of a"
            " YAML file",
        )
