"""Serving of registered policies by OpenAI's protocol, and people's feedback on the answers.

The front in `app` checks, routes and records; an `engine` generates with one version; `journal` keeps what MLflow shall
record. MLflow's traces are the store of answers and feedback; `feedback` makes rows of them for the pipeline.
"""
