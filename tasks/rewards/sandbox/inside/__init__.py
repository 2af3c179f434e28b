"""Code that runs inside the sandboxes: few imports, from the standard library alone, as each start pays for them."""
