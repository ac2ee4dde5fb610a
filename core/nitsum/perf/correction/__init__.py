"""A step-time model that learns from the engines' own timings.

Per (TP, phase): measured = offset + factor x modelled, by recursive least squares on relative errors with a prior at (0, 1), so that one
operating point moves both a little and several tell them apart; old data fade. A measurement far outside what the estimate expects (a
garbage collection, a paused engine) is left out; where most of the recent ones are and agree with each other, the engine has changed and
learning starts afresh. Both numbers are bounded. What one (TP, phase) does not know yet it borrows from the others of its phase, by their
confidence: else the planner would flee from every TP that it has measured to those that only the profile praises.
"""

from nitsum.perf.correction.corrected import Corrected, Learned
from nitsum.perf.correction.line import Bounds
from nitsum.perf.correction.timing import Phase, StepTiming

__all__ = ["Bounds", "Corrected", "Learned", "Phase", "StepTiming"]
