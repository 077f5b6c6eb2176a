"""How robust any model is, in one call."""

import hashlib
import inspect
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.adapters import as_model
from rain_jax.attacks import suites
from rain_jax.checks import UsageError, one_of, whole, within
from rain_jax.data import as_float, from_arrays
from rain_jax.evaluation import audit, probe, record
from rain_jax.evaluation.columns import AttackColumn, EvaluationRun
from rain_jax.evaluation.engine import Evaluation
from rain_jax.evaluation.result import Result
from rain_jax.evaluation.resume import digest
from rain_jax.keys import is_key
from rain_jax.logs import Progress
from rain_jax.norms import linf
from rain_jax.parallel import Devices, place
from rain_jax.remembered import remembered
from rain_jax.types import Attack, Iteration, Key, Model, Norm, Threat

# Draws of a random model for each verdict, unless it is said how many.
_DRAWS = 20
# Images that are looked at before any is attacked.
_FEW = 4


def evaluate(
    model: Any,
    images: Any,
    labels: Any,
    threat: Threat,
    attacks: str | Attack | Iteration | Mapping[str, Attack | Iteration] = "standard",
    *,
    key: Key | None = None,
    batch_size: int = 256,
    draws: int | None = None,
    eight_bit: bool = False,
    cascade: bool = True,
    random: bool | None = None,
    checks: bool = True,
    folder: str | os.PathLike[str] | None = None,
    replace: bool = False,
    devices: Devices | None = None,
    name: str | None = None,
    progress: bool | None = None,
) -> Result:
    """How many images a model classifies correctly after each of some attacks.

    Args:
      model: what `rain_jax.adapters.as_model` takes: a Flax linen module with its variables,
        `(module, variables)`, an NNX, Equinox or PyTorch module, or a function of images.
      images: [N, H, W, C], uint8, or floats in [0, 1].
      labels: [N], whole numbers below the number of classes.
      threat: what the attacker may do: `Threat(linf, 8 / 255)`.
      attacks: the name of a suite ("standard" is AutoAttack's, "rand" its suite for random models,
        "plus"), an attack, or attacks by name.
      key: the root of all draws, `jax.random.key(0)` by default.
      batch_size: images that are shown to the model at once, over all devices. Results do not
        depend on it but for rounding.
      draws: how often a random model is asked for each verdict, 20 by default.
      eight_bit: whether images are rounded to 256 levels before they are judged.
      cascade: whether an attack gets only the images that those before it left correct. Without,
        every attack gets all of them.
      random: whether the model draws from the key; by default a function that takes a key does.
      checks: whether it is looked for what makes robustness look larger than it is
        (`evaluation.audit`): a short attack at several radii on the first 128 images, of a random
        model 64, and comparisons of the attacks with each other.
      folder: where the evaluation leaves its record: evaluation.json, verdicts.npz and
        adversarial.npy. Blocks of results are kept there until it is complete: the same call goes
        on after a kill, and ends with the same result. One evaluation at a time uses it.
      replace: whether another evaluation's record in that folder may be written over.
      devices: where it runs, `rain_jax.parallel.place()` by default: on all there are.
      name: what the model is called; by default what it calls itself.
      progress: whether progress is printed; by default unless RAIN_JAX_PROGRESS=0.

    An attack returns images, and whether one is misclassified is judged apart from it: by fresh
    keys, by the mean over `draws` for images that leave, and only within the threat, which is
    looked at in float64. Programs are kept: a second call with the same model, attacks and shapes
    compiles nothing.

    Raises `UsageError` for a model, images, labels, attacks or a threat of another kind. Warns of
    attacks that leave the threat, and of logits that are not finite, look like probabilities or are
    drawn without saying so, for which it asks about the first four images; without `checks` also of
    their gradients. A check that does not hold is a line below the result's table.
    """
    prepared = prepare(
        model, images, labels, threat, partial(_columns, attacks, kept=folder is not None),
        key=key, batch_size=batch_size, draws=draws, eight_bit=eight_bit, cascade=cascade,
        random=random, recorded=[checks], slopes=not checks, folder=folder, replace=replace,
        devices=devices, name=name, progress=progress,
    )  # fmt: skip
    evaluation, found = prepared.evaluation, prepared.warnings
    seen = None
    if checks:
        with Progress(f"{evaluation.name}: checks", 1, unit="set", shown=progress) as bar:
            seen = probe.look(evaluation)
            bar.advance(1)
    run = evaluation()
    found += of_the_run(run)
    verdicts = None if seen is None else tuple(audit.checks(evaluation, run, seen))
    end(evaluation, run, record.described(evaluation, run, verdicts), found)
    return Result(evaluation.name, evaluation.threat, prepared.images, run, tuple(found), verdicts)


