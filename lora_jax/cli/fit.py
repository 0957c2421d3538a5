"""How a command fits an adapter onto its base: the options --strict, --rename and --residual."""

import dataclasses
from collections.abc import Mapping, Sequence

from lora_jax.cli.errors import AdapterOptionError
from lora_jax.files import kinds


@dataclasses.dataclass(frozen=True)
class Fit:
    """How an adapter is fitted onto its base.

    Attributes:
      strict, rename, residual: as in `lora_jax.peft.load`.
      full_rank: as in `lora_jax.diffusion.load`.
    """

    strict: bool = True
    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)
    residual: bool = False
    full_rank: int | None = None

    @classmethod
    def of_options(
        cls,
        strict: bool,
        rename: Sequence[str] | None,
        residual: bool,
        full_rank: int | None = None,
    ) -> "Fit":
        """Return what the options say, --rename as texts such as "module=".

        Raises:
          AdapterOptionError: a text has no "=".
        """
        pairs = [text.partition("=") for text in rename or ()]
        wrong = [old for old, equals, _ in pairs if not equals]
        if wrong:
            raise AdapterOptionError(
                f"--rename {wrong[0]}: must be OLD=NEW, parts of names; leave NEW empty to remove "
                "OLD"
            )
        return cls(strict, {old: new for old, _, new in pairs}, residual, full_rank)

    def refuse_unused(self, adapter: kinds.Found) -> None:
        """Raise if an option is given that this kind of adapter has no use for.

        Raises:
          AdapterOptionError: it is.
        """
        what = f"{adapter.path}: a {kinds.DESCRIPTIONS[adapter.kind]}"
        if self.rename and adapter.kind in (kinds.NATIVE, kinds.GGUF_ADAPTER):
            raise AdapterOptionError(f"{what}; --rename is for adapters with PyTorch's names")
        if self.residual and adapter.kind != kinds.PEFT:
            raise AdapterOptionError(f"{what}; --residual is for adapters of PEFT")
        if self.full_rank and adapter.kind not in kinds.OF_IMAGES:
            raise AdapterOptionError(f"{what}; --full-rank is for files of image generators")


#: Every tensor must fit, under its own name, the base as it is.
EXACT = Fit()
