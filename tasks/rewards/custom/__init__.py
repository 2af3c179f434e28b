"""Your own rewards: put a module here, and name a function of it in params.yaml; example.py shows how."""
