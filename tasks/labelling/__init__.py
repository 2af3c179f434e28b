"""Labels of people and language models: the page, its database, export and import.

Labels are only added, never changed. The web page and the commands write through `store`.
`formats` and `records` speak Argilla's and Label Studio's formats. The page's commands are in `flows/cli/labels.py`.
"""
