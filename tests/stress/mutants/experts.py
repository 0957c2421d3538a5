"""Mutants of mixtures of experts, and of decoders in GGUF files."""

from tests.stress.mutants.mutant import Mutant

EXPERTS = (["tests/models/decoder/test_experts.py", "-k", "logits or shares or saved or gate"],)
GGUF = (
    [
        *("tests/models/decoder/test_gguf.py", "tests/models/decoder/test_gguf_families.py"),
        *("-k", "same or granted"),
    ],
)

MUTANTS = [
    Mutant(
        "begin the pattern of layers with one that sees all",
        "models/decoder/layer_choice.py",
        "[SLIDING if (i + 1) % every else FULL",
        "[SLIDING if i % every else FULL",
        GGUF,
    ),
    Mutant(
        "leave the shares of experts as they are",
        "models/decoder/experts.py",
        "shares = shares / shares.sum(-1, keepdims=True)",
        "pass",
        EXPERTS,
    ),
    Mutant(
        "take a softmax over all experts",
        "models/decoder/experts.py",
        'if config.shares == "chosen":',
        "if False:",
        EXPERTS,
    ),
    Mutant(
        "give experts the rows of other tokens",
        "models/decoder/mixture.py",
        "tokens[order // experts.chosen]",
        "tokens[order % len(tokens)]",
        EXPERTS,
    ),
    Mutant(
        "leave the rows of experts in their order",
        "models/decoder/mixture.py",
        "each = rows[jnp.argsort(order)]",
        "each = rows[order]",
        EXPERTS,
    ),
    Mutant(
        "give all experts the bias of the first",
        "models/decoder/experts.py",
        "bias.astype(y.dtype)[experts]",
        "bias.astype(y.dtype)[0 * experts]",
        EXPERTS,
    ),
    Mutant(
        "take gate and up of experts for two halves",
        "models/decoder/mixture.py",
        "gate, up = both[..., ::2], both[..., 1::2]",
        "gate, up = both[..., : e.width], both[..., e.width :]",
        EXPERTS,
    ),
    Mutant(
        "leave the gates of experts without their limit",
        "models/decoder/mixture.py",
        "gate, up = jnp.minimum(gate, limit), jnp.clip",
        "gate, up = gate, jnp.clip",
        EXPERTS,
    ),
    Mutant(
        "leave the up of experts without its limit",
        "models/decoder/mixture.py",
        "jnp.clip(up, -limit, limit)",
        "up",
        EXPERTS,
    ),
    Mutant(
        "leave out the one that is added to up",
        "models/decoder/mixture.py",
        "return (up + 1) *",
        "return up *",
        EXPERTS,
    ),
    Mutant(
        "swap gate and up of Mixtral's experts",
        "models/decoder/expert_names.py",
        '"experts", "gate", "w1", "w3", "w2"',
        '"experts", "gate", "w3", "w1", "w2"',
        EXPERTS,
    ),
    Mutant(
        "swap gate and up of experts that are one parameter",
        "models/decoder/expert_names.py",
        '(at("gate"), at("up"))',
        '(at("up"), at("gate"))',
        EXPERTS,
    ),
    Mutant(
        "leave the one in that GGUF adds to norms",
        "models/decoder/gguf.py",
        "super()._decode(stored, shape) - np.float32(1)",
        "super()._decode(stored, shape)",
        GGUF,
    ),
    Mutant(
        "leave the heads of GGUF's queries in pairs",
        "models/decoder/gguf.py",
        "turn(left, 'half two')",
        "turn(left, 'two half')",
        GGUF,
    ),
    Mutant(
        "take the biases of GGUF's gates for those of up",
        "models/decoder/gguf_experts.py",
        'f"(two e) o -> {axis}e (o two)"',
        'f"(two e) o -> {axis}e (two o)"',
        GGUF,
    ),
    Mutant(
        "take GGUF's gate and up for two halves",
        "models/decoder/gguf_experts.py",
        'f"e (two o) i -> {axis}e i (o two)"',
        'f"e (two o) i -> {axis}e i (two o)"',
        GGUF,
    ),
    Mutant(
        "take GGUF's local layers for global ones",
        "models/decoder/gguf_architectures.py",
        "[SLIDING if local else FULL for",
        "[FULL if local else SLIDING for",
        GGUF,
    ),
    Mutant(
        "take the whole base of rotations for the local one",
        "models/decoder/gguf_architectures.py",
        'known.get("rope.freq_base_swa", 1e4)',
        'known.get("rope.freq_base", 1e4)',
        GGUF,
    ),
    Mutant(
        "swap GGUF's long and short factors",
        "models/decoder/gguf_architectures.py",
        '"long_factor": _as_list(tensors[LONG])',
        '"long_factor": _as_list(tensors[SHORT])',
        GGUF,
    ),
]
