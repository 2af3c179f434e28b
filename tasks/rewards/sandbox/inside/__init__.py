"""Code that runs in the two sandboxed processes.

It imports the standard library only, and little of it, because every program pays for its imports.
Nothing here may import from this project outside this folder.
"""
