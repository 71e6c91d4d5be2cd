"""What the figures say, in sentences that comparisons of the figures choose.

Nothing here knows which method should win. FGGM is read against the base model first, then
against each other method that ran. A difference is called clear when it is more than two standard
errors of the test examples, which both methods answer in pairs.
"""

from __future__ import annotations

from learning import Course, Run
from measures import MEASURE, MEASURES, Estimate, score_matrix


def read_results(runs: list[Run], course: Course) -> str:
    """The reading as plain text: one paragraph on FGGM, one a rival, one of caution."""
    fggm = next((run for run in runs if run.method == "fggm"), runs[0])
    rivals = [run for run in runs if run is not fggm]
    paragraphs = [_against_the_base(fggm, course)]
    paragraphs += [_against_a_rival(fggm, rival) for rival in rivals]
    if len(rivals) > 1:
        paragraphs.append(_how_much_the_rival_matters(fggm, rivals))
    paragraphs.append(_caution(course))
    return "\n\n".join(paragraphs)


def _against_the_base(run: Run, course: Course) -> str:
    matrix = score_matrix(run)
    parts = []
    for position, task in enumerate(course.tasks):
        before, learned, final = matrix[0, position], *matrix[[position + 1, -1], position]
        verb = "learned" if learned > before else "did not improve on"
        later = "" if position == len(course.tasks) - 1 else f", {final:.2f} at the end"
        parts.append(f"{verb} {task.name} ({before:.2f} → {learned:.2f}{later})")
    forgetting, general = (MEASURE[name].of(run) for name in ("forgetting_score", "general"))
    kept = _choose(
        forgetting,
        positive="It answers the earlier tasks clearly better at the end than right after them",
        negative="It clearly forgot some of the earlier tasks",
        unclear="Its scores on the earlier tasks show no clear change since",
    )
    text = _choose(
        general,
        positive="the general text became clearly harder for it",
        negative="the general text became clearly easier for it",
        unclear="the general text shows no clear change at the end",
    )
    worst = MEASURE["worst_general"].show(run)
    return (
        f"{run.label} {', '.join(parts)}. {kept} (BWT {_with_noise(forgetting)}), and {text} "
        f"({_with_noise(general)} nats; {worst} at its worst point)."
    )


def _against_a_rival(run: Run, rival: Run) -> str:
    learned, final, forgot, general = (
        MEASURE[name].advantage(run, rival) for name in ("learned", "final", "forgetting_score", "general")
    )
    more, level = ("more", "less"), "about as much"
    return (
        f"{run.label} (rate {run.learning_rate:g}) beside {rival.label} "
        f"(rate {rival.learning_rate:g}), differences in {run.label}'s favour counted as +: "
        f"it learned {_compare(learned, *more, level)}, "
        f"forgot {_compare(forgot, *reversed(more), level)}, "
        f"ended {_compare(final, 'higher', 'lower', 'level within the noise')} on the tasks "
        f"and harmed the general text {_compare(general, *reversed(more), level)}. "
        f"{_verdict(run, rival)} {_cost(run, rival)}"
    )


def _compare(advantage: Estimate, better: str, worse: str, level: str) -> str:
    word = _choose(advantage, positive=better, negative=worse, unclear=level)
    return f"{word} ({_with_noise(advantage)})"


def _choose(estimate: Estimate, *, positive: str, negative: str, unclear: str) -> str:
    if not estimate.is_clear:
        return unclear
    return positive if estimate.value > 0 else negative


def _with_noise(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f} ± {2 * estimate.standard_error:.3f}"


def _verdict(run: Run, rival: Run) -> str:
    advantages = {measure.title: measure.advantage(run, rival) for measure in MEASURES}
    clear = {title: advantage for title, advantage in advantages.items() if advantage.is_clear}
    better = [title for title, advantage in clear.items() if advantage.value > 0]
    worse = [title for title, advantage in clear.items() if advantage.value < 0]
    of_all = f"of {len(MEASURES)} figures"
    if better and worse:
        return (
            f"The outcome is mixed: {run.label} did clearly better in {len(better)} {of_all} "
            f"({'; '.join(better)}) and clearly worse in {len(worse)} ({'; '.join(worse)})."
        )
    if better:
        return (
            f"{run.label} did better here: clearly so in {len(better)} {of_all} "
            f"({'; '.join(better)}), clearly worse in none."
        )
    if worse:
        return (
            f"{run.label} did worse here: clearly so in {len(worse)} {of_all} "
            f"({'; '.join(worse)}), clearly better in none."
        )
    return "No figure tells the two apart clearly."


def _cost(run: Run, rival: Run) -> str:
    ours, theirs = (
        sum(each.training_seconds) + sum(selection.seconds for selection in each.selections) for each in (run, rival)
    )
    disk = max(run.file_bytes) / max(rival.file_bytes)
    memory = run.peak_memory_bytes / rival.peak_memory_bytes
    return (
        f"It took {ours / theirs:.2f} × the time (selection included), {memory:.2f} × the peak "
        f"memory and {disk:.2f} × the disk space for a task."
    )


def _how_much_the_rival_matters(run: Run, rivals: list[Run]) -> str:
    leads = [MEASURE["final"].advantage(run, rival) for rival in rivals]
    shown = ", ".join(
        f"{_with_noise(lead)} at rate {rival.learning_rate:g}" for lead, rival in zip(leads, rivals, strict=True)
    )
    verdicts = {_choose(lead, positive="ahead", negative="behind", unclear="") for lead in leads}
    if {"ahead", "behind"} <= verdicts:
        sentence = "changes its sign with plain's learning rate: whoever picks that rate picks the winner"
    elif len(verdicts) > 1:
        sentence = f"is clear ({max(verdicts)}) at one rate of plain and not at another"
    elif verdicts == {""}:
        sentence = "is clear in neither direction at any rate of plain"
    else:
        sentence = f"is the same at every rate of plain: clearly {verdicts.pop()}"
    return f"{run.label}'s lead in the final score {sentence} ({shown})."


def _caution(course: Course) -> str:
    size = min(len(task.test) for task in course.tasks)
    return (
        f"This is one run with one seed ({course.seed}) of one model on {len(course.tasks)} small "
        f"tasks with {size} test examples each (one example is {1 / size:.2f} of a score). It is "
        "a hint, not a result: ± is two standard errors of these test examples and nothing more; "
        "another seed or rate may turn the order around."
    )
