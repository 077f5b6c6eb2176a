"""Packing changes what an attack costs, and nothing else."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rain_jax import attacks, evaluation
from rain_jax.evaluation import Rules, packing, seats
from rain_jax.norms import l2
from rain_jax.parallel import choose_devices, place
from rain_jax.types import Batch, Iteration, Threat

# In L2, where steps are continuous: another program's last bit turns no sign.
THREAT = Threat(l2, 0.07)
COUNT = 83
WEIGHTS = np.asarray(jax.random.normal(jax.random.key(2), (2, 60, 3)))
ROOT = jax.random.key(5)
SHAPE = (6, 5, 2)


def logits_fn_of(variables):
    """Three curved classes; sums written out, so that batch sizes round alike."""

    def logits_fn(key, image):
        flat = image.reshape(-1, 1)
        bent = jnp.tanh(jnp.sum(flat * variables[0], axis=0))
        return 2 * bent + jnp.sum(flat**2 * variables[1], axis=0)

    return logits_fn


IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, *SHAPE)).astype(np.uint8)
LABELS = np.array([np.argmax(logits_fn_of(WEIGHTS)(ROOT, x / 255)) for x in IMAGES], np.int32)
THIRDS = np.arange(COUNT, dtype=np.int32) % 3


def batches(size=20, skip=(), labels=LABELS):
    """Images of 8 bits, some of them not valid, in batches that fit no shape below."""
    for start in range(0, COUNT, size):
        index = np.arange(start, min(start + size, COUNT)).astype(np.int32)
        yield Batch(IMAGES[index], labels[index], index, ~np.isin(index, skip))


def drive(attack, *, batch_size, devices=1, mapping="shard_map", early=True, **given):
    on = place(mapping, choose_devices(devices))
    run = evaluation.packed(attack, logits_fn_of, on, batch_size=batch_size, early=early)
    rules = Rules(THREAT)
    judge = evaluation.judging(logits_fn_of, rules, on, batch_size=32)
    variables = on.replicate(WEIGHTS)
    verdicts = list(judge(variables, ROOT, run(variables, ROOT, batches(**given))))
    joined = evaluation.join([v.judgement for v in verdicts])
    order = np.argsort(np.concatenate([v.judgement.index for v in verdicts]))
    rest = [np.concatenate([getattr(v, name) for v in verdicts])[order]
            for name in ("image", "steps", "queries")]  # fmt: skip
    return joined, *rest


@pytest.fixture(scope="module")
def alone():
    """Every image through the whole attack by itself, one after the other."""
    attack = attacks.pgd(THREAT, steps=12)
    model = logits_fn_of(WEIGHTS)

    @jax.jit
    def one(key, image, label):
        attack_key, judge_key = jax.random.split(key)
        found = attack(attack_key, model, image, label)
        return evaluation.judge(model, Rules(THREAT), judge_key, image, found, label)

    results = []
    for batch in batches():
        for image, label, index, _ in zip(*batch, strict=True):
            key = jax.random.fold_in(ROOT, index)
            results.append(one(key, jnp.float32(image * np.float32(1 / 255)), label))
    right = np.array([bool(seen[0]) for seen, _ in results])
    assert 10 < np.sum(right) < COUNT - 10
    return right, np.array([image for _, image in results])


@pytest.mark.parametrize(
    ("batch_size", "devices", "mapping"),
    [(7, 1, "shard_map"), (32, 1, "shard_map"), (256, 1, "shard_map"), (32, 8, "shard_map"),
     (128, 4, "shard_map"), (32, 2, "pmap")],
)  # fmt: skip
def test_verdicts_are_those_of_each_image_alone(batch_size, devices, mapping, alone):
    attack = attacks.pgd(THREAT, steps=12)
    found, images, steps, _ = drive(attack, batch_size=batch_size, devices=devices, mapping=mapping)
    right, alone_images = alone
    np.testing.assert_array_equal(found.index, np.arange(COUNT))
    np.testing.assert_array_equal(found.right, right)
    # Who stood had every step, so its image is the same; who fell left early.
    np.testing.assert_allclose(images[right], alone_images[right], atol=1e-6)
    assert np.all(steps[right] == 12)
    assert np.mean(steps[~right]) < 12
    assert np.all(found.allowed)


def test_without_leaving_early_images_are_the_same_too(alone):
    found, images, steps, _ = drive(attacks.pgd(THREAT, steps=12), batch_size=32, early=False)
    np.testing.assert_array_equal(found.right, alone[0])
    np.testing.assert_allclose(images, alone[1], atol=1e-6)
    assert np.all(steps == 12)


def test_looks_at_an_image_are_its_own():
    """The last of 45 steps is no look of those who came later: two steps lie between theirs."""
    found, few, steps, _ = drive(attacks.pgd(THREAT, steps=45), batch_size=7)
    both, many, others, _ = drive(attacks.pgd(THREAT, steps=45), batch_size=256)
    np.testing.assert_array_equal(steps, others)
    np.testing.assert_allclose(few, many, atol=1e-6)
    np.testing.assert_allclose(found.margin, both.margin, atol=1e-5)
    assert len(set(steps)) > 3
    assert set(steps % 2) == {0, 1}  # some had all


def test_whoever_is_rounded_leaves_when_he_is_wrong_rounded():
    """Rounding may undo what was just enough; then he goes on, and ends as if he had never left."""
    attack, on = (
        attacks.pgd(THREAT, steps=60, step_size=0.003),
        place("shard_map", choose_devices(2)),
    )
    judge = evaluation.judging(logits_fn_of, Rules(THREAT, eight_bit=True), on, batch_size=16)
    variables = on.replicate(WEIGHTS)

    def stand(early):
        run = evaluation.packed(attack, logits_fn_of, on, batch_size=16, early=early)
        seen = list(judge(variables, ROOT, run(variables, ROOT, batches())))
        order = np.argsort(np.concatenate([v.judgement.index for v in seen]))
        steps = np.concatenate([v.steps for v in seen])[order]
        return evaluation.standing(evaluation.join([v.judgement for v in seen])), steps

    (hasty, few), (asked, some), (patient, all_) = map(stand, (True, judge, False))
    assert not np.any(asked & ~patient)
    assert np.all(all_ == 60)
    assert np.all(some[asked] == 60)
    assert np.any(hasty & ~asked)
    assert np.mean(few) <= np.mean(some) < 60


def test_only_valid_images_are_attacked():
    skip = [0, 3, 19, 20, 21, 82]
    found, *_ = drive(attacks.fgsm(THREAT), batch_size=16, skip=skip)
    np.testing.assert_array_equal(found.index, np.setdiff1d(np.arange(COUNT), skip))


def test_no_images_are_no_work():
    on = place("shard_map", choose_devices(1))
    run = evaluation.packed(attacks.fgsm(THREAT), logits_fn_of, on, batch_size=8)
    assert list(run(WEIGHTS, ROOT, [])) == []
    assert list(run(WEIGHTS, ROOT, batches(skip=range(COUNT)))) == []


def test_attacks_that_have_no_steps_run_at_once():
    found, images, steps, queries = drive(attacks.noise(THREAT), batch_size=16)
    assert np.all(steps == 0)
    assert np.all(queries == -1)
    assert np.all(found.allowed)
    assert np.all(np.max(np.abs(images - np.round(images * 255) / 255), axis=(1, 2, 3)) > 0)


class Counted(NamedTuple):
    image: Any
    done: Any
    target: Any


def counting(steps, breaks_at):
    """Breaks an image after `breaks_at(label)` steps; its pixels count the steps it was given."""

    def init(key, logits_fn, image, target):
        return Counted(jnp.zeros_like(image), jnp.int32(0), target)

    def step(logits_fn, state):
        return state._replace(image=state.image + 0.01, done=state.done + 1)

    def best(logits_fn, state):
        return state.image, jnp.where(state.done >= breaks_at(state.target), 1.0, -1.0)

    return Iteration(init, step, best, steps, lambda state: 2 * state.done)


@pytest.mark.parametrize("steps", [1, 7, 37, 100])
def test_nobody_takes_more_steps_than_there_are(steps):
    attack = counting(steps, lambda label: jnp.where(label == 0, 5, 10**6))
    _, images, taken, queries = drive(attack, batch_size=8, labels=THIRDS)
    label = THIRDS
    chunk = max(1, steps // 20)
    assert np.all(taken[label != 0] == steps)
    assert np.all(taken[label == 0] <= min(steps, 5 + chunk - 1))
    np.testing.assert_allclose(images[:, 0, 0, 0], 0.01 * taken, rtol=1e-4)
    np.testing.assert_array_equal(queries, 2 * taken)


@pytest.fixture
def work(monkeypatch):
    """Places times steps of everything that runs."""
    found = []
    compile_ = packing._compile

    def spying(*arguments):
        programs = compile_(*arguments)

        def advance(variables, states, length, *ended):
            found.append(len(jax.tree.leaves(states)[0]) * int(length))
            return programs.advance(variables, states, length, *ended)

        return programs._replace(advance=advance)

    monkeypatch.setattr(packing, "_compile", spying)
    return found


def test_broken_images_make_room(work):
    """Two of three break at once: the work done is that of the third, and little more."""
    attack = counting(100, lambda label: jnp.where(label < 2, 1, 10**6))
    drive(attack, batch_size=32, labels=THIRDS)
    hard = np.sum(THIRDS == 2) * 100
    assert sum(work) < 1.5 * hard < 0.6 * COUNT * 100


@pytest.mark.parametrize("batch_size", [16, 33, 64, 200])
@pytest.mark.parametrize("count", [3, 17, 33, 47, 65, 83])
def test_images_that_all_stand_leave_hardly_a_place_empty(count, batch_size, work):
    attack = counting(100, lambda label: jnp.int32(10**6))
    drive(attack, batch_size=batch_size, devices=2, skip=range(count, COUNT))
    # Rounded up by an eighth at most, to a place on each device, in every batch.
    batches = -(-count // batch_size)
    assert count * 100 <= sum(work) <= (count * 9 / 8 + 2 * batches) * 100


def test_many_steps_to_go_are_worth_a_smaller_batch(work):
    """A third breaks at once, and so few leave that only a long attack moves."""

    def breaks(label):
        return jnp.where(label == 0, 1, 10**6)

    stand = np.sum(THIRDS != 0)
    drive(counting(2000, breaks), batch_size=128, labels=THIRDS)
    assert sum(work) < 1.2 * 2000 * stand
    work.clear()
    drive(counting(20, breaks), batch_size=128, labels=THIRDS)
    assert sum(work) >= 20 * COUNT


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_shapes_are_few_and_fit(devices):
    shapes = set()
    for count in range(1, 1200):
        size = seats.fitting(count, 100, devices)
        shapes.add(size)
        assert size == 100 or size * devices >= count
        assert size <= max(1.125 * count / devices + 1, 1)
    assert len([s for s in shapes if 32 <= s < 64]) == 8
    assert max(shapes) == 100


def test_nothing_recompiles_for_other_variables_images_or_numbers():
    on = place("shard_map", choose_devices(1))
    traces = []

    def spied(variables):
        traces.append(1)
        return logits_fn_of(variables)

    run = evaluation.packed(attacks.pgd(THREAT, steps=12), spied, on, batch_size=32)
    patterns = [(), range(41), range(0, COUNT, 2), range(5), range(1, COUNT)]

    def all_of_them(variables, key):
        for skip in patterns:
            for _ in run(variables, key, batches(skip=skip)):
                pass

    all_of_them(WEIGHTS, ROOT)
    # Each of a few shapes to fill and to step: most of the five patterns share them.
    assert len(traces) <= 10
    before = len(traces)
    all_of_them(2 * WEIGHTS, jax.random.key(9))
    assert len(traces) == before
