"""Code that runs in the two sandboxed processes: it imports little, for each program pays, and nothing outside it."""
