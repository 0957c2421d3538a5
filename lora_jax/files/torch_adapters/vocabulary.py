"""Say once that a file is for a model with another number of tokens, not tensor by tensor."""

from lora_jax.files.torch_adapters.contents import TorchBase, module_of


class OtherVocabulary:
    """Collects the tensors of a file that fit the base but for the size of its vocabulary."""

    def __init__(self, model: TorchBase):
        self._model = model
        embeddings = [name for name in model.index if model.kind(name) == "embedding"]
        self._sizes = {model.shape(name)[0] for name in embeddings}
        self._found: dict[str, tuple[int, int]] = {}

    def explains(self, weight: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
        """Return whether two shapes differ in the vocabulary's axis alone, and remember it.

        Args:
          weight: the embedding's or head's weight that the tensor belongs to.
          got, wanted: the tensor's shape in the file, and the shape that fits the base.
        """
        has_rows = self._model.kind(weight) in ("embedding", "linear", "")
        if not has_rows or self._model.shape(weight)[:1][0] not in self._sizes:
            return False
        differ = [i for i in range(len(wanted)) if got[i : i + 1] != wanted[i : i + 1]]
        if len(got) != len(wanted) or len(differ) != 1 or wanted[differ[0]] not in self._sizes:
            return False
        self._found[module_of(weight)] = got[differ[0]], wanted[differ[0]]
        return True

    def problems(self) -> list[str]:
        """Return one line that says what to do, or nothing."""
        if not self._found:
            return []
        theirs, ours = next(iter(self._found.values()))
        return [
            f"{', '.join(sorted(self._found))}: the adapter's model has {theirs:,} tokens, this "
            f"base {ours:,}; give the base as many first: models.resize_for_adapter"
        ]
