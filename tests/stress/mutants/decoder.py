"""Mutants of decoders: attention, rotations, the mixture of experts, and their files."""

from tests.stress.mutants.mutant import Mutant

ATTENTION = (["tests/models/test_attention.py", "-k", "definition or cache"],)
ENCODERS = (["tests/models/encoder"],)
ROPE = (["tests/models/test_rope.py"],)
LOGITS = (["tests/models/decoder/test_families.py", "-k", "logits or greedy"],)
LLAMA = (["tests/models/decoder/test_decoder.py", "-k", "logits or cache or packed"],)
EXPERTS = (["tests/models/decoder/test_experts.py", "-k", "logits or shares or saved or gate"],)

MUTANTS = [
    Mutant(
        "see one key more than the window",
        "models/attention.py",
        "(back < self.window)[None]",
        "(back <= self.window)[None]",
        ATTENTION,
    ),
    Mutant(
        "see one key more on a side than an encoder's window",
        "models/attention.py",
        "(away < self.window)[None]",
        "(away <= self.window)[None]",
        ENCODERS,
    ),
    Mutant(
        "let packed texts see each other",
        "models/attention.py",
        "same if visible is None else same & visible",
        "same if visible is None else visible",
        ATTENTION,
    ),
    Mutant(
        "leave out the sinks of attention",
        "models/attention.py",
        "return jax.nn.softmax(jnp.concatenate([scores, own], axis=-1), axis=-1)[..., :-1]",
        "return jax.nn.softmax(scores, axis=-1)",
        EXPERTS,
    ),
    Mutant(
        "give sinks to the heads of other groups",
        "models/attention.py",
        "own = sinks.astype(scores.dtype)",
        "own = jnp.roll(sinks, 1).astype(scores.dtype)",
        EXPERTS,
    ),
    Mutant(
        "leave the scores of attention without their cap",
        "models/attention.py",
        "if self.cap is not None:",
        "if False:",
        LOGITS,
    ),
    Mutant(
        "scale scores by the size of a head, whatever the model says",
        "models/attention.py",
        "scale = size**-0.5 if self.scale is None else self.scale",
        "scale = size**-0.5",
        LOGITS,
    ),
    Mutant(
        "turn pairs the other way",
        "models/rope.py",
        "turned = (first * cos - second * sin, second * cos + first * sin)",
        "turned = (first * cos + second * sin, second * cos - first * sin)",
        LLAMA,
    ),
    Mutant(
        "rotate the last part of a head",
        "models/rope.py",
        "part = rotate(x[..., :rotated], cos, sin)",
        "part = rotate(x[..., -rotated:], cos, sin)",
        ROPE,
    ),
    Mutant(
        "divide the frequencies that YaRN keeps",
        "models/rope.py",
        "kept = 1 - self._ramp(rotated)",
        "kept = self._ramp(rotated)",
        ROPE,
    ),
    Mutant(
        "multiply by no attention factor",
        "models/rope.py",
        "if self.attention_factor != 1.0:",
        "if False:",
        ROPE,
    ),
    Mutant(
        "take the long factors at the original length too",
        "models/rope.py",
        "is_long = reach > self",
        "is_long = reach >= self",
        ROPE,
    ),
    Mutant(
        "give global layers the local rotation",
        "models/decoder/config.py",
        "self.local_rope if is_local and self.local_rope else",
        "self.local_rope if not is_local and self.local_rope else",
        LOGITS,
    ),
    Mutant(
        "rotate the layers that do not rotate",
        "models/decoder/config.py",
        "None if i in self.unrotated_layers else rope",
        "rope",
        LOGITS,
    ),
    Mutant(
        "scan over the kinds of layers backwards",
        "models/decoder/module.py",
        "kinds.index(kind) for kind in self.config.layer_kinds]",
        "kinds.index(kind) for kind in self.config.layer_kinds[::-1]]",
        LOGITS,
    ),
    Mutant(
        "take the positions of cached tokens for those after them",
        "models/decoder/places.py",
        "(0 if sight.first is None else sight.first)",
        "0",
        LLAMA,
    ),
    Mutant(
        "swap gate and up",
        "models/decoder/layer.py",
        "ACTIVATIONS[c.hidden_act](gate) * up",
        "ACTIVATIONS[c.hidden_act](up) * gate",
        LLAMA,
    ),
    Mutant(
        "swap gate and up that are one matrix",
        "models/decoder/layer.py",
        "gate, up = jnp.split(both, 2, axis=-1)",
        "up, gate = jnp.split(both, 2, axis=-1)",
        LOGITS,
    ),
    Mutant(
        "swap key and value that are one matrix",
        "models/decoder/layer.py",
        "for part in jnp.split(flat, ends, axis=-1))",
        "for part in (jnp.split(flat, ends, axis=-1)[i] for i in (0, 2, 1)))",
        LOGITS,
    ),
    Mutant(
        "norm neither queries nor keys of heads",
        "models/decoder/layer.py",
        'if c.qk_norm == "head":',
        "if False:",
        LOGITS,
    ),
    Mutant(
        "add parts of layers unscaled",
        "models/decoder/layer.py",
        "if c.residual_multiplier != 1.0:",
        "if False:",
        LOGITS,
    ),
    Mutant(
        "multiply the logits by what divides them",
        "models/decoder/module.py",
        "products = products / c.logits_scaling",
        "products = products * c.logits_scaling",
        LOGITS,
    ),
    Mutant(
        "leave the logits without their cap",
        "models/decoder/module.py",
        "return capped(products, c.final_cap)",
        "return products",
        LOGITS,
    ),
    Mutant(
        "leave embeddings as they are",
        "models/decoder/module.py",
        "x = x * jnp.asarray(c.embedding_multiplier, x.dtype)",
        "pass",
        LOGITS,
    ),
    Mutant(
        "do not add one to the scale of Gemma's norms",
        "models/decoder/parts.py",
        "gain = 1 + scale.astype(x.dtype)",
        "gain = scale.astype(x.dtype)",
        LOGITS,
    ),
]