class Prepared(NamedTuple):
    """An evaluation of a model that somebody has brought, which has not run yet."""

    evaluation: Evaluation
    images: np.ndarray  # float32 [N, H, W, C]
    warnings: list[str]  # what a few answers of the model say against the numbers to come


def prepare(
    model: Any,
    images: Any,
    labels: Any,
    threat: Threat,
    columns_of: Callable[[Threat, Model, np.ndarray, np.ndarray, int], dict[str, AttackColumn]],
    *,
    key: Key | None,
    batch_size: int,
    draws: int | None,
    eight_bit: bool,
    cascade: bool,
    random: bool | None,
    recorded: Any,
    slopes: bool,
    folder: str | os.PathLike[str] | None,
    replace: bool,
    devices: Devices | None,
    name: str | None,
    progress: bool | None,
) -> Prepared:
    """The evaluation that arguments of `evaluate` ask for, once they have been checked.

    `columns_of(threat, model, images, labels, classes)` makes the attacks by title, of images in
    float32; `recorded` is `Evaluation.recorded`, and with `slopes` gradients of a few images are
    asked for.
    """
    try:
        images, labels = np.asarray(images), np.asarray(labels)
    except ValueError as error:
        first = " ".join(str(error).split())
        raise UsageError(f"images and labels: expected arrays: {first:.200}") from None
    whole("batch_size", batch_size, 1)
    if draws is not None:
        whole("draws", draws, 1)
    if jnp.issubdtype(images.dtype, jnp.floating):  # bfloat16 among them
        images = images.astype(np.float32)
    if devices is not None and not isinstance(devices, Devices):
        raise UsageError(f"devices={devices!r:.60}: expected what rain_jax.parallel.place gives")
    if key is not None and not is_key(key):
        raise UsageError(f"key={key!r:.60}: expected one as jax.random.key makes it")
    threat = _checked(threat)
    _check_images(threat, images, labels)
    asked = as_model(model, images.shape[1:], random=random)
    classes = classes_of(asked, images.shape[1:])
    _check_labels(labels, len(images), classes)
    whole_images = as_float(images)
    columns = columns_of(threat, asked, whole_images, labels, classes)
    times = draws if draws is not None else _DRAWS if asked.random else 1
    found = _look(asked, images, labels, times, slopes=slopes)
    evaluation = Evaluation(
        model=asked,
        source=from_arrays(
            images,
            labels,
            name="arrays",
            classes=classes,
            bounds=(float(threat.low), float(threat.high)),
        ),
        threat=threat,
        columns=columns,
        key=jax.random.key(0) if key is None else key,
        devices=place() if devices is None else devices,
        cascade=cascade,
        draws=times,
        eight_bit=eight_bit,
        batch_size=batch_size,
        folder=None if folder is None else Path(folder),
        name=asked.name if name is None else name,
        identity=None if folder is None else identity_of(asked, whole_images, labels),
        recorded=recorded,
        shown=progress,
    )
    if folder is not None and not replace:
        record.refuse_another(Path(folder), evaluation, "name another folder, or give replace=True")
    return Prepared(evaluation, whole_images, found)


def end(
    evaluation: Evaluation, run: EvaluationRun, content: dict[str, Any], found: Sequence[str]
) -> None:
    """Leaves the record of an evaluation in its folder, where it has one, and warns of `found`."""
    if evaluation.folder is not None and jax.process_index() == 0:
        content = content | {"warnings": list(found)}
        content["flagged"] = bool(found) or content["flagged"]
        record.write(evaluation.folder, content, run)
    run.found.image = np.array(run.found.image)  # the file that it may lie in goes now
    evaluation.finish()
    for text in found:
        warnings.warn(text, stacklevel=3)


