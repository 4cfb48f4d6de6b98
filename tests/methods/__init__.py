"""A package, so that `methods.conftest` and the `conftest` above are two modules."""
