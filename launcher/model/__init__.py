"""The schema of a resolved preset: ``validate`` says everything that is wrong with one.

Defaults are no business of this package: ``jobs/base.yaml`` holds them, and a preset that leaves a setting
out after its ``extends:`` chain is incomplete.
"""

from launcher.model.rules import Problem
from launcher.model.sections import Settings
from launcher.model.validation import setting_names, validate

__all__ = ["Problem", "Settings", "setting_names", "validate"]
