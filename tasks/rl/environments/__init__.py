"""Multi-turn environments: `base` has the interface, this module the ones that params.yaml can name.

An environment takes and returns strings and a number; it has no tensors and no model. Equal rows and equal turns give
equal answers. Its docstring says how it can be gamed.
"""
