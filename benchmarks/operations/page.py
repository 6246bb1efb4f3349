"""The page: a table for each setting, and one over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean, stdev

from benchmarks.operations.run import Outcome
from benchmarks.operations.task import Section, Setting

CLEAR = 2.0  # standard errors from which on a difference is called one


BY_HAND = "<!-- by hand from here on -->"  # a run leaves alone what stands behind it


def rewritten(old: str, new: str) -> str:
    """The new page, with the part of the old one that was written by hand."""
    _, mark, rest = old.partition(BY_HAND)
    return f"{new}\n{mark}{rest}" if mark else new


def page(sections: Mapping[str, Section], found: Sequence[Outcome], command: str) -> str:
    """Markdown of everything that was measured."""
    parts = [_HEAD.format(command=command)]
    for name, section in sections.items():
        own = [outcome for outcome in found if outcome.section == name]
        if own:
            parts.append(_section(section, own))
    return "\n".join(parts)


_HEAD = """# Operations: what their choices bring

Made by `{command}`.

Each arm starts from the same half-trained model and optimizer of its seed and trains on the same
batches with the rate annealed to zero. The loss is the cross-entropy on images that neither
training nor the choice has seen: right after the change (*at once*) and after the further training,
as mean and standard deviation over the seeds. *Against* is the mean over seeds of the paired
difference to the first arm, with its standard error: negative is better, and what is below two
standard errors is noise. *Better in* counts seeds.
"""


def _section(section: Section, found: Sequence[Outcome]) -> str:
    parts = [f"## {section.title}\n", section.about.strip() + "\n"]
    settings = [s for s in section.settings if any(o.setting == s.name for o in found)]
    if len(settings) > 1:
        parts.append(_summary(settings, found))
    parts += [_setting(s, [o for o in found if o.setting == s.name]) for s in settings]
    return "\n".join(parts)


def _summary(settings: Sequence[Setting], found: Sequence[Outcome]) -> str:
    first = next(iter(settings[0].arms))
    lines = [
        f"Over all settings, against *{first}*:\n",
        "| arm | mean difference | settings clearly better | even | clearly worse |",
        "|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(arm for setting in settings for arm in setting.arms):
        gaps = [gap for s in settings if (gap := paired(s, arm, found))]
        if arm == first or not gaps:
            continue
        better = sum(mean < -CLEAR * error for mean, error in gaps)
        worse = sum(mean > CLEAR * error for mean, error in gaps)
        mean = fmean(mean for mean, _ in gaps)
        lines.append(f"| {arm} | {mean:+.4f} | {better} | {len(gaps) - better - worse} | {worse} |")
    return "\n".join(lines) + "\n"


def paired(setting: Setting, arm: str, found: Sequence[Outcome]) -> tuple[float, float] | None:
    """Mean and standard error of an arm's loss less the first arm's, over the seeds of both."""
    losses = {(o.arm, o.seed): o.loss for o in found if o.setting == setting.name}
    first = next(iter(setting.arms))
    gaps = [
        loss - losses[first, seed]
        for (own, seed), loss in losses.items()
        if own == arm and (first, seed) in losses
    ]
    if len(gaps) < 2:
        return None
    return fmean(gaps), stdev(gaps) / sqrt(len(gaps))


def _setting(setting: Setting, found: Sequence[Outcome]) -> str:
    lines = [
        f"### {setting.name}\n",
        "| arm | parameters | loss at once | loss | against | better in | accuracy, % |",
        "|---|---|---|---|---|---|---|",
    ]
    first = next(iter(setting.arms))
    base = {o.seed: o.loss for o in found if o.arm == first}
    for arm in setting.arms:
        own = [o for o in found if o.arm == arm]
        if not own:
            continue
        gap = paired(setting, arm, found) if arm != first else None
        wins = sum(o.loss < base[o.seed] for o in own if o.seed in base)
        against = f"{gap[0]:+.4f} ± {gap[1]:.4f} | {wins}/{len(own)}" if gap else " |"
        accuracy = _spread([o.accuracy for o in own], 2)
        size = fmean(o.parameters for o in own)
        at_once = fmean(o.at_once for o in own)
        lines.append(
            f"| {arm} | {size:,.0f} | {at_once:.4f} | {_spread([o.loss for o in own], 4)} "
            f"| {against} | {accuracy} |"
        )
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float], digits: int) -> str:
    spread = stdev(values) if len(values) > 1 else 0.0
    return f"{fmean(values):.{digits}f} ± {spread:.{digits}f}"
