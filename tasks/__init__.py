"""Pipeline stages, one module each, and the packages that they share.

A stage reads files, calls library functions and writes files; it is runnable alone (`python -m tasks.sft`). Stages
never import each other. The packages have one order: labelling, evals, rl, rewards, models and data, config, core.
"""

from tasks.core.determinism import fix_instructions

fix_instructions()  # before any library computes: the one thing that happens at import
