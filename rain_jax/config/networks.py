"""From the sections `network`, `defence`, `start` and `ensemble` to networks, and to the weights
that they begin with.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rain_jax import defences, evaluation, models
from rain_jax.adapters import of_network
from rain_jax.audit.ladder import UNDEFENDED, Forms
from rain_jax.checks import UsageError, nearest, one_of
from rain_jax.config import options
from rain_jax.config.schema import make
from rain_jax.defences.network import ensemble, in_front, parts_of
from rain_jax.defences.vote import mean_logits, smallest_margins, vote_scores
from rain_jax.types import Array, Defence, Key, Network, Variables

_VOTES = {"vote": vote_scores, "mean": mean_logits, "margins": smallest_margins}


class Assembly(NamedTuple):
    """The networks of a config: what is deployed, what its members are, what attackers climb."""

    members: tuple[Network, ...]  # of an ensemble; else one
    together: bool  # whether they are an ensemble
    through: Callable[[str | None], Network]
    forms: tuple[str, ...]  # what `through` takes, of the defence
    votes: tuple[str, ...]  # and of the members of an ensemble
    fixed: frozenset[str]  # the forms that draw nothing, also of a random model

    @property
    def network(self) -> Network:
        return self.through(None)

    @property
    def attackable(self) -> Forms:
        """What the ladder of adaptive attacks is made from."""
        return Forms(self.network.random, self.forms, self.votes, self.fixed)


def assembly(spec: dict[str, Any], classes: int) -> Assembly:
    """Builds what the sections describe."""
    classifier: Network = make("config.network", models, spec["network"], classes=classes)
    start: options.Start = spec["start"]
    group: options.Ensemble | None = spec["ensemble"]
    if spec["defence"] is None:
        for where, given in ("ensemble", group), ("start.defence", start.defence):
            if given is not None:
                raise UsageError(f"config.{where}: expected config.defence beside it")
        return Assembly(
            (classifier,), False, lambda words: _plain(classifier, words), (), (), frozenset()
        )

    fronts = [make("config.defence", defences, one) for one in _sections(spec["defence"], group)]

    def member(front: Defence, words: str | None) -> Network:
        if words == UNDEFENDED:
            return without(classifier)
        return in_front(front, classifier, trained=start.trained, drift=start.drift, through=words)

    def through(words: str | None) -> Network:
        form, vote = _parsed(words, tuple(fronts[0].surrogates), group)
        networks = [member(front, form) for front in fronts]
        if group is None:
            return networks[0]
        if vote.startswith("member:"):
            number = int(vote.removeprefix("member:"))
            return ensemble(networks, lambda logits: logits[number])
        return ensemble(networks, _VOTES[vote])

    return Assembly(
        tuple(member(front, None) for front in fronts),
        group is not None,
        through,
        (UNDEFENDED, *fronts[0].surrogates),
        _votes(group),
        fronts[0].fixed,
    )


def without(classifier: Network) -> Network:
    """The classifier alone, as a function of the variables of the defended one."""

    def apply(
        variables: Variables, images: Array, train: bool = False, axis_name: Any = None,
        keys: Array | None = None,
    ) -> Any:  # fmt: skip
        own = parts_of(variables)["classifier"]
        return classifier.apply(own, images, train, axis_name, keys)[0], variables["frozen"]

    return Network(classifier.init, apply, classifier.classes)


def _plain(classifier: Network, words: str | None) -> Network:
    if words is not None:
        raise UsageError(f"through={words!r}: expected None: there is no defence")
    return classifier


def _sections(defence: dict[str, Any], group: options.Ensemble | None) -> list[dict[str, Any]]:
    """The defence's section of every member."""
    if group is None:
        return [defence]
    key = group.key.removeprefix("defence.")
    if key == group.key or key not in defence:
        keys = [f"defence.{name}" for name in defence if name != "name"]
        raise UsageError(
            f"config.ensemble.key={group.key!r}: expected one of {', '.join(keys)}"
            f"{nearest(group.key, keys)}"
        )
    # Values are numbers of any kind; what was whole stays whole, as a quality of JPEG must.
    whole = isinstance(defence[key], int) and all(value == int(value) for value in group.values)
    return [{**defence, key: int(value) if whole else value} for value in group.values]


def _parsed(
    words: str | None, surrogates: tuple[str, ...], group: options.Ensemble | None
) -> tuple[str | None, str]:
    """(form of the defence, how members are combined) that `words` name."""
    form: str | None = None
    vote: str = "vote" if group is None else group.combine
    attacked = _votes(group)
    for word in [] if words is None else words.split("+"):
        one_of("through", word, (UNDEFENDED, *surrogates, *attacked))
        if word in attacked:
            vote = word
        else:
            form = word
            # Who goes through a surrogate climbs something smooth, unless told otherwise.
            vote = "mean" if vote == "vote" else vote
    return form, vote


def _votes(group: options.Ensemble | None) -> tuple[str, ...]:
    """The ways to attack an ensemble."""
    if group is None:
        return ()
    return ("mean", "margins", *(f"member:{m}" for m in range(len(group.values))))


def followed(network: Network, variables: Variables, shape: tuple[int, ...]) -> Variables:
    """`variables` with the defence's fixed collections, such as tables, as the network makes them.

    A checkpoint holds those that it was trained with; traced settings make them data here.
    `network` is that of an `Assembly`, `shape` that of its images [H, W, C].
    """

    # As a program, of which the classifier's weights are no part, and as a run begins.
    def defence(key: Key, images: Array) -> Variables:
        return network.init(key, images)["frozen"]["defence"]

    made = jax.jit(defence)(jax.random.key(0), jnp.zeros((1, *shape)))
    fixed = {name: held for name, held in made.items() if name != "params"}
    frozen = variables["frozen"]
    return {**variables, "frozen": {**frozen, "defence": {**frozen["defence"], **fixed}}}


def logits_fn_of(network: Network) -> evaluation.LogitsFnOf:
    """The network in evaluation mode as a function of its variables, one image at a time."""
    return evaluation.logits_fn_of(of_network(network, {}))
