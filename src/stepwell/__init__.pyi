"""The public names: type checkers read them here, and so does `__init__.py`, which imports each one when it is used."""

from stepwell import check as check
from stepwell import methods as methods
from stepwell.api import compare as compare
from stepwell.api import sample as sample
from stepwell.api import solvers as solvers
from stepwell.api import train as train
from stepwell.columns import Columns as Columns
from stepwell.data.prompts import load_prompts as load_prompts
from stepwell.errors import StepwellError as StepwellError
from stepwell.meter import Budget as Budget
from stepwell.meter import Meter as Meter
from stepwell.process import exact as exact
from stepwell.process.base import Process as Process
from stepwell.process.conversation.build import conversation as conversation
from stepwell.process.conversation.environment import environment_return as environment_return
from stepwell.process.flow.build import flow as flow
from stepwell.process.language.build import language as language
from stepwell.process.models import Models as Models
from stepwell.process.pipeline.build import pipeline as pipeline
from stepwell.recipe.recipe import Recipe as Recipe
from stepwell.recipe.registry import method as method
from stepwell.reward.mixing import Rewards as Rewards
from stepwell.rng import Replay as Replay
from stepwell.rng import Rng as Rng
from stepwell.sampling.request import Prompt as Prompt
from stepwell.sampling.request import Request as Request
from stepwell.sampling.rollout import rollout as rollout
from stepwell.tasks.registry import Task as Task
from stepwell.tasks.registry import task as task

__version__: str
