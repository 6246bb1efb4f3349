"""Why new units cannot stay silent in a width, in words."""

from __future__ import annotations

from neuroexapt.couple import Mixer, Width
from neuroexapt.errors import EditError


def moved_on_the_way(width: Width, mixer: Mixer) -> EditError:
    """New entries reach a norm as something else than what they were made."""
    centre = "the mean of their siblings" if mixer.kind == "layer_norm" else "zero"
    return EditError(
        width.name,
        seen=f"a '{mixer.kind}' over this width behind an operator that new entries do not pass "
        f"as {centre} ({mixer.place})",
        needed="a width whose new entries leave the norm's statistics alone",
        next_step="widen another width; Narrow works on this one",
    )


def literal_epsilon(width: Width, mixer: Mixer) -> EditError:
    """A norm's epsilon cannot be set."""
    return EditError(
        width.name,
        seen=f"a norm over this width whose epsilon is a number in the code ({mixer.place})",
        needed="an epsilon held by an attribute of the module (self.eps), to shrink with the norm",
        next_step="keep it in the module, or widen another width; Narrow works on this one",
    )


def no_scale(width: Width, mixer: Mixer) -> EditError:
    """Nothing makes up for a norm's larger divisor."""
    return EditError(
        width.name,
        seen=f"a norm without a scale of its own over this width ({mixer.place})",
        needed="a scale that can make up for the norm's larger divisor",
        next_step="give the norm a weight, or widen another width; Narrow works on this one",
    )


def dead_end(width: Width) -> EditError:
    """New units would be zero on both sides."""
    return EditError(
        width.name,
        seen="one weight that both makes and reads the units (tied)",
        needed="a maker that is not tied, or new units would never get gradient",
        next_step="untie the weights, or widen another width; Narrow works on this one",
    )


def tied_to_a_mean(width: Width) -> EditError:
    """New units are not zero, and neither is what reads them."""
    return EditError(
        width.name,
        seen="one weight that makes the units and reads them without a norm before it (tied)",
        needed="a reader whose new columns can be silent: beside a layer norm, new units are the "
        "mean of the others, not zero",
        next_step="untie the weights, or widen another width; Narrow works on this one",
    )
