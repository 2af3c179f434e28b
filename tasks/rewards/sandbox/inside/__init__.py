"""What runs in the two sandboxes: the standard library alone, and little of it, for every program pays its imports."""
