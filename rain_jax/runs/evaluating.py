"""From an experiment to the evaluation that its config asks for."""

from pathlib import Path

import jax

from rain_jax.audit import ladder
from rain_jax.config import attack_columns, build, corrupted, networks, options
from rain_jax.runs import loading, workdir
from rain_jax.config import schema as schema_
from rain_jax import data, evaluation
from rain_jax.adapters import of_network
from rain_jax.evaluation import AttackColumn, Evaluation
from rain_jax.evaluation.resume import code
from rain_jax.types import Key, Model, PyTree

# What a config is made into objects by: results depend on it as on the library.
_MAKERS = tuple(
    Path(module.__file__) for module in
    (build, corrupted, networks, ladder, attack_columns, schema_, options) if module.__file__
)  # fmt: skip
# Forms of a model whose gradients are not those of the deployed one.
_OTHERS = ladder.UNDEFENDED, "gray"


def evaluation_key(seed: int) -> Key:
    """The root of all draws in an evaluation; training draws nothing from it."""
    return jax.random.fold_in(jax.random.key(seed), 1)


def key_of(seed: int, title: str) -> Key:
    """The root of a column's draws, which do not depend on the other columns of the config."""
    return evaluation.key_of(evaluation_key(seed), title)


def evaluation_of(
    experiment: build.Experiment, variables: PyTree, name: str, folder: Path | None = None
) -> Evaluation:
    """The evaluation that the config asks for, on the test images.

    What is done is kept in `folder`, and found there when a killed evaluation is started again.
    """
    wanted = experiment.evaluation
    # A rung that is left out, or another sweep, makes no other of what is run already.
    budget = wanted.ladder and {key: wanted.ladder[key] for key in ladder.BUDGET}

    def column(title: str, look: attack_columns.Column) -> AttackColumn:
        named = {
            "attack": wanted.attacks.get(title, wanted.distances.get(title)),
            "suite": wanted.suite, "ladder": budget, "through": look.through,
        }  # fmt: skip
        through = look.through
        form = None if through is None else lambda: attacked_model(experiment, variables, through)
        words = tuple((through or "").split("+"))
        spec = wanted.attacks.get(title, {"name": title})
        return AttackColumn(
            look.attack, form, look.threat, named,
            transfer=any(word in _OTHERS or word.startswith(ladder.RUN) for word in words),
            through=words,
            fixed=through in experiment.assembly.fixed,
            kind={key: spec[key] for key in spec if key not in ("steps", "step_size")},
        )  # fmt: skip

    sections = [experiment.config[s] for s in ("network", "defence", "ensemble")]
    return Evaluation(
        model=of_network(experiment.network, variables),
        source=data.first(experiment.splits.test, wanted.images),
        threat=experiment.threat,
        columns={title: column(title, look) for title, look in experiment.columns.items()},
        key=evaluation_key(experiment.seed),
        devices=experiment.parallel.placed(),
        distances={
            title: column(title, attack_columns.Column(attack))
            for title, attack in experiment.distances.items()
        },
        cascade=wanted.suite is not None if wanted.cascade is None else wanted.cascade,
        draws=wanted.draws or 1,
        eight_bit=wanted.eight_bit,
        batch_size=wanted.batch_size,
        block=wanted.block,
        folder=folder,
        name=name,
        recorded=[wanted.checks, wanted.save_images, wanted.ladder],
        surrogates=tuple(form for form in experiment.assembly.forms if form not in _OTHERS),
        identity=[sections, experiment.parallel.mapping, code(*_MAKERS)],
    )


def attacked_model(experiment: build.Experiment, variables: PyTree, through: str) -> Model:
    """The form of the model that an attack is run on: of the same weights, or another run's."""
    if not through.startswith(ladder.RUN):
        return of_network(experiment.assembly.through(through), variables)
    folder = Path(through.removeprefix(ladder.RUN))
    other = build.experiment(workdir.read_config(folder))
    return of_network(other.network, loading.restore(other, folder)[0])
