"""The rules, per primitive or family of them: how a lazy weight passes through an equation."""

from lora_jax.engine.rules import (
    concatenate,
    cond,
    conv,
    custom_jvp,
    custom_vjp,
    dot_general,
    indexing,
    jit_remat,
    linear_solve,
    ragged_dot,
    scan_while,
    shard_map,
    views,
)

#: Rules by primitive name.
RULES = {
    **views.RULES,
    **concatenate.RULES,
    **indexing.RULES,
    **dot_general.RULES,
    **conv.RULES,
    **ragged_dot.RULES,
    **shard_map.RULES,
}

#: Rules for equations that contain programs, by primitive name.
CONTAINERS = {
    **jit_remat.CONTAINERS,
    **linear_solve.CONTAINERS,
    **cond.CONTAINERS,
    **scan_while.CONTAINERS,
    **custom_jvp.CONTAINERS,
    **custom_vjp.CONTAINERS,
    **shard_map.CONTAINERS,
}


def is_view(primitive: str) -> bool:
    """Return whether the rule of a primitive only makes a view of a weight."""
    return primitive in views.RULES


#: What keeps the adapters of all slots: views, what makes one weight of several, and containers.
_KEEP_SLOTS = {
    *views.RULES,
    *concatenate.RULES,
    *indexing.RULES,
    *shard_map.RULES,
    *CONTAINERS,
} - {*custom_jvp.CONTAINERS, *custom_vjp.CONTAINERS, *linear_solve.CONTAINERS}


def keeps_slots(primitive: str) -> bool:
    """Return whether an equation takes weights with the adapters of all slots, not one row's."""
    return primitive in _KEEP_SLOTS
