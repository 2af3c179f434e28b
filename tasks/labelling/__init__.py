"""Human and AI preference labels: the labelling page, its database, agreement statistics, import and export.

`store.LabelStore` is the one way into the database, for the page and for the commands alike. A new file format is a
pair of functions in `formats/`; a change of the tables needs a new file in `migrations/`.
"""
