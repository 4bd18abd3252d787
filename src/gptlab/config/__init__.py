"""Recipes and studies: every setting of a run in one schema, its layers, and the files they come from.

A setting has the same name, bounds and errors in a recipe file, in an arm of a study and as a flag:

    >>> recipe = load_recipe("shakespeare-char-cpu", {"optim.lr": "3e-4"})
    >>> recipe.optim.lr
    0.0003
"""

from gptlab.config.factors import factors_on as factors_on
from gptlab.config.folder import assignment as assignment
from gptlab.config.folder import run_folder as run_folder
from gptlab.config.ladder import Ladder as Ladder
from gptlab.config.ladder import parameters_of as parameters_of
from gptlab.config.ladder import size_of as size_of
from gptlab.config.layers import Setting as Setting
from gptlab.config.layers import flag_sections as flag_sections
from gptlab.config.layers import load_recipe as load_recipe
from gptlab.config.layers import parse_flag as parse_flag
from gptlab.config.layers import read_layer as read_layer
from gptlab.config.layers import shipped as shipped
from gptlab.config.plan import plan_changes as plan_changes
from gptlab.config.plan import plan_hash as plan_hash
from gptlab.config.plan import study_plan as study_plan
from gptlab.config.recipe import Recipe as Recipe
from gptlab.config.recipe import build_recipe as build_recipe
from gptlab.config.recipe import may_change as may_change
from gptlab.config.recipe import may_differ as may_differ
from gptlab.config.recipe import settings as settings
from gptlab.config.recipe import unknown_setting as unknown_setting
from gptlab.config.recipe import value_of as value_of
from gptlab.config.sections import OPTIMIZER_NAMES as OPTIMIZER_NAMES
from gptlab.config.sections import PRESETS as PRESETS
from gptlab.config.sections import REGIME_NAMES as REGIME_NAMES
from gptlab.config.sections import TASKS as TASKS
from gptlab.config.sections import Count as Count
from gptlab.config.sections import Data as Data
from gptlab.config.sections import Model as Model
from gptlab.config.sections import Optim as Optim
from gptlab.config.sections import Positive as Positive
from gptlab.config.sections import Precision as Precision
from gptlab.config.sections import Sample as Sample
from gptlab.config.sections import Schedule as Schedule
from gptlab.config.sections import Section as Section
from gptlab.config.sections import Sparsity as Sparsity
from gptlab.config.study import Clause as Clause
from gptlab.config.study import Comparison as Comparison
from gptlab.config.study import Metric as Metric
from gptlab.config.study import Question as Question
from gptlab.config.study import Study as Study
from gptlab.config.study import arms_like as arms_like
from gptlab.config.study import clauses as clauses
from gptlab.config.study import load_comparison as load_comparison
from gptlab.config.study import load_study as load_study
from gptlab.config.sweep import sweep_study as sweep_study
