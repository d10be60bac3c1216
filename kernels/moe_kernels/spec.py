"""ExpertSpec: what an expert computes and how its weights lie in memory; said by the caller, never guessed.

Letters: E experts, D width, F expert hidden width, H width of the product before the activation (2F where the
activation is gated, else F).
"""

from dataclasses import dataclass
from typing import Literal, get_args

Activation = Literal["swiglu", "geglu", "relu2", "gpt_oss"]
GateUpLayout = Literal["concatenated", "interleaved"]
WeightLayout = Literal["out_in", "in_out"]
Saved = Literal["H", "X"]

# the constants of GPT-OSS (openai/gpt-oss): sigmoid(1.702 g), g held below 7 and u within -7..7
GPT_OSS_SLOPE = 1.702
GPT_OSS_LIMIT = 7.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSpec:
    """The form of all experts of a layer. The defaults are SwiGLU in the layout of Hugging Face's Mixtral and Qwen.

    Attributes:
        activation: with g the gate and u the up half of the first product,
            swiglu  silu(g) * u
            geglu   gelu(g) * u, the exact gelu (error function)
            gpt_oss (u' + 1) * g' * sigmoid(1.702 g'), g' = min(g, 7), u' = clamp(u, -7, 7)
            relu2   relu(h)^2 of an ungated product: the first weight has F outputs, not 2F (arXiv 2109.08668)
        gate_up: "concatenated" (outputs 0..F-1 are the gate) or "interleaved" (gate and up take turns, as in
            GPT-OSS). Ignored by relu2, which has no gate.
        weights: "out_in", gate_up [E, H, D] and down [E, D, F], or "in_out", gate_up [E, D, H] and down [E, F, D].
        saved: "H" keeps the first product for the backward pass; "X" keeps nothing but the tokens and computes it
            again there: 4 T D F K more FLOPs of 18, 2 N H bytes less in bfloat16.

    Raises:
        ValueError: a value that is not listed above.
    """

    activation: Activation = "swiglu"
    gate_up: GateUpLayout = "concatenated"
    weights: WeightLayout = "out_in"
    saved: Saved = "H"

    def __post_init__(self) -> None:
        known = {"activation": Activation, "gate_up": GateUpLayout, "weights": WeightLayout, "saved": Saved}
        for name, values in known.items():
            if getattr(self, name) not in get_args(values):
                raise ValueError(f"{name} is {getattr(self, name)!r}; known are {', '.join(get_args(values))}")

    @property
    def name(self) -> str:
        """Return the spec in one word: torch operations take strings, not objects."""
        return "/".join((self.activation, self.gate_up, self.weights, self.saved))

    @classmethod
    def parse(cls, name: str) -> "ExpertSpec":
        """Return the spec of that name."""
        activation, gate_up, weights, saved = name.split("/")
        return cls(activation=activation, gate_up=gate_up, weights=weights, saved=saved)  # type: ignore[arg-type]

    @property
    def is_interleaved(self) -> bool:
        """Whether gate and up take turns among the outputs of the first product."""
        return self.halves == 2 and self.gate_up == "interleaved"

    @property
    def is_paired(self) -> bool:
        """Whether gate and up stand side by side in memory; then their gradients are stored so as well."""
        return self.is_interleaved and self.weights == "in_out"

    @property
    def halves(self) -> int:
        """How many products of width F the activation takes: 2 (gate and up) or 1."""
        return 1 if self.activation == "relu2" else 2


# What is meant where no spec is given: SwiGLU in the layout of Hugging Face.
PLAIN = ExpertSpec()
