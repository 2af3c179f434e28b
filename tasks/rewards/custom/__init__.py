"""Your own reward functions; `example.py` shows how.

Import packages as you like, but of this project only files of this folder. The stages that score run again when a file
here changes.
"""
