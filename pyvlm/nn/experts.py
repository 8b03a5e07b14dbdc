"""The experts' weights, new or copied from a dense MLP, and soft MoE, which needs no router.

Shape legend
    E experts · H hidden · I intermediate · P slots an expert
"""

from contextlib import nullcontext
from typing import Any, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn

from pyvlm.ops.moe_experts import Activation, soft_moe
from pyvlm.reference.gating import ACTIVATIONS


class DenseMLP(NamedTuple):
    """The weights of a dense MLP as one expert has them."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    gated: bool
    activation: Activation


class Experts(nn.Module):
    """E MLPs of one shape; what tokens they work on is a subclass's matter, which also starts them.

    Args:
        hidden_size: H.
        intermediate_size: I of each expert.
        num_experts: E.
        activation: as for `pyvlm.ops.expert_mlp`.
        gated: gated experts, act(gate x) ⊙ (up x), or plain ones, act(up x).
        bias: whether both projections have biases.
        backend: as for `pyvlm.ops.expert_mlp`.

    Raises:
        ValueError: a size below 1 or an unknown activation.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        activation: Activation = "silu",
        gated: bool = True,
        bias: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        sizes = {
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_experts": num_experts,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if activation not in get_args(Activation):
            expected = ", ".join(map(repr, get_args(Activation)))
            raise ValueError(f"activation={activation!r} is unknown; expected one of {expected}")
        self.num_experts = num_experts
        self.activation = activation
        self.gated = gated
        self.backend = backend
        up_rows = 2 * intermediate_size if gated else intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, up_rows, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.gate_up_bias = nn.Parameter(torch.empty(num_experts, up_rows)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(num_experts, hidden_size)) if bias else None

    def reset_parameters(self) -> None:
        """As `nn.Linear` starts, apart from the biases: they are zero."""
        for weight in (self.gate_up_proj, self.down_proj):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
        for bias in (self.gate_up_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    @property
    def mlp_options(self) -> dict[str, Any]:
        """The experts as arguments of `expert_mlp` and `soft_moe`."""
        return {
            "gate_up": self.gate_up_proj,
            "down": self.down_proj,
            "activation": self.activation,
            "gated": self.gated,
            "gate_up_bias": self.gate_up_bias,
            "down_bias": self.down_bias,
            "backend": self.backend,
        }

    @classmethod
    def from_dense(
        cls, mlp: nn.Module, num_experts: int, *, activation: Activation | None = None, **options: Any
    ) -> Self:
        """A layer whose experts are exact copies of a dense MLP ("upcycling", arXiv 2212.05055).

        Where a token's weights add up to 1 (token choice, normalised, nothing dropped), the layer computes at
        the start what the MLP computes.

        Args:
            mlp: its linears are named gate_up_proj (gate rows first) or gate_proj and up_proj, and down_proj;
                or up_proj and down_proj, or fc1 and fc2, where it is not gated; or it is an `nn.Sequential`
                of a linear, the activation and a linear.
            num_experts: E.
            activation: None: that of the module's act_fn or activation_fn, "silu" for a gated one that has
                neither.
            options: the layer's other arguments.

        Raises:
            ValueError: another kind of module, or an activation that experts do not have.
        """
        dense = read_dense(mlp, activation)
        hidden_size, intermediate_size = dense.down.shape
        has_bias = dense.gate_up_bias is not None or dense.down_bias is not None
        # Of a model on the meta device nothing is drawn: MoE-LLaVA's experts took 10 s.
        with dense.down.device if dense.down.is_meta else nullcontext():
            layer = cls(
                hidden_size,
                intermediate_size,
                num_experts,
                activation=dense.activation,
                gated=dense.gated,
                bias=has_bias,
                **options,
            ).to(dense.down)
        with torch.no_grad():
            for copies, original in (
                (layer.gate_up_proj, dense.gate_up),
                (layer.down_proj, dense.down),
                (layer.gate_up_bias, dense.gate_up_bias),
                (layer.down_bias, dense.down_bias),
            ):
                if copies is not None and original is not None:
                    copies.copy_(original)
        return layer.train(mlp.training)


class SoftMoE(Experts):
    """Experts on weighted means of all tokens, for encoders: every token sees every other one.

    From Sparse to Soft Mixtures of Experts (arXiv 2308.00951); see `pyvlm.ops.soft_moe`.

    Args:
        slots_per_expert: P; E · P = the number of tokens costs what a dense MLP costs.
        others: as for `Experts`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        slots_per_expert: int = 1,
        *,
        activation: Activation = "gelu",
        gated: bool = False,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        if slots_per_expert < 1:
            raise ValueError(f"slots_per_expert must be at least 1, got {slots_per_expert}")
        super().__init__(
            hidden_size,
            intermediate_size,
            num_experts,
            activation=activation,
            gated=gated,
            bias=bias,
            backend=backend,
        )
        self.phi = nn.Parameter(torch.empty(hidden_size, num_experts, slots_per_expert))
        self.scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.phi, std=self.phi.shape[0] ** -0.5)
        nn.init.ones_(self.scale)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, N, H] to [B, N, H] without the residual; a row is one group, and none of it is padding."""
        return soft_moe(hidden_states, self.phi, scale=self.scale, **self.mlp_options)

    def extra_repr(self) -> str:
        experts, hidden, intermediate = self.down_proj.shape
        return f"{experts} experts {hidden}→{intermediate}, {self.phi.shape[-1]} slots each"


# The linears of a dense MLP: those that project up, in the order of an expert's rows; that which projects
# down; and whether the first is a gate.
DENSE_FORMS: tuple[tuple[tuple[str, ...], str, bool], ...] = (
    (("gate_up_proj",), "down_proj", True),
    (("gate_proj", "up_proj"), "down_proj", True),
    (("up_proj",), "down_proj", False),
    (("fc1",), "fc2", False),
    (("0",), "2", False),
)
ACTIVATION_ATTRIBUTES = ("act_fn", "activation_fn", "1")


def read_dense(mlp: nn.Module, activation: Activation | None) -> DenseMLP:
    """The weights of a dense MLP; see `Experts.from_dense`."""
    linears = {name: module for name, module in mlp.named_children() if isinstance(module, nn.Linear)}
    for up_names, down_name, gated in DENSE_FORMS:
        if linears.keys() == {*up_names, down_name}:
            ups = [linears[name] for name in up_names]
            weights: list[Tensor] = [up.weight for up in ups]
            biases: list[Tensor] = [up.bias for up in ups if up.bias is not None]
            if len(biases) in (0, len(ups)):
                return DenseMLP(
                    torch.cat(weights),
                    linears[down_name].weight,
                    torch.cat(biases) if biases else None,
                    linears[down_name].bias,
                    gated,
                    activation or _read_activation(mlp, gated),
                )
    known = "; ".join(" + ".join((*up_names, down_name)) for up_names, down_name, _ in DENSE_FORMS)
    raise ValueError(
        f"{type(mlp).__name__} with the linears {sorted(linears) or 'none'} is no MLP that experts can copy; "
        f"expected one with the linears {known}"
    )


def _read_activation(mlp: nn.Module, gated: bool) -> Activation:
    """The name of a module's activation, found by what it computes: its class has many names."""
    function = next((getattr(mlp, name) for name in ACTIVATION_ATTRIBUTES if hasattr(mlp, name)), None)
    if function is None and gated:
        return "silu"
    probe = torch.linspace(-4, 4, 33, dtype=torch.float64)
    for name in get_args(Activation):
        if function is not None and torch.allclose(function(probe), ACTIVATIONS[name](probe), atol=1e-6):
            return name
    raise ValueError(
        f"the activation {function} of {type(mlp).__name__} is none that experts have; "
        f"expected one of {', '.join(map(repr, get_args(Activation)))}, or give activation="
    )
