"""Mutants of foreign files: those of image generators, GGUF adapters, Orbax, model cards."""

from tests.stress.mutants.mutant import Mutant

DIFFUSION = (["tests/parity/diffusion/test_diffusion.py", "tests/files/diffusion"],)
GGUF = (["tests/parity/llama_cpp"],)
ORBAX = (["tests/parity/checkpoints"],)
CARD = (["tests/parity/model_card"],)

MUTANTS = [
    Mutant(
        "take alpha for the scale of an image generator's file",
        "files/diffusion/weight.py",
        'return float(fields["alpha"].reshape(())) / rank',
        'return float(fields["alpha"].reshape(()))',
        DIFFUSION,
    ),
    Mutant(
        "swap the factors of LoKr's product",
        "files/diffusion/methods.py",
        "_kron(a1, a2), np.kron(b1, b2), by",
        "_kron(a1, a2), np.kron(b2, b1), by",
        DIFFUSION,
    ),
    Mutant(
        "divide LoKr's alpha by the rank of the first matrix",
        "files/diffusion/methods.py",
        "rank = rank1 if rank2 is None else rank2",
        "rank = rank2 if rank1 is None else rank1",
        DIFFUSION,
    ),
    Mutant(
        "scale LoKr's two whole matrices",
        "files/diffusion/methods.py",
        "by = 1.0 if rank is None else",
        "by = 0.5 if rank is None else",
        DIFFUSION,
    ),
    Mutant(
        "pair LoHa's columns in another order",
        "files/diffusion/methods.py",
        "b = (b1[:, :, None] * b2[:, None, :])",
        "b = (b1[:, None, :] * b2[:, :, None])",
        DIFFUSION,
    ),
    Mutant(
        "transpose the core of LoCon",
        "files/diffusion/methods.py",
        '"ij...,jr->ir...", core',
        '"ji...,jr->ir...", core',
        DIFFUSION,
    ),
    Mutant(
        "forget the magnitudes of image generators' files",
        "files/diffusion/meaning.py",
        "return dataclasses.replace(found, magnitude=x.reshape(-1))",
        "return found",
        DIFFUSION,
    ),
    Mutant(
        "take the norms of DoRA by inputs over the inputs",
        "files/diffusion/whole.py",
        "if i != by_column",
        "if i == by_column",
        DIFFUSION,
    ),
    Mutant(
        "add the bias of B unscaled",
        "files/diffusion/read.py",
        'bias.astype("float64") * meant.scale',
        'bias.astype("float64")',
        DIFFUSION,
    ),
    Mutant(
        "leave the halves of Flux' last layer as they are",
        "files/diffusion/read.py",
        "return np.roll(x, len(x) // 2, 0)",
        "return x",
        DIFFUSION,
    ),
    Mutant(
        "write differences the other way round",
        "files/diffusion/write_kohya.py",
        'trained.astype("float64") - value.astype("float64")',
        'value.astype("float64") - trained.astype("float64")',
        DIFFUSION,
    ),
    Mutant(
        "write the scale in place of alpha",
        "files/diffusion/write_kohya.py",
        "alpha = alpha_of(factors.scale, factors.rank, False)",
        "alpha = factors.scale",
        DIFFUSION,
    ),
    Mutant(
        "take alpha for the scale of a GGUF adapter",
        "files/gguf/adapter_file.py",
        "scale = self.alpha / b.shape[-1] if",
        "scale = self.alpha if",
        GGUF,
    ),
    Mutant(
        "take a GGUF adapter without alpha for one without effect",
        "files/gguf/adapter_file.py",
        "if self.alpha else 1.0",
        "if self.alpha else 0.0",
        GGUF,
    ),
    Mutant(
        "write the A of an embedding as that of a linear layer",
        "files/gguf/save.py",
        "a = one.a.T if is_embedding(name) else one.a",
        "a = one.a",
        GGUF,
    ),
    Mutant(
        "forget what is left of the scales of a GGUF adapter",
        "files/gguf/save.py",
        "dataclasses.replace(one, scale=one.scale * one.rank / alpha).fold()",
        "one",
        GGUF,
    ),
    Mutant(
        "scale openpi's feed-forward layers",
        "files/orbax/formats.py",
        'axes, outs, factors, scaled=False, group=f"ffn{expert}")',
        'axes, outs, factors, group=f"ffn{expert}")',
        ORBAX,
    ),
    Mutant(
        "take alpha for the scale of a checkpoint",
        "files/orbax/factors.py",
        "np.full(lead, scale, np.float32)",
        "np.full(lead, scale * sizes[RANK], np.float32)",
        ORBAX,
    ),
    Mutant(
        "leave MaxText's queries as small as they are",
        "files/orbax/to_tree.py",
        "scale=node.scale * np.sqrt(np.float32(size))",
        "scale=node.scale",
        ORBAX,
    ),
    Mutant(
        "leave MaxText's rotations in pairs",
        "files/orbax/formats.py",
        'own.replace(" h", " (half two)")',
        'own.replace(" h", " (two half)")',
        ORBAX,
    ),
    Mutant(
        "swap gate and up of Gemma's checkpoints",
        "files/orbax/formats.py",
        'gate_up = (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")',
        'gate_up = (f"{layer}.mlp.up_proj", f"{layer}.mlp.gate_proj")',
        ORBAX,
    ),
    Mutant(
        "forget the rest of the scale of a checkpoint",
        "files/orbax/factors.py",
        "if not np.all(rest == 1):",
        "if False:",
        ORBAX,
    ),
    Mutant(
        "replace a card that somebody has changed",
        "files/peft/model_card.py",
        "and end[1] == _digest(text[: end.start()])",
        "and bool(end[1])",
        CARD,
    ),
    Mutant(
        "name a path of this machine as the base on the Hub",
        "files/peft/model_card.py",
        "if name and _HUB_ID.fullmatch(name) and not Path(name).exists() else None",
        "if name else None",
        CARD,
    ),
]
