"""A method of one's own, in one's own file: `--plugin examples/my_method.py --method above-average`."""

from stepwell import Recipe, method
from stepwell.credit.group import GroupCredit
from stepwell.objective.policy import Policy
from stepwell.objective.reduction import Reduction
from stepwell.objective.regularise import Divergence, Regulariser
from stepwell.objective.surrogate import Clip


@method("above-average", title="GRPO that leans on its reference", differs="dr-grpo with a divergence penalty")
def above_average(clip: float = 0.2, kl: float = 0.02) -> Recipe:
    policy = Policy(GroupCredit("mean"), surrogate=Clip(clip, clip), reduction=Reduction("row"))
    return Recipe(policy + Regulariser(Divergence("k2"), kl))
