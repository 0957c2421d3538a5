"""Programs that keep rows apart give each row as if alone; what mixes rows is refused, by name."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from tests.programs import merged

ROWS, TIME, WIDTH = 4, 5, 6
IDS = (1, 0, -1, 1)
KEY = jax.random.key(0)
BASE = {"w": jax.random.normal(KEY, (WIDTH, WIDTH)), "other": jnp.ones((3, 2))}
X = jax.random.normal(jax.random.key(1), (ROWS, TIME, WIDTH))
LENGTHS = jnp.array([1, 4, 2, 3])
SEGMENTS = jnp.array([[0, 0, 1, 1, 1]] * ROWS)
CACHE = jnp.zeros((ROWS, 9, WIDTH))
NORM = nn.BatchNorm(use_running_average=True)
STATS = NORM.init(KEY, X)
TRAINING = nn.BatchNorm(use_running_average=False)


def f(params, x):
    return jnp.tanh(x @ params["w"])


def new(seed):
    config = lora.LoraConfig(rank=2, alpha=4, targets=["w"])
    params = lora.init(jax.random.key(seed), BASE, config, f, X)
    noise = lambda x: x + 0.3 * jax.random.normal(jax.random.key(seed), x.shape)
    return jax.tree.map(lambda x: noise(x) if x.ndim > 1 else x, lora.split(params)[1])


@pytest.fixture(scope="module")
def adapters():
    return [new(2), new(3)]


def experts_by_sorting(params, x):
    tokens = x.reshape(-1, WIDTH)
    order = jnp.argsort(jnp.argmax(tokens @ params["w"], -1))
    return f(params, tokens[order])[jnp.argsort(order)].reshape(x.shape)


def sorted_tokens(params, x):
    order = jnp.argsort(jnp.argmax(x.reshape(-1, WIDTH) @ params["w"], -1))
    return f(params, x.reshape(-1, WIDTH)[order]), order


def in_groups(params, x, counted=lambda chosen: chosen, combine="sort", most=None):
    """Send each token to two of three experts, the parts of the adapted kernel."""
    tokens, kernels = x.reshape(-1, WIDTH), params["w"].reshape(3, 2, WIDTH)
    shares, chosen = jax.lax.top_k(tokens[:, :3], 2)
    flat = chosen.reshape(-1)
    order, sizes = jnp.argsort(flat), jnp.bincount(counted(flat), length=3)
    sizes = sizes if most is None else jnp.minimum(sizes, most)
    y = jax.lax.ragged_dot(tokens[:, :2][order // 2], kernels, sizes)
    if combine == "scatter":
        return jnp.zeros((len(tokens), WIDTH)).at[order // 2].add(y).reshape(x.shape)
    y = y[jnp.argsort(order)].reshape(-1, 2, WIDTH)
    return jnp.einsum("tkw,tk->tw", y, shares).reshape(x.shape)


def experts_by_masks(params, x):
    scores = x.reshape(-1, WIDTH) @ params["w"]
    chosen = jax.nn.one_hot(jnp.argmax(scores, -1), WIDTH)
    return jnp.einsum("nd,ne->nd", scores, chosen).reshape(x.shape)


def heads(params, x):
    return f(params, x).reshape(x.shape[0], TIME, 2, 3)


def guided(params, x):
    with_text, without = jnp.split(f(params, jnp.concatenate([x, 0 * x])), 2)
    return without + 2 * (with_text - without)


def by_steps(params, x):
    start = jnp.zeros((x.shape[0], WIDTH))
    step = lambda carry, y: (f(params, carry + y),) * 2
    return jax.lax.scan(step, start, x.swapaxes(0, 1))[1].swapaxes(0, 1)


def written(params, x, cache, lengths):
    update = lambda c, y, i: jax.lax.dynamic_update_slice(c, y, (i, 0))
    return jax.vmap(update)(cache, f(params, x), lengths)


def attend(params, x, lengths):
    q = heads(params, x)
    return jax.nn.dot_product_attention(q, q, q, key_value_seq_lengths=lengths)


def same_segment(params, x, segments):
    same = (segments[:, :, None] == segments[:, None]).astype(x.dtype)
    return jnp.einsum("bij,bjd->bid", same, f(params, x))


# fn(params, x, lengths, cache, segments)
APART = {
    "plain": lambda p, x, *_: f(p, x),
    "last token by numbers": lambda p, x, n, *_: f(p, x)[jnp.arange(x.shape[0]), n],
    "last token by take_along_axis": lambda p, x, n, *_: jnp.take_along_axis(
        f(p, x), n[:, None, None], axis=1
    ),
    "top_k": lambda p, x, *_: jax.lax.top_k(f(p, x), 2)[0],
    "sorted features": lambda p, x, *_: jnp.sort(f(p, x), -1),
    "one-hot positions": lambda p, x, n, *_: f(p, x + jax.nn.one_hot(n, TIME)[..., None]),
    "a loss per row": lambda p, x, *_: jax.nn.logsumexp(f(p, x), -1).mean(-1),
    "padding mask": lambda p, x, n, *_: jnp.where(
        (jnp.arange(TIME)[None] < n[:, None])[..., None], f(p, x), 0
    ).sum(1),
    "flattened tokens": lambda p, x, *_: f(p, x.reshape(-1, WIDTH)).reshape(x.shape),
    "transposed inside": lambda p, x, *_: f(p, x.swapaxes(0, 1)).swapaxes(0, 1),
    "two halves of a doubled batch": lambda p, x, *_: guided(p, x),
    "cache by numbers": lambda p, x, n, cache, _: cache.at[jnp.arange(x.shape[0]), n].set(
        f(p, x)[:, 0]
    ),
    "cache at one place": lambda p, x, n, cache, _: jax.lax.dynamic_update_slice(
        cache, f(p, x), (0, 2, 0)
    ),
    "cache by row": lambda p, x, n, cache, _: written(p, x, cache, n),
    "segments": lambda p, x, n, c, segments: same_segment(p, x, segments),
    "lax.map over rows": lambda p, x, *_: jax.lax.map(lambda row: f(p, row), x),
    "vmap over rows": lambda p, x, *_: jax.vmap(lambda row: f(p, row))(x),
    "sorted tokens of a row": lambda p, x, *_: jax.vmap(
        lambda row: experts_by_sorting(p, row[None])[0]
    )(x),
    "masked experts": lambda p, x, *_: experts_by_masks(p, x),
    "sorted tokens": lambda p, x, *_: experts_by_sorting(p, x),
    "tokens in groups": lambda p, x, *_: in_groups(p, f(p, x)),
    "tokens in groups, added up": lambda p, x, *_: in_groups(p, x, combine="scatter"),
    "attention with lengths": lambda p, x, n, *_: attend(p, x, n),
    "running averages": lambda p, x, *_: NORM.apply(STATS, f(p, x)),
    "scan over time": lambda p, x, *_: by_steps(p, x),
    "fft over time": lambda p, x, *_: jnp.abs(jnp.fft.fft(f(p, x), axis=1)),
}


def test_a_loop_that_waits_for_all_rows_takes_the_steps_of_each_alone(adapters):
    """Here 3, 1, 0 and 2 steps, where all rows together would take 3."""

    def until_done(params, x, steps):
        go_on = lambda state: jnp.any(state[1] < steps)
        step = lambda state: (f(params, state[0]), state[1] + 1)
        return jax.lax.while_loop(go_on, step, (x, jnp.zeros(x.shape[0], jnp.int32)))[0]

    steps = [3, 1, 0, 2]
    stack = lora.join(BASE, lora.stack(adapters))
    got = jax.jit(lora.lora(until_done, adapters_of=jnp.array(IDS)))(stack, X, jnp.array(steps))
    for n, (i, count) in enumerate(zip(IDS, steps, strict=True)):
        want, params = X[n], BASE if i < 0 else merged(lora.join(BASE, adapters[i]))
        for _ in range(count):
            want = f(params, want)
        np.testing.assert_allclose(got[n], want, atol=3e-6)


def test_programs_that_keep_rows_apart(adapters, quick_compile):
    def model(params, *args):
        return {name: fn(params, *args) for name, fn in APART.items()}

    @jax.jit
    def both(adapters, *args):
        stack = lora.join(BASE, lora.stack(adapters))
        got = lora.lora(model, adapters_of=jnp.array(IDS))(stack, *args)
        params = [merged(lora.join(BASE, x)) for x in adapters]
        rows = [
            model(BASE if i < 0 else params[i], *(x[n : n + 1] for x in args))
            for n, i in enumerate(IDS)
        ]
        return got, jax.tree.map(lambda *xs: jnp.concatenate(xs), *rows)

    got, want = both(adapters, X, LENGTHS, CACHE, SEGMENTS)
    for name in APART:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=5e-6, err_msg=name)


REFUSED = {
    "the mean of a loss": (lambda p, x: f(p, x).mean(), "`reduce_sum` at .*Return one value per"),
    "batch norm": (lambda p, x: f(p, x) - f(p, x).mean(0, keepdims=True), "`reduce_sum` at"),
    "flax batch norm": (
        lambda p, x: TRAINING.apply(STATS, f(p, x), mutable=["batch_stats"]),
        "`reduce_sum` at .*normalization.py",
    ),
    "top_k of rows": (lambda p, x: jax.lax.top_k(f(p, x).T, 2)[0].T, "`top_k` at"),
    "sorted rows": (lambda p, x: jnp.sort(f(p, x), axis=0), "`sort` at .*mixes the rows"),
    "permuted": (lambda p, x: f(p, x)[jnp.argsort(x[:, 0, 0])], "`sort` at"),
    "another row": (lambda p, x: f(p, x)[jnp.clip(x[:, 0, 0], 0, 1).astype(int)], "`gather` at"),
    "reversed": (lambda p, x: f(p, x)[::-1], "`rev` at"),
    "rolled": (lambda p, x: jnp.roll(f(p, x), 1, 0), "takes some of the rows"),
    "the first row": (lambda p, x: f(p, x) - f(p, x)[:1], "`slice` at .*takes some of the rows"),
    "a row that is set": (lambda p, x: f(p, x).at[0].set(0.0), "`scatter` at .*indexes the rows"),
    "a row that is updated": (
        lambda p, x: jax.lax.dynamic_update_slice(f(p, x), x[:1], (0, 0, 0)),
        "takes some of the rows|changes some of the rows",
    ),
    "a loop over rows": (lambda p, x: jnp.stack([f(p, r) for r in x]), "jax.vmap over them"),
    "scan over rows": (
        lambda p, x: jax.lax.scan(lambda c, r: (c + f(p, r), c), jnp.zeros((TIME, WIDTH)), x)[1],
        "carries from row to row",
    ),
    "rows with rows": (lambda p, x: jnp.einsum("btd,ctd->bc", x, f(p, x)), "pairs rows"),
    "rows before": (lambda p, x: jnp.tri(x.shape[0]) @ f(p, x)[:, 0], "`dot_general` at"),
    "cumsum": (lambda p, x: jnp.cumsum(f(p, x), 0), "`cumsum` at"),
    "convolved rows": (
        lambda p, x: jax.lax.conv_general_dilated(
            f(p, x)[:, 0][None],
            jnp.ones((3, WIDTH, WIDTH)),
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
        )[0],
        "`conv_general_dilated` at",
    ),
    "pooled rows": (
        lambda p, x: nn.avg_pool(f(p, x)[:, 0][None], (3,), padding="SAME")[0],
        "mixes the rows",
    ),
    "a wrong reshape": (lambda p, x: f(p, x)[..., 0].reshape(TIME, -1).T, "divides the axis"),
    "microbatches": (
        lambda p, x: jax.lax.map(lambda m: f(p, m), x.reshape(2, -1, TIME, WIDTH)),
        "divides the axis of rows",
    ),
    "tokens that stay sorted": (
        lambda p, x: sorted_tokens(p, x)[0],
        "`sort` at .*jax.vmap over them",
    ),
    "tokens sorted by others than are counted": (
        lambda p, x: in_groups(p, x, counted=lambda chosen: 2 - chosen),
        "`ragged_dot_general` at|`sort` at",
    ),
    "tokens put back to others": (
        lambda p, x: (lambda y, order: y[(jnp.argsort(order) + 1) % len(order)])(
            *sorted_tokens(p, x)
        ).reshape(x.shape),
        "`sort` at",
    ),
    "a capacity of experts": (
        lambda p, x: in_groups(p, x, counted=lambda chosen: chosen, most=2),
        "`ragged_dot_general` at|`sort` at|`scatter-add` at",
    ),
    "a branch for all": (
        lambda p, x: jax.lax.cond((x > 0).any(), lambda y: f(p, y), lambda y: y, x),
        "`reduce_or` at",
    ),
    "one key for all rows": (
        lambda p, x: (
            f(p, x * jax.random.bernoulli(KEY, 0.5, x.shape)) + f(p, jnp.ones((1, 1, WIDTH)))
        ),
        "`random_bits` at .*Pass a key per row",
    ),
    "rows that stay merged": (lambda p, x: f(p, x.reshape(-1, WIDTH)), "merged with another axis"),
    "rows that are closed over": (lambda p, x: f(p, x + X), "as an argument.* It fails with Type"),
    "no rows, and adapters": (
        lambda p, x: (f(p, x), (p["w"] @ jnp.ones(WIDTH)).sum()),
        "no axis of rows and depends on the adapters",
    ),
    "one row, where a weight meets no rows": (
        lambda p, x: f(p, x) + f(p, jnp.ones((1, 1, WIDTH))) if len(x) > 1 else 1 / 0,
        "as a batch of one row.*fails with ZeroDivisionError",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_programs_that_mix_rows_are_refused(name, adapters):
    fn, words = REFUSED[name]
    stack = lora.join(BASE, lora.stack(adapters))
    with pytest.raises(lora.ConfigError, match=words):
        jax.make_jaxpr(lambda x: lora.lora(fn, adapters_of=jnp.array(IDS))(stack, x))(X)


def test_arguments_of_every_kind(adapters):
    """Rows on axis 1, a key per row, numpy, a counter without rows, static and named arguments."""

    def model(params, x, keys, count, train, *, bias):
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (WIDTH,)))(keys)
        x = x * kept[None] + bias["all"][None, None] if train else x
        return f(params, x + bias["row"].T[..., None]), count + 1, "seen", params["other"]

    stack = lora.join(BASE, lora.stack(adapters))
    x, keys = X.swapaxes(0, 1), jax.random.split(KEY, ROWS)
    bias = {"all": jnp.ones(WIDTH), "row": np.arange(20.0, dtype="float32").reshape(ROWS, TIME)}
    run = lora.lora(
        model, adapters_of=[list(IDS)], row_axes={2: 0, "bias": {"all": None, "row": 0}}
    )
    got, count, text, other = run(stack, x, keys, jnp.int32(4), True, bias=bias)
    assert count == 5 and text == "seen"
    np.testing.assert_array_equal(other, BASE["other"])
    for n, i in enumerate(IDS):
        params = BASE if i < 0 else merged(lora.join(BASE, adapters[i]))
        row = {"all": bias["all"], "row": bias["row"][n : n + 1]}
        want = model(params, x[:, n : n + 1], keys[n : n + 1], 0, True, bias=row)[0]
        np.testing.assert_allclose(got[:, n : n + 1], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("ids", "row_axes", "words"),
    [
        ([0, 1], None, "no array among the arguments has 2 rows along axis 0"),
        ([0.0] * 4, None, "ids must be integers, got float"),
        ([0, 1, 2, 0], None, r"no slots \[2\]; the stack has 2, from 0 on, and -1 is the base"),
        ([[0, 1], [1, 0]], None, r"one id per row of the batch, \[rows\], got shape \(2, 2\)"),
        (np.zeros(0, int), None, r"one id per row of the batch, \[rows\], got shape \(0,\)"),
        (IDS, {"y": 0}, "the call has no argument 'y'; it has"),
        (IDS, {1: {"a": 1, "b": 0}}, r"1/a \(4, 5, 6\) has no axis 1 of 4 rows"),
        (IDS, {1: {"a": 0}}, "the tree for argument 1 does not begin the argument's tree"),
        (IDS, {1: "rows"}, "1/a: an axis is an integer or None, got 'rows'"),
        (IDS, [0], "pass a dict from the position or name of an argument to an axis"),
        (IDS, {0: 0}, "0/other has no rows"),
    ],
)
def test_ids_and_row_axes_that_do_not_fit(ids, row_axes, words, adapters):
    stack = lora.join(BASE, lora.stack(adapters))
    fn = lambda params, xs: f(params, xs["a"] + xs["b"])
    with pytest.raises(lora.ConfigError, match=words):
        lora.lora(fn, adapters_of=ids, row_axes=row_axes)(stack, {"a": X, "b": X})


def test_an_array_that_only_looks_as_if_it_had_rows(adapters):
    """A matrix has as many rows as the batch: the error names the mend."""
    matrix = jnp.ones((ROWS, ROWS)) / 4

    def model(params, x, matrix):
        return f(params, x)[:, :ROWS].swapaxes(1, 2) @ matrix

    stack = lora.join(BASE, lora.stack(adapters))
    with pytest.raises(lora.ConfigError, match=r"by row_axes, with None\. It fails with TypeError"):
        lora.lora(model, adapters_of=jnp.array(IDS))(stack, X, matrix)
    run = lora.lora(model, adapters_of=jnp.array(IDS), row_axes={2: None})
    assert run(stack, X, matrix).shape == (ROWS, WIDTH, ROWS)


def test_one_key_draws_other_numbers_for_each_row(adapters):
    """The program stays that of the whole batch, and so does a model's own dropout."""

    def model(params, x):
        return f(params, x * jax.random.bernoulli(KEY, 0.5, x.shape))

    stack = lora.join(BASE, lora.stack(adapters))
    got = lora.lora(model, adapters_of=jnp.array([1] * ROWS))(stack, X)
    want = model(merged(lora.join(BASE, adapters[1])), X)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_slots_in_order_are_not_gathered(adapters):
    stack = lora.join(BASE, lora.stack(adapters))
    run = lambda ids: lambda stack, x: lora.lora(f, adapters_of=ids)(stack, x)
    got = str(jax.make_jaxpr(run(np.arange(2)))(stack, X[:2]))
    assert "gather" not in got and "gather" in str(jax.make_jaxpr(run([1, 0]))(stack, X[:2]))
    np.testing.assert_allclose(
        run(range(2))(stack, X[:2]), run(jnp.arange(2))(stack, X[:2]), rtol=0, atol=1e-6
    )
    for n, overlay in enumerate(adapters):
        want = f(merged(lora.join(BASE, overlay)), X[n])
        np.testing.assert_allclose(run([0, 1])(stack, X[:2])[n], want, rtol=0, atol=2e-6)
