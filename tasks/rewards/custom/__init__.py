"""Your own reward functions; `example.py` shows how.

Name the function in params.yaml as `module:function`. Import packages as you like, but of this project only files of
this folder. The stages that score run again when a file here changes.
"""