def _columns(
    attacks: Any,
    threat: Threat,
    model: Model,
    images: np.ndarray,
    labels: np.ndarray,
    classes: int,
    *,
    kept: bool,
) -> dict[str, AttackColumn]:
    """The attacks by title."""
    if isinstance(attacks, str):
        one_of("attacks", attacks, suites.__all__)
        if model.random and attacks != "rand":
            raise UsageError(
                f"attacks={attacks!r}: expected 'rand' for a model that draws, or attacks along "
                "means, estimator=eot(draws=20)"
            )
        attacks = getattr(suites, attacks)(threat)
    elif callable(attacks):
        attacks = {"attack": attacks}
    if not isinstance(attacks, Mapping):
        raise UsageError(
            f"attacks are a {type(attacks).__name__}: expected a suite's name, an attack, or names "
            'and attacks, {"pgd": pgd(threat, steps=40)}'
        )
    for taken in ("clean", "worst case"):
        if taken in attacks:
            raise UsageError(f"attacks: expected another name than {taken!r}, which is taken")
    for title, attack in attacks.items():
        try:
            inspect.signature(attack).bind("key", "logits_fn", "image", "label")
        except TypeError as error:
            raise UsageError(
                f"attacks: {title} is {attack!r:.60}: expected an attack, (key, logits_fn, image, "
                f"label) -> image, as pgd(threat, steps=40) makes one ({error})"
            ) from None
    return {
        str(title): AttackColumn(
            attack, settings=attack_identity(attack, images.shape[1:], classes) if kept else None
        )
        for title, attack in attacks.items()
    }


def attack_identity(attack: Any, shape: tuple[int, ...], classes: int) -> str:
    """A hash of an attack: of its program on a model of as many classes."""

    def stand_in(key: Key, image: Any) -> Any:
        return jnp.sin(jnp.sum(image) * jnp.arange(1.0, classes + 1))

    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    key, label = jax.eval_shape(jax.random.key, 0), jax.ShapeDtypeStruct((), jnp.int32)
    return _hashed(jax.make_jaxpr(lambda k, x, y: attack(k, stand_in, x, y))(key, image, label))


def of_the_run(run: EvaluationRun) -> list[str]:
    """What went wrong in attacks, in words."""
    found = []
    for title, column in run.columns.items():
        given = len(column.judgement.index)
        if outside := int(np.sum(~column.judgement.allowed)):
            found.append(
                f"{title}: {outside:,} of {given:,} images are outside of the threat and count as "
                "correct: an attack for another radius, norm or range?"
            )
    return found


def _look(
    model: Model, images: np.ndarray, labels: np.ndarray, draws: int, *, slopes: bool
) -> list[str]:
    """What the logits of a few images, and their `slopes`, say against the numbers to come."""
    few, label = as_float(images[:_FEW]), labels[:_FEW].astype(np.int32)
    program = _answers_and_slopes(model.logits)
    # Two calls: a module of PyTorch that draws in secret answers all keys of one alike.
    keys = jax.random.key(0), jax.random.key(1)
    (one, slope), (other, _) = (
        jax.tree.map(np.asarray, program(model.variables, key, few, label)) for key in keys
    )
    found = []
    size = np.abs(slope).reshape(len(slope), -1)
    if not np.all(np.isfinite(one)):
        found.append(
            "the first images' logits are not finite: they count as wrong, attacked or not"
        )
    elif np.all(one >= 0) and np.allclose(np.sum(one, axis=-1), 1.0, atol=1e-3):
        found.append("the model seems to give probabilities: attacks climb logits")
    elif slopes and not np.all(np.isfinite(size)):
        found.append(
            f"gradients of {np.sum(~np.isfinite(size).all(axis=1))} of the first {len(few)} images "
            "are not finite: attacks take them for zero, and robustness to them says little"
        )
    elif slopes and np.all(size == 0):
        found.append(
            "the first images have no gradient: attacks that need one find nothing, which says "
            "nothing of robustness"
        )
    changed = not np.array_equal(one, other, equal_nan=True)
    if changed and not model.random:
        found.append(
            "the model draws and does not say so: give random=True, and attacks along means, "
            "estimator=eot(draws=20)"
        )
    elif changed and draws == 1:
        found.append("the model draws, and one draw is judged: give draws=20")
    return found


@remembered
def _answers_and_slopes(logits: Callable[..., Any]) -> Callable[..., Any]:
    """A program of a model's logits and of the gradients of the label's, image by image."""

    def lead(variables: Any, key: Key, image: Any, label: Any) -> Any:
        found = logits(variables, key, image)
        return found[label] - jnp.mean(found), found

    slopes = jax.vmap(jax.value_and_grad(lead, 2, has_aux=True), (None, None, 0, 0))

    @jax.jit
    def program(variables: Any, key: Key, images: Any, labels: Any) -> Any:
        (_, found), slope = slopes(variables, key, images, labels)
        return found, slope

    return program


