"""How large a share of a tier's requests meets TTFT and TPOT on one group at a rate, and the rate up to which the target share does.

Means do not tell: a request whose TTFT is met on average is missed half of the time. What is modelled (stock SGLang;
`tests/golden/test_capacity.py` compares it with the simulated engine over a grid):

- Prefill goes before decode. What arrived during a step is prefilled in one step next, so short prompts share a step's fixed part: the
  share of prefill steps is a fixed point. A TTFT is what is left of a step + work ahead and in the same batch (exponential tail, scaled by
  the variance of prompts and of arrivals) + the request's own prefill.
- A TPOT is a mean over the request's tokens, so it concentrates: its spread comes from the prefills that fall into its life and from how
  many others run beside it, both larger for short outputs and for bursts.
- With the governor decode never stops: a step carries at most `chunk` prefill tokens beside it, as many as the TPOT allows, so a prompt
  delays the others by less than its own time and takes longer itself.

Lengths are lognormal by mean and coefficient of variation, read at a few quantiles. TTFT and TPOT count as independent.
"""

from nitsum.attainment.goal import Goal, Point
from nitsum.attainment.group import BUSY_MAX, EVEN, Group
from nitsum.attainment.lengths import Lengths, running_length
from nitsum.attainment.met import MIXED_TAIL, SHARED
from nitsum.attainment.safe_rate import MARGIN, Safe, safe

__all__ = [
    "BUSY_MAX",
    "EVEN",
    "MARGIN",
    "MIXED_TAIL",
    "SHARED",
    "Goal",
    "Group",
    "Lengths",
    "Point",
    "Safe",
    "running_length",
    "safe",
]
