"""`sweep`: many runs of one base in one compiled step."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.adapters.init import init_planned
from lora_jax.adapters.plan import Plan, make_plan, planned_again
from lora_jax.adapters.split import join, split
from lora_jax.adapters.stacks.select import padded
from lora_jax.adapters.stacks.stack import stack, unstack
from lora_jax.adapters.sweeps.buckets import Buckets, map_slots, rank_of
from lora_jax.adapters.sweeps.optimizer import (
    Make,
    check_same_numbers,
    faster_b,
    numbers_of,
    transformation,
)
from lora_jax.adapters.sweeps.run import Run
from lora_jax.adapters.sweeps.state import SweepState, shardings_of, stack_states
from lora_jax.adapters.switches import with_dropout
from lora_jax.adapters.updates import apply_updates
from lora_jax.core.config import LoraConfig
from lora_jax.core.dtypes import accumulator
from lora_jax.core.errors import ConfigError, StructureError
from lora_jax.core.sharding.placement import Placement
from lora_jax.core.slots import check_ids
from lora_jax.core.tree import adapted_nodes, map_adapted
from lora_jax.engine.custom_rules import Rule

#: Computes the gradients of one run, and what its step measures.
Gradients = Callable[..., tuple[Any, Any]]


def sweep(
    loss: Callable[..., Any],
    base: Any,
    runs: Sequence[Run],
    config: LoraConfig,
    *batch: Any,
    slots: int | None = None,
    optimizer: Make = optax.adamw,
    schedule: Callable[[Any], Any] | None = None,
    batch_axes: Any = None,
    buckets: Sequence[int] = (),
    at_once: int | None = None,
    gradients: Gradients | None = None,
    rules: Mapping[str, Rule] | None = None,
    fsdp: str | Sequence[str] | None = None,
) -> "Sweep":
    """Prepare to train many adapters of one base in one compiled step.

    Each run trains as it would alone, with its rank, scale, initial values, learning rate, weight
    decay, clipping and dropout: its losses are those of a loop with `init` and `freeze`, up to
    rounding. Factors are padded to the largest rank, see `stack`, and `jax.vmap` runs over
    the slots, so the base is in memory once and its products are one large matrix product. What the
    runs may differ in is data: other runs in the same slots do not recompile.

    Args:
      loss: `loss(params, *batch)`, the scalar that one run minimizes, as you would differentiate it
        for one adapter: it gets adapted parameters, so it applies `lora` inside, or is `lora(f)`.
      base: the parameters without adapters.
      runs: the configurations; see `grid`.
      config: what to adapt, and what the runs leave open.
      *batch: an example batch of one run, arrays or `ShapeDtypeStruct`s; `loss` is traced with it
        to learn the layouts of the weights, see `init`.
      slots: how many runs train at once; None for all. The others wait for a slot, see
        `Sweep.replace` and `halving`.
      optimizer: makes a transformation from a learning rate, and from `weight_decay` and the run's
        `options` by name, if it has these parameters. They are arrays. Its updates must be
        proportional to the learning rate if a run has a `b_ratio`. It sees the padded factors. With
        a parameter `params` in the second place, such as `lora_rite`, it gets the adapters.
      schedule: a function of the run's own step, from 0, that returns a multiple of its learning
        rate.
      batch_axes: None if all runs see the same batch. Otherwise which axis of the batch's arrays is
        the axis of slots, as `in_axes` of `jax.vmap`: 0, or one entry per argument of the batch.
      buckets: ranks that divide the slots: with `[8]` those whose first run has at most rank 8 are
        computed apart from the others. Their factors are not padded to the largest rank there, so a
        step takes fewer operations; but there is one base product per bucket, which takes longer to
        compile, and a slot only gets runs of its bucket or smaller ones. The buckets are computed
        in turn, so the activations of one at a time are in memory.
      at_once: how many slots are computed at once; None for all of a bucket. The others follow in a
        loop within the compiled step: it takes the temporary memory of so many runs. It is 1 for a
        loss that `jax.vmap` has no rule for, such as that of a model with experts (`ragged_dot`).
      gradients: computes what a step of one run needs in place of `jax.value_and_grad` of the loss,
        such as the sum over several micro-batches: `(adapters, base, *batch, key) -> (gradients,
        measured)`, where the key is that for dropout. `measured` may be a tree of arrays: `step`
        returns it in place of the losses, with the slots as the first axis.
      rules: as for `init`.
      fsdp: as for `init`.

    Raises:
      ConfigError: `runs` is empty or shorter than `slots`; or a run has a setting that the
        optimizer or the other runs do not allow.
      StructureError: a run's initial values change the base.
      TargetError, LayoutError: as for `init`.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> base, x = {"kernel": jnp.ones((4, 3))}, jnp.ones((5, 4))
    >>> loss = lora_jax.lora(lambda params, x: ((x @ params["kernel"]) ** 2).mean())
    >>> runs = lora_jax.grid(rank=[1, 2], learning_rate=[1e-2, 1e-1])
    >>> sweep = lora_jax.sweep(loss, base, runs, lora_jax.LoraConfig(), x)
    >>> state = sweep.init()
    >>> for _ in range(9):
    ...     state, losses = sweep.step(state, x)
    >>> losses.shape, bool(losses[1] < losses[0])
    ((4,), True)
    """
    runs = [] if isinstance(runs, Run) else list(runs)
    if not runs or not all(isinstance(run, Run) for run in runs):
        raise ConfigError("sweep: runs must be a sequence of one or more Run; see lora_jax.grid")
    if not callable(loss):
        raise ConfigError(f"sweep: pass the loss first, got {type(loss).__name__}")
    slots = len(runs) if slots is None else slots
    if not 0 < slots <= len(runs):
        raise ConfigError(f"sweep: slots={slots} must be from 1 to the number of runs, {len(runs)}")
    check_same_numbers(runs)
    plan = make_plan("sweep", base, runs[0].config(config), loss, batch, {}, rules)
    placement = Placement.of("sweep", plan.leaves.values(), fsdp, (batch, {}))
    options = (optimizer, schedule, batch_axes, buckets, at_once, gradients)
    return Sweep(loss, base, runs, config, slots, *options, plan, placement)


class Sweep:
    """Many runs that train together; made by `sweep`.

    Attributes:
      runs: all runs; the first `slots` of them train first.
      slots: how many train at once.
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        base: Any,
        runs: Sequence[Run],
        config: LoraConfig,
        slots: int,
        optimizer: Make,
        schedule: Callable[[Any], Any] | None,
        batch_axes: Any,
        buckets: Sequence[int],
        at_once: int | None,
        gradients: Gradients | None,
        plan: Plan,
        placement: Placement,
    ):
        self.runs, self.slots = tuple(runs), slots
        self._loss, self._base, self._config = loss, base, config
        self._optimizer, self._schedule, self._batch_axes = optimizer, schedule, batch_axes
        self._gradients = gradients
        self._plan, self._placement = plan, placement
        self._plans: dict[LoraConfig, Plan] = {}
        self._compiled: dict[Any, Callable[..., Any]] = {}
        configs = dict.fromkeys(run.config(config) for run in runs)
        for run in runs:
            numbers_of(run, optimizer)
        news = {
            one: jax.eval_shape(functools.partial(self._new, config=one), jax.random.key(0))
            for one in configs
        }
        # What every slot looks like, with room for each of the runs.
        shapes = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
        self._frame = stack([jax.tree.map(shapes, overlay) for overlay in news.values()])
        self._ranks = {one: rank_of(overlay) for one, overlay in news.items()}
        ranks = [self._ranks[run.config(config)] for run in runs]
        self._buckets = Buckets.of(buckets, ranks, slots, at_once)

    def init(self) -> SweepState:
        """Return the state before the first step, with the first runs in the slots."""
        return stack_states([self.start(run) for run in self.runs[: self.slots]])

    def step(self, state: SweepState, *batch: Any) -> tuple[SweepState, jax.Array]:
        """Take a step of every run, compiled; the state's arrays are donated.

        Args:
          state: as `init`, `replace` or the last step returned it.
          *batch: the arguments of the loss behind the parameters; see `batch_axes` of `sweep`.

        Returns:
          The next state and the losses `[slots]`, those before the step.
        """
        compiled = self._jitted("step", self.update, state, has_losses=True)
        return compiled(self._base, state, *batch)

    def update(self, base: Any, state: SweepState, *batch: Any) -> tuple[SweepState, jax.Array]:
        """Return what `step` does, as a pure function of the base too: for your own `jit` or scan.

        A base that your compiled function does not get as an argument would be a constant in it.
        """
        step = functools.partial(self._step_of_one, base)
        axes = self._axes(batch, self._batch_axes, state.slots)
        return self._buckets.map(step, self._init_optimizer, axes, state, *batch)

    def evaluate(self, state: SweepState, *batch: Any, batch_axes: Any = None) -> jax.Array:
        """Return the losses `[slots]` without dropout, compiled; the state stays as it is.

        Args:
          state: a state.
          *batch: the arguments of the loss behind the parameters.
          batch_axes: None if all runs see the same batch, as in `sweep`.
        """

        def losses(base: Any, adapters: Any, *batch: Any) -> jax.Array:
            one = lambda adapters, *batch: self._loss(join(base, adapters), *batch)
            slots = len(jax.tree.leaves(adapters)[0])
            axes = self._axes(batch, batch_axes, slots)
            return map_slots(one, axes, self._buckets.at_once, adapters, *batch)

        key = ("evaluate", str(batch_axes), len(batch))
        if key not in self._compiled:
            self._compiled[key] = jax.jit(losses)
        return self._compiled[key](self._base, state.adapters, *batch)

    def replace(self, state: SweepState, slot: Any, run: Run) -> SweepState:
        """Return the state with another run in a slot, at its step 0; the state is donated.

        Nothing recompiles. The run need not be among `runs`, but must fit beside them: its rank is
        at most the largest of theirs, and it has dropout or magnitudes only if one of them has.

        Raises:
          ConfigError: the slot does not exist, or the run has a setting that does not fit here.
          StructureError: its adapters do not fit those of the other runs.
        """
        return self.put(state, slot, self.start(run))

    def start(self, run: Run) -> SweepState:
        """Return the state of one run at its step 0, without an axis of slots, for `put`."""
        if run.options.keys() != self.runs[0].options.keys():
            check_same_numbers([self.runs[0], run])
        numbers = numbers_of(run, self._optimizer)
        overlay = self._new(jax.random.key(run.seed), run.config(self._config))
        adapters = self._placed(padded("sweep", self._frame, overlay), overlay)
        dtype = accumulator(self._config.dtype)
        arrays = {name: jnp.asarray(x, dtype) for name, x in numbers.items()}
        optimizer = self._init_optimizer(arrays, adapters)
        return SweepState(adapters, optimizer, arrays, jnp.int32(run.seed), jnp.int32(0))

    def put(self, state: SweepState, slot: Any, one: SweepState) -> SweepState:
        """Return the state with the state of one run in a slot; `state` is donated.

        Args:
          state: a state.
          slot: the number of the slot.
          one: what `start` or `take` returned, so that a run can pause and go back to any slot.

        Raises:
          ConfigError: the slot does not exist, or its bucket has no room for the run's rank.
        """
        slot = check_ids("put", slot, state.slots, lowest=0)
        self._buckets.check_fits(one.adapters, slot)
        put = lambda state, slot, one: jax.tree.map(lambda x, new: x.at[slot].set(new), state, one)
        return self._jitted("put", put, state, donate=0)(state, slot, one)

    def take(self, state: SweepState, slot: Any) -> SweepState:
        """Return the state of the run in a slot, without an axis of slots."""
        slot = check_ids("take", slot, state.slots, lowest=0)
        if "take" not in self._compiled:
            self._compiled["take"] = jax.jit(
                lambda state, slot: jax.tree.map(lambda x: x[slot], state)
            )
        return self._compiled["take"](state, slot)

    @property
    def has_own_batches(self) -> bool:
        """Whether each slot sees its own batch."""
        return any(x is not None for x in jax.tree.leaves(self._batch_axes))

    def turns(self, runs: Sequence[Run]) -> list[dict[int, int]]:
        """Return in which turn and slot each of some runs trains: `{index of the run: slot}`.

        All runs of a turn train at once; what a bucket has no room for waits for the next turn.
        """
        ranks = [self._ranks[run.config(self._config)] for run in runs]
        return self._buckets.turns(ranks)

    def adapters(self, state: SweepState) -> list[Any]:
        """Return the overlay of every slot, each with its own rank, as `split` returns one."""
        return unstack(state.adapters)

    def _new(self, key: jax.Array, config: LoraConfig) -> Any:
        """Return a new overlay."""
        if config not in self._plans:
            self._plans[config] = planned_again(self._plan, config)
        params = init_planned(key, self._plans[config], self._placement)
        for path, node in adapted_nodes(params).items():
            if node.w is not self._plan.leaves[path]:
                raise StructureError(
                    f"sweep: {path}: init={config.init!r} changes the base, which all runs share: "
                    'use "kaiming", "gaussian" or "orthogonal"'
                )
        return split(params)[1]

    def _placed(self, adapters: Any, like: Any) -> Any:
        """Return padded adapters with the shardings of what was padded."""
        nodes = adapted_nodes(like)
        leaves = self._plan.leaves
        place = lambda path, node: self._placement.place(node, leaves[path])
        return map_adapted(lambda path, x: place(path, x) if path in nodes else x, adapters)

    def _differentiate(
        self, adapters: Any, base: Any, batch: Sequence[Any], key: jax.Array
    ) -> tuple[Any, Any]:
        """Return the gradients of one slot, and what is measured."""
        if self._gradients is not None:
            return self._gradients(adapters, base, *batch, key)

        def loss(adapters: Any) -> Any:
            return self._loss(with_dropout(join(base, adapters), key), *batch)

        value, gradients = jax.value_and_grad(loss)(adapters)
        return gradients, value

    def _init_optimizer(self, numbers: Mapping[str, jax.Array], adapters: Any) -> Any:
        """Return the optimizer's state of one slot, before its first step."""
        return transformation(self._optimizer, numbers, adapters, self._config.dtype).init(adapters)

    def _step_of_one(
        self, base: Any, state: SweepState, *batch: Any
    ) -> tuple[SweepState, jax.Array]:
        """Return the next state of one slot, with the factors still padded, and its loss."""
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        gradients, measured = self._differentiate(state.adapters, base, batch, key)
        numbers = dict(state.numbers)
        if self._schedule is not None:
            numbers["learning_rate"] *= self._schedule(state.step)
        tx = transformation(self._optimizer, numbers, state.adapters, self._config.dtype)
        told = {"value": measured} if self._gradients is None else {}
        updates, optimizer = tx.update(gradients, state.optimizer, state.adapters, **told)
        adapters = apply_updates(state.adapters, faster_b(updates, numbers["b_ratio"]))
        return SweepState(adapters, optimizer, state.numbers, state.seed, state.step + 1), measured

    def _axes(self, batch: Sequence[Any], axes: Any, slots: int) -> Sequence[Any]:
        """Return `in_axes` of the arguments of a batch."""
        axes = axes if isinstance(axes, tuple) else (axes,) * len(batch)
        if len(axes) != len(batch):
            raise ConfigError(
                f"sweep: batch_axes has {len(axes)} entries for a batch of {len(batch)} arguments"
            )
        for number, (argument, axis) in enumerate(zip(batch, axes, strict=True)):
            for x in jax.tree.leaves(argument) if isinstance(axis, int) else ():
                if jnp.shape(x)[axis : axis + 1 or None] != (slots,):
                    raise ConfigError(
                        f"sweep: argument {number} of the batch has the shape {jnp.shape(x)}, and "
                        f"batch_axes={axis} says that axis {axis} has the {slots} slots"
                    )
        return axes

    def _jitted(
        self,
        name: str,
        fn: Callable[..., Any],
        state: SweepState,
        donate: int = 1,
        has_losses: bool = False,
    ) -> Callable[..., Any]:
        """Return a compiled function that donates the state and leaves it where it lies."""
        where = shardings_of(state)
        key = (name, None if where is None else tuple(jax.tree.leaves(where)))
        if key not in self._compiled:
            outs = where if where is None or not has_losses else (where, None)
            self._compiled[key] = jax.jit(fn, donate_argnums=donate, out_shardings=outs)
        return self._compiled[key]
