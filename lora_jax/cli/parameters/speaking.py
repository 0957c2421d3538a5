"""The options that `generate` and `chat` share: a model, adapters, and how they speak."""

import dataclasses
from typing import Annotated, Any

from lora_jax.cli.compile_cache import CompileCacheOption
from lora_jax.cli.options import (
    ADAPTER,
    NAMED,
    DType,
    MaxTokensOption,
    ModelOption,
    QuantizeOption,
    RenameOption,
    ResidualOption,
    SeedOption,
    StopOption,
    StrictOption,
    SystemOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    refuse_empty,
)
from lora_jax.cli.parameters.groups import in_adapter, in_model

_DTYPE = "Dtype of the computation; default: the model's, float32 for GGUF."


@dataclasses.dataclass(frozen=True)
class Speaking:
    """The options as typer has checked them."""

    model: ModelOption
    adapter: Annotated[list[str] | None, in_adapter(metavar=NAMED, help=ADAPTER)] = None
    system: SystemOption = None
    stop: StopOption = None
    max_tokens: MaxTokensOption = 128
    temperature: TemperatureOption = 0.0
    top_k: TopKOption = 0
    top_p: TopPOption = 1.0
    seed: SeedOption = 0
    dtype: Annotated[DType | None, in_model(help=_DTYPE)] = None
    quantize: QuantizeOption = None
    rename: RenameOption = None
    residual: ResidualOption = False
    strict: StrictOption = True
    compile_cache: CompileCacheOption = None

    def __post_init__(self) -> None:
        refuse_empty(self.stop)

    @property
    def speaker(self) -> dict[str, Any]:
        """The arguments of `open_speaker` but the model and the adapter."""
        from lora_jax.cli.fit import Fit  # not for --help

        return {
            "stop": self.stop or (),
            "max_tokens": self.max_tokens,
            "dtype": self.dtype,
            "quantize": self.quantize,
            "fit": Fit.of_options(self.strict, self.rename, self.residual),
            "sampling": {
                "temperature": self.temperature,
                "top_k": self.top_k,
                "top_p": self.top_p,
            },
        }
