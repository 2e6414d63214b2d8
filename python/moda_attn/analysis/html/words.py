"""What a page says about its numbers: how to read each, and what it does not mean."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..plot.profile import title_of

if TYPE_CHECKING:
    from ..compare import RowComparison
    from ..report import RowBalance

#: Below the heading of a page.
LEAD = (
    "Where a model’s queries look: at keys of their own modality (self), at those of other modalities (cross), or at"
    " the pseudo-scores of MODA’s mask. Chance is what even attention to every key that a query sees would give. The"
    " measures are those of arXiv 2507.04635, equation 4 and figures 2 and 4."
)

#: A sentence beside every number.
OF_MEASURE = {
    "disparity": (
        "Mean over the layers of |self − cross|. At 0 % these queries look at their own modality as much as at the"
        " others, at 100 % at one side only. Chance is not 0 %: a prompt with many more keys of one kind starts far"
        " from it."
    ),
    "relative_disparity": (
        "The same as a share of the mass that lies on keys. Pseudo-scores take from both sides and lower the plain"
        " disparity by themselves; this one does not move then."
    ),
    "pseudo_share": (
        "Mass on the pseudo-scores, which carry no value; 0 % in an unpatched model. Read both disparities with it."
    ),
    "lift": (
        "The attention on other modalities over what chance would put there: below 1 they get less than their number of"
        " keys would bring them, above 1 more. Pseudo-scores are left out on both sides."
    ),
    "decay": (
        "γ, the factor by which the mass on other modalities changes from one layer to the next: 1 is level, less is"
        " the decay with depth that the paper describes."
    ),
    "error": (
        "The paper's equation 4, a product over the layers. It shrinks with every layer: compare models of the same"
        " depth only, and expect numbers near 0."
    ),
}

TRAPS = (
    (
        "Hold it against chance.",
        "It follows from the prompt and the mask alone. A large disparity at chance is the make-up of the prompt; what"
        " differs from it is the model’s doing.",
    ),
    ("Look at all three together.", "A patch that lowers only the plain disparity has balanced nothing."),
    (
        "A causal mask has a say.",
        "A picture that comes first sees almost no text; its queries show the order of the prompt, not a disorder of"
        " the model. Compare a model with itself on the same inputs, not across prompts.",
    ),
    ("Mass is not use.", "The value that a key carries may be small, or be cancelled later."),
    (
        "Intervals are over the inputs.",
        "They say how far another sample of such inputs might differ, not how another training run would. Rows of one"
        " input are not independent and are not counted as if they were.",
    ),
)

PROFILE = (
    "Layer by layer, the share of their attention that these queries give to keys of their own modality (blue, solid),"
    " to the other modalities (orange, dashed), and to the pseudo-scores (grey, dotted; only where there are some)."
    " Thin lines of the same colours are chance."
)
BANDS = "Bands are 95 % intervals over the inputs."
UNMEASURED = (
    "They are in no mean. Cross-attention to an image is all on the image by construction, whatever the model prefers."
)
HEADS = (
    "Every cell is one head: blue looks at its own modality, orange at the others, pale at both alike or at the"
    " pseudo-scores; the line on the colour scale is chance. Means over heads hide heads that do nothing else than"
    " cross over."
)
IMAGE = (
    "The attention that each visual token receives from the text queries, over what it would be if all tokens of the"
    " image received the same; below each map how much of all attention lies on the image. Attention is no explanation:"
    " a bright patch is looked at, which need not mean that it is used."
)
GENERATION = (
    "Every bar is a generated token, and shows where attention went when it was chosen, as a mean over layers and"
    " heads. The line across it is chance, the image’s share if attention were even: it falls as the answer grows,"
    " because what was generated is there to be looked at too. An answer whose words about the picture are chosen"
    " without looking at it deserves mistrust."
)
KEYS = (
    "The keys of text and of vision, layer by layer: how alike the bases are that alignment works with (1 is alike),"
    " how far the means of the unit keys lie apart, and how far their distributions do; as the model makes them, and"
    " after alignment, which is meant to close this gap. Lines are means over inputs and key heads, thin ones the least"
    " and the largest head."
)


def summary(row: RowBalance) -> str:
    """Where these queries look, held against chance."""
    subject, chance = f"{title_of(row)}:", row.chance.cross_mass
    if math.isnan(row.lift):
        return f"{subject} they see no key of another modality."
    cross, even = (sum(masses) / len(masses) for masses in (row.cross_mass, chance))
    low, high = row.intervals["lift"]
    interval = "" if math.isnan(low) else f" ({low:.2f} to {high:.2f} over the inputs)"
    return (
        f"{subject} {_share(cross)} of their attention goes to other modalities, {_share(even)} at chance."
        f" Pseudo-scores left out, that is {row.lift:.2f} times chance{interval}."
    )


def verdict(row: RowComparison, names: tuple[str, str]) -> str:
    """What changed for these queries, in a sentence or two that claim no more than the intervals do."""
    change = row.changes["relative_disparity"]
    subject = f"{title_of(row.before)}:"
    if math.isnan(change.low):
        sentence = (
            f"{subject} relative disparity {_share(row.before.relative_disparity)} with {names[0]} and"
            f" {_share(row.after.relative_disparity)} with {names[1]}; one input says nothing about others."
        )
    elif change.low <= 0 <= change.high:
        sentence = f"{subject} these inputs show no difference in relative disparity between {names[0]} and {names[1]}."
    else:
        word = "more" if change.value < 0 else "less"
        by = f"by {_points(change.value)} of relative disparity"
        sentence = f"{subject} {names[1]} looks {word} evenly than {names[0]} {by}."
    plain = row.changes["disparity"]
    if plain.high < 0 and change.high >= 0:
        sentence += " The plain disparity fell only because the pseudo-scores take mass from both sides."
    if not math.isnan(row.before.lift):
        sentence += (
            f" Other modalities get {row.before.lift:.2f} times what chance would give them with {names[0]},"
            f" {row.after.lift:.2f} times with {names[1]}."
        )
    return sentence


def _share(value: float) -> str:
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def _points(value: float) -> str:
    return f"{100 * abs(value):.1f} points"
