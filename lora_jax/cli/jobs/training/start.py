"""What `lora-jax train` trains at first: new adapters, or those of `--adapter`."""

import dataclasses
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax as lora
from lora_jax.cli import sources
from lora_jax.cli.classifiers import LABELS, POOLING, labels_of
from lora_jax.cli.jobs.training import whole_model
from lora_jax.cli.jobs.training.data import Task
from lora_jax.cli.jobs.training.model import TrainableModel
from lora_jax.cli.layers_option import parse_layers
from lora_jax.cli.targets import resolve, resolve_leaves, without
from lora_jax.cli.train_options import MEAN, TrainOptions, names
from lora_jax.core.config import ALL_LINEAR
from lora_jax.core.foreign import shown
from lora_jax.core.tree import adapted_nodes, map_adapted
from lora_jax.files import kinds
from lora_jax.training.errors import TrainingError


@dataclasses.dataclass(frozen=True)
class Start:
    """The parameters before the first step, joined with their adapters, and how those were made."""

    params: Any
    config: lora.LoraConfig

    @property
    def paths(self) -> frozenset[str]:
        """The paths of all that trains."""
        return frozenset(adapted_nodes(self.params))


def make_start(options: TrainOptions, model: TrainableModel, task: Task) -> Start:
    """Return the initial parameters.

    Raises:
      LoraError: modules are not in the model, or the adapter cannot be read or does not fit.
    """
    if options.adapter is not None:
        return _from_adapter(kinds.adapter(options.adapter), options, model, task)
    if options.full:
        config = whole_model.config_of(options, model)
        return Start(lora.init(jax.random.key(0), task.params, config), config)
    config = config_of(options, model, task)
    ids = jax.ShapeDtypeStruct((1, options.length), jnp.int32)
    key = jax.random.key(options.seed)
    return Start(lora.init(key, task.params, config, task.apply, ids, ids), config)


def config_of(options: TrainOptions, model: TrainableModel, task: Task) -> lora.LoraConfig:
    """Return the configuration of new adapters, whose targets are paths.

    Raises:
      LoraError: modules are not in the model, or a value has no meaning.
    """
    params, naming = model.params, model.naming
    targets = resolve(options.target_names, params, naming)
    if options.exclude:
        targets = without(targets, names(options.exclude), params, naming)
    trained = resolve_leaves(names(options.train), params, naming) if options.train else []
    trained += [path for path in model.whole if path not in trained]
    if ALL_LINEAR in options.target_names:
        targets = [path for path in targets if path not in trained]
    return lora.LoraConfig(
        targets=[task.prefix + path for path in targets],
        train=[*(task.prefix + path for path in trained), *task.whole],
        layers=parse_layers(options.layers),
        bias=options.bias,
        rank=options.rank,
        alpha=options.alpha,
        init=options.init,
        dora=options.dora,
        scaling="rslora" if options.rslora else "standard",
        dropout=options.dropout,
    )


def _from_adapter(
    found: kinds.Found, options: TrainOptions, model: TrainableModel, task: Task
) -> Start:
    """Return the parameters with the adapter that the options name, in float32."""
    labels = labels_of(found)
    if labels is not None:
        params = _classifier(found, labels, task)
    else:
        adapted = lora.join(model.params, model.adapters)
        params = _with_new_head(adapted, task) if task.prefix else adapted

    def prepare(path: str, node: Any) -> Any:
        node = dataclasses.replace(
            node, **{name: _widen(getattr(node, name)) for name in _TRAINED if hasattr(node, name)}
        )
        is_dropped = options.dropout and isinstance(node, lora.LoraWeight)
        return dataclasses.replace(node, dropout=options.dropout) if is_dropped else node

    params = map_adapted(prepare, params)
    return Start(params, _config_of(params))


_TRAINED = ("a", "b", "magnitude", "value")  # fields of adapted nodes that train


def _widen(x: Any) -> Any:
    return None if x is None else jnp.asarray(x, jnp.float32)


def _classifier(found: kinds.Found, labels: list[Any], task: Task) -> Any:
    """Return a classifier's parameters with the adapter and head of another run."""
    if not task.prefix:
        raise TrainingError(f"{found.path}: a classifier's adapter; add --task classification")
    pooling = lora.read_metadata(found.path)["metadata"].get(POOLING, MEAN)
    if labels != task.metadata[LABELS]:
        raise TrainingError(
            f"{found.path}: trained on the labels {shown(labels)}, but the data has "
            f"{shown(task.metadata[LABELS])}; give data with the same labels"
        )
    if pooling != task.metadata[POOLING]:
        given = MEAN if pooling == MEAN else "model"
        raise TrainingError(f"{found.path}: trained with --pooling {given}; add it")
    adapters = lora.load(found.path, sources.as_trained(found, task.params))
    return lora.join(task.params, adapters)


def _with_new_head(adapted: Any, task: Task) -> Any:
    """Return a classifier's parameters with an adapted encoder and a new head, fully trained."""
    config = lora.LoraConfig(targets=(), train=task.whole)
    params = lora.init(jax.random.key(0), task.params, config)
    return {**params, task.prefix.rstrip("/"): adapted}


def _config_of(params: Any) -> lora.LoraConfig:
    """Return a configuration that would make adapters like these, for the files."""
    nodes = adapted_nodes(params)
    factors = {path: n for path, n in nodes.items() if isinstance(n, lora.LoraWeight)}
    if not factors:
        return lora.LoraConfig(targets=(), train=list(nodes))
    rank = Counter(node.rank for node in factors.values()).most_common(1)[0][0]
    scales = Counter(float(jnp.max(n.scale)) for n in factors.values() if n.rank == rank)
    return lora.LoraConfig(
        targets=list(factors),
        train=[path for path, n in nodes.items() if isinstance(n, lora.TrainedLeaf)],
        rank=rank,
        alpha=scales.most_common(1)[0][0] * rank,
        dora=any(node.magnitude is not None for node in factors.values()),
        dropout=max(node.dropout for node in factors.values()),
    )
