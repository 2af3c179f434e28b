"""Your own reward functions; `example.py` shows how.

Of this project, import only files of this folder: the stages that score run again when one of them changes.
"""
