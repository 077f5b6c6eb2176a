"""What a report shows of runs, in the order in which it is read."""

from itertools import count

from experiments.pages.accuracies import against_radius, cost, headline, under_attack
from experiments.pages.exhibit import Exhibit, Section
from experiments.pages.images import confusion, galleries, spectra
from experiments.pages.load import Group, Run
from experiments.pages.studies import against_budget, learning, studies
from experiments.pages.tradeoff import tradeoff


def sections(runs: list[Run], groups: list[Group]) -> list[Section]:
    """All that these runs give rise to; sections without exhibits are left out."""
    several = len(groups) > 1
    apart = " Runs on other images or under another threat have a table of their own." * several
    bare = [run.name for run in runs if run.evaluation is None]
    without = f" No accuracies are recorded of {', '.join(bare)}." if bare else ""
    found = [
        Section("results", "Results", "Accuracy on clean images and in the worst case over all "
                f"attacks, image by image, in per cent with 95 % intervals; draws are those that a "
                "verdict is over, and 8 bit is whether images were rounded as if saved before they "
                f"were judged.{apart}{without}",
                [headline(group, place) for place, group in enumerate(groups)]),
        Section("attacks", "Under each attack", "What is left under each attack on its own; after "
                "a “+” under it and all before it, each of which was given what still stood.",
                [under_attack(group, place) for place, group in enumerate(groups)
                 if any((run.evaluation or {})["attacks"] for run in group.runs)]),
        Section("tradeoff", "Clean against robust accuracy", "What robustness cost: runs of one "
                "method are joined where their configs differ in one number, which stands beside.",
                [e for place, group in enumerate(groups) for e in tradeoff(group, place)]),
        Section("radius", "Accuracy against the radius", "From the nearest misclassified image "
                "that a minimum-norm attack found: one run of it gives the whole curve.",
                [e for place, group in enumerate(groups) for e in against_radius(group, place)]),
        Section("budget", "Accuracy against steps and draws", "Whether the attack had enough of "
                "either: a curve that still falls at its end bounds nothing.",
                [e for run in runs for e in against_budget(run)]),
        Section("studies", "Certified radii, corruptions and sweeps", "Measured by commands of "
                "their own.", [e for run in runs for e in studies(run)]),
        Section("learning", "Learning curves", "Over the steps of training: the loss, and "
                "accuracies on training batches and on held-out images.", learning(runs)),
        Section("gallery", "Perturbations", "The first test images, what was added to them, and "
                "what the model takes the result for; ✗ is wrong, and grey is no change.",
                [e for run in runs for e in galleries(run)]),
        Section("spectra", "Spectra", "At which spatial frequencies things happen.",
                [e for run in runs for e in spectra(run)]),
        Section("confusion", "Confusion under attack", "Per cent of each true class.",
                [e for run in runs for e in confusion(run)]),
        Section("cost", "Cost", "What the measuring took. Seconds include compilation, and are of "
                "the device named; they compare only where nothing else ran beside.",
                [cost(group, place) for place, group in enumerate(groups)]),
    ]  # fmt: skip
    return _told_apart([section for section in found if section.exhibits])


def _told_apart(found: list[Section]) -> list[Section]:
    """The sections with a number behind the slug of an exhibit whose name is taken."""
    taken: set[str] = set()

    def free(exhibit: Exhibit) -> Exhibit:
        number = count(2)
        slug = exhibit.slug
        while slug in taken:
            slug = f"{exhibit.slug}-{next(number)}"
        taken.add(slug)
        return exhibit._replace(slug=slug)

    return [section._replace(exhibits=list(map(free, section.exhibits))) for section in found]
