"""The sections of params.yaml as pydantic models, and the functions that read and change the file.

Every field has bounds and a sentence; unknown keys are errors. A new key needs a value in params.yaml as well.
Nothing here imports torch or reads data.
"""