def identity_of(model: Model, images: np.ndarray, labels: np.ndarray) -> list[str]:
    """Hashes of a model and of its images; its variables are hashed elsewhere.

    That is the program of its logits and of their gradient, which other rules for derivatives
    change alone, and what it answers to a few images, since weights may be out of JAX's sight.
    """

    def slope(variables: Any, key: Key, image: Any) -> Any:
        total = lambda image: jnp.sum(jnp.cos(model.logits(variables, key, image)))
        return jax.value_and_grad(total)(image)

    image = jax.ShapeDtypeStruct(images.shape[1:], jnp.float32)
    program = jax.make_jaxpr(slope)(model.variables, jax.eval_shape(jax.random.key, 0), image)
    few, label = images[:_FEW], labels[:_FEW].astype(np.int32)
    answers = np.asarray(
        _answers_and_slopes(model.logits)(model.variables, jax.random.key(0), few, label)[0]
    )
    # Coarsely, since an accelerator may add in another order next time.
    scale = np.max(np.abs(answers), initial=1e-30)
    return [_hashed(program), digest(np.round(answers / scale, 3)), digest(images, labels)]


def _hashed(program: Any) -> str:
    """A hash of a jaxpr, with the arrays in it and in the programs that it calls."""
    found = hashlib.sha256(re.sub(r"0x[0-9a-f]+", "", str(program)).encode())
    for array in _constants(program):
        plain = jax.random.key_data(array) if is_key(array) else array
        found.update(digest(np.asarray(plain)).encode())
    return found.hexdigest()[:16]


def _constants(program: Any) -> Iterator[Any]:
    yield from getattr(program, "consts", ())
    is_program = lambda value: hasattr(value, "eqns")
    for equation in program.eqns:
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(value):
                yield from _constants(value)


def classes_of(model: Model, shape: tuple[int, ...]) -> int:
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    logits = jax.eval_shape(model.logits, model.variables, jax.eval_shape(jax.random.key, 0), image)
    if getattr(logits, "ndim", None) != 1:
        raise UsageError(
            f"the model gives {getattr(logits, 'shape', type(logits).__name__)} for one image "
            f"{list(shape)}: expected logits [K]"
        )
    return int(logits.shape[0])


def _checked(threat: Any) -> Threat:
    """The threat in plain numbers; refuses a radius in other units, and one nothing can keep."""
    if not isinstance(threat, Threat):
        raise UsageError(f"threat={threat!r:.60}: expected a Threat(norm, radius)")
    if not isinstance(threat.norm, Norm):
        raise UsageError(f"threat.norm={threat.norm!r:.60}: expected rain_jax.norms.linf, l2 or l1")
    numbers: Any = {}
    for field in ("radius", "low", "high"):
        try:
            value = getattr(threat, field)
            numbers[field] = float("nope" if isinstance(value, str) else value)
        except (TypeError, ValueError):
            raise UsageError(f"threat.{field}={value!r:.60}: expected a number") from None
    threat = threat._replace(**numbers)
    most = threat.high - threat.low if threat.norm is linf else math.inf
    radius = threat.radius
    if most < radius <= 255 * most:
        raise UsageError(
            f"threat.radius={radius:g}: expected a number in [0, {most:g}]; pixels are in "
            f"[{threat.low:g}, {threat.high:g}]: did you mean {radius:g} / 255?"
        )
    if radius == math.inf:
        raise UsageError("threat.radius=inf: expected a distance that can be kept")
    within("threat.radius", radius, 0.0, most)
    return threat


def _check_images(threat: Threat, images: np.ndarray, labels: np.ndarray) -> None:
    if images.ndim != 4 or not len(images):
        raise UsageError(f"images are {list(images.shape)}: expected [N, H, W, C]")
    if images.dtype != np.uint8 and images.dtype != np.float32:
        raise UsageError(f"images are {images.dtype}: expected uint8, or floats in [0, 1]")
    floats = images.dtype != np.uint8
    if floats and (unknown := np.count_nonzero(np.isnan(images).any(axis=(1, 2, 3)))):
        raise UsageError(f"images: {unknown:,} of {len(images):,} have pixels that are no numbers")
    low, high = float(as_float(np.min(images))), float(as_float(np.max(images)))
    if not (threat.low <= low and high <= threat.high):
        other = "" if images.dtype == np.uint8 else ", or uint8"
        raise UsageError(
            f"images have pixels in [{low:.3g}, {high:.3g}]: expected "
            f"[{threat.low:g}, {threat.high:g}]{other}"
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(
            f"labels are {labels.dtype} {list(labels.shape)}: expected whole numbers "
            f"[{len(images)}]"
        )


def _check_labels(labels: np.ndarray, count: int, classes: int) -> None:
    if np.min(labels) < 0 or np.max(labels) >= classes:
        raise UsageError(
            f"labels are {np.min(labels)} to {np.max(labels)}: expected 0 to {classes - 1}, the "
            "model's classes"
        )
