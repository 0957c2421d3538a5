"""`Catalogue`: what is served by name, the base and adapters that may come and go."""

from collections.abc import Sequence

from lora_jax.core.foreign import shown, shown_value
from lora_jax.serving.errors import RequestError
from lora_jax.serving.served import Served


class Catalogue:
    """What is served at the moment.

    Args:
      served: the base, then the adapters.
      spare: slots of the stack for adapters that are loaded later.
    """

    def __init__(self, served: Sequence[Served], spare: Sequence[int] = ()) -> None:
        self._served = {one.name: one for one in served}
        self.spare = [*spare]

    def all(self) -> list[Served]:
        """Return the base, then the adapters."""
        return list(self._served.values())

    def find(self, name: str) -> Served:
        """Return what is served under a name.

        Raises:
          RequestError: nothing is.
        """
        if name not in self._served:
            names = ", ".join(map(shown, self._served))
            raise RequestError(
                f"the model {shown_value(name)} does not exist; this server has {names}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return self._served[name]

    def __contains__(self, name: str) -> bool:
        """Return whether something is served under a name."""
        return name in self._served

    def add(self, one: Served) -> None:
        """Serve an adapter, in a slot that was spare."""
        self.spare.remove(one.slot)
        self._served[one.name] = one

    def remove(self, name: str) -> None:
        """Serve an adapter no longer; its slot is spare."""
        self.spare.append(self._served.pop(name).slot)
